"""What RobustnessLab sends to the browser: curves as little-endian float32, pictures in 8 bits, the rest as plain values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from qlab.attacks.checks import Check
    from qlab.attacks.evaluation import Evaluation
    from qlab.attacks.honesty import Honesty
    from qlab.attacks.samples import Samples

__all__ = ["answer_of", "curve_of", "page_of", "panel_of", "pictures_of", "sample_of", "verdict"]

PAGE = 8  # examples that are shown at a time
_ROOM = 600_000  # bytes of pictures in a message


def curve_of(name: str, slot: int, e: Evaluation) -> dict[str, Any]:
    """Return accuracy against eps, as far as attacks have run, and who broke how many."""
    tried = e.done.any(1)
    points = np.array([e.accuracy(eps) for eps in e.eps])
    points[~tried] = np.nan
    table = e.frame()
    broken = [table.loc[table["attack"] == attack, "broken"].tolist() for attack in e.attacks]
    return {
        "name": name,
        "slot": slot,
        "clean": float(e.clean.mean()),
        "eps": _floats(np.array(e.eps)),
        "share": _floats(points[:, 0]),
        "low": _floats(points[:, 1]),
        "high": _floats(points[:, 2]),
        "complete": e.complete,
        "plain": _plain(e.honesty),
        "verdict": verdict(e.honesty),
        "masked": e.honesty is not None and e.honesty.masked,
        "broken": [
            {"attack": attack, "counts": [n if e.done[row, k] else None for row, n in enumerate(broken[k])]}
            for k, attack in enumerate(e.attacks)
        ],
    }


def _plain(honesty: Honesty | None) -> dict[str, float] | None:
    """Return what plain PGD leaves right at the panel's radius, to be told apart from the worst case."""
    if honesty is None or not math.isfinite(honesty.plain):
        return None
    return {"eps": honesty.eps, "share": honesty.plain}


def verdict(honesty: Honesty | None) -> str:
    """Return what a panel says in a few words."""
    from qlab.attacks.checks import MECHANISMS

    if honesty is None:
        return "the honesty panel has not run"
    if not honesty.masked:
        return "no sign of masking found"
    return f"masking: {' and '.join(MECHANISMS[m] for m in honesty.mechanisms)}"


def panel_of(name: str, slot: int, honesty: Honesty | None) -> dict[str, Any]:
    """Return the checks of a net with their evidence and curves, and the verdict in words; no rows where it has not run."""
    head = {"name": name, "slot": slot, "verdict": verdict(honesty)}
    if honesty is None:
        return head | {"rows": [], "summary": "", "masked": False, "eps": None}
    rows = [_row(check) for check in honesty.checks]
    return head | {"rows": rows, "summary": honesty.summary(), "masked": honesty.masked, "eps": honesty.eps}


def _row(check: Check) -> dict[str, Any]:
    from qlab.attacks.checks import MECHANISMS

    told = check.state in ("fail", "warn")
    curve = check.curve
    return {
        "number": check.number,
        "name": check.name,
        "state": check.state,
        "masking": check.masking,
        "mechanism": MECHANISMS[check.mechanism] if told else "",
        "condition": check.condition,
        "words": check.words,
        "repair": check.repair if told else "",
        "curve": None
        if curve is None
        else {
            "x": _floats(curve.x),
            "y": _floats(curve.y),
            "x_name": curve.x_name,
            "y_name": curve.y_name,
            "log": curve.log,
        },
    }


