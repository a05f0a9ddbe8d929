"""AnnealingCockpit: every method's schedule on one time axis, and a run that is frozen, rewound and branched.

    from qlab.widgets import AnnealingCockpit

    cockpit = AnnealingCockpit("mirror_descent")    # as the last line of a cell: shows itself
    cockpit.branch(wait=True)                       # train as planned, then again from the moment with the schedule frozen
    cockpit.run, cockpit.other                      # qlab.steering.SteeredRun; cockpit.comparison has the verdict

Everything the browser can do can be done from Python: `choose`, `train`, `stop`, `freeze`, `release`, `rewind`, `branch`. No
mathematics stands here: runs are those of `qlab.steering`, schedules and comparisons those of `qlab.cockpit`.
"""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

import traitlets
from qlab.widgets.cockpit_payload import instruments, packed
from qlab.widgets.view import View

from qlab.data import DATA
from qlab.errors import InputError
from qlab.jobs import Job, Latest, Update, background
from qlab.methods.catalog import CATALOG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qlab.cockpit import Comparison, Schedules, Telemetry
    from qlab.steering import SteeredRun

__all__ = ["AnnealingCockpit"]

_STATIC = pathlib.Path(__file__).parent / "static"
_READY = "Ready. Choose a moment, guess, then run."
_FIELDS = ("method", "data", "epochs", "seed", "moment", "change")
_PREFERRED = (
    "mirror_descent",
    "binary_relax",
    "adaste",
)  # to begin with: their forward weights are not the deployed ones
_DATA = tuple(d.name for d in DATA.values() if d.kind != "text")
_MAX_EPOCHS = 200
CHANGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "frozen": ("its schedule frozen", {"frozen": True}),
    "half": ("a schedule at half speed", {"speed": 0.5}),
    "double": ("a schedule at double speed", {"speed": 2.0}),
    "lr": ("0.3 of the learning rate", {"lr": 0.3}),
    "same": ("nothing changed", {}),
}
"""What a branch has other than its parent: name -> (in words, arguments of `SteeredRun.branch`)."""


