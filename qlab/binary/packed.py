"""A packed net: compile it, run it, prove it, save it.

    packed = qlab.binary.compile(method.deployed(), example)
    packed(x)                      # the deployed net's logits, from packed bits
    packed.report()                # per layer: what runs how, and why
    packed.verify(x)               # every backend against the simulation, as a certificate
    packed.save("net.safetensors")

What runs is a `Graph`; a backend runs it, and is made when it is first asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlab.binary.backends import Backend, Simulation, Words
from qlab.binary.graph import Graph
from qlab.binary.images import Normalise
from qlab.binary.lower import lower
from qlab.errors import InputError, QlabError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.binary.certificate import Certificate

__all__ = ["BACKENDS", "PackedNet", "compile", "present"]

Product = Literal["unpack", "sums"]


def _numpy(graph: Graph) -> Backend:
    from qlab.binary.kernels import reference

    return Words(graph, reference, "numpy")


def _numba(graph: Graph) -> Backend:
    from qlab.binary.backend_cpu import Numba

    return Numba(graph)


def _shim(graph: Graph) -> Backend:
    from qlab.binary.kernels import cuda_shim

    return Words(graph, cuda_shim, "shim")


def _cuda(graph: Graph) -> Backend:
    from qlab.binary.backend_cuda import Cuda

    return Cuda(graph)


def _onnxruntime(graph: Graph) -> Backend:
    from qlab.binary.backend_onnx import OnnxRuntime

    return OnnxRuntime(graph)


BACKENDS: dict[str, tuple[str, Callable[[Graph], Backend]]] = {
    "torch": ("the simulation: signs as +-1 in float32", Simulation),
    "numpy": ("the reference kernels, slow", _numpy),
    "numba": ("the CPU kernels", _numba),
    "shim": ("the CUDA sources, compiled for the CPU; slow", _shim),
    "cuda": ("the CUDA kernels", _cuda),
    "onnxruntime": ("the ONNX export in another runtime", _onnxruntime),
}
"""Name -> what it is, and what makes it."""


def present() -> list[str]:
    """Return the names of the backends that this machine can run: "shim" needs g++, "cuda" a GPU and CuPy, "onnxruntime"
    the extra `onnx`."""
    import shutil
    from importlib.util import find_spec

    names = ["torch", "numpy", "numba"]
    if shutil.which("g++"):
        names.append("shim")
    if torch.cuda.is_available():
        from qlab.binary.kernels import cuda

        names += ["cuda"] if cuda.available() else []
    if find_spec("onnx") and find_spec("onnxruntime"):
        names.append("onnxruntime")
    return names


def compile(
    net: nn.Module,
    example: Tensor,
    product: Product = "unpack",
    image: tuple[Sequence[float], Sequence[float]] | None = None,
) -> PackedNet:
    """Return a deployed net on packed bits.

    Args:
        net: in eval mode, with plain weights, as `method.deployed()` returns; it is not changed.
        example: a batch of inputs (N, C, H, W) or (N, D), for the shapes.
        product: how layers with sign weights and float inputs multiply. "unpack": the bits become floats for the one
            product, and torch sums in the order of the original net, so logits are equal bit for bit. "sums": the
            weights are read as bits, which needs 1/32 of the memory traffic; the sums round differently.
        image: (mean, std) of each channel on the [0, 1] scale, such as (data.mean, data.std): the packed net then takes raw images
            (N, C, H, W) in uint8, as does `example`, and a first layer with sign weights runs on their bit planes; see
            `qlab.binary.images`.

    Raises:
        InputError: a net in training mode or with latent weights; an example that does not fit or holds NaN; a net that cannot be
            traced or has an operation that the packed format does not know, which is named.
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"net is a {type(net).__name__}; expected a deployed net, as method.deployed() returns")
    if any(parametrize.is_parametrized(m) for m in net.modules()):
        raise InputError(
            "this net still has latent weights; compile what is shipped: method.deployed(), or qlab.harden(net)"
        )
    if any(m.training for m in net.modules()):
        raise InputError("this net is in training mode; compile what is shipped: method.deployed(), or net.eval()")
    if product not in ("unpack", "sums"):
        raise UnknownNameError("product", product, ["unpack", "sums"])
    shape = tuple(example.shape[1:]) if isinstance(example, Tensor) else ()
    check_batch(example, shape, image is not None)
    device = next((p.device for p in net.parameters()), example.device)
    if image is None:
        return PackedNet(lower(net, example.to(device), product), source=net)
    normalise = _normalise(image, shape).to(device)
    graph = lower(net, normalise(example.to(device)), product, normalise)
    return PackedNet(graph, source=nn.Sequential(normalise, net))


