"""TimeTravel: every weight at every step of a training, and which flip changed a prediction.

    from qlab.widgets import TimeTravel

    bits = BitHistory()
    run = qlab.fit("ste", "digits", callbacks=[bits])
    travel = TimeTravel(bits.history, run.deployed, x)     # as the last line of a cell: shows itself
    travel.choose(step=120, example=3)
    travel.find().result()                                 # then travel.answer is a WhichFlip

No mathematics stands here: what is shown comes from `qlab.diagnose` (`flips`, `course`, `which_flip`). What takes time runs in a
Job, so the kernel is never blocked; the film of a layer is in the browser, so its slider needs no kernel.
"""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import traitlets
from qlab.widgets import film
from qlab.widgets.view import View

from qlab.errors import InputError
from qlab.jobs import Job, Latest, Update, background

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from qlab.diagnose.course import Course
    from qlab.diagnose.history import History
    from qlab.diagnose.which_flip import WhichFlip

__all__ = ["TimeTravel"]

_STATIC = pathlib.Path(__file__).parent / "static"
_READY = "Ready. Guess how many flips it takes, then find them."
_FIELDS = ("layer", "step", "example", "since", "until")


class TimeTravel(View):
    """A window into the history of a net's bits.

    Args:
        history: of `qlab.callbacks.BitHistory`, recorded during the training of this net.
        net: a method of the lab, its net, or the deployed net: of it come float layers, biases and batch norm.
        x: (N, ...) the examples to ask about.
        layer: a recorded tensor; the first by default.
        step: to begin at; the last by default.
        example: which of x.

    Raises:
        InputError: a history of another net, a wrong batch, a step that was not recorded, no such example.
        UnknownNameError: there is no such layer.
    """

    _esm = _STATIC / "time_travel.js"
    _css = _STATIC / "time_travel.css"

    layers: traitlets.List[Any] = traitlets.List().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    frames = traitlets.Dict().tag(sync=True)
    rate = traitlets.Dict().tag(sync=True)
    swings: traitlets.List[Any] = traitlets.List().tag(sync=True)
    prediction = traitlets.Dict().tag(sync=True)
    found = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        history: History,
        net: nn.Module,
        x: Tensor,
        layer: str | None = None,
        step: int | None = None,
        example: int = 0,
    ) -> None:
        from qlab.diagnose.base import check
        from qlab.diagnose.flips import flips, scrub

        check(scrub(history, net, int(history.steps[-1])), x, None, labels=False)
        self._history, self._net, self._x = history, net, x
        self._lock = threading.RLock()
        self._look = Latest(self._looked)
        self._find = Latest(self._finding)
        self._job: Job | None = None
        self._interval_chosen = False
        self.flips = flips(history)
        self.course: Course | None = None
        self.answer: WhichFlip | None = None
        first, last = int(history.steps[0]), int(history.steps[-1])
        place = self._place = self._checked(
            {
                "layer": history.tensors[0].name if layer is None else layer,
                "step": last if step is None else step,
                "example": example,
                "since": max(first, last - max(1, (last - first) // 20)),
                "until": last,
            }
        )
        super().__init__(
            layers=film.titles(history),
            settings=place | {"first": first, "last": last, "examples": len(x)},
            frames=film.film(history, self.flips, place["layer"]),
            rate=film.rate(self.flips, place["layer"]),
            swings=film.swings(self.flips),
            status={"phase": "idle", "text": _READY, "fraction": 0.0, "at": 0.0},
        )
        self.caption = self._caption()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    def choose(
        self,
        layer: str | None = None,
        step: int | None = None,
        example: int | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> Job | None:
        """Look at another place; what is not given stays.

        Returns:
            The job that follows the prediction for another example, or None where the example stays.

        Raises:
            InputError: no such step or example, or an empty interval; nothing is changed then.
            UnknownNameError: there is no such layer.
        """
        given = {"layer": layer, "step": step, "example": example, "since": since, "until": until}
        return self._choose({name: value for name, value in given.items() if value is not None})

    def look(self) -> Job:
        """Follow the prediction for the example over the training, in the background."""
        example = self._place["example"]
        return self._look.submit(lambda: self._looking(example))

    def find(self, *, wait: bool = False) -> Job:
        """Find which flips of the interval changed the prediction, in the background.

        Args:
            wait: return when it has ended; a failure is raised then.
        """
        from qlab.diagnose.which_flip import tracing

        with self._lock:
            s = self._place
            example = self._x[s["example"] : s["example"] + 1]
            self.answer, self.found = None, {}
            self._say("Running the net flip by flip ...", phase="find", fraction=0.0)
            job = self._find.submit(lambda: tracing(self._history, self._net, example, s["since"], s["until"]))
            self._job = job
        if wait:
            job.result()
        return job

    def stop(self) -> None:
        """Ask the search that is running to stop; what it has found stays."""
        self._find.cancel()

    def figure(self) -> Figure:
        """Return a static figure: the margin flip by flip once there is an answer, the flips of the training before."""
        return (self.flips if self.answer is None else self.answer).figure()

    def _kept(self) -> dict[str, Any]:
        return dict(self._place)

    @classmethod
    def from_state(cls, state: object, history: History, net: nn.Module, x: Tensor) -> TimeTravel:
        """Return a TimeTravel at the same place; `state` is a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write, or a place that there is not.
        """
        fields = _fields(cls._read(state))
        travel = cls(history, net, x)
        travel._choose(fields, look=False)
        return travel

    def _pictured(self) -> bool:
        return self.answer is not None or self.course is not None

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _act(self, kind: object, content: Any) -> bool:
        if kind == "ready":
            if self.course is None:
                self.look()
        elif kind == "choose":
            self._choose(_fields({name: value for name, value in content.items() if name != "type"}))
        elif kind == "find":
            self.find()
        elif kind == "stop":
            self.stop()
        else:
            return False
        return True

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _choose(self, changes: Mapping[str, Any], *, look: bool = True) -> Job | None:
        with self._lock:
            before = self._place
            chosen = self._checked(before | dict(changes))
            self._place = chosen
            self.settings = {**self.settings, **chosen}
            self._forgive()
            if chosen["layer"] != before["layer"]:
                self.frames = film.film(self._history, self.flips, chosen["layer"])
                self.rate = film.rate(self.flips, chosen["layer"])
            if {"since", "until"} & set(changes):
                self._interval_chosen = True
            asked = ("example", "since", "until")
            if [chosen[k] for k in asked] != [before[k] for k in asked]:
                self._find.cancel()
                self.answer, self.found = None, {}
            if chosen["example"] == before["example"]:
                self.caption = self._caption()
                return None
            self.course, self.prediction = None, {}
            self._interval_chosen = bool({"since", "until"} & set(changes))
            self.caption = self._caption()
        return self.look() if look else None

    def _looking(self, example: int) -> Generator[Update, None, None]:
        from qlab.diagnose.course import course

        found = yield from background(
            lambda: course(self._history, self._net, self._x[example : example + 1]), "Following the prediction ..."
        )
        yield Update(1.0, "", (example, found))

    def _looked(self, job: Job) -> None:
        """Show the course of a prediction, and the interval of its last turn; runs in the job's thread."""
        if job.error is not None:
            self._complain(job.error)
        elif job.value is not None and job.status == "done":
            with self._lock:
                example, found = job.value
                if example != self._place["example"]:
                    return
                self.course, self.prediction = found, film.prediction(found)
                if found.turns and not self._interval_chosen:
                    since, until = found.turns[-1]
                    self._place = self._place | {"since": since, "until": until}
                    self.settings = {**self.settings, **self._place}
                self.caption = self._caption()

    def _finding(self, job: Job) -> None:
        """Show what a search has found so far; runs in the job's thread."""
        with self._lock:
            if job.value is not None:
                self.answer = job.value
                self.found = film.answer(job.value)
                self.caption = self._caption()
            if job.status == "running":
                self._say(job.text, phase="find", fraction=job.fraction)
                return
            self._say({"done": "Found.", "cancelled": "Stopped."}.get(job.status, "The search failed."), fraction=1.0)
            if job.error is not None:
                self._complain(job.error)

    # ---- state of the view ----------------------------------------------------------------------------------------------

    def _checked(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return complete settings; a place that the history does not have is told."""
        if not isinstance(fields["layer"], str):
            raise InputError(f"layer is {fields['layer']!r:.40}; expected a name.")
        self._history.tensor(fields["layer"])
        chosen: dict[str, Any] = {"layer": fields["layer"]}
        for name in ("step", "since", "until", "example"):
            value = fields[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name} is {value!r:.40}; expected a whole number.")
            if name != "example":
                self._history.row(value)
            elif not 0 <= value < len(self._x):
                raise InputError(f"example is {value}; there are examples 0 to {len(self._x) - 1}.")
            chosen[name] = value
        if chosen["until"] < chosen["since"]:
            raise InputError(
                f"the interval from step {chosen['since']} to step {chosen['until']} is empty; give the earlier step first."
            )
        return chosen

    def _caption(self) -> str:
        if self.answer is not None:
            return self.answer.summary()
        return self.flips.summary() + ("" if self.course is None else f" {self.course.summary()}")


def _fields(value: object) -> dict[str, Any]:
    """Return fields of settings that came from outside; their values are checked against the history later."""
    if not isinstance(value, dict) or not set(value) <= set(_FIELDS):
        raise InputError(f"the settings are {value!r:.80}; expected a dictionary of {', '.join(_FIELDS)}.")
    return value
