"""Temperature: a slider on the scale of the logits, and what every temperature makes of an attack's gradient.

    from qlab.widgets import Temperature

    view = Temperature()                                # a binary net of the lab's own; as the last line of a cell: shows itself
    view = Temperature(net, x, y, eps=8 / 255)
    view.choose(beta=0.01, example=3, dtype="float64")  # only picks: everything is computed for all temperatures
    view.choose(c=100)                                  # logits 100 times as large: computed in the background
    view.run().result()
    view.found                                          # the numbers: qlab.attacks.temperature.Temperature
    view.caption                                        # what the pictures say, in words

No mathematics stands here: everything shown comes from `qlab.attacks.temperature_sweep`. Curves are computed once for each factor
c, in a Job whose newest request wins, so the slider only moves marks.
"""

from __future__ import annotations

import math
import pathlib
import threading
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from qlab.widgets.temperature_payload import chosen_of, curves_of, net_of, regimes_of, rows_of
from qlab.widgets.view import Chosen

from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job, Latest, Update

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from qlab.attacks.temperature import Temperature as Found
    from qlab.attacks.temperature_sweep import Sweep

__all__ = ["Temperature"]

_STATIC = pathlib.Path(__file__).parent / "static"
_EXAMPLES = 200  # more are not looked at
_BETAS = tuple(float(b) for b in np.logspace(-3, 2, 51))  # beta 1 is one of them
_DTYPES = ("float32", "float64", "float16")
_FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
_OF = ("mean", "example")
_FIELDS = ("beta", "dtype", "example", "of", "c")
_LOUD = 100.0  # c for the lab's own net, whose logits have a median gap of 4


