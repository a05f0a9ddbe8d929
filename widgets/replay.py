"""AttackReplay: several attackers of one example, step by step, on one plane: which of them moves?

    from qlab.widgets import AttackReplay

    view = AttackReplay()                               # a binary net of the lab's own; as the last line of a cell: shows itself
    view = AttackReplay(net, x, y, example=3, eps=0.1)
    view.choose(step=12, loss="margin")
    view.run().result()                                 # in the background otherwise
    view.found                                          # the numbers: qlab.attacks.replay.Replay

No mathematics stands here: everything shown comes from `qlab.attacks.replay`. Paths of all attackers are computed once, so the
slider only picks a step; another example, radius or loss runs them again in a Job, whose newest request wins.
"""

from __future__ import annotations

import math
import pathlib
import threading
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import traitlets
from qlab.widgets.replay_payload import ground_of, path_of, pictures_of
from qlab.widgets.view import Chosen

from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job, Latest, Update

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from qlab.attacks.replay import Replay

__all__ = ["AttackReplay"]

_STATIC = pathlib.Path(__file__).parent / "static"
_LOSSES = ("ce", "margin", "dlr")
_DATA = ("digits", "moons")  # those of `qlab.attacks.replay_examples`, which imports torch
_FAULTS = ("saturated", "dead", "none")
_STEPS = 20
_FINER = 10  # a step is eps over this, where eta is not given: smaller than PGD's own, so that there is a path to see
_FIELDS = ("example", "eps", "loss", "step", "data", "fault")