class AnnealingCockpit(View):
    """Schedules of all methods, and one run with a branch.

    Args:
        method: to train; None is one whose training-time weights are not the deployed ones.
        data: name of a data set.
        epochs: of the plan, at most 200.
        seed: of the run.
        moment: share of the plan, in [0, 1], at which the branch leaves.
        change: what the branch has other than the run: "frozen", "half", "double", "lr" or "same".

    Raises:
        InputError: for a setting out of range.
    """

    _esm = _STATIC / "cockpit.js"
    _css = _STATIC / "cockpit.css"

    methods: traitlets.List[Any] = traitlets.List().tag(sync=True)
    changes: traitlets.List[Any] = traitlets.List().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    instruments = traitlets.Dict().tag(sync=True)
    planned = traitlets.Dict().tag(sync=True)
    branched = traitlets.Dict().tag(sync=True)
    verdict = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        method: str | None = None,
        data: str = "two_moons",
        *,
        epochs: int = 20,
        seed: int = 0,
        moment: float = 0.5,
        change: str = "frozen",
    ) -> None:
        if method is None:
            method = next(name for name in (*_PREFERRED, *CATALOG) if name in CATALOG)
        given = {"method": method, "data": data, "epochs": epochs, "seed": seed, "moment": moment, "change": change}
        self._set = _checked(given)
        self._lock = threading.RLock()
        self._look = Latest(self._looked)
        self._flight = Latest(self._flown)
        self._drawn: object = None
        self._branching_job: Job | None = None
        self.schedules: Schedules | None = None
        self.run: SteeredRun | None = None
        self.other: SteeredRun | None = None
        self.comparison: Comparison | None = None
        self._telemetry: dict[str, Telemetry] = {}
        super().__init__(
            methods=[{"name": m.name, "title": f"{m.name}: {m.title.split(': ', 1)[-1]}"} for m in CATALOG.values()],
            changes=[{"name": name, "title": title} for name, (title, _) in CHANGES.items()],
            settings=dict(self._set),
            status={"phase": "idle", "text": _READY, "fraction": 0.0, "at": 0.0},
        )
        self.caption = self._caption()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    def choose(self, **changes: Any) -> None:
        """Change settings: method, data, epochs, seed, moment, change. Another run begins anew, another branch is taken back.

        Raises:
            InputError: for a field that there is not, or a value out of range; nothing is changed then.
        """
        if not set(changes) <= set(_FIELDS):
            raise InputError(f"the settings are {changes!r:.80}; expected some of {', '.join(_FIELDS)}.")
        with self._lock:
            before, self._set = self._set, _checked(self._set | changes)
            self.settings = {**self.settings, **self._set}
            self._forgive()
            new = any(self._set[k] != before[k] for k in ("method", "data", "epochs", "seed"))
            if new:
                self._flight.cancel()
                self.run, self.planned = None, {}
                self._telemetry.pop("planned", None)
            if new or any(self._set[k] != before[k] for k in ("moment", "change")):
                if self._branching_job is not None:
                    self._branching_job.cancel()  # it would answer another question
                self._forget_branch()
            self.caption = self._caption()

    def look(self) -> Job:
        """Load the schedules of all methods, in the background."""
        return self._look.submit(self._looking)

    def train(self, *, wait: bool = False) -> Job:
        """Train the run on: to the end of its plan, or a quarter of it further while its schedule is frozen.

        Args:
            wait: return when it has ended; a failure is raised then.
        """
        return self._fly(lambda run: run.advancing(run_on(run)), "Training ...", wait)

    def freeze(self, *, wait: bool = False) -> Job:
        """Hold the run's schedule where it is; a run that is training goes on."""
        return self._steered(lambda run: run.freeze(), wait)

    def release(self, *, wait: bool = False) -> Job:
        """Let the run's schedule go on; a run that is training goes on."""
        return self._steered(lambda run: run.release(), wait)

    def rewind(self, *, wait: bool = False) -> Job:
        """Take the run back to the kept moment nearest to the chosen one."""
        self._forget_branch()
        return self._steered(lambda run: run.rewind(self._nearest(run)), wait, go_on=False)

    def branch(self, *, wait: bool = False) -> Job:
        """Train the run to the end of its plan, then a second one from the chosen moment, for as many steps; compare them.

        Args:
            wait: return when it has ended; a failure is raised then.
        """
        with self._lock:
            self._forget_branch()
            chosen = dict(self._set)
            job = self._fly(lambda run: self._branching(run, chosen), "Training as planned ...", wait=False)
            self._branching_job = job
        if wait:
            job.result()
        return job

    def stop(self) -> None:
        """Ask what is being trained to stop; what there is stays, and can be trained on."""
        self._flight.cancel()

    def figure(self) -> Figure:
        """Return a static figure: the runs once there is one, the schedules before."""
        from qlab.plots.cockpit import schedules_figure, telemetry_figure

        if self._telemetry:
            return telemetry_figure({f"{name}": run for name, run in self._telemetry.items()})
        from qlab.cockpit import schedules

        return schedules_figure(self.schedules or schedules())

    def _kept(self) -> dict[str, Any]:
        return dict(self._set)

    @classmethod
    def from_state(cls, state: object) -> AnnealingCockpit:
        """Return a cockpit with the settings of `state`, a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        return cls(**_checked(cls._read(state, _FIELDS)))

    def _pictured(self) -> bool:
        return bool(self._telemetry) or self.schedules is not None

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _act(self, kind: object, content: Any) -> bool:
        acts: dict[object, Callable[[], Any]] = {
            "ready": lambda: self.look() if self.schedules is None else None,
            "choose": lambda: self.choose(**{k: v for k, v in content.items() if k != "type"}),
            "train": self.train,
            "stop": self.stop,
            "freeze": self.freeze,
            "release": self.release,
            "rewind": self.rewind,
            "branch": self.branch,
        }
        if not isinstance(kind, str) or kind not in acts:
            return False
        acts[kind]()
        return True

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _looking(self) -> Generator[Update, None, None]:
        def found() -> Schedules:
            from qlab.cockpit import schedules

            return schedules()

        yield Update(1.0, "", (yield from background(found, "Loading PyTorch ...")))

    def _looked(self, job: Job) -> None:
        """Show the schedules; runs in the job's thread."""
        if job.error is not None:
            self._complain(job.error)
        elif job.status == "done":
            with self._lock:
                self.schedules = job.value
                self.instruments = instruments(job.value)
                self.caption = self._caption()

    def _fly(self, work: Callable[[SteeredRun], Any], text: str, wait: bool) -> Job:
        """Do a piece of work on the run, which is made where there is none; it takes the place of what is being done."""
        with self._lock:
            chosen = dict(self._set)
            self._say(text, phase="flying", fraction=0.0)

        def flying() -> Generator[Update, None, None]:
            if self.run is None:
                run = yield from background(lambda: _made(chosen), "Loading PyTorch, the data and the net ...")
                with self._lock:
                    self.run = run
            yield from work(self.run)

        job = self._flight.submit(flying)
        if wait:
            job.result()
        return job

    def _steered(self, change: Callable[[SteeredRun], None], wait: bool, *, go_on: bool = True) -> Job:
        """Steer the run; one that is training goes on after it."""
        going = go_on and self.status.get("phase") == "flying"

        def work(run: SteeredRun) -> Generator[Update, None, None]:
            change(run)
            yield Update(0.0, "", run.telemetry())
            if going:
                yield from run.advancing(run_on(run))

        return self._fly(work, "Steering ...", wait)

    def _branching(self, run: SteeredRun, chosen: Mapping[str, Any]) -> Generator[Update, None, None]:
        if run.frozen:
            run.release()
        yield from run.advancing()
        step = self._nearest(run)
        other = run.branch(step, **CHANGES[chosen["change"]][1])
        with self._lock:
            self.other = other
        yield from other.advancing(run.step - step)

    def _flown(self, job: Job) -> None:
        """Show what has been trained so far; runs in the job's thread."""
        fresh = job.value is not None and job.value is not self._drawn
        with self._lock:
            if fresh and job is self._flight.job and self.run is not None:
                self._drawn = job.value
                self._show(job.value)
                self._say(job.text, phase="flying", fraction=job.fraction)
            elif job.status == "running" and job.value is None and job.text != self.status.get("text"):
                self._say(job.text, phase="flying")
            if job.status == "running":
                return
            self._say({"done": "Done.", "cancelled": "Stopped."}.get(job.status, "The run failed."), fraction=1.0)
            if job.error is not None:
                self._complain(job.error)
            elif job.status == "done" and self.other is not None and "the branch" in self._telemetry:
                self._compare()

    def _show(self, telemetry: Telemetry) -> None:
        which = "as planned" if telemetry.branched is None else "the branch"
        run = self.run if telemetry.branched is None else self.other
        if run is None:
            return
        self._telemetry[which] = telemetry
        drawn = packed(telemetry, run.frozen, run.progress)
        if which == "as planned":
            self.planned = drawn
        else:
            self.branched = drawn
        self.caption = self._caption()

    def _compare(self) -> None:
        from qlab.cockpit import compare

        self.comparison = compare(self._telemetry["as planned"], self._telemetry["the branch"])
        c = self.comparison
        self.verdict = {"measure": c.measure, "verdict": c.verdict, "text": c.summary()}
        self.caption = self._caption()

    def _forget_branch(self) -> None:
        with self._lock:
            self.other, self.comparison = None, None
            self._telemetry.pop("the branch", None)
            self.branched, self.verdict = {}, {}

    def _nearest(self, run: SteeredRun) -> int:
        wanted = self._set["moment"] * run.telemetry().total
        return min(run.kept, key=lambda step: abs(step - wanted))

    # ---- state of the view ----------------------------------------------------------------------------------------------

    def _caption(self) -> str:
        said = [f"{name.capitalize()}: {run.summary()}" for name, run in self._telemetry.items()]
        if self.comparison is not None:
            said.append(self.comparison.summary())
        if not said and self.schedules is not None:
            return self.schedules.summary()
        s = self._set
        return (
            " ".join(said)
            or f"{s['method']} on {s['data']}, {s['epochs']} epochs with seed {s['seed']}: not trained yet."
        )


