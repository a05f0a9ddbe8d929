"""LandscapeExplorer: the loss of one net as it is shipped, as its latent weights would have it, and smoothed, on one plane.

    from qlab.widgets import LandscapeExplorer

    view = LandscapeExplorer(net, x, y)         # as the last line of a cell: shows itself
    view.smooth(20).result()                    # another sharpness of the smoothed function
    view.refine(wait=True)                      # to the last point; view.stop() keeps what there is
    view.landscape                              # the numbers: a qlab.diagnose Landscape

No mathematics stands here: every number comes from `qlab.diagnose`. Surfaces are coarse at first and grow finer in a Job, so the
kernel is never blocked.
"""

from __future__ import annotations

import math
import pathlib
import threading
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from qlab.widgets.view import View

from qlab.errors import InputError
from qlab.jobs import Job, Latest, Update

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from qlab.diagnose.landscape import Landscape
    from qlab.diagnose.trajectory import Trajectory

__all__ = ["LandscapeExplorer"]

_STATIC = pathlib.Path(__file__).parent / "static"
_MODES = ("frozen", "reestimated")
_SHARPNESS = (0.5, 5000.0)
_MAX_POINTS = 101  # a side: below a megabyte for three functions
_SOFT = "smoothed"


class LandscapeExplorer(View):
    """Three functions of one net on one plane and colour scale.

    Args:
        net: a method of the lab or any torch module, in eval mode; a net without quantizers has one function.
        x: (N, ...) inputs.
        y: (N,) labels.
        d1: a direction, as from `qlab.diagnose.directions`; by default that of `path`, or a random one with filter norms.
        d2: another.
        span: as of `qlab.diagnose.landscape.landscape`; by default 1, or what holds the path.
        points: a side, 5 to 101.
        sharpness: k of the smoothed function.
        batch_norm: "frozen" or "reestimated" at every point.
        path: a trajectory to draw on its plane.
        seed: of random directions.

    Raises:
        InputError: a net, data, direction or number that does not fit.
    """

    _esm = _STATIC / "landscape.js"
    _css = _STATIC / "landscape.css"

    settings = traitlets.Dict().tag(sync=True)
    surface = traitlets.Dict().tag(sync=True)
    path = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        d1: Mapping[str, Tensor] | None = None,
        d2: Mapping[str, Tensor] | None = None,
        span: Any = None,
        points: int = 51,
        sharpness: float = 5.0,
        batch_norm: str = "frozen",
        path: Trajectory | None = None,
        seed: int = 0,
    ) -> None:
        from qlab.diagnose.base import check, plain
        from qlab.diagnose.directions import random_direction
        from qlab.diagnose.views import has_batch_norm, usual_functions

        if not isinstance(points, int) or isinstance(points, bool) or not 5 <= points <= _MAX_POINTS:
            raise InputError(f"points is {points!r}; expected a whole number from 5 to {_MAX_POINTS}")
        check(net, x, y)
        self._net, self._x, self._y, self._points, self._trajectory = plain(net), x, y, points, path
        drawn = path.directions if path is not None else [random_direction(net, seed + i) for i in (0, 1)]
        self._directions = (d1 if d1 is not None else drawn[0], d2 if d2 is not None else drawn[1])
        own = path is not None and d1 is None and d2 is None
        self._span = span if span is not None else path.span(points=points) if own and path is not None else 1.0
        names = ("first principal component", "second principal component") if own else ("a", "b")
        self._names = names if d1 is None and d2 is None else ("first direction", "second direction")
        self._functions = usual_functions(net)
        self._norms = has_batch_norm(net)
        self._parts: dict[str, Landscape] = {}
        self._lock = threading.RLock()
        self._job = Latest(self._grown)
        self._k, self._mode = _sharpness(sharpness), _mode(batch_norm)
        super().__init__(
            status={"phase": "idle", "text": "", "fraction": 0.0},
            path={} if not own or path is None else _path(path),
        )
        self._told()
        self.on_msg(self._on_message)

    # ---- what a user calls --------------------------------------------------------------------------------------------

    @property
    def landscape(self) -> Landscape | None:
        """What there is so far; None before the first picture."""
        with self._lock:
            parts = [self._parts[key] for key in ("hard", "soft") if key in self._parts]
        if not parts or (len(parts) < 2 and _SOFT in self._functions and len(self._functions) > 1):
            return parts[0] if parts else None
        first, last = parts[0], parts[-1]
        merged = {key: getattr(first, key) | getattr(last, key) for key in ("loss", "accuracy", "noise")}
        return replace(first, **merged, evaluated=first.evaluated & last.evaluated, sharpness=last.sharpness)

    def refine(self, *, wait: bool = False) -> Job:
        """Go on to the last point, in the background.

        Args:
            wait: return when it is done; a failure is raised then.
        """
        job = self._job.submit(self._growing)
        if wait:
            job.result()
        return job

    def stop(self) -> None:
        """Stop refining; what there is stays."""
        self._job.cancel()

    def smooth(self, sharpness: float) -> Job:
        """Show the smoothed function with another sharpness; the other surfaces stay.

        Raises:
            InputError: a sharpness out of [0.5, 5000].
        """
        k = _sharpness(sharpness)
        with self._lock:
            if k != self._k:
                self._k = k
                self._parts.pop("soft", None)
            self._told()
        return self.refine()

    def norm(self, batch_norm: str) -> Job:
        """Look with batch norm "frozen" or "reestimated" at every point.

        Raises:
            InputError: something else.
        """
        mode = _mode(batch_norm)
        with self._lock:
            if mode != self._mode:
                self._mode = mode
                self._parts.clear()
            self._told()
        return self.refine()

    def figure(self) -> Figure:
        """Return the surfaces as a static figure.

        Raises:
            InputError: before the first picture.
        """
        from qlab.plots.landscape import landscape_figure

        land = self.landscape
        if land is None:
            raise InputError("nothing has been evaluated yet; call refine(wait=True) first")
        return landscape_figure(land, self._trajectory if self.path else None)

    def _kept(self) -> dict[str, Any]:
        return {"sharpness": self._k, "batch_norm": self._mode, "points": self._points}

    @classmethod
    def from_state(cls, state: object, net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> LandscapeExplorer:
        """Return the same view of a net and data; `state` is a dictionary or its JSON text, `options` are directions and the like.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        return cls(net, x, y, **(options | cls._read(state, ("sharpness", "batch_norm", "points"))))

    def _pictured(self) -> bool:
        return self.landscape is not None

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _act(self, kind: object, content: Any) -> bool:
        if kind == "ready":
            if self.landscape is None:
                self.refine()
        elif kind == "refine":
            self.refine()
        elif kind == "stop":
            self.stop()
        elif kind == "smooth":
            self.smooth(content.get("sharpness"))
        elif kind == "norm":
            self.norm(content.get("batch_norm"))
        else:
            return False
        return True

    # ---- work ---------------------------------------------------------------------------------------------------------

    def _growing(self) -> Generator[Update, None, None]:
        """Refine hard and smoothed functions in turns; every update holds the pictures of both."""
        from qlab.diagnose.quadtree import landscaping

        with self._lock:
            k, mode, parts = self._k, self._mode, dict(self._parts)
        hard = [f for f in self._functions if f != _SOFT]
        groups: dict[str, Any] = {"hard": (hard, 5.0)} | ({"soft": ([_SOFT], k)} if _SOFT in self._functions else {})
        going = {
            key: landscaping(
                self._net,
                self._x,
                self._y,
                *self._directions,
                span=self._span,
                points=self._points,
                functions=functions,
                sharpness=sharpness,
                batch_norm=mode,  # type: ignore[arg-type]  # checked
                names=self._names,
                resume=parts.get(key),
            )
            for key, (functions, sharpness) in groups.items()
        }
        done = dict.fromkeys(going, 0.0)
        ahead = {key: 0.0 if key not in parts else parts[key].evaluated.mean() for key in going}
        while going:
            for key in list(going):
                update = next(going[key], None)
                if update is None:
                    del going[key]
                    continue
                done[key] = update.fraction
                if update.fraction < ahead[key]:
                    continue  # a round that was shown before it was cut off
                share = sum(done.values()) / len(done)
                yield Update(share, f"{round(100 * share)} % of the points", (k, mode, key, update.value))

    def _grown(self, job: Job) -> None:
        """Show what has been evaluated; runs in the job's thread."""
        if job.value is not None:
            k, mode, key, land = job.value
            with self._lock:
                if mode == self._mode and (key == "hard" or k == self._k):
                    self._parts[key] = land
            self._told()
        if job.status == "running":
            self._say(job.text, phase="running", fraction=job.fraction)
            return
        words = {"done": "All points are evaluated.", "cancelled": "Stopped; what there is stays."}
        self._say(words.get(job.status, "The evaluation failed."), fraction=job.fraction)
        if job.error is not None:
            self._complain(job.error)

    def _told(self) -> None:
        """Send settings, surfaces and caption."""
        with self._lock:
            self.settings = {
                "sharpness": self._k,
                "range": list(_SHARPNESS),
                "batch_norm": self._mode,
                "modes": list(_MODES) if self._norms else [],
                "smooth": _SOFT in self._functions,
                "functions": list(self._functions),
                "names": list(self._names),
            }
            land = self.landscape
            if land is not None and set(land.functions) == set(self._functions):
                self.surface = _surface(land)
                self.caption = land.summary()
            elif land is None:
                self.caption = "Nothing has been evaluated yet."


def _surface(land: Landscape) -> dict[str, Any]:
    """Return a landscape for the view: float32 arrays [function][a][b], and the scale they are drawn in."""
    low, high, log = land.scale()

    def packed(name: str) -> bytes:
        return np.stack([getattr(land, name)[f] for f in land.functions]).astype("<f4").tobytes()

    i, j = land.centre()
    return {
        "functions": list(land.functions),
        "shape": [len(land.a), len(land.b)],
        "a": [float(land.a[0]), float(land.a[-1])],
        "b": [float(land.b[0]), float(land.b[-1])],
        "loss": packed("loss"),
        "accuracy": packed("accuracy"),
        "flipped": land.flipped.astype("<f4").tobytes() if np.isfinite(land.flipped).all() else b"",
        "evaluated": land.evaluated.astype(np.uint8).tobytes(),
        "complete": bool(land.evaluated.all()),
        "low": low,
        "high": high,
        "log": log,
        "sharpness": land.sharpness,
        "origin": [i, j],
        "centre": {f: float(land.loss[f][i, j]) for f in land.functions},
    }


def _path(path: Trajectory) -> dict[str, Any]:
    return {
        "a": path.a.astype("<f4").tobytes(),
        "b": path.b.astype("<f4").tobytes(),
        "steps": [int(s) for s in path.steps],
        "text": path.summary(),
    }


def _sharpness(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"sharpness is {value!r:.40}; expected a number from {_SHARPNESS[0]} to {_SHARPNESS[1]:g}")
    if not _SHARPNESS[0] <= value <= _SHARPNESS[1]:
        raise InputError(f"sharpness is {value:g}; expected {_SHARPNESS[0]} to {_SHARPNESS[1]:g}")
    return float(value)


def _mode(value: Any) -> str:
    if value not in _MODES:
        raise InputError(f"batch_norm is {value!r:.40}; expected one of {', '.join(_MODES)}")
    return str(value)