def answer_of(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return which guess is right, and why; empty until every net has its accuracy and its panel.

    Of several nets, those that keep the most at the middle eps are right; of one, "more" or "less" than half of the examples.
    """
    if not evaluations or not all(e.complete for e in evaluations.values()):
        return {}
    grid = next(iter(evaluations.values())).eps
    eps = grid[len(grid) // 2]
    kept = {name: e.accuracy(eps) for name, e in evaluations.items()}
    most = max(share for share, *_ in kept.values())
    right = [name for name, (share, *_) in kept.items() if share == most]
    if len(kept) == 1:
        right = ["more" if most >= 0.5 else "less"]
    parts = [
        f"{name} keeps at most {share:.1%} ({low:.1%} to {high:.1%}), panel: {verdict(evaluations[name].honesty)}"
        for name, (share, low, high) in kept.items()
    ]
    return {"eps": eps, "right": right, "words": f"At eps {eps:.4g}: {'; '.join(parts)}."}


def page_of(example: int, total: int, nbytes: int, nets: int) -> range:
    """Return the examples that are shown together with one of them; fewer where pictures are large.

    Args:
        example: that is on view.
        total: of all examples.
        nbytes: of one picture.
        nets: on view.
    """
    size = max(1, min(PAGE, _ROOM // (nbytes * (1 + 2 * max(nets, 1)))))
    first = example // size * size
    return range(first, min(first + size, total))


def pictures_of(found: Mapping[str, Samples], slots: Mapping[str, int], row: int) -> dict[str, Any]:
    """Return a page of examples, what was found for them at the radius of a row, and the change magnified, 8 bits a number.

    Pictures are (C, H, W) with one or three channels; of other inputs, and of pictures that are too large for a message, only
    labels are sent.
    """
    from qlab.plots.attacks import magnification

    first = next(iter(found.values()))
    e, index = first.evaluation, first.index.tolist()
    shape = tuple(e.x.shape[1:])
    drawn = len(shape) == 3 and shape[0] in (1, 3) and math.prod(shape) * (1 + 2 * len(found)) <= _ROOM
    page: dict[str, Any] = {
        "first": index[0],
        "total": len(e),
        "eps": e.eps[row],
        "norm": e.norm,
        "labels": e.y[index].tolist(),
        "shape": list(shape) if drawn else [],
        "nets": [_found(name, slots[name], s, row) for name, s in found.items()],
    }
    if not drawn:
        return page
    before = e.x[index].double().cpu().numpy()
    after = [s.evaluation.worst[row][index].double().cpu().numpy() for s in found.values()]
    low = min(float(a.min()) for a in (before, *after))
    width = max(float(a.max()) for a in (before, *after)) - low or 1.0
    deltas = [a - before for a in after]
    page["factor"] = factor = magnification(np.stack(deltas), width)
    page["clean"] = _grey(before, low, width)
    for net, a, delta in zip(page["nets"], after, deltas, strict=True):
        net["adversarial"] = _grey(a, low, width)
        net["delta"] = np.clip(np.rint(254 * factor * delta / width), -127, 127).astype("i1").tobytes()
    return page


def _found(name: str, slot: int, s: Samples, row: int) -> dict[str, Any]:
    e = s.evaluation
    distance = e.distance[row, s.index]
    return {
        "name": name,
        "slot": slot,
        "tried": bool(e.done[row].any()),
        "said": s.said.tolist(),
        "worst_said": s.worst_said[row].tolist(),
        "clean": e.clean[s.index].tolist(),
        "broken": np.isfinite(distance).tolist(),
        "distance": [_number(d) for d in distance],
    }


def sample_of(found: Mapping[str, Samples], slots: Mapping[str, int], example: int) -> dict[str, Any]:
    """Return what is known of one example: in words, and by net and radius."""
    nets = []
    label = 0
    for name, s in found.items():
        e, i = s.evaluation, int(np.flatnonzero(s.index == example)[0])
        label, by = int(e.y[example]), s.broken_by
        rows = [
            {
                "eps": eps,
                "tried": bool(e.done[row].any()),
                "broken": bool(np.isfinite(e.distance[row, example])),
                "by": str(by[row, i]),
                "distance": _number(e.distance[row, example]),
                "said": int(s.worst_said[row, i]),
                "margin": _number(s.worst_margin[row, i]),
            }
            for row, eps in enumerate(e.eps)
        ]
        clean = {"said": int(s.said[i]), "margin": _number(s.margin[i]), "right": bool(e.clean[example])}
        nets.append({"name": name, "slot": slots[name], "story": s.story(i), "rows": rows} | clean)
    return {"example": example, "label": label, "nets": nets}


def _grey(values: NDArray[Any], low: float, width: float) -> bytes:
    return np.clip(np.rint(255 * (values - low) / width), 0, 255).astype("u1").tobytes()


def _floats(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def _number(value: float) -> float | None:
    """Return a number as JSON has it: no NaN, no infinity."""
    return float(value) if math.isfinite(value) else None