def run_on(run: SteeredRun) -> int | None:
    """Return how many steps "train" goes on: a quarter of the plan while the schedule is frozen or over, else to its end."""
    return max(1, run.telemetry().total // 4) if run.frozen or run.progress >= 1 else None


def _made(chosen: Mapping[str, Any]) -> SteeredRun:
    from qlab.steering import steer

    return steer(chosen["method"], chosen["data"], epochs=chosen["epochs"], seed=chosen["seed"])


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that came from outside; a value out of range is told."""
    for name, shelf in (("method", CATALOG), ("data", _DATA), ("change", CHANGES)):
        if not isinstance(fields[name], str) or fields[name] not in shelf:
            raise InputError(f"{name} is {fields[name]!r:.40}; expected one of {', '.join(shelf)}.")
    for name, low, high in (("epochs", 1, _MAX_EPOCHS), ("seed", 0, 2**53 - 1)):
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"{name} is {value!r:.40}; expected a whole number from {low} to {high}.")
    moment = fields["moment"]
    if isinstance(moment, bool) or not isinstance(moment, int | float) or not 0 <= moment <= 1:
        raise InputError(f"moment is {moment!r:.40}; expected a share of the plan from 0 to 1.")
    return {name: fields[name] for name in _FIELDS} | {"moment": float(moment)}
