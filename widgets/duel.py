"""MethodDuel: two methods, one start, the same batches, and where the nets that they deploy part.

    from qlab.widgets import MethodDuel

    fight = MethodDuel("adaste", "ste")     # as the last line of a cell: shows itself
    fight.start(wait=True)
    fight.duel                              # the numbers: a qlab.duel Duel

No mathematics stands here: what is shown comes from `qlab.duel`, whose steps run in a Job, so the kernel is never blocked.
"""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from qlab.widgets.view import View

from qlab.data import DATA
from qlab.errors import InputError
from qlab.jobs import Job, Latest, Update, background
from qlab.methods.catalog import CATALOG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qlab.duel import Duel

__all__ = ["MethodDuel"]

_STATIC = pathlib.Path(__file__).parent / "static"
_READY = "Ready. Choose two methods, guess, then start."
_FIELDS = ("a", "b", "data", "epochs", "seed")
_MAX_EPOCHS = 500
_POINTS = 600  # of a curve that is sent
_DATA = tuple(d.name for d in DATA.values() if d.kind != "text")
_SETS = tuple(name for name in _DATA if DATA[name].source != "files")  # what is here without a download


class MethodDuel(View):
    """Two methods in lockstep.

    Args:
        a, b: names of methods.
        data: name of a data set.
        epochs: of both, at most 500.
        seed: of start, batches and noise.
        options_a, options_b: hyperparameters.

    Raises:
        InputError: for a setting out of range.
    """

    _esm = _STATIC / "duel.js"
    _css = _STATIC / "duel.css"

    methods: traitlets.List[Any] = traitlets.List().tag(sync=True)
    sets: traitlets.List[Any] = traitlets.List().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    result = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        a: str = "adaste",
        b: str = "ste",
        data: str = "two_moons",
        *,
        epochs: int = 20,
        seed: int = 0,
        options_a: Mapping[str, Any] | None = None,
        options_b: Mapping[str, Any] | None = None,
    ) -> None:
        self._set = _checked({"a": a, "b": b, "data": data, "epochs": epochs, "seed": seed})
        self._options = {"a": (a, dict(options_a or {})), "b": (b, dict(options_b or {}))}
        self._lock = threading.RLock()
        self._job = Latest(self._fought)
        self._drawn: object = None
        self._left: Job | None = None  # what was fought with other settings, and still has a last word
        self.duel: Duel | None = None
        sets = dict.fromkeys((*_SETS, data))
        super().__init__(
            methods=[{"name": m.name, "title": f"{m.name}: {m.title.split(': ', 1)[-1]}"} for m in CATALOG.values()],
            sets=[{"name": name, "title": DATA[name].title.split(": ", 1)[0]} for name in sets],
            settings=dict(self._set),
            status={"phase": "idle", "text": _READY, "fraction": 0.0, "at": 0.0},
        )
        self.caption = self._caption()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    def choose(self, **changes: Any) -> None:
        """Change settings: a, b, data, epochs, seed. What was seen of another duel goes.

        Raises:
            InputError: for a field that there is not, or a value out of range; nothing is changed then.
        """
        if not set(changes) <= set(_FIELDS):
            raise InputError(f"the settings are {changes!r:.80}; expected some of {', '.join(_FIELDS)}.")
        with self._lock:
            before, self._set = self._set, _checked(self._set | changes)
            self.settings = dict(self._set)
            self._forgive()
            if self._set != before:
                self._job.cancel()
                self._left = self._job.job
                self.duel, self.result = None, {}
                self.caption = self._caption()

    def start(self, *, wait: bool = False) -> Job:
        """Train both methods in lockstep, in the background.

        Args:
            wait: return when it has ended; a failure is raised then.
        """
        with self._lock:
            self._say("Loading PyTorch, the data and the net ...", phase="fighting", fraction=0.0)
            self.duel, self.result = None, {}
            chosen = dict(self._set)
            options = {f"options_{k}": o if name == chosen[k] else {} for k, (name, o) in self._options.items()}
            job = self._job.submit(lambda: _fighting(chosen, options))
        if wait:
            job.result()
        return job

    def stop(self) -> None:
        """Ask the duel to stop; what there is stays."""
        self._job.cancel()

    def figure(self) -> Figure:
        """Return a static figure of the duel.

        Raises:
            InputError: there was none yet.
        """
        if self.duel is None:
            raise InputError("there is nothing to draw yet: start the duel first")
        return self.duel.figure()

    def _kept(self) -> dict[str, Any]:
        return dict(self._set)

    @classmethod
    def from_state(cls, state: object, **options: Any) -> MethodDuel:
        """Return a duel with the settings of `state`, a dictionary or its JSON text; hyperparameters are given anew.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        return cls(**_checked(cls._read(state, _FIELDS)), **options)

    def _pictured(self) -> bool:
        return self.duel is not None

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _act(self, kind: object, content: Any) -> bool:
        if kind == "ready":
            pass
        elif kind == "choose":
            self.choose(**{k: v for k, v in content.items() if k != "type"})
        elif kind == "start":
            self.start()
        elif kind == "stop":
            self.stop()
        else:
            return False
        return True

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _fought(self, job: Job) -> None:
        """Show what there is of the duel; runs in the job's thread."""
        with self._lock:
            if job is not self._job.job:
                return
            if job is self._left:
                self._say(_READY, fraction=0.0)
                return
            if job.value is not None and job.value is not self._drawn:
                self._drawn = self.duel = job.value
                self.result = _packed(job.value, done=job.status == "done")
                self.caption = self._caption()
                self._say(job.text, phase="fighting", fraction=job.fraction)
            elif job.status == "running" and job.value is None and job.text != self.status.get("text"):
                self._say(job.text, phase="fighting")
            if job.status == "running":
                return
            if self.duel is not None:
                self.result = {**self.result, "done": job.status == "done"}
            self._say({"done": "Done.", "cancelled": "Stopped."}.get(job.status, "The duel failed."), fraction=1.0)
            if job.error is not None:
                self._complain(job.error)

    def _caption(self) -> str:
        if self.duel is not None:
            return self.duel.summary()
        s = self._set
        return f"{s['a']} against {s['b']} on {s['data']}, {s['epochs']} epochs with seed {s['seed']}: not fought yet."


