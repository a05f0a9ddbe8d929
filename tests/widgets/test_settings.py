"""Settings come from browsers and files: everything but good settings is one InputError."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.errors import InputError

pytest.importorskip("anywidget")

from qlab.widgets.settings import Settings, control, parse_json, parse_value

from qlab.methods import Hyperparameter

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FIELDS = sorted(Settings().json())


def test_settings_survive_json() -> None:
    before = Settings(
        data="two_moons", hyper={"lr": "3e-4", "stochastic": True}, epochs=3, seed=2**53 - 1, name="my_run"
    )
    assert Settings.from_json(json.loads(json.dumps(before.json()))) == before


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
@settings(max_examples=300, deadline=None)
def test_hostile_fields_give_input_error_or_valid_settings(value: dict[str, Any]) -> None:
    try:
        made = Settings.from_json(value)
    except InputError:
        return
    assert made == Settings.from_json(made.json())


@given(JSON)
@settings(max_examples=200, deadline=None)
def test_any_json_but_settings_is_an_input_error(value: Any) -> None:
    if isinstance(value, dict) and set(value) <= set(FIELDS):
        return
    with pytest.raises(InputError):
        Settings.from_json(value)


@given(st.text(max_size=200) | st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_parses_or_is_an_input_error(text: str | bytes) -> None:
    try:
        parse_json(text)
    except InputError:
        return
    json.loads(text)


@pytest.mark.parametrize("text", ["[" * 50_000, "1" * 200_000, '{"a": NaN', "\ud800"])
def test_deep_long_and_broken_texts_are_input_errors(text: str) -> None:
    with pytest.raises(InputError):
        parse_json(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "from 1 to"),
        ("epochs", True, "whole number"),
        ("epochs", "12", "whole number"),
        ("batch_size", 1e3, "whole number"),
        ("seed", -1, "from 0"),
        ("seed", 2**53, "from 0"),
        ("data", "digit", "expected one of digits"),
        ("method", ["adaste"], "expected one of"),
        ("guess", float("nan"), "percent"),
        ("name", "lambda", "Python name"),
        ("name", "a b", "Python name"),
        ("name", "__builtins__", "Python name"),
        ("hyper", {"a b": 1}, "not a Python name"),
        ("hyper", {"lr": [1]}, "expected a number"),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings.from_json({field: value})


LR = Hyperparameter("lr", "float", 0.01)
SCALE = Hyperparameter("scale", "float", None, optional=True)
STEPS = Hyperparameter("steps", "int", 3)
MODE = Hyperparameter("mode", "choice", "a", choices=("a", 2))
KEEP = Hyperparameter("keep", "list", ())
FLAG = Hyperparameter("flag", "bool", False)


@pytest.mark.parametrize(
    ("parameter", "raw", "value"),
    [
        (LR, "3e-4", 3e-4),
        (LR, 1, 1.0),
        (SCALE, "", None),
        (SCALE, " 0.5 ", 0.5),
        (STEPS, "7", 7),
        (STEPS, 7.0, 7),
        (MODE, "2", 2),
        (MODE, "a", "a"),
        (KEEP, "first, last", ["first", "last"]),
        (KEEP, "", []),
        (FLAG, True, True),
    ],
)
def test_a_control_gives_the_value_it_shows(parameter: Hyperparameter, raw: Any, value: Any) -> None:
    parsed = parse_value(parameter, raw)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("parameter", "raw"),
    [(LR, ""), (LR, "inf"), (LR, True), (LR, "1,5"), (STEPS, 1.5), (STEPS, "x"), (MODE, "b"), (FLAG, "yes"), (KEEP, 3)],
)
def test_a_bad_value_names_the_hyperparameter_and_what_it_takes(parameter: Hyperparameter, raw: Any) -> None:
    with pytest.raises(InputError, match=rf"^{parameter.name} is .*; expected "):
        parse_value(parameter, raw)


@given(st.sampled_from([LR, SCALE, STEPS, MODE, KEEP, FLAG]), JSON)
@settings(max_examples=300, deadline=None)
def test_no_raw_value_raises_anything_but_an_input_error(parameter: Hyperparameter, raw: Any) -> None:
    with suppress(InputError):
        parse_value(parameter, raw)


def test_controls_are_primitives_for_every_method() -> None:
    from qlab.methods import CATALOG, hyperparameters

    for name in CATALOG:
        parameters = [h for h in hyperparameters(CATALOG.load(name)) if h.kind != "other"]
        assert parameters
        for parameter in parameters:
            described = control(parameter)
            assert json.loads(json.dumps(described)) == described
            assert parse_value(parameter, described["default"]) == (
                list(parameter.default) if parameter.kind == "list" else parameter.default
            )
