"""`qlab pack`: a checkpoint to a packed net on disk, with its per-layer table and its certificate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qlab.cli.checkpoint import named_data, opened
from qlab.cli.shelves import lines
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
    given = named_data(options)

    from qlab import binary

    method, data = opened(options.checkpoint, given)
    shape = method.hparams["net"]["input_shape"]
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


def _batch(shape: list[int], data: DataModule | None) -> Tensor:
    """Return inputs of the net: test pictures, or noise where there are no data."""
    import torch

    if data is None:
        return torch.randn(EXAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    return data.transform(data.split("test", EXAMPLES).x)


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
