"""RobustnessLab: accuracy against eps by the worst case over attacks, with the honesty panel beside it, and each example in detail.

    from qlab.widgets import RobustnessLab

    view = RobustnessLab()                                  # two nets of the lab's own; as the last line of a cell: shows itself
    view = RobustnessLab({"float": a, "binary": b}, (x, y), eps=[0.02, 0.05, 0.1], attacks="quick")
    view.choose(attacks=["plain PGD"])
    view.run().result()                                     # in the background otherwise
    view.evaluations["binary"].summary()                    # the numbers: qlab.attacks.evaluation.Evaluation

No mathematics stands here: everything shown comes from `qlab.attacks`: `suite.evaluating`, `honesty`, `samples`. No robust accuracy
is stated of a net whose attacks or whose panel have not run to the end; its curve is drawn as unfinished.
"""

from __future__ import annotations

import math
import pathlib
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import traitlets
from qlab.widgets.robustness_payload import answer_of, curve_of, page_of, panel_of, pictures_of, sample_of, verdict
from qlab.widgets.view import Chosen

from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job, Latest, Update

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from qlab.attacks.base import Attack
    from qlab.attacks.evaluation import Evaluation

__all__ = ["RobustnessLab"]

_STATIC = pathlib.Path(__file__).parent / "static"
_NETS = ("float", "binary")  # those of `qlab.attacks.robustness_examples`, which imports torch; so are the radii
_EPS = (0.02, 0.05, 0.1, 0.15, 0.2)
_SUITES = ("standard", "quick", "search")  # those of `qlab.attacks.suite`
_PLAIN = "plain PGD"
_SAMPLES = 100
_MOST = 297  # unseen digits
_OPTIONS = ("norm", "low", "high", "samples", "twin", "root", "budget", "seed")
_FIELDS = ("nets", "suite", "attacks", "eps", "example")


