"""GradientMismatch: the gradient that trains a binary net against the truth, and a surrogate of one's own to draw.

    from qlab.widgets import GradientMismatch

    view = GradientMismatch()            # a small net on two moons; or GradientMismatch(net, x, y)
    view.draw("tanh")                    # a named surrogate at the knots, or nine values of one's own
    view.look().result()                 # in the background otherwise; then view.mismatch and view.circulation
    view.train()                         # two moons with this surrogate, live; view.stop() ends it
    view.quantizer()                     # take it home: a quantizer for qlab.quantize, and view.code as Python text

No mathematics stands here: everything shown comes from `qlab.diagnose` and `qlab.quantizers.drawn`. The truth, exact flips, belongs
to the deployed net, which no surrogate changes: it is had once, and each new drawing costs one back-propagation and a few loops.
"""

from __future__ import annotations

import math
import pathlib
import threading
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import traitlets
from qlab.widgets import mismatch_payload as payload
from qlab.widgets.view import View

from qlab.errors import InputError, UnknownNameError
from qlab.jobs import Job, Latest, Update

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from qlab.diagnose.gradients import Mismatch
    from qlab.diagnose.honesty import Circulation
    from qlab.diagnose.moons import MoonsRun
    from qlab.quantizers.drawn import Drawn

__all__ = ["GradientMismatch"]

_STATIC = pathlib.Path(__file__).parent / "static"
_READY = "Ready. Guess first; then draw."
_WARM_UP = 60  # steps of the default net: trained enough to have something to be wrong about
_STEPS = 300
_LOOPS, _POINTS = 4, 32
_LIMIT = 20.0  # magnitude of a value, at most


