"""AttributionGuard: maps of a float net and its quantized twin next to exact ablation, with what each of them explains.

    from qlab.widgets import AttributionGuard

    view = AttributionGuard(float_net, quantized_net, x, y)     # as the last line of a cell: shows itself
    view.choose(example=3, patch=2)
    view.run().result()                                         # in the background otherwise; view.twins has what there is
    view.stop()

No mathematics stands here: everything shown comes from `qlab.diagnose.attribution_twins`. The work runs in a Job that brings exact
ablation first and one method more at a time; what a stopped one has found stays.
"""

from __future__ import annotations

import math
import pathlib
import threading
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import traitlets
from qlab.widgets.view import View

from qlab.errors import InputError
from qlab.jobs import Job, Latest, Update

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from qlab.diagnose.attribution_maps import AttributionMap, Attributions
    from qlab.diagnose.attribution_twins import Twins

__all__ = ["AttributionGuard"]

_STATIC = pathlib.Path(__file__).parent / "static"
_PATCHES = (1, 2, 4)
_MOST = 64  # examples of a batch
_READY = "Ready."


class AttributionGuard(View):
    """Attribution maps of two nets, guarded.

    Args:
        float_net: in eval mode.
        quantized_net: its quantized twin, in eval mode.
        x: (N, *shape), at most 64 inputs: pictures or vectors.
        target: (N,) int64 classes, or one class.
        methods: names of `qlab.diagnose.attribution_methods.METHODS`; saliency, integrated gradients, DeepLift and, where both nets
            have a convolution, Grad-CAM by default.
        patch: side of the square that counts as one feature: 1, 2 or 4.
        example: which of the batch is on view.
        settings: more of `qlab.diagnose.attribution.attribute`, such as baseline, steps or seed.

    Raises:
        InputError, UnknownNameError: as `qlab.diagnose.attribution.attribute`; more than 64 inputs.
    """

    _esm = _STATIC / "attribution.js"
    _css = _STATIC / "attribution.css"

    settings = traitlets.Dict().tag(sync=True)
    choices = traitlets.Dict().tag(sync=True)
    picture = traitlets.Dict().tag(sync=True)
    maps = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        float_net: nn.Module,
        quantized_net: nn.Module,
        x: Tensor,
        target: int | Tensor,
        methods: tuple[str, ...] | None = None,
        patch: int = 1,
        example: int = 0,
        **settings: Any,
    ) -> None:
        from qlab.diagnose.attribution_methods import METHODS
        from qlab.diagnose.base import plain

        if "features" in settings:
            raise InputError("the view groups features into patches: give patch=1, 2 or 4 in place of features.")
        self._nets = (plain(float_net), plain(quantized_net))
        self._x, self._target = x, target
        if methods is None:
            methods = ("saliency", "integrated_gradients", "deeplift", *self._cam())
        self._options = {"methods": methods, **settings}
        self._lock = threading.RLock()
        self._latest = Latest(self._told, min_interval=0.1)
        self.twins: Twins | None = None
        if len(x) > _MOST:
            raise InputError(f"the view is for at most {_MOST} inputs; it was given {len(x)}. Give x[:{_MOST}].")
        self._place = {"example": 0, "patch": patch}
        next(self._work(self._checked({"patch": patch})["patch"]))  # refuses here what cannot be attributed
        self._place = self._checked({"patch": patch, "example": example})
        super().__init__(
            settings=dict(self._place),
            choices={
                "examples": len(x),
                "patches": [p for p in _PATCHES if p <= max(x.shape[1:])],
                "methods": [{"name": m, "title": METHODS[m].title} for m in methods if m != "feature_ablation"],
            },
            status={"phase": "idle", "text": _READY, "fraction": 0.0},
        )
        self._show()
        self.on_msg(self._on_message)

    def _cam(self) -> tuple[str, ...]:
        from torch import nn

        both = all(any(isinstance(m, nn.Conv2d) for m in net.modules()) for net in self._nets)
        return ("layer_gradcam",) if both else ()

    # ---- what a user calls --------------------------------------------------------------------------------------------

    def choose(self, example: int | None = None, patch: int | None = None) -> Job | None:
        """Look at another example, or group features otherwise; what is not given stays.

        Returns:
            The job that computes the maps again, or None where they are there already.

        Raises:
            InputError: no such example or patch; nothing is changed then.
        """
        given = {"example": example, "patch": patch}
        return self._choose({name: value for name, value in given.items() if value is not None})

    def run(self) -> Job:
        """Compute the maps of both nets in the background, and show them as they come."""
        patch = self._place["patch"]
        with self._lock:
            self.twins = None
            self._show()
            self._say("Running the nets ...", phase="running", fraction=0.0)
        return self._latest.submit(lambda: self._work(patch))

    def stop(self) -> None:
        """Ask the work to stop; the maps found so far stay."""
        self._latest.cancel()

    def figure(self) -> Figure:
        """Return a static figure of the example on view; waits for the maps where there are none yet."""
        if self.twins is None:
            self._find()
        assert self.twins is not None
        return self.twins.figure(self._place["example"])

    def _kept(self) -> dict[str, Any]:
        return dict(self._place)

    @classmethod
    def from_state(
        cls,
        state: object,
        float_net: nn.Module,
        quantized_net: nn.Module,
        x: Tensor,
        target: int | Tensor,
        **settings: Any,
    ) -> AttributionGuard:
        """Return a view of the same example and patch; `state` is a dictionary or its JSON text.

        Raises:
            InputError: for anything that `state()` does not write.
        """
        return cls(float_net, quantized_net, x, target, **_fields(cls._read(state)), **settings)

    def _pictured(self) -> bool:
        return self.twins is not None

    # ---- messages from the browser ------------------------------------------------------------------------------------

    def _act(self, kind: object, content: Any) -> bool:
        if kind == "ready":
            if self.twins is None and self.status["phase"] != "running":
                self.run()
        elif kind == "choose":
            self._choose(_fields({name: content[name] for name in ("example", "patch") if name in content}))
        elif kind == "run":
            self.run()
        elif kind == "stop":
            self.stop()
        else:
            return False
        return True

    # ---- work -----------------------------------------------------------------------------------------------------------

    def _work(self, patch: int) -> Generator[Update, None, None]:
        from qlab.diagnose.attribution_twins import twinning

        for update in twinning(*self._nets, self._x, self._target, features=patch, **self._options):
            yield Update(update.fraction, update.text, None if update.value is None else (patch, update.value))

    def _find(self) -> None:
        """Compute the maps here and now."""
        patch = self._place["patch"]
        for update in self._work(patch):
            last = update.value
        with self._lock:
            self.twins = last[1]
            self._show()

    def _told(self, job: Job) -> None:
        """Show what the work has found; runs in the job's thread."""
        with self._lock:
            if job.value is not None and job.value[0] == self._place["patch"]:
                self.twins = job.value[1]
                self._show()
        if job.status == "running":
            self._say(job.text, phase="running", fraction=job.fraction)
            return
        self._say(
            {"done": "Done.", "cancelled": "Stopped; the maps found so far stay."}.get(job.status, "The work failed."),
            fraction=1.0,
        )
        if job.error is not None:
            self._complain(job.error)

    def _choose(self, changes: Mapping[str, Any]) -> Job | None:
        with self._lock:
            before = self._place
            self._place = self._checked(before | dict(changes))
            self.settings = dict(self._place)
            self._forgive()
            if self._place["patch"] == before["patch"]:
                self._show()
                return None
        return self.run()

    # ---- state of the view ----------------------------------------------------------------------------------------------

    def _checked(self, fields: Mapping[str, Any]) -> dict[str, int]:
        """Return complete settings; an example or patch that there is not is told."""
        chosen = {**self._place, **fields}
        for name, value in chosen.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name} must be a whole number, not {value!r:.40}.")
        if not 0 <= chosen["example"] < len(self._x):
            raise InputError(f"example is {chosen['example']}; the batch has examples 0 to {len(self._x) - 1}.")
        if chosen["patch"] not in _PATCHES:
            raise InputError(f"patch is {chosen['patch']}; expected one of {', '.join(map(str, _PATCHES))}.")
        return chosen

    def _show(self) -> None:
        """Send the example on view."""
        from qlab.diagnose.attribution_maps import plane

        i = self._place["example"]
        picture = plane(self._x[i].detach().cpu().numpy())
        self.picture = {"values": _bytes(picture), "height": picture.shape[0], "width": picture.shape[1], "example": i}
        if self.twins is None:
            self.maps = {}
            self.caption = f"Example {i} of {len(self._x)}; the maps are not there yet."
            return
        nets = (("float", self.twins.float_net), ("quantized", self.twins.quantized_net))
        self.maps = {
            "example": i,
            "target": int(nets[0][1].target[i]),
            "best": nets[1][1].best(i),
            "rows": [_row(name, maps, i) for name, maps in nets],
        }
        self.caption = self.twins.summary()