class Temperature(Chosen):
    """A view of gradients, regimes and accuracy under attack over temperatures.

    Args:
        net: a method of the lab or any torch module, in eval mode; by default a binary net of the lab's own, trained in a second
            on digits, whose logits are 100 times as large as they need be.
        x, y: (N, ...) inputs and (N,) labels; the first 200 are looked at.
        beta: factor on the attacker's logits, to begin with; the nearest of 51 from 1e-3 to 100.
        dtype: "float32", "float64" or "float16", to begin with.
        example: on view, to begin with.
        of: whose curves are drawn, "mean" over the examples that are right, or "example".
        c: factor on the logits of the net itself; 1 by default, and 100 for the lab's own net.
        eps: radius of the attack, in the units of x.
        settings: more of `qlab.attacks.temperature.tempering`: norm, low, high, attack.

    Raises:
        InputError, UnknownNameError: as `qlab.attacks.temperature_sweep.sweeping`.
    """

    _esm = _STATIC / "temperature.js"
    _css = _STATIC / "temperature.css"

    settings = traitlets.Dict().tag(sync=True)
    choices = traitlets.Dict().tag(sync=True)
    net = traitlets.Dict().tag(sync=True)
    curves = traitlets.Dict().tag(sync=True)
    regimes = traitlets.Dict().tag(sync=True)
    chosen = traitlets.Dict().tag(sync=True)
    rows: traitlets.List[Any] = traitlets.List().tag(sync=True)

    def __init__(
        self,
        net: nn.Module | None = None,
        x: Tensor | None = None,
        y: Tensor | None = None,
        beta: float = 1.0,
        dtype: str = "float32",
        example: int = 0,
        of: str = "mean",
        c: float | None = None,
        *,
        eps: float = 0.15,
        **settings: Any,
    ) -> None:
        if (net is None) != (x is None) or (net is None) != (y is None):
            raise InputError("give net, x and y together, or none of them for a net of the lab's own")
        self._own = net is None
        self._data = None if net is None or x is None or y is None else (net, x[:_EXAMPLES], y[:_EXAMPLES])
        self._left_out = 0 if x is None else max(0, len(x) - _EXAMPLES)
        self._options = {"eps": eps} | settings
        self._lock = threading.RLock()
        self._latest = Latest(self._told, min_interval=0.05)
        self._sweeps: dict[float, Sweep] = {}
        c = (_LOUD if self._own else 1.0) if c is None else c
        self._place: dict[str, Any] = self._checked(
            {"beta": beta, "dtype": dtype, "example": example, "of": of, "c": c}
        )
        if not self._own:  # refuses here what cannot be attacked; the first gradients are there at once
            self._sweeps[self._place["c"]] = next(u.value for u in self._work(dict(self._place)) if u.value is not None)
        super().__init__(status={"phase": "idle", "text": "Ready.", "fraction": 0.0, "at": 0.0})
        self._show()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    @property
    def sweep(self) -> Sweep | None:
        """What is known at the factor c that is on view; None before the first result."""
        return self._sweeps.get(self._place["c"])

    @property
    def found(self) -> Found | None:
        """The numbers of `sweep`."""
        return None if self.sweep is None else self.sweep.found

    @property
    def complete(self) -> bool:
        """Whether everything has been computed at the factor c that is on view."""
        sweep = self.sweep
        return sweep is not None and all(sweep.finished(name) or name in sweep.failed for name in _DTYPES)

    def choose(self, **changes: Any) -> Job | None:
        """Change what is on view: beta, dtype, example, of or c; what is not given stays.

        Returns:
            The job that computes what is missing; None where nothing is.

        Raises:
            InputError: no such field, a number out of range, a dtype that the net does not run in; nothing is changed then.
            UnknownNameError: no such dtype.
        """
        with self._lock:
            wrong = sorted(set(changes) - set(_FIELDS))
            if wrong:
                raise InputError(f"there is no field {wrong[0]!r:.40}; expected {', '.join(_FIELDS)}")
            before = self._place
            place = self._checked(before | changes)
            there = self._sweeps.get(place["c"])
            if there is not None and place["dtype"] in there.failed:
                raise InputError(there.failed[place["dtype"]])
            self._place = place
            self._forgive()
            self._show()
            if (place["c"], place["dtype"]) == (before["c"], before["dtype"]):
                return None
            if there is None or place["dtype"] not in there.found.dtypes:
                return self.run()
            if place["c"] == before["c"]:
                return None
            if not self.complete:
                return self.run()
            self._latest.cancel()  # of the other factor; what it found stays
            return None

    def run(self) -> Job:
        """Compute what is missing in the background, and show it as it comes; what is on view first."""
        with self._lock:
            place = dict(self._place)
            self._say("Computing ...", phase="running", fraction=0.0)
        return self._latest.submit(lambda: self._work(place))

    def figure(self) -> Figure:
        """Return a static figure of what there is; computes it where that is nothing."""
        if self.found is None:
            self.run().result()
        assert self.found is not None
        return self.found.figure()

    @classmethod
    def from_state(
        cls,
        state: object,
        net: nn.Module | None = None,
        x: Tensor | None = None,
        y: Tensor | None = None,
        **settings: Any,
    ) -> Temperature:
        """Return the same view of a net and data; `state` is a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        return cls(net, x, y, **cls._read(state, _FIELDS), **settings)

    def _pictured(self) -> bool:
        return self.complete

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self.complete and self.status["phase"] != "running":
            self.run()

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _work(self, place: dict[str, Any]) -> Generator[Update, None, None]:
        """Yield the sweep so far; on the lab's own net, train that first."""
        from qlab.attacks.temperature_sweep import sweeping

        share = 0.0
        if self._data is None:
            from qlab.attacks.replay_examples import preparing

            share = 0.2
            for update in preparing("digits", "none"):
                yield Update(share * update.fraction, update.text)
                own = update.value
            self._data = (own.net, own.x[:_EXAMPLES], own.y[:_EXAMPLES])
        c = place["c"]
        settings = {"c": c, "dtypes": _order(place["dtype"]), "start": self._sweeps.get(c), **self._options}
        for update in sweeping(*self._data, _BETAS, **settings):
            yield Update(share + (1 - share) * update.fraction, update.text, update.value)

    def _told(self, job: Job) -> None:
        """Show what the work has found; runs in the job's thread."""
        with self._lock:
            sweep: Sweep | None = job.value
            if sweep is not None:
                self._sweeps[sweep.c] = sweep
                failed = sweep.failed.get(self._place["dtype"]) if sweep.c == self._place["c"] else None
                if failed is not None:
                    self._place = self._place | {"dtype": sweep.found.own}
                self._show()
                if failed is not None:
                    self._complain(InputError(failed))
            if job.status == "running":
                self._say(f"Computed: {job.text}.", phase="running", fraction=job.fraction, **self._error())
                return
            ended = {"done": "", "cancelled": "" if self.complete else "Stopped; what was computed so far stays."}
            self._say(ended.get(job.status, "Failed."), fraction=job.fraction, **self._error())
            if job.error is not None:
                self._complain(job.error)

    def _error(self) -> dict[str, Any]:
        """Return the error on view, for a status that keeps it."""
        return {name: self.status[name] for name in ("error", "about") if name in self.status}

    # ---- state of the view ----------------------------------------------------------------------------------------------

    def _checked(self, place: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings that make sense, beta the nearest of the grid; what does not is told."""
        place = dict(place)
        for name in ("beta", "c"):
            value = place[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name} is {value!r:.40}; expected a positive number")
            place[name] = float(value)
        place["beta"] = min(_BETAS, key=lambda b: abs(math.log(b / place["beta"])))
        for name, known in (("dtype", _DTYPES), ("of", _OF)):
            if not isinstance(place[name], str) or place[name] not in known:
                raise UnknownNameError(name, place[name], known)
        example, last = place["example"], math.inf if self._data is None else len(self._data[2]) - 1
        if isinstance(example, bool) or not isinstance(example, int) or not 0 <= example <= last:
            end = f"from 0 to {last}" if math.isfinite(last) else "that is not negative"
            raise InputError(f"example is {example!r:.40}; expected a whole number {end}")
        return place

    def _show(self) -> None:
        """Send what there is at the factor c that is on view."""
        if self._data is not None:  # the lab's own net was not there yet when an example was chosen
            self._place = self._place | {"example": min(self._place["example"], len(self._data[2]) - 1)}
        place, sweep = self._place, self.sweep
        with self.hold_sync():  # one message: arrays that belong together come together
            self.settings = {**place, "index": _BETAS.index(place["beta"])}
            self.choices = {
                "betas": list(_BETAS),
                "dtypes": [
                    {"name": name, "failed": "" if sweep is None else sweep.failed.get(name, "")} for name in _DTYPES
                ],
                "factors": sorted({*_FACTORS, *self._sweeps, place["c"]}),
                "examples": None if self._data is None else len(self._data[2]),
                "left_out": self._left_out,
                "own": self._own,
                "eps": self._options["eps"],
                "norm": self._options.get("norm", "linf"),
                "complete": self.complete,
            }
            self.rows = rows_of(self._sweeps)
            if sweep is None or self._data is None:
                self.net, self.curves, self.regimes, self.chosen = {}, {}, {}, {}
                self.caption = "Nothing has been computed yet."
                return
            self.net, self.curves, self.regimes = net_of(sweep), curves_of(sweep), regimes_of(sweep.found)
            self.chosen = chosen_of(sweep.found, self._data[1], place["example"])
            self.caption = _in_words(sweep, place)


def _order(dtype: str) -> tuple[str, ...]:
    """Return the dtypes to compute, the one on view first."""
    return (dtype, *(name for name in _DTYPES if name != dtype))


def _in_words(sweep: Sweep, place: Mapping[str, Any]) -> str:
    """Return the summary of all temperatures, and what the one on view makes of gradients and of the example."""
    found = sweep.found
    k, dtype = _BETAS.index(place["beta"]), place["dtype"]
    text = found.summary()
    if sweep.c != 1:
        text = f"Logits times {sweep.c:g}. {text}"
    if dtype not in found.dtypes:
        return text
    w = found.dtypes[dtype]
    healthy, wrong, dead = (round(float(share) * int(w.counted.sum())) for share in w.shares[:, k])
    changed = int((~w.same[k]).sum())
    text += (
        f" At beta {found.betas[k]:.3g} in {dtype}: error signal {w.mean(w.psi)[k]:.3g}, singular value {found.spread[k]:.3g}, "
        f"input gradient {w.mean(w.gradient)[k]:.3g}, Hessian {w.mean(found.h)[k]:.3g} in the mean; "
        f"{w.mean(w.signs**2)[k]:.0%} of signs are not 0, {w.mean(w.underflow)[k]:.0%} of the error signal's entries are. "
        f"{healthy} examples are healthy, {wrong} have the wrong direction, {dead} are dead; the decision of {changed} of "
        f"{len(found.labels)} changes."
    )
    if math.isfinite(w.accuracy[k]):
        text += f" The attack leaves {w.accuracy[k]:.1%} right."
    n = place["example"]
    if n >= len(found.labels):
        return text
    from qlab.attacks.temperature import REGIMES

    p = found.probabilities(n)[k, found.labels[n]]
    return text + (
        f" Example {n}, of class {found.labels[n]}, has a gap of {found.gap[n]:.3g} at beta 1 and probability {p:.3g} here; "
        f"error signal: {REGIMES[w.regime[k, n]]}. NJS gives it beta {found.njs[n]:.3g}, HNS {found.hns[n]:.3g}."
    )