class GradientMismatch(View):
    """Surrogate against truth, with a surrogate to draw.

    Args:
        net: a net in eval mode with `Sign` quantizers; a small one on two moons by default.
        x: (N, ...) inputs; the first 256 are looked at.
        y: (N,) labels.
        knots: where the drawing has its points, ascending.
        values: of the derivative at the knots; those of "clipped" by default.
        beta: what the logits are multiplied by; a small one keeps the loss from saturating.

    Raises:
        InputError: a net without `Sign`, in training mode, or without x and y; knots or values that are no drawing.
    """

    _esm = _STATIC / "mismatch.js"
    _css = _STATIC / "mismatch.css"

    drawing = traitlets.Dict().tag(sync=True)
    curves = traitlets.Dict().tag(sync=True)
    layers: traitlets.List[Any] = traitlets.List().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    honesty = traitlets.Dict().tag(sync=True)
    moons = traitlets.Dict().tag(sync=True)
    code = traitlets.Unicode().tag(sync=True)

    def __init__(
        self,
        net: nn.Module | None = None,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        knots: Sequence[float] | None = None,
        values: Sequence[float] | None = None,
        beta: float = 0.3,
    ) -> None:
        from qlab.quantizers.drawn import KNOTS, redrawn, sampled

        if net is not None:
            from qlab.diagnose.base import check

            if x is None or y is None:
                raise InputError("a net needs examples: give x of shape (N, ...) and labels y of shape (N,)")
            x, y = x[:256], y[:256]
            net, _ = check(net, x, y)
        self._lock = threading.RLock()
        self._net, self._x, self._y, self._beta = net, x, y, beta
        t = _numbers(KNOTS if knots is None else knots, "knots")
        v = sampled("clipped", t) if values is None else _numbers(values, "values")
        self._drawing = (t, tuple(v))
        drawn = self._drawn()
        if net is not None:
            redrawn(net, drawn)  # raises where there is nothing to draw
        self._known: Mismatch | None = None
        self._layer = ""
        self._serial = 0  # of the newest drawing that a browser has sent
        self.mismatch: Mismatch | None = None
        self.circulation: Circulation | None = None
        self.run: MoonsRun | None = None
        self._follow = Latest(self._followed)
        self._training: Job | None = None
        super().__init__(status={"phase": "idle", "text": _READY, "fraction": 0.0, "at": 0.0})
        self._show_drawing()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    def draw(self, values: str | Sequence[float]) -> Job:
        """Set the derivative at the knots, and look again in the background.

        Args:
            values: one number per knot, or the name of a surrogate, taken at the knots.

        Raises:
            InputError: values that are no drawing; nothing is changed then.
            UnknownNameError: no such surrogate.
        """
        from qlab.quantizers.drawn import drawn, sampled

        t, _ = self._drawing
        v = sampled(values, t) if isinstance(values, str) else _numbers(values, "values")
        if len(v) != len(t):
            raise InputError(f"there are {len(v)} values for {len(t)} knots")
        drawn(t, v)
        with self._lock:
            self._drawing = (t, tuple(v))
            self._show_drawing()
        return self.look()

    def look(self) -> Job:
        """Compare the drawing with the truth, in the background."""
        return self._follow.submit(self._looking)

    def choose(self, layer: str) -> None:
        """Show another layer's gradients.

        Raises:
            UnknownNameError: it is not among those compared.
        """
        names = [row["layer"] for row in self.layers]
        if layer not in names:
            raise UnknownNameError("layer", layer, names)
        with self._lock:
            self._layer = layer
            self.settings = {"layer": layer}

    def train(self, steps: int = _STEPS, *, wait: bool = False) -> Job:
        """Train a small binary net on two moons with this surrogate, in the background.

        Raises:
            InputError: while another run is going on, or steps that are no positive number.
        """
        from qlab.diagnose.moons import moons_training

        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 5000:
            raise InputError(f"steps is {steps!r:.20}; expected a whole number from 1 to 5000")
        with self._lock:
            if self._training is not None and not self._training.wait(0):
                raise InputError("A run is going on; stop it first.")
            drawn = self._drawn()
            job = self._training = Job(lambda: moons_training(drawn, steps), self._trained, min_interval=0.1)
            self._say("Starting ...", phase="training", fraction=0.0)
            job.start()
        if wait:
            job.result()
        return job

    def stop(self) -> None:
        """Ask the run to stop; what it has learned stays on view."""
        with self._lock:
            if self._training is not None and not self._training.wait(0):
                self._training.cancel()

    def quantizer(self) -> Drawn:
        """Return a fresh quantizer with the surrogate that is drawn."""
        from qlab.quantizers.drawn import Drawn

        return Drawn(*self._drawing)

    def figure(self) -> Figure:
        """Return a static figure: gradients against truth once they are compared, the drawing before."""
        from qlab.plots import surrogate_figure

        return surrogate_figure([self._drawn()]) if self.mismatch is None else self.mismatch.figure()

    def _kept(self) -> dict[str, Any]:
        t, v = self._drawing
        return {"knots": list(t), "values": list(v), "layer": self._layer}

    @classmethod
    def from_state(
        cls, state: object, net: nn.Module | None = None, x: Tensor | None = None, y: Tensor | None = None
    ) -> GradientMismatch:
        """Return a view with the same drawing; `state` is a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        settings = cls._read(state, ("knots", "values", "layer"))
        if not isinstance(settings["layer"], str):
            raise InputError(f"layer is {settings['layer']!r:.40}; expected a name.")
        view = cls(net, x, y, knots=settings["knots"], values=settings["values"])
        view._layer = settings["layer"]
        return view

    def _pictured(self) -> bool:
        return self.mismatch is not None

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _act(self, kind: object, content: Any) -> bool:
        if kind == "ready":
            if self.mismatch is None:
                self.look()
        elif kind == "draw":
            serial = content.get("serial", 0)
            if isinstance(serial, int) and 0 <= serial < 2**53:
                self._serial = max(self._serial, serial)
            self.draw(content.get("values"))
        elif kind == "choose":
            self.choose(content.get("layer"))
        elif kind == "train":
            self.train()
        elif kind == "stop":
            self.stop()
        else:
            return False
        return True

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _looking(self) -> Generator[Update, None, None]:
        """Yield (mismatch, circulation or None): gradients first, loops after."""
        from qlab.diagnose.gradients import believing, mismatching
        from qlab.diagnose.honesty import circulation
        from qlab.quantizers.drawn import redrawn

        drawn = self._drawn()
        if self._net is None:
            yield from self._default_net()
        assert self._net is not None
        assert self._x is not None
        assert self._y is not None
        net = redrawn(self._net, drawn)
        options: dict[str, Any] = {"loss": "cross_entropy", "beta": self._beta}
        if self._known is None:
            known: Mismatch | None = None
            for update in mismatching(net, self._x, self._y, references=["coordinate", "flip"], **options):
                known = update.value
                assert known is not None
                yield Update(update.fraction / 2, "Comparing with the truth ...", (known, None) if known.rows else None)
            assert known is not None
            self._known = known
        found = believing(self._known, net, self._x, self._y, **options)
        yield Update(0.6, "Walking in loops ...", (found, None))
        loops = circulation(net, self._x, self._y, loops=_LOOPS, points=_POINTS, **options)
        yield Update(1.0, "", (found, loops))

    def _default_net(self) -> Generator[Update, None, None]:
        from qlab.diagnose.moons import moons_data, moons_training

        run: MoonsRun | None = None
        for update in moons_training("clipped", _WARM_UP):
            yield Update(update.fraction / 4, "Training a small net on two moons ...")
            run = update.value
        assert run is not None
        x, y, *_ = moons_data()
        with self._lock:
            self._x, self._y, self._net = x[:256], y[:256], run.net
            if self.run is None:
                self.moons = payload.moons(run, x, y)

    def _followed(self, job: Job) -> None:
        """Show what a comparison has found; runs in the job's thread."""
        if job.error is not None:
            self._complain(job.error)
        elif job.value is not None:
            with self._lock:
                self.mismatch, loops = job.value
                self.layers = payload.layers(self.mismatch)
                names = [row["layer"] for row in self.layers]
                shown = self._layer if self._layer in names else names[0]  # the layer chosen may come later
                self.settings = {"layer": shown}
                if loops is not None:
                    self.circulation = loops
                    self.honesty = payload.honesty(loops)
                self.caption = self._caption()

    def _trained(self, job: Job) -> None:
        """Show how far a run has come; runs in the job's thread."""
        from qlab.diagnose.moons import moons_data

        if job.value is not None:
            x, y, *_ = moons_data()
            self.run = job.value
            self.moons = payload.moons(job.value, x, y)
        if job.status == "running":
            self._say(job.text, phase="training", fraction=job.fraction)
            return
        ended = {"done": "Trained. ", "cancelled": "Stopped. "}.get(job.status, "The run failed. ")
        self._say(ended + ("" if job.value is None else job.value.summary()), fraction=1.0)
        if job.error is not None:
            self._complain(job.error)

    # ---- state of the view ----------------------------------------------------------------------------------------------

    def _drawn(self) -> Any:
        from qlab.quantizers.drawn import drawn

        return drawn(*self._drawing)

    def _show_drawing(self) -> None:
        from qlab.quantizers.drawn import area, code

        t, v = self._drawing
        self.drawing = {
            "knots": list(t),
            "values": list(v),
            "area": area(t, v),
            "serial": self._serial,
            "at": time.time(),
        }
        self.curves = payload.curves(self._drawn(), t)
        self.code = code(t, v)
        self._forgive()

    def _caption(self) -> str:
        said = [] if self.mismatch is None else [payload.told(self.mismatch)]
        if self.circulation is not None and not math.isnan(self.circulation.mean):
            said.append(
                f"Mean circulation {self.circulation.mean:.3f}: 0 for the gradient of a function, 1 for a vortex."
            )
        return " ".join(said)


def _numbers(values: object, what: str) -> tuple[float, ...]:
    """Return numbers that came from outside."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InputError(f"{what} is {values!r:.40}; expected a sequence of numbers, or the name of a surrogate")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= _LIMIT for v in values):
        raise InputError(f"{what} must be numbers of magnitude at most {_LIMIT:g}")
    return tuple(float(v) for v in values)
