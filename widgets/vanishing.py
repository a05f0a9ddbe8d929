"""VanishingMicroscope: where the gradient dies in a quantized net, and at which temperature it wakes up.

    from qlab.widgets import VanishingMicroscope

    microscope = VanishingMicroscope(net, x, y)     # as the last line of a cell: shows itself
    microscope.set(beta=0.01, dtype="float64")
    microscope.found                                # the numbers: qlab.diagnose.vanishing.Vanishing
    microscope.caption                              # what the picture says, in words

No mathematics stands here: everything shown comes from `qlab.diagnose.vanishing`. Gradients for all temperatures are computed
once, so the slider only picks; other dtypes, the smoothed function and the Jacobian follow in a Job.
"""

from __future__ import annotations

import pathlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from qlab.widgets.view import View

from qlab.errors import InputError
from qlab.jobs import Job

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from qlab.diagnose.vanishing import Vanishing
    from qlab.diagnose.wake import Wake

__all__ = ["VanishingMicroscope"]

_STATIC = pathlib.Path(__file__).parent / "static"
_EXAMPLES = 200  # more are not looked at: the first picture is due within a second
_DTYPES = ("float32", "float64", "float16", "bfloat16")


class VanishingMicroscope(View):
    """A view of gradients per layer over temperatures and dtypes.

    Args:
        net: a method of the lab or any torch module, in eval mode.
        x: (N, ...) inputs; the first 200 are looked at.
        y: (N,) labels.
        beta: factor on the logits to begin with; the nearest of the grid from 1e-3 to 100.
        dtype: "float32", "float64", "float16" or "bfloat16", to begin with.
        batch: B where the loss is a mean over B examples.

    Raises:
        InputError: see `qlab.diagnose.base.check`; a beta that is not positive.
        UnknownNameError: no such dtype.
    """

    _esm = _STATIC / "vanishing.js"
    _css = _STATIC / "vanishing.css"

    layers: traitlets.List[Any] = traitlets.List().tag(sync=True)
    grid = traitlets.Dict().tag(sync=True)
    curves = traitlets.Dict().tag(sync=True)
    smoothed = traitlets.Dict().tag(sync=True)
    expected = traitlets.Bytes().tag(sync=True)
    gaps = traitlets.Dict().tag(sync=True)
    spectrum = traitlets.Dict().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)

    def __init__(
        self, net: nn.Module, x: Tensor, y: Tensor, beta: float = 1.0, dtype: str = "float32", batch: int = 1
    ) -> None:
        from qlab.diagnose.vanishing import vanishings

        self._lock = threading.RLock()
        self._examples = len(x)
        self._work = vanishings(net, x[:_EXAMPLES], y[:_EXAMPLES], dtypes=_order(dtype), batch=batch)
        first = next(self._work)
        self.found: Vanishing = first.value
        self._index, self._dtype = self.found.nearest(beta), dtype
        self._job: Job | None = None
        super().__init__(status={"phase": "idle", "text": "", "fraction": first.fraction, "at": 0.0})
        self._show()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """The factor on the logits that is on view."""
        return float(self.found.betas[self._index])

    @property
    def dtype(self) -> str:
        """The dtype that is on view."""
        return self._dtype

    def set(self, beta: float | None = None, dtype: str | None = None) -> None:
        """Look at another temperature or dtype.

        Raises:
            InputError: beta is no positive number, or the dtype is still being computed.
            UnknownNameError: there is no such dtype.
        """
        with self._lock:
            index = self._index if beta is None else self.found.nearest(_number(beta))
            chosen = self._dtype if dtype is None else dtype
            if chosen not in self.found.wakes:
                _order(chosen)
                if chosen in self.found.failed:
                    raise InputError(self.found.failed[chosen])
                raise InputError(f"{chosen} is still being computed; wait for look().result(), or look at another one")
            self._index, self._dtype = index, chosen
            self._caption()
            self._forgive()

    def look(self) -> Job:
        """Compute the rest in the background: other dtypes, the smoothed function, mean field, the Jacobian."""
        with self._lock:
            if self._job is None:
                self._job = Job(self._work, self._followed)
                self._say("Computing ...", phase="running")
                self._job.start()
            return self._job

    def stop(self) -> None:
        """Ask what is running to stop; what has been computed stays."""
        job = self._job
        if job is not None:
            job.cancel()

    def figure(self) -> Figure:
        """Return a static figure of the view."""
        return self.found.figure(self.beta, self._dtype)

    def _kept(self) -> dict[str, Any]:
        return {"beta": self.beta, "dtype": self._dtype}

    @classmethod
    def from_state(cls, state: object, net: nn.Module, x: Tensor, y: Tensor) -> VanishingMicroscope:
        """Return a microscope with the same view of `net` and data; `state` is a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        settings = cls._read(state, ("beta", "dtype"))
        return cls(net, x, y, _number(settings["beta"]), settings["dtype"])

    def _pictured(self) -> bool:
        return self._job is not None

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _act(self, kind: object, content: Any) -> bool:
        if kind == "ready":
            self.look()
        elif kind == "set":
            self.set(content.get("beta"), content.get("dtype"))
        elif kind == "stop":
            self.stop()
        else:
            return False
        return True

    # ---- state of the view ----------------------------------------------------------------------------------------------

    def _followed(self, job: Job) -> None:
        """Show what has been computed so far; runs in the job's thread."""
        with self._lock:
            if job.value is not None:
                self.found = job.value
                self._show()
            if job.status == "running":
                text, phase = f"Computed: {job.text}.", "running"
            else:
                text = {"done": "", "cancelled": "Stopped; what is missing was not computed."}.get(
                    job.status, "Failed."
                )
                phase = "idle"
            self._say(text, phase=phase, fraction=job.fraction)
            if job.error is not None:
                self._complain(job.error)

    def _show(self) -> None:
        from qlab.diagnose.vanishing import smallest

        found, s = self.found, self.found.layers
        means = [None] * len(s.names) if found.jacobian is None else [float(m) for m in found.jacobian.mean]
        self.layers = [
            {
                "name": name,
                "kind": s.kinds[i],
                "exact": bool(s.exact[i]),
                "saturated": _share(s.saturation[i]),
                "degenerate": _share(s.degenerate[i]),
                "dead": _share(s.dead[i]),
                "gain": means[i],
            }
            for i, name in enumerate(s.names)
        ]
        self.grid = {
            "betas": [float(b) for b in found.betas],
            "dtypes": list(_order(self._dtype)),
            "thresholds": {name: list(found.thresholds(name)) for name in found.wakes},
            "smallest": {name: smallest(name) for name in found.wakes},
            "examples": int(s.gap.size),
            "left_out": self._examples - int(s.gap.size),
            "k": found.k,
        }
        self.curves = {n: _curve(w) | {"regimes": _bytes(found.regimes(n))} for n, w in found.wakes.items()}
        self.smoothed = {} if found.smoothed is None else _curve(found.smoothed)
        expected = found.log_expected()
        if expected is not None:
            self.expected = _bytes(expected)
        edges, shares, wrong = found.gaps()
        self.gaps = {"edges": _bytes(edges), "shares": _bytes(shares), "misclassified": wrong}
        if found.jacobian is not None:
            edges, shares = found.spectrum()
            exact = bool(found.jacobian.exact[0])
            self.spectrum = {
                "edges": _bytes(edges),
                "shares": _bytes(shares),
                "beta1": found.jacobian.beta1 if np.isfinite(found.jacobian.beta1) else None,
                "exact": exact,
            }
        self._caption()

    def _caption(self) -> None:
        self.settings = {"index": self._index, "dtype": self._dtype}
        self.caption = self.found.summary(self.beta, self._dtype)


def _order(dtype: object) -> tuple[str, ...]:
    """Return the dtypes to compute, the one on view first."""
    from qlab.diagnose.vanishing import DTYPES
    from qlab.errors import UnknownNameError

    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    return (dtype, *(name for name in _DTYPES if name != dtype))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"beta is {value!r:.40}; expected a positive number")
    return float(value)


def _curve(w: Wake) -> dict[str, Any]:
    """Return quartiles of norms (3, K, L) as log10 and shares lost (K, L): float32 cannot hold what float64 has."""
    return {"norms": _bytes(w.log_quartiles()), "lost": _bytes(w.lost)}


def _bytes(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def _share(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
