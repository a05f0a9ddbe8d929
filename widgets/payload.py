"""What BitLab sends to the browser. Words go as little-endian bytes, for JavaScript has no integers of 64 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlab.binary.cost import Cost, Crossover
    from qlab.binary.dots import DotProduct, LayerBits
    from qlab.binary.packed import PackedNet

__all__ = ["crossing", "grids", "latencies", "packed_bits", "packed_dot", "sizes"]

_DRAWN = 512 * 1024  # bytes of weights that are sent, at most: half a message
_WIDEST = 160  # words of a unit that are drawn, at 3 pixels a bit: a canvas is at most 32,767 pixels wide


def grids(packed: PackedNet) -> dict[str, tuple[int, ...]]:
    """Return (OH, OW) of every layer on bits, () of a linear one."""
    from qlab.binary.inspect import ON_BITS
    from qlab.binary.shapes import infer

    shapes = infer(packed.graph)
    return {s.layer: tuple(shapes[s.outputs[0]][2:]) for s in packed.graph.steps if s.op in ON_BITS}


def packed_bits(bits: LayerBits) -> dict[str, Any]:
    """Return the words of a layer, as far as they are drawn: `units` rows of `width` words."""
    flat = bits.words.reshape(bits.units, -1)
    shown = flat[:, :_WIDEST]
    shown = shown[: max(1, _DRAWN // shown[0].nbytes)]
    return {
        "layer": bits.layer,
        "words": shown.astype("<u8").tobytes(),
        "used": bits.used.astype("<u8").tobytes(),
        "units": len(shown),
        "width": shown.shape[1],
        "left_out": [bits.units - len(shown), flat.shape[1] - shown.shape[1]],
        "summary": bits.summary(),
    }


def packed_dot(product: DotProduct) -> dict[str, Any]:
    """Return one dot product: words as 64-bit, numbers as 32-bit integers."""
    from qlab.binary.dots import NEVER, compared

    words = {
        name: getattr(product, name).astype("<u8").tobytes() for name in ("activation", "weight", "xor", "counted")
    }
    numbers = {
        name: getattr(product, name).astype("<i4").tobytes() for name in ("taps", "first", "signs", "popcount", "sums")
    }
    threshold = product.threshold if product.threshold is not None and product.threshold != NEVER else None
    return {
        **words,
        **numbers,
        "layer": product.layer,
        "unit": product.unit,
        "position": product.position,
        "example": product.example,
        "inside": product.inside.astype("u1").tobytes(),
        "count": len(product.sums),
        "k": product.k,
        "z": product.z,
        "simulated": product.simulated,
        "threshold": threshold,
        "verdict": _verdict(product)
        if product.threshold is None
        else compared(product.z, product.threshold, product.flip),
    }


def _verdict(product: DotProduct) -> str:
    """Return in words what becomes of a sum that is not compared at once."""
    value = "" if product.value is None else f"Batch norm and what is added make it {product.value:.4g}."
    sign = "" if product.bit is None else f" Its sign is {1 - 2 * product.bit:+d}."
    return (value + sign).strip()


def sizes(cost: Cost) -> dict[str, Any]:
    """Return bytes of the packed net, and with float weights."""
    return {"packed": cost.nbytes, "float": cost.float_nbytes}


def latencies(cost: Cost) -> dict[str, Any]:
    """Return median seconds of a batch per backend."""
    return {
        "batch": cost.batch,
        "rows": [{"name": name, "seconds": s} for name, s in cost.seconds.items()],
        "where": f"{cost.device}, {cost.threads} thread{'' if cost.threads == 1 else 's'}",
    }


def crossing(found: Crossover) -> dict[str, Any]:
    """Return what was measured at each size, and from which sizes on packed products win."""
    from qlab.binary.cost import KINDS

    return {
        "kinds": KINDS,
        "points": [vars(point) for point in found.points],
        "smallest": {kind: {"words": found.smallest(kind), "packing": found.smallest(kind, True)} for kind in KINDS},
        "summary": found.summary(),
    }
