"""BitLab: the bits of a packed net, one dot product word by word, and what bits cost and save on this machine.

    from qlab.widgets import BitLab

    lab = BitLab(packed, x)     # as the last line of a cell: shows itself
    lab.choose(layer="hidden.0", unit=3)
    lab.look().result()         # runs the example; then lab.product is the dot product on view
    lab.measure("cost")         # in the background; lab.stop() ends it, lab.cost has what there is

No mathematics stands here: everything shown comes from `qlab.binary.inspect`. What takes time runs in a Job, so the kernel is
never blocked; the weights are on screen before the net has run.
"""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import traitlets
from qlab.widgets import payload
from qlab.widgets.view import View

from qlab.errors import InputError
from qlab.jobs import Job, Latest, Update, background

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from qlab.binary.cost import Cost, Crossover
    from qlab.binary.dots import DotProduct, LayerBits, LayerRun
    from qlab.binary.packed import PackedNet

__all__ = ["BitLab"]

_STATIC = pathlib.Path(__file__).parent / "static"
_READY = "Ready. Predict the sign of the sum, then add word by word."
_TIMED = 64  # examples in a timed batch, at most
_FIELDS = ("layer", "unit", "row", "column", "example")
_MEASURES = ("cost", "crossover")


class BitLab(View):
    """A window into a packed net.

    Args:
        packed: as `qlab.binary.compile` or `qlab.binary.load` return it, with a layer that runs on bits.
        x: (N, *input_shape), float32: the examples to look at; the first 64 are timed.
        layer: a name of `qlab.binary.inspect.layers`; the first by default.
        unit: output channel or neuron.
        position: (row, column) of a convolution's result; the middle by default.
        example: which of the batch.

    Raises:
        InputError: no packed net, no layer on bits, a wrong batch, unit, position or example.
        UnknownNameError: there is no such layer.
    """

    _esm = _STATIC / "bitlab.js"
    _css = _STATIC / "bitlab.css"

    layers: traitlets.List[Any] = traitlets.List().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    weights = traitlets.Dict().tag(sync=True)
    dot = traitlets.Dict().tag(sync=True)
    size = traitlets.Dict().tag(sync=True)
    latency = traitlets.Dict().tag(sync=True)
    crossing = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        packed: PackedNet,
        x: Tensor,
        layer: str | None = None,
        unit: int = 0,
        position: tuple[int, int] | None = None,
        example: int = 0,
    ) -> None:
        from qlab.binary import inspect
        from qlab.binary.cost import costing
        from qlab.binary.packed import check_batch

        names = inspect.layers(packed)
        check_batch(x, packed.graph.input_shape, packed.graph.image)
        self._packed, self._x = packed, x
        self._grids = payload.grids(packed)
        self._bits: dict[str, LayerBits] = {}
        self._run: LayerRun | None = None
        self._lock = threading.RLock()
        self._job: Job | None = None
        self._what = ""
        self._follow = Latest(self._followed)
        self.product: DotProduct | None = None
        self.cost: Cost = next(costing(packed, x[:_TIMED], [])).value  # the bytes; nothing has run yet
        self.crossover: Crossover | None = None
        settings = self._place = self._checked(  # the trait is a copy: a browser can write to it
            {"layer": names[0] if layer is None else layer, "unit": unit, "example": example}
            | ({} if position is None else dict(zip(("row", "column"), _pair(position), strict=True)))
        )
        super().__init__(
            layers=[self._described(name) for name in names],
            settings=settings,
            weights=payload.packed_bits(self._bits[settings["layer"]]),
            size=payload.sizes(self.cost),
            status={"phase": "idle", "text": _READY, "fraction": 0.0, "at": 0.0},
        )
        self.caption = self._caption()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    @property
    def bits(self) -> LayerBits:
        """The weights of the layer on view."""
        return self._bits[self._place["layer"]]

    def choose(
        self,
        layer: str | None = None,
        unit: int | None = None,
        position: tuple[int, int] | None = None,
        example: int | None = None,
    ) -> Job | None:
        """Look at another place; what is not given stays, as far as the layer has it.

        Returns:
            The job that runs the example, or None where that has been run already.

        Raises:
            InputError: no such unit, position or example; nothing is changed then.
            UnknownNameError: there is no such layer.
        """
        given: dict[str, Any] = {"layer": layer, "unit": unit, "example": example}
        if position is not None:
            given |= dict(zip(("row", "column"), _pair(position), strict=True))
        return self._choose({name: value for name, value in given.items() if value is not None})

    def look(self) -> Job:
        """Run the example through the net, in the background, and show the dot product."""
        layer, example = self._place["layer"], self._place["example"]
        return self._follow.submit(lambda: self._following(layer, example))

    def measure(self, what: str = "cost", *, wait: bool = False) -> Job:
        """Measure on this machine, in the background.

        Args:
            what: "cost" (seconds of a batch per backend) or "crossover" (the size from which packed products win).
            wait: return when it has ended; a failure is raised then.

        Raises:
            InputError: something else, or while another measurement runs.
        """
        from qlab.binary.cost import costing, crossing

        if what not in _MEASURES:
            raise InputError(f"{what!r:.40} cannot be measured; expected one of {', '.join(_MEASURES)}.")
        with self._lock:
            if self._job is not None and not self._job.wait(0):
                raise InputError(f"The {self._what} is being measured; stop that first.")
            work = crossing() if what == "crossover" else costing(self._packed, self._x[:_TIMED])
            job = self._job = Job(work, lambda job: self._measured(what, job), min_interval=0.1)
            self._what = what
            self._say("Getting ready to measure ...", phase=what, fraction=0.0)
            job.start()
        if wait:
            job.result()
        return job

    def stop(self) -> None:
        """Ask the measurement that is running to stop; what it has measured stays."""
        with self._lock:
            if self._job is not None and not self._job.wait(0):
                self._job.cancel()

    def figure(self) -> Figure:
        """Return a static figure: the dot product once the example has run, the layer's weights before."""
        return (self.bits if self.product is None else self.product).figure()

    def _kept(self) -> dict[str, Any]:
        return dict(self._place)

    @classmethod
    def from_state(cls, state: object, packed: PackedNet, x: Tensor) -> BitLab:
        """Return a BitLab that looks at the same place of `packed` and `x`; `state` is a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write, or a place that there is not.
        """
        fields = _fields(cls._read(state))
        lab = cls(packed, x)
        lab._choose(fields, look=False)
        return lab

    def _pictured(self) -> bool:
        return self.product is not None

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _act(self, kind: object, content: Any) -> bool:
        if kind == "ready":
            if self._run is None:
                self.look()
        elif kind == "choose":
            self._choose(_fields({name: content[name] for name in _FIELDS if name in content}))
        elif kind == "measure":
            what = content.get("what")
            self.measure(what if isinstance(what, str) else repr(what))
        elif kind == "stop":
            self.stop()
        else:
            return False
        return True

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _choose(self, changes: Mapping[str, Any], *, look: bool = True) -> Job | None:
        with self._lock:
            before = self._place
            if changes.get("layer", before["layer"]) != before["layer"]:
                # another layer: keep what it has too, and let the rest be its own
                chosen = self._checked({"layer": changes["layer"], "example": before["example"]} | dict(changes))
            else:
                chosen = self._checked(before | dict(changes))
            self._place, self.settings = chosen, chosen
            self._forgive()
            if chosen["layer"] != before["layer"]:
                self.weights = payload.packed_bits(self.bits)
            run = self._run
            if run is not None and (run.bits.layer, run.example) == (chosen["layer"], chosen["example"]):
                self._follow.cancel()
                self._show(run)
                return None
            self.product = None
            self.dot = {}
            self.caption = self._caption()
        return self.look() if look else None

    def _following(self, layer: str, example: int) -> Generator[Update, None, None]:
        from qlab.binary import inspect

        backend = self._packed.backend if self._packed.backend in inspect.KEEP_WORDS else "numba"
        run = yield from background(
            lambda: inspect.follow(self._packed, self._x, layer, example, backend), "Running the example ..."
        )
        yield Update(1.0, "", run)

    def _followed(self, job: Job) -> None:
        """Show the layer that an example has run through; runs in the job's thread."""
        if job.error is not None:
            self._complain(job.error)
        elif job.value is not None and job.status == "done":
            with self._lock:
                run = job.value
                if (run.bits.layer, run.example) == (self._place["layer"], self._place["example"]):
                    self._run = run
                    self._show(run)

    def _show(self, run: LayerRun) -> None:
        s = self._place
        self.product = run.dot(s["unit"], (s["row"], s["column"]) if run.grid else None)
        self.dot = payload.packed_dot(self.product)
        self.caption = self._caption()

    def _measured(self, what: str, job: Job) -> None:
        """Show what a measurement has found; runs in the job's thread."""
        if job.value is not None and what == "cost":
            self.cost = job.value
            self.latency = payload.latencies(job.value)
        elif job.value is not None:
            self.crossover = job.value
            self.crossing = payload.crossing(job.value)
        if job.status == "running":
            self._say(job.text, phase=what, fraction=job.fraction)
            return
        self._say(
            {"done": "Measured.", "cancelled": "Stopped."}.get(job.status, "The measurement failed."), fraction=1.0
        )
        if job.error is not None:
            self._complain(job.error)

    # ---- state of the view ----------------------------------------------------------------------------------------------

    def _checked(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return complete settings; a place that the layer does not have is told."""
        from qlab.binary import inspect
        from qlab.binary.dots import checked_index

        name = fields["layer"]
        if not isinstance(name, str) or name not in self._bits:
            if name not in inspect.layers(self._packed):
                inspect.dot(self._packed, self._x, name, 0)  # raises, and says what there is
            self._bits[name] = inspect.bits(self._packed, name)
        grid = self._grids[name]
        chosen = {
            "layer": name,
            "unit": checked_index("unit", fields.get("unit", 0), self._bits[name].units),
            "row": 0,
            "column": 0,
            "example": checked_index("example", fields.get("example", 0), len(self._x)),
        }
        if grid:
            for axis, count in zip(("row", "column"), grid, strict=True):
                chosen[axis] = checked_index(axis, fields.get(axis, count // 2), count)
        elif fields.get("row") or fields.get("column"):
            raise InputError(f"{name} is a linear layer and has no positions; leave row and column out.")
        return chosen

    def _described(self, name: str) -> dict[str, Any]:
        from qlab.binary import inspect

        bits = self._bits.setdefault(name, inspect.bits(self._packed, name))
        kind = "convolution" if bits.op.endswith("conv2d") else "linear"
        title = f"{name}: {kind}, {bits.units} units of {bits.k:,} signs"
        return {
            "name": name,
            "title": title,
            "units": bits.units,
            "grid": list(self._grids[name]),
            "examples": len(self._x),
        }

    def _caption(self) -> str:
        return self.bits.summary() + ("" if self.product is None else f" {self.product.summary()}")


def _pair(position: object) -> tuple[Any, Any]:
    if not isinstance(position, tuple | list) or len(position) != 2:
        raise InputError(f"position is {position!r:.40}; expected (row, column)")
    return position[0], position[1]


def _fields(value: object) -> dict[str, Any]:
    """Return fields of settings that came from outside; their values are checked against the net later."""
    if not isinstance(value, dict) or not set(value) <= set(_FIELDS):
        raise InputError(f"the settings are {value!r:.80}; expected a dictionary of {', '.join(_FIELDS)}.")
    if "layer" in value and not isinstance(value["layer"], str):
        raise InputError(f"layer is {value['layer']!r:.40}; expected a name.")
    return value