def _normalise(image: tuple[Sequence[float], Sequence[float]], shape: tuple[int, ...]) -> Normalise:
    mean, std = (torch.as_tensor(value, dtype=torch.float32).flatten() for value in image)
    if (
        len(shape) != 3
        or len(mean) != shape[0]
        or len(std) != shape[0]
        or not bool((std > 0).all() and mean.isfinite().all())
    ):
        raise InputError(
            f"image is {len(mean)} means and {len(std)} deviations for examples of shape {shape}; expected one of each, finite and "
            "positive deviations, for every channel of (C, H, W)"
        )
    return Normalise(mean.tolist(), std.tolist()).eval()


def check_batch(x: object, shape: tuple[int, ...], image: bool = False) -> None:
    """Raise an InputError unless x is a batch (N, *shape) of finite float32, or of uint8 for a net that takes raw images."""
    expected = torch.uint8 if image else torch.float32
    if not isinstance(x, Tensor) or x.dtype != expected:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        hint = "the raw images, as data.split gives them" if image else "`data.transform` makes it from raw data"
        raise InputError(f"the input is {kind}; expected a {str(expected)[6:]} tensor. {hint}")
    if x.dim() < 2 or tuple(x.shape[1:]) != shape or x.shape[0] == 0:
        wanted = ", ".join(map(str, shape)) or "C, H, W"
        raise InputError(f"the input has shape {tuple(x.shape)}; expected (N, {wanted}) with N of at least 1")
    # A sum is finite only if all are: several times as quick, and the exact count follows where it is not.
    if not image and not math.isfinite(float(x.sum())) and not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).sum())
        raise InputError(f"the input holds {bad} values that are NaN or infinite; clean the data")


class PackedNet:
    """A net on packed bits; see `compile` and `qlab.binary.load`.

    Args:
        graph: what it computes.
        source: the net it was compiled from, if that is at hand.
        certificate: of an earlier `verify`.

    Attributes:
        graph, source, certificate: as given.
        backend: name of the backend that `packed(x)` uses.
    """

    def __init__(self, graph: Graph, source: nn.Module | None = None, certificate: Certificate | None = None) -> None:
        self.graph = graph
        self.source = source
        self.certificate = certificate
        self.backend = "numba"
        self._made: dict[str, Backend] = {}

    def on(self, name: str) -> Backend:
        """Return a backend, made when it is first asked for.

        Raises:
            UnknownNameError: no such backend.
            QlabError: this machine cannot run it.
        """
        if name not in BACKENDS:
            raise UnknownNameError("backend", name, BACKENDS)
        if name not in self._made:
            if name not in present():
                raise QlabError(
                    f"backend {name!r} ({BACKENDS[name][0]}) cannot run here; there are {', '.join(present())}"
                )
            self._made[name] = BACKENDS[name][1](self.graph)
        return self._made[name]

    def __call__(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Return the logits for a batch, on the batch's device.

        Args:
            x: (N, *input_shape), float32.
            backend: a name of `BACKENDS`; by default "cuda" for a CUDA tensor, else `self.backend`.

        Raises:
            InputError: a wrong shape or type, NaN, infinity.
        """
        check_batch(x, self.graph.input_shape, self.graph.image)
        name = backend or ("cuda" if x.is_cuda else self.backend)
        return self.on(name).run(x).to(x.device)

    def verify(self, batch: Tensor, backends: list[str] | None = None) -> Certificate:
        """Run every backend that is present on a batch and compare the outputs bit for bit; the certificate is kept.

        Args:
            batch: (N, *input_shape), float32.
            backends: names; all that are present by default.
        """
        from qlab.binary.certificate import certify

        check_batch(batch, self.graph.input_shape, self.graph.image)
        self.certificate = certify(self, batch, backends or present())
        return self.certificate

    def report(self) -> pd.DataFrame:
        """Return one row per layer: what runs how, its bits, sizes in bytes and multiply-adds, and the reason for float."""
        import pandas as pd

        return pd.DataFrame(list(self.graph.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.graph.tensors.values())

    def summary(self) -> str:
        """Return one paragraph with the numbers of the report."""
        rows = self.graph.layers
        runs = [row["runs"] for row in rows]
        binary, floats = (sum(row[key] for row in rows) for key in ("binary_macs", "float_macs"))
        before = sum(row["float_bytes"] for row in rows)
        kinds = ", ".join(f"{runs.count(kind)} {text}" for kind, text in _KINDS.items() if kind in runs)
        return (
            f"{len(rows)} layers: {kinds}. {binary:,} binary and {floats:,} float multiply-adds an example. "
            f"All tensors {self.nbytes / 1024:,.1f} KB; weights as float32 {before / 1024:,.1f} KB."
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the net to a .safetensors file; see `qlab.binary.load`."""
        from qlab.binary.file import save

        save(self, path)

    def __repr__(self) -> str:
        return f"PackedNet({self.summary()})"


_KINDS = {
    "bits": "on bits",
    "bit planes": "on bit planes of the image",
    "sign weights": "with sign weights on floats",
    "float": "in float",
}