def _fields(given: object) -> dict[str, Any]:
    if not isinstance(given, dict) or not set(given) <= {"example", "patch"}:
        raise InputError(f"expected example and patch, not {given!r:.60}.")
    return dict(given)


def _row(name: str, maps: Attributions, i: int) -> dict[str, Any]:
    """Return what one net shows of an example: exact ablation, then its maps."""
    from qlab.diagnose.attribution_maps import plane

    reference = {
        "method": "exact",
        "title": "Exact ablation",
        "explains": "deployed",
        "scores": _bytes(plane(maps.ablation[i][maps.groups])),
        "zeros": b"",
    }
    return {
        "net": name,
        "difference": float(maps.difference[i]),
        "cells": [reference, *(_cell(m, maps, i) for m in maps.maps)],
    }


def _cell(m: AttributionMap, maps: Attributions, i: int) -> dict[str, Any]:
    from qlab.diagnose.attribution_maps import marks, plane

    return {
        "method": m.method,
        "title": m.title,
        "explains": m.explains,
        "scores": _bytes(plane(m.scores[i][maps.groups])),
        "zeros": marks(m.zeros[i][maps.groups]).tobytes(),
        "complete": m.complete,
        "relative": _number(m.relative[i]),
        "rank": _number(m.rank_ablation[i]),
        "median": _number(m.median_rank),
        "silent": bool(m.silent[i]),
        "verdict": m.verdict.word,
        "reason": m.verdict.reason,
    }


def _bytes(a: np.ndarray) -> bytes:
    return a.astype("<f4").tobytes()


def _number(value: float) -> float | None:
    """Return a number as JSON has it: no NaN, no infinity."""
    return float(value) if math.isfinite(value) else None