class AttackReplay(Chosen):
    """A view of the paths of several attackers of one example.

    Args:
        net: a method of the lab or any torch module, in eval mode; by default a binary net of the lab's own, trained in a second.
        x, y: (N, ...) inputs and (N,) labels.
        example: which of them, to begin with; one that takes several steps where the net is the lab's own.
        eps: radius of the ball, to begin with; 0.1 by default, or what fits the net of the lab's own.
        loss: that PGD maximises, to begin with: "ce", "margin" or "dlr".
        step: that is on view; the last one by default.
        data: of the lab's own net: "digits" or "moons".
        fault: of the lab's own net, why plain PGD is stuck: "saturated", "dead" or "none".
        settings: more of `qlab.attacks.replay.replaying`: norm, low, high, steps, eta (eps / 10 by default), questions, attackers,
            random_start, side, seed.

    Raises:
        InputError, UnknownNameError: as `qlab.attacks.replay.replay`.
    """

    _esm = _STATIC / "replay.js"
    _css = _STATIC / "replay.css"

    settings = traitlets.Dict().tag(sync=True)
    choices = traitlets.Dict().tag(sync=True)
    ground = traitlets.Dict().tag(sync=True)
    paths: traitlets.List[Any] = traitlets.List().tag(sync=True)
    pictures = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        net: nn.Module | None = None,
        x: Tensor | None = None,
        y: Tensor | None = None,
        example: int | None = None,
        eps: float | None = None,
        loss: str = "ce",
        step: int | None = None,
        *,
        data: str = "digits",
        fault: str = "saturated",
        **settings: Any,
    ) -> None:
        if (net is None) != (x is None) or (net is None) != (y is None):
            raise InputError("give net, x and y together, or none of them for a net of the lab's own")
        self._own = net is None
        self._given = (net, x, y)
        self._made: dict[tuple[str, str], Any] = {}  # nets of the lab's own
        self._options = settings
        self._lock = threading.RLock()
        self._latest = Latest(self._told, min_interval=0.05)
        self._complete = False
        self.found: Replay | None = None
        steps = settings.get("steps", _STEPS)
        begin = {"example": example, "eps": eps, "loss": loss, "step": steps if step is None else step}
        if not self._own:
            begin |= {"example": example or 0, "eps": 0.1 if eps is None else eps}
        self._place: dict[str, Any] = self._checked(begin | {"data": data, "fault": fault})
        if not self._own:  # refuses here what cannot be attacked; the first path is there at once
            self.found = next(update.value for update in self._work(self._place) if update.value is not None)
        super().__init__(status={"phase": "idle", "text": "Ready.", "fraction": 0.0, "at": 0.0})
        self._show()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    def choose(self, **changes: Any) -> Job | None:
        """Change what is on view: example, eps, loss, step, data or fault; what is not given stays.

        Another net of the lab's own begins with its own example and radius.

        Returns:
            The job that runs the attackers again; None where only the step changes.

        Raises:
            InputError: no such field, a number out of range; nothing is changed then.
            UnknownNameError: no such loss, data or fault.
        """
        with self._lock:
            before = self._place
            if ("data" in changes and changes["data"] != before["data"]) and self._own:
                changes = {"example": None, "eps": None} | changes
            self._place = self._checked(before | _known(changes))
            self._forgive()
            if {k: v for k, v in before.items() if k != "step"} == {
                k: v for k, v in self._place.items() if k != "step"
            }:
                self._told_place()
                return None
        return self.run()

    def run(self) -> Job:
        """Run all attackers in the background, and show their paths as they come."""
        with self._lock:
            place = dict(self._place)
            self._complete = False
            self._told_place()
            self._say("Attacking ...", phase="running", fraction=0.0)
        return self._latest.submit(lambda: self._work(place))

    def figure(self) -> Figure:
        """Return a static figure of the paths; runs the attackers where that has not been done."""
        if self.found is None:
            for update in self._work(dict(self._place)):
                self.found = update.value or self.found
            with self._lock:
                self._complete = True
                self._show()
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
    ) -> AttackReplay:
        """Return a view of the same example, radius, loss and step; `state` is a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        return cls(net, x, y, **cls._read(state, _FIELDS), **settings)

    def _pictured(self) -> bool:
        return self.found is not None and self._complete

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._complete and self.status["phase"] != "running":
            self.run()

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _work(self, place: dict[str, Any]) -> Generator[Update, None, None]:
        """Yield the replay so far; on a net of the lab's own, train that first."""
        from qlab.attacks.replay import replaying

        place, options = dict(place), {"steps": _STEPS} | self._options
        net, x, y = self._given
        share = 0.0
        if self._own:
            key = (place["data"], place["fault"])
            if key not in self._made:
                from qlab.attacks.replay_examples import preparing

                share = 0.3
                for update in preparing(*key):
                    yield Update(share * update.fraction, update.text)
                    self._made[key] = update.value
            own = self._made[key]
            net, x, y = own.net, own.x, own.y
            options = {"low": own.low, "high": own.high} | options
            place |= {k: getattr(own, name) for k, name in (("example", "index"), ("eps", "eps")) if place[k] is None}
            self._settle(key, place)
        options = {"eta": place["eps"] / _FINER} | options
        assert net is not None and x is not None and y is not None  # noqa: PT018
        for update in replaying(net, x, y, place["example"], place["eps"], loss=place["loss"], **options):
            yield Update(share + (1 - share) * update.fraction, update.text, update.value)

    def _settle(self, key: tuple[str, str], place: dict[str, Any]) -> None:
        """Take over example and radius that a net of the lab's own brings along, if it is still the one on view."""
        with self._lock:
            if key == (self._place["data"], self._place["fault"]):
                for name in ("example", "eps"):
                    if self._place[name] is None:
                        self._place[name] = place[name]

    def _told(self, job: Job) -> None:
        """Show what the work has found; runs in the job's thread."""
        with self._lock:
            before, complete = self.found, self._complete
            if job.value is not None or job.status == "failed":
                self.found = job.value
            self._complete = job.status == "done"
            if self.found is not before or self._complete != complete:
                self._show()
        if job.status == "running":
            self._say(f"{job.text} ...", phase="running", fraction=job.fraction)
            return
        ended = {"done": "Done.", "cancelled": "Stopped; what was found so far stays."}
        self._say(ended.get(job.status, "The attack failed."), fraction=job.fraction)
        if job.error is not None:
            self._complain(job.error)

    # ---- state of the view ----------------------------------------------------------------------------------------------

    def _checked(self, place: Mapping[str, Any]) -> dict[str, Any]:
        """Return complete settings; what is out of range is told. None of a net of the lab's own: what it brings along."""
        place = dict(place)
        count = self._count(place)
        _whole("step", place["step"], self._steps)
        if not (place["example"] is None and self._own):
            _whole("example", place["example"], math.inf if count is None else count - 1)
        eps = place["eps"]
        if not (eps is None and self._own):
            if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
                raise InputError(f"eps is {eps!r:.40}; expected a positive number, in the units of the inputs")
            place["eps"] = float(eps)
        for name, known in (("loss", _LOSSES), ("data", _DATA), ("fault", _FAULTS)):
            if not isinstance(place[name], str) or place[name] not in known:
                raise UnknownNameError(name, place[name], known)
        return place

    @property
    def _steps(self) -> float:
        """T; infinite for attacks of a user's own, which have their own number."""
        own = isinstance(self._options.get("attackers"), Mapping)
        return math.inf if own else self._options.get("steps", _STEPS)

    def _count(self, place: Mapping[str, Any]) -> int | None:
        """Return how many examples there are; None where the net of the lab's own is not made yet."""
        if not self._own:
            return len(self._given[2])  # type: ignore[arg-type]
        made = self._made.get((place["data"], place["fault"]))
        return None if made is None else len(made.y)

    def _told_place(self) -> None:
        """Send settings, choices and caption."""
        self.settings = dict(self._place)
        self.choices = {
            "own": self._own,
            "examples": self._count(self._place),
            "losses": list(_LOSSES),
            "data": list(_DATA),
            "faults": list(_FAULTS),
            "steps": self._options.get("steps", _STEPS),
            "complete": self._complete,
        }
        if self.found is None:
            self.caption = "The attackers have not run yet."
        else:
            self.caption = self.found.summary() + _at_step(self.found, self._place["step"])

    def _show(self) -> None:
        """Send the replay so far."""
        found = self.found
        self._told_place()
        if found is None:
            self.ground, self.paths, self.pictures = {}, [], {}
            return
        self.ground = ground_of(found)
        self.paths = [path_of(found, path) for path in found.paths]
        self.pictures = pictures_of(found)


def _known(changes: Mapping[str, Any]) -> dict[str, Any]:
    wrong = sorted(set(changes) - set(_FIELDS))
    if wrong:
        raise InputError(f"there is no field {wrong[0]!r:.40}; expected {', '.join(_FIELDS)}")
    return dict(changes)


def _whole(name: str, value: object, last: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= last:
        end = f"from 0 to {last}" if math.isfinite(last) else "that is not negative"
        raise InputError(f"{name} is {value!r:.40}; expected a whole number {end}")


def _at_step(found: Replay, step: int) -> str:
    """Return where all attackers stand."""
    margins = [f"{path.title} {path.margin[min(step, len(path.margin) - 1)]:.4g}" for path in found.paths]
    return f" Margins at step {step}: {'; '.join(margins)}."
