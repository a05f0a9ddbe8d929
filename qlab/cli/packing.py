"""`qlab pack`: a checkpoint to a packed net on disk, with its per-layer table and its certificate."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlab.cli.choice import beside
from qlab.cli.shelves import lines
from qlab.data import DATA
from qlab.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from qlab.binary import PackedNet
    from qlab.data import DataModule

__all__ = ["pack"]

EXAMPLES = 64  # of the batch on which the backends are compared


def pack(options: argparse.Namespace) -> int:
    """Compile, verify and save a checkpoint's deployed net; return 0, or 3 where two backends gave different bits.

    Raises:
        CheckpointError: a checkpoint that cannot be read.
        UnknownNameError: no such data set.
        InputError: a net that has no packed form, or a file that cannot be written.
    """
    target = Path(options.out or Path(options.checkpoint).with_suffix(".safetensors"))
    for path in (target, *([Path(options.onnx)] if options.onnx else [])):
        if not path.parent.is_dir() or path.is_dir():
            raise InputError(f"{path} cannot be written; name a file in a folder that exists")
    saved = beside(options.checkpoint).get("data")
    name = options.data or (saved or {}).get("name")
    if name is not None:
        _ = DATA[name]  # an unknown name is said before torch is imported

    from qlab import binary
    from qlab.methods import checkpoints

    method = checkpoints.load(options.checkpoint)
    shape = method.hparams["net"]["input_shape"]
    data = _data(name, saved if not options.data or (saved or {}).get("name") == name else None, shape)
    net = method.deployed(None if data is None else data.calibration(method.calibration_batches))
    x = _batch(shape, data)
    packed = binary.compile(net, x[:1], options.product)
    certificate = packed.verify(x)
    packed.save(target)
    print(_table(packed))
    print(f"\n{packed.summary()}\n{certificate.summary()}")
    print(f"\npacked net  {target}  {target.stat().st_size / 1024:,.1f} KB")
    if options.onnx:
        binary.export_onnx(packed, x[:1], options.onnx)
        print(f"ONNX        {options.onnx}  {Path(options.onnx).stat().st_size / 1024:,.1f} KB")
    return 0 if certificate.equal else 3


def _data(name: str | None, saved: Mapping[str, Any] | None, shape: list[int]) -> DataModule | None:
    """Return the data set that the net was trained on, or None where nothing says which."""
    if name is None:
        return None
    from qlab import data

    found = data.load(name, **{key: value for key, value in (saved or {}).items() if key != "name"})
    if list(found.input_shape) != list(shape):
        raise InputError(
            f"the net takes inputs of {shape}, but {name} has {list(found.input_shape)}: choose the data set it was trained on "
            "with --data"
        )
    return found


def _batch(shape: list[int], data: DataModule | None) -> Tensor:
    """Return inputs of the net: test pictures, or noise where there are no data."""
    import torch

    if data is None:
        return torch.randn(EXAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    return data.transform(data.split("test").x[:EXAMPLES])


def _table(packed: PackedNet) -> str:
    header = ("layer", "kind", "runs", "weights", "inputs", "packed KB", "float KB", "binary MACs", "float MACs", "why")
    rows = [
        (
            row["layer"],
            row["kind"],
            row["runs"],
            f"{row['weight_bits']} bit",
            f"{row['input_bits']} bit",
            f"{row['packed_bytes'] / 1024:,.2f}",
            f"{row['float_bytes'] / 1024:,.2f}",
            f"{row['binary_macs']:,}",
            f"{row['float_macs']:,}",
            row["reason"],
        )
        for row in packed.graph.layers
    ]
    return lines([header, *rows])