class RobustnessLab(Chosen):
    """A view of the robustness of several nets, and of whether it can be trusted.

    Args:
        nets: by name, in eval mode; by default a float and a binary net of the lab's own, trained in seconds.
        data: a data set of the lab, or inputs and labels (x, y) as the nets take them.
        eps: radii in the units of the data, one or more; needed where nets are given.
        attacks: a name of `qlab.attacks.suite.SUITES`, or attacks by title in the order they are to run.
        example: which one is looked at in detail, to begin with.
        options: more of `qlab.attacks.suite.evaluating`: norm, low, high, samples (100 by default), twin, root, budget, seed.

    Attributes:
        evaluations: what was found so far, by net; those of nets that are not chosen are dropped with the next run.

    Raises:
        InputError, UnknownNameError: as `qlab.attacks.suite.evaluating`.
    """

    _esm = _STATIC / "robustness.js"
    _css = _STATIC / "robustness.css"

    settings = traitlets.Dict().tag(sync=True)
    choices = traitlets.Dict().tag(sync=True)
    curves: traitlets.List[Any] = traitlets.List().tag(sync=True)
    panels: traitlets.List[Any] = traitlets.List().tag(sync=True)
    answer = traitlets.Dict().tag(sync=True)
    pictures = traitlets.Dict().tag(sync=True)
    sample = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        nets: Mapping[str, nn.Module] | None = None,
        data: Any = None,
        eps: Sequence[float] | float | None = None,
        attacks: str | Mapping[str, Attack] = "quick",
        example: int = 0,
        **options: Any,
    ) -> None:
        if (nets is None) != (data is None):
            raise InputError("give nets and data together, or none of them for two nets of the lab's own")
        self._own = nets is None
        if nets is not None and eps is None:
            raise InputError("give eps: one or more radii in the units of the data, [0, 1] for pictures")
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise InputError(f"there is no option {unknown[0]!r:.40}; expected {', '.join(_OPTIONS)}")
        self._nets: dict[str, nn.Module] = {} if nets is None else _named(nets)
        self._names = _NETS if nets is None else tuple(self._nets)
        self._data = data
        self._given = attacks
        self._options = {"samples": _SAMPLES} | options
        self._lock = threading.RLock()
        self._latest = Latest(self._told, min_interval=0.1)
        self._offers: dict[str, dict[str, Attack]] = {}
        self._complete = False
        self._stale = False  # whether what is chosen is not what was run
        self.evaluations: dict[str, Evaluation] = {}
        self._radii = _EPS if eps is None else _grid(eps)
        self._place: dict[str, Any] = {
            "nets": list(self._names),
            "suite": attacks if isinstance(attacks, str) else "own",
            "attacks": None,
            "eps": self._radii[len(self._radii) // 2],
            "example": 0,
        }
        if isinstance(attacks, str) and attacks not in _SUITES:
            raise UnknownNameError("suite of attacks", attacks, _SUITES)
        if not self._own:  # refuses here what cannot be attacked; clean accuracies are there at once
            self._place = self._checked({})
            for update in self._work(dict(self._place), begin=True):
                self.evaluations = update.value or self.evaluations
        self._place |= {"example": self._checked({"example": example})["example"]}
        super().__init__(status={"phase": "idle", "text": "Ready.", "fraction": 0.0, "at": 0.0})
        self._show()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    def choose(self, **changes: Any) -> None:
        """Change what is chosen; what is not given stays.

        Nets, suite and attacks count from the next run on, eps and example change the view at once.

        Args:
            changes: nets: names; suite: a name of `SUITES`, which chooses all of its attacks; attacks: titles of that suite, or
                "plain PGD", which is always offered beside a suite; eps: a radius of the grid; example: a number.

        Raises:
            InputError: no such field, net, attack, radius or example; nothing is changed then.
            UnknownNameError: no such suite.
        """
        with self._lock:
            wrong = sorted(set(changes) - set(_FIELDS))
            if wrong:
                raise InputError(f"there is no field {wrong[0]!r:.40}; expected {', '.join(_FIELDS)}")
            if "suite" in changes and "attacks" not in changes and changes["suite"] != self._place["suite"]:
                changes = changes | {"attacks": None}
            before, self._place = self._place, self._checked(changes)
            runs = ("nets", "suite", "attacks")
            self._stale |= any(before[name] != self._place[name] for name in runs)
            self._forgive()
            self._tell_place()
            self._show_examples()

    def run(self) -> Job:
        """Evaluate the chosen nets by the chosen attacks in the background, and show what is known as it comes."""
        with self._lock:
            place = dict(self._place)
            self._complete = self._stale = False
            self._say("Attacking ...", phase="running", fraction=0.0)
            self._tell_place()
        return self._latest.submit(lambda: self._work(place))

    def figure(self) -> Figure:
        """Return accuracies against eps of the nets that are finished; runs the chosen attacks where none is."""
        from qlab.plots.robustness import evaluation_figure

        finished = self._finished()
        if not finished:
            for update in self._work(dict(self._place)):
                self.evaluations = update.value or self.evaluations
            with self._lock:
                self._complete = True
                self._show()
            finished = self._finished()
        if not finished:
            raise InputError(f"no net was evaluated to the end, so there is nothing to draw. {self.caption}")
        figure = evaluation_figure(finished)
        verdicts = [f"{name}: {verdict(e.honesty)}" for name, e in finished.items()]
        figure.suptitle("Honesty panel\n" + "\n".join(verdicts), fontsize=8)
        figure.set_label(f"{figure.get_label()} {self.caption}")
        return figure

    def _finished(self) -> dict[str, Evaluation]:
        return {name: e for name, e in self.evaluations.items() if e.complete}

    @classmethod
    def from_state(
        cls,
        state: object,
        nets: Mapping[str, nn.Module] | None = None,
        data: Any = None,
        eps: Sequence[float] | float | None = None,
        attacks: str | Mapping[str, Attack] = "quick",
        **options: Any,
    ) -> RobustnessLab:
        """Return a view with the same choices; `state` is a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        settings = cls._read(state, _FIELDS)
        view = cls(nets, data, eps, attacks, **options)
        view._place = view._checked(settings)
        view._show()
        return view

    def _pictured(self) -> bool:
        return bool(self._finished())

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self.evaluations and self.status["phase"] != "running":
            self._begin()

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _begin(self) -> Job:
        """Train the lab's own nets and look at their clean accuracy, without any attack."""
        self._say("Training two small nets ...", phase="running", fraction=0.0)
        place = dict(self._place)
        return self._latest.submit(lambda: self._work(place, begin=True))

    def _work(self, place: dict[str, Any], begin: bool = False) -> Generator[Update, None, None]:
        """Yield evaluations so far, clean accuracies of all nets first; no more than these to begin with."""
        from qlab.attacks.suite import evaluating

        found: dict[str, Evaluation] = {}
        share = 0.0
        if self._own and len(self._nets) < len(_NETS):
            share = 0.9 if begin else 0.1
            yield from self._training(place, share)
        offered = self._offered(place["suite"])
        attacks = offered if place["attacks"] is None else {t: a for t, a in offered.items() if t in place["attacks"]}
        if place["attacks"] is None:
            attacks.pop(_PLAIN, None)
        runs = {n: self._run_of(evaluating, n, attacks) for n in place["nets"]}
        for name, run in runs.items():
            found[name] = next(run).value
            yield Update(share, "clean accuracy", dict(found))
        if begin:
            return
        for k, (name, run) in enumerate(runs.items()):
            for update in run:
                value = None
                if update.value is not None:
                    found[name] = update.value
                    value = dict(found)
                fraction = share + (1 - share) * (k + update.fraction) / len(runs)
                yield Update(fraction, f"{name}: {update.text}", value)

    def _run_of(self, evaluating: Any, name: str, attacks: Mapping[str, Attack]) -> Generator[Update, None, None]:
        run: Generator[Update, None, None] = evaluating(
            self._nets[name], self._data, self._radii, attacks=attacks, **self._options
        )
        return run

    def _training(self, place: dict[str, Any], share: float) -> Generator[Update, None, None]:
        """Train the lab's own nets; each is evaluated without an attack as soon as it is there."""
        from qlab.attacks.robustness_examples import preparing
        from qlab.attacks.suite import evaluating

        offered = self._offered(place["suite"])
        found: dict[str, Evaluation] = {}
        nets: dict[str, nn.Module] = {}
        for update in preparing(self._options["samples"], self._options.get("seed", 0)):
            if update.value is not None:
                nets, self._data = update.value.nets, (update.value.x, update.value.y)
                self._nets = dict(nets)
                for name in nets:
                    if name in place["nets"] and name not in found:
                        found[name] = next(self._run_of(evaluating, name, offered)).value
            yield Update(share * update.fraction, update.text, dict(found) or None)

    def _offered(self, suite: str) -> dict[str, Attack]:
        """Return the attacks to choose from: those of a suite and plain PGD, or the user's own."""
        if isinstance(self._given, Mapping):
            return dict(self._given)
        if suite not in self._offers:
            from qlab.attacks.pgd import PGD
            from qlab.attacks.suite import suite as attacks_of

            seed, norm = self._options.get("seed", 0), self._options.get("norm", "linf")
            known = attacks_of(suite, norm, self._options.get("twin"), seed)
            self._offers[suite] = {_PLAIN: PGD(40, seed=seed), **known}
        return dict(self._offers[suite])

    def _told(self, job: Job) -> None:
        """Show what the work has found; runs in the job's thread."""
        with self._lock:
            before, complete = self.evaluations, self._complete
            if job.value is not None:
                self.evaluations = job.value
            self._complete = job.status == "done" and bool(self._finished())
            if self.evaluations is not before or self._complete != complete:
                self._show()
        if job.status == "running":
            self._say(f"{job.text} ...", phase="running", fraction=job.fraction)
            return
        ready = "Done." if self._complete else "Ready."
        ended = {"done": ready, "cancelled": "Stopped; what was found so far stays."}
        self._say(ended.get(job.status, "The evaluation failed."), fraction=job.fraction)
        if job.error is not None:
            self._complain(job.error)

    # ---- state of the view ----------------------------------------------------------------------------------------------

    def _checked(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return complete settings; what there is not is told."""
        place = self._place | dict(changes)
        place["nets"] = _some("net", place["nets"], self._names)
        suites = ("own",) if isinstance(self._given, Mapping) else _SUITES
        if not isinstance(place["suite"], str) or place["suite"] not in suites:
            raise UnknownNameError("suite of attacks", place["suite"], suites)
        if place["attacks"] is not None:
            place["attacks"] = _some("attack", place["attacks"], tuple(self._offered(place["suite"])))
        eps = place["eps"]
        hits = [v for v in self._radii if not isinstance(eps, bool) and isinstance(eps, int | float) and _near(v, eps)]
        if not hits:
            known = ", ".join(f"{v:.4g}" for v in self._radii)
            raise InputError(f"eps is {eps!r:.40}; expected a radius of the grid: {known}")
        place["eps"] = hits[0]
        example, most = place["example"], self._count()
        if isinstance(example, bool) or not isinstance(example, int) or not 0 <= example < most:
            raise InputError(f"example is {example!r:.40}; expected a whole number from 0 to {most - 1}")
        return place

    def _count(self) -> int:
        """Return how many examples there are."""
        if self.evaluations:
            return len(next(iter(self.evaluations.values())))
        return min(self._options["samples"] or _MOST, _MOST) if self._own else 1

    def _tell_place(self) -> None:
        """Send settings and choices."""
        known = self.evaluations or not self._own  # else torch would be imported before the view is there
        titles = list(self._offered(self._place["suite"])) if known else []
        chosen = self._place["attacks"]
        if chosen is None:
            chosen = [title for title in titles if title != _PLAIN or isinstance(self._given, Mapping)]
        self.settings = self._kept() | {"attacks": chosen}
        self.choices = {
            "nets": list(self._names),
            "suites": ["own"] if isinstance(self._given, Mapping) else list(_SUITES),
            "attacks": titles,
            "eps": list(self._radii),
            "examples": self._count(),
            "stale": self._stale,
        }

    def _show(self) -> None:
        """Send what is known."""
        self._tell_place()
        slots = self._slots()
        self.curves = [curve_of(name, slots[name], e) for name, e in self.evaluations.items()]
        self.panels = [panel_of(name, slots[name], e.honesty) for name, e in self.evaluations.items()]
        self.answer = answer_of(self.evaluations)
        self._show_examples()
        parts = [f"{name}: {e.summary()}" for name, e in self.evaluations.items()]
        self.caption = " ".join(parts) or "The nets are not there yet."

    def _show_examples(self) -> None:
        """Send the page of examples on view, and the one that is looked at."""
        if not self.evaluations:
            self.pictures, self.sample = {}, {}
            return
        from qlab.attacks.samples import samples

        e, example = next(iter(self.evaluations.values())), self._place["example"]
        page = page_of(example, len(e), math.prod(e.x.shape[1:]), len(self.evaluations))
        found = {name: samples(self._asked(name), e, page) for name, e in self.evaluations.items()}
        row = self._radii.index(self._place["eps"])
        self.pictures = pictures_of(found, self._slots(), row)
        self.sample = sample_of(found, self._slots(), example)

    def _asked(self, name: str) -> nn.Module:
        """Return the net that takes what an evaluation holds."""
        if isinstance(self._data, tuple | list):
            return self._nets[name]
        from qlab.attacks.victim import pixels

        return pixels(self._nets[name], self._data)

    def _slots(self) -> dict[str, int]:
        return {name: slot for slot, name in enumerate(self._names)}


def _named(nets: object) -> dict[str, nn.Module]:
    if not isinstance(nets, Mapping) or not nets or not all(isinstance(name, str) and name for name in nets):
        raise InputError(f"nets is a {type(nets).__name__}; expected one or more nets by name, as in {{'float': net}}")
    return dict(nets)


def _grid(eps: Sequence[float] | float) -> tuple[float, ...]:
    from qlab.attacks.suite import _radii

    return _radii(eps)


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def _some(what: str, chosen: object, known: tuple[str, ...]) -> list[str]:
    """Return at least one of the names known, in their order."""
    if not isinstance(chosen, list | tuple) or not chosen or any(name not in known for name in chosen):
        raise InputError(f"the {what}s are {chosen!r:.80}; expected at least one of {', '.join(known)}")
    return [name for name in known if name in chosen]
