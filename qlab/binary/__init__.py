"""The binary path: a trained net on packed bits, with exactly the logits of the net that was trained.

packed = qlab.binary.compile(method.deployed(), example)
packed(x);  packed.report();  packed.verify(x);  packed.save("net.safetensors")

bits           packing; the bit convention
kernels        what each kernel means, and the same for CPU and GPU
fold           batch norm and sign as one comparison of integers
lower, graph   from a deployed net to steps that are data
packed         compile, run, verify
file, onnx     on disk; for other runtimes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlab.lazy import lazy_names

if TYPE_CHECKING:
    from qlab.binary.bits import pack, unpack, words_for
    from qlab.binary.certificate import Certificate
    from qlab.binary.file import load
    from qlab.binary.onnx import export_onnx
    from qlab.binary.packed import BACKENDS, PackedNet, compile, present

__all__ = [
    "BACKENDS",
    "Certificate",
    "PackedNet",
    "compile",
    "export_onnx",
    "load",
    "pack",
    "present",
    "unpack",
    "words_for",
]

_HOME = {
    "BACKENDS": "qlab.binary.packed",
    "Certificate": "qlab.binary.certificate",
    "PackedNet": "qlab.binary.packed",
    "compile": "qlab.binary.packed",
    "export_onnx": "qlab.binary.onnx",
    "load": "qlab.binary.file",
    "pack": "qlab.binary.bits",
    "present": "qlab.binary.packed",
    "unpack": "qlab.binary.bits",
    "words_for": "qlab.binary.bits",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
