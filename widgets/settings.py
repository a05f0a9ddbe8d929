"""What the Studio is asked to train: validated settings, and the controls made from a method's typed signature.

Settings come from places that are not to be trusted - a browser, a saved state, a colleague's JSON - so every field is
checked here, before anything is built from it.
"""

from __future__ import annotations

import json
import keyword
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from qlab.data import DATA
from qlab.errors import InputError, QlabError
from qlab.methods.catalog import CATALOG
from qlab.models import MODELS

if TYPE_CHECKING:
    from qlab.methods import Hyperparameter

__all__ = ["Settings", "control", "parse_json", "parse_value"]

MAX_STATE = 100_000  # characters of a saved state; a real one has a few hundred
MAX_TEXT = 1000  # characters of one text field
MAX_HYPER = 100  # hyperparameters of one method

# The Studio shows pictures and points, so neither texts nor the nets that take them.
_SHELVES: dict[str, tuple[str, ...]] = {
    "data": tuple(d.name for d in DATA.values() if d.kind != "text"),
    "net": tuple(m.name for m in MODELS.values() if m.takes == "floats"),
    "method": tuple(CATALOG),
}

_LIMITS = {
    "epochs": (1, 100_000),
    "batch_size": (1, 65_536),
    "seed": (0, 2**53 - 1),
}  # 2^53: what a browser holds exactly


@dataclass(frozen=True)
class Settings:
    """One run as the controls describe it.

    Args:
        data, net, method: names on the lab's shelves.
        hyper: hyperparameters that differ from the method's defaults; raw control values, parsed when the run is built.
        epochs, batch_size, seed: as in `qlab.fit` and `qlab.data.load`.
        folder: the tree of class folders, for `image_folder` only.
        name: the Python variable that a run is sent to.
        guess: the predicted deployed accuracy, in percent.
    """

    data: str = "digits"
    net: str = "mlp"
    method: str = "adaste"
    hyper: dict[str, Any] = field(default_factory=dict)
    epochs: int = 20
    batch_size: int = 128
    seed: int = 0
    folder: str = ""
    name: str = "run"
    guess: float = 80.0

    def __post_init__(self) -> None:
        for key, shelf in _SHELVES.items():
            value = getattr(self, key)
            if not isinstance(value, str) or value not in shelf:
                raise InputError(f"{key} is {_short(value)}; expected one of {', '.join(shelf)}.")
        for key, (low, high) in _LIMITS.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(
                    f"{key.replace('_', ' ')} is {_short(value)}; expected a whole number from {low} to {high}."
                )
        if isinstance(self.guess, bool) or not isinstance(self.guess, (int, float)) or not 0 <= self.guess <= 100:
            raise InputError(f"the prediction is {_short(self.guess)}; expected percent from 0 to 100.")
        for key in ("folder", "name"):
            value = getattr(self, key)
            if not isinstance(value, str) or len(value) > MAX_TEXT:
                raise InputError(f"{key} is {_short(value)}; expected a text of at most {MAX_TEXT} characters.")
        check_variable(self.name)
        self._check_hyper()

    def _check_hyper(self) -> None:
        if not isinstance(self.hyper, dict) or len(self.hyper) > MAX_HYPER:
            raise InputError(f"hyper is {_short(self.hyper)}; expected at most {MAX_HYPER} named values.")
        for name, value in self.hyper.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise InputError(f"hyperparameter name {_short(name)} is not a Python name.")
            plain = value is None or isinstance(value, (bool, int, float, str))
            if not plain or (isinstance(value, str) and len(value) > MAX_TEXT):
                raise InputError(f"hyperparameter {name} is {_short(value)}; expected a number, a text or true/false.")

    @classmethod
    def from_json(cls, value: object) -> Settings:
        """Return settings from a dictionary of primitives; fields left out keep their defaults.

        Raises:
            InputError: anything but such a dictionary; names the field, what it held and what was expected.
        """
        if not isinstance(value, Mapping):
            raise InputError(f"settings are {_short(value)}; expected a dictionary like Studio().state()['settings'].")
        known = {f.name for f in fields(cls)}
        for key in value:
            if key not in known:
                raise InputError(f"settings have an unknown field {_short(key)}; known: {', '.join(sorted(known))}.")
        try:
            return cls(**value)
        except QlabError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"settings cannot be read: {error}") from error

    def json(self) -> dict[str, Any]:
        """Return the settings as a dictionary of primitives."""
        return asdict(self)


def check_variable(name: str) -> None:
    """Raise InputError unless `name` can be a variable in a notebook."""
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise InputError(f"{_short(name)} cannot be a variable; expected a Python name such as run or run_1.")


def control(parameter: Hyperparameter) -> dict[str, Any]:
    """Describe the control of one hyperparameter, as a dictionary of primitives for the front end.

    A bool gives a checkbox, a choice a menu, a number a field that takes 3e-4, a list a text with commas; where None is
    allowed, an empty field means None.
    """
    default = parameter.default
    return {
        "name": parameter.name,
        "kind": parameter.kind,
        "choices": list(parameter.choices),
        "optional": parameter.optional,
        "default": ", ".join(map(str, default)) if isinstance(default, (list, tuple)) else default,
        "help": parameter.help,
    }


def parse_value(parameter: Hyperparameter, raw: Any) -> Any:
    """Return the value that a control's raw content stands for.

    Raises:
        InputError: content that is not of the parameter's type.
    """
    value = raw.strip() if isinstance(raw, str) else raw
    if parameter.optional and value in (None, ""):
        return None
    try:
        return _CONVERT[parameter.kind](value, parameter.choices)
    except (ValueError, TypeError, OverflowError):
        expected = _EXPECTED[parameter.kind].format(choices=", ".join(map(str, parameter.choices)))
        raise InputError(f"{parameter.name} is {_short(raw)}; expected {expected}.") from None


def _to_bool(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _to_int(value: Any, _: Any) -> int:
    if isinstance(value, bool) or not float(value).is_integer():
        raise ValueError
    return int(float(value)) if isinstance(value, str) else int(value)


def _to_float(value: Any, _: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _to_text(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _to_list(value: Any, _: Any) -> list[str]:
    return [part.strip() for part in _to_text(value, _).split(",") if part.strip()]


def _to_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:  # a menu gives back text, whatever the choice was
        if str(value) == str(choice):
            return choice
    raise ValueError


_CONVERT = {
    "bool": _to_bool,
    "int": _to_int,
    "float": _to_float,
    "str": _to_text,
    "list": _to_list,
    "choice": _to_choice,
}
_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number such as 0.01 or 3e-4",
    "str": "a text",
    "list": "names separated by commas",
    "choice": "one of {choices}",
}


def parse_json(text: object) -> Any:
    """Return what a JSON text holds; a value that is no text is returned as it is.

    Raises:
        InputError: text that is too long, too deep or no JSON.
    """
    if not isinstance(text, (str, bytes)):
        return text
    if len(text) > MAX_STATE:
        raise InputError(f"the state has {len(text)} characters; expected a small JSON of at most {MAX_STATE}.")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"the state is no JSON ({type(error).__name__}: {error}); expected json.dumps(studio.state())."
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