def _fighting(chosen: Mapping[str, Any], options: Mapping[str, Any]) -> Generator[Update, None, None]:
    def work() -> Any:
        from qlab.duel import dueling

        updates = dueling(
            chosen["a"], chosen["b"], chosen["data"], epochs=chosen["epochs"], seed=chosen["seed"], **options
        )
        return next(updates), updates  # loads the data and builds both nets

    first, rest = yield from background(work, "Loading PyTorch, the data and the net ...")
    yield first
    yield from rest


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that came from outside; a value out of range is told."""
    for name, shelf in (("a", CATALOG), ("b", CATALOG), ("data", _DATA)):
        if not isinstance(fields[name], str) or fields[name] not in shelf:
            raise InputError(f"{name} is {fields[name]!r:.40}; expected one of {', '.join(shelf)}.")
    for name, low, high in (("epochs", 1, _MAX_EPOCHS), ("seed", 0, 2**53 - 1)):
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"{name} is {value!r:.40}; expected a whole number from {low} to {high}.")
    return {name: fields[name] for name in _FIELDS}


def _bytes(values: Any) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def _packed(d: Duel, *, done: bool) -> dict[str, Any]:
    """Return what is drawn of a duel: losses as running means, at most 600 points of them."""
    from qlab.cockpit import smoothed

    n = len(d.loss)
    chosen = np.unique(np.linspace(0, n - 1, _POINTS).round().astype(int)) if n else np.zeros(0, int)
    plane = None
    if d.plane is not None:
        p = d.plane
        plane = {
            "side": len(p.u),
            "a": p.a.astype(np.uint8).tobytes(),
            "b": p.b.astype(np.uint8).tobytes(),
            "u": [float(p.u[0]), float(p.u[-1])],
            "v": [float(p.v[0]), float(p.v[-1])],
            "x": _bytes(p.x),
            "y": p.y.astype(np.uint8).tobytes(),
            "disagree": p.disagree,
        }
    return {
        "done": done,
        "steps": _bytes(chosen + 1),
        "loss": [_bytes(smoothed(d.loss[:, k])[chosen]) for k in (0, 1)],
        "at": _bytes(d.at),
        "accuracy": [_bytes(d.accuracy[:, k]) for k in (0, 1)],
        "apart": _bytes(d.apart),
        "disagree": _bytes(d.disagree),
        "layers": [
            {"name": name, "weights": int(w), "differ": float(share)}
            for name, w, share in zip(d.layers, d.weights, d.differ[-1], strict=True)
        ],
        "weights": int(d.weights.sum()),
        "examples": len(d.y),
        "table": d.table.tolist(),
        "p_value": d.p_value,
        "plane": plane,
    }
