"""What a doctor measures before it judges: one forward and one backward pass of a copy of the net, with everything written down.

Values are those of the net's forward pass in eval mode; gradients are what back-propagation gives, straight-through where
quantizers are. Nothing here raises for a sick net: NaN weights or a net in training mode are findings, not errors.

Shapes: N examples, d classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.diagnose.base import _check_inputs, _check_labels, plain
from qlab.diagnose.foreign import Flat, scan, visible
from qlab.errors import InputError
from qlab.quantizers import Quantizer, quantized_tensors, reestimate_batch_norm

__all__ = ["ALMOST_ALL", "Exam", "Finding", "LayerRecord", "Severity", "constant", "rms", "units"]

Severity = Literal["high", "medium", "low", "info"]
EXAMPLES = 256
ALMOST_ALL = 0.99  # from this share on, it is taken as a whole


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Args:
        name: what it is, such as "dead layer".
        severity: "high" and "medium" are alarms; "low" and "info" are not.
        layer: where; "" is the net as a whole.
        evidence: one sentence with the numbers.
        function: which function of the net they are of.
        lesson: name of the notebook that explains it.
        fix: what to try.
        score: how bad, in [0, 1], among findings of one kind.
    """

    name: str
    severity: Severity
    layer: str
    evidence: str
    function: str
    lesson: str
    fix: str
    score: float = 0.0


@dataclass
class LayerRecord:
    """What a module without children got, gave and got back.

    Args:
        input, output: tensors of the first call, detached.
        gradient: of the loss with respect to the output; None where none arrived.
    """

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor
    gradient: Tensor | None = None


@dataclass
class Exam:
    """A net and a batch, looked at once.

    Args:
        given: the net as it was handed over.
        net: its copy, in eval mode.
        x, y: (N, ...) inputs and (N,) labels.
        in_training: modules of the given net whose eval mode computes otherwise, and that are in training mode.
        logits: (N, d), of the copy.
        layers: in the order in which they ran.
        gradients: of the mean cross-entropy with respect to every parameter, None where none arrived.
        function: "deployed", or "training-time" where a quantizer is still soft.
    """

    given: nn.Module
    net: nn.Module
    x: Tensor
    y: Tensor
    in_training: list[str]
    logits: Tensor
    layers: list[LayerRecord]
    gradients: dict[str, Tensor | None]
    function: str
    seed: int = 0

    @classmethod
    def of(cls, net: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> Exam:
        """Run the net forward and backward.

        Raises:
            InputError: for inputs or labels that do not fit, or a net that gives no logits.
        """
        given = plain(net)
        _check_inputs(x)
        x, y = x[:EXAMPLES].detach(), y[:EXAMPLES] if isinstance(y, Tensor) else y
        twin = copy.deepcopy(given).eval()
        twin.requires_grad_(True)
        noisy = nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd
        in_training = [name for name, m in given.named_modules() if m.training and isinstance(m, noisy) and _matters(m)]
        if given is not net:
            in_training = []  # the Trainer switches a method's mode; what is shipped is method.deployed()
        logits, layers = _forward(twin, x)
        _check_labels(y, len(x), logits.shape[1])
        named = dict(twin.named_parameters())
        loss = F.cross_entropy(logits, y)
        grads: tuple[Tensor | None, ...] = (None,) * len(named)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        soft = any(bool((t.quantizer(t.latent) != t.quantizer.hard(t.latent)).any()) for t in quantized_tensors(twin))
        return cls(
            given=given,
            net=twin,
            x=x,
            y=y,
            in_training=in_training,
            logits=logits.detach(),
            layers=layers,
            gradients=dict(zip(named, grads, strict=True)),
            function="training-time" if soft else "deployed",
            seed=seed,
        )

    @property
    def classes(self) -> int:
        """Number of classes d."""
        return self.logits.shape[1]

    @cached_property
    def finite(self) -> bool:
        """Whether the logits are."""
        return bool(self.logits.isfinite().all())

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(F.cross_entropy(self.logits, self.y))

    @cached_property
    def accuracy(self) -> float:
        """Share of the batch that is classified right."""
        return float((self.logits.argmax(1) == self.y).double().mean())

    @property
    def honest(self) -> str:
        """Which function the gradients are of."""
        return "surrogate" if self.quantized else self.function

    @cached_property
    def quantized(self) -> bool:
        """Whether the net has quantizers, the lab's or foreign ones."""
        return any(isinstance(m, Quantizer) for m in self.net.modules()) or bool(self.flats)

    @cached_property
    def flats(self) -> list[Flat]:
        """Where modules are piecewise constant; empty where the net does not run in float64."""
        return self._scan(functional=False)

    @cached_property
    def all_flats(self) -> list[Flat]:
        """The same with functional code between modules."""
        return self._scan(functional=True)

    def _scan(self, functional: bool) -> list[Flat]:
        if not self.finite:
            return []
        try:
            return scan(self.net, self.x[:8], self.seed, functional)
        except (RuntimeError, TypeError):  # code for one dtype only
            return []

    @cached_property
    def recalibrated(self) -> tuple[Tensor, list[LayerRecord]]:
        """(N, d) logits and layers with batch-norm statistics of this very batch."""
        twin = copy.deepcopy(self.net)
        reestimate_batch_norm(twin, [self.x])
        with torch.no_grad():
            return _forward(twin, self.x)

    def weight_gradients(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """Yield layer, gradient and value of every tensor with at least two dimensions, in registration order."""
        for name, p in self.net.named_parameters():
            if p.dim() >= 2:
                layer = name.split(".parametrizations.")[0].removesuffix(".weight")
                yield layer, self.gradients[name], p.detach()


def _matters(module: nn.Module) -> bool:
    """Return whether training mode changes what the module computes."""
    p = getattr(module, "p", None)
    return p is None or p > 0


def _forward(net: nn.Module, x: Tensor) -> tuple[Tensor, list[LayerRecord]]:
    layers: list[LayerRecord] = []
    seen: set[str] = set()
    handles = []
    names = dict(visible(net))
    leaves = {n: m for n, m in names.items() if not any(o.startswith(f"{n}." if n else "") for o in names if o != n)}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name in seen or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        seen.add(name)
        first = args[0].detach().clone() if args and isinstance(args[0], Tensor) else None
        record = LayerRecord(name, module, first, output.detach().clone())
        layers.append(record)
        if output.requires_grad:
            output.register_hook(partial(setattr, record, "gradient"))

    def before(module: nn.Module, args: Any) -> None:
        """Nothing in place: it would overwrite what was written down."""
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]

    for name, module in leaves.items():
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(partial(keep, name)))
    try:
        logits = net(x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"the net does not take inputs of shape {tuple(x.shape)} and {x.dtype}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the net returns {given} for {len(x)} inputs; expected logits of shape (N, classes)")
    return logits, layers


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def units(x: Tensor) -> Tensor:
    """Return (units, values): channels of images (N, C, ...), features of vectors (N, F) and of sequences (N, T, F)."""
    axis = 1 if x.dim() in (2, 4, 5) else x.dim() - 1
    return x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x[None]


def constant(x: Tensor) -> float:
    """Return the share of units whose values are the same for all examples."""
    u = units(x)
    low, high = u.aminmax(dim=1)
    return float((high - low <= 1e-6 * torch.maximum(low.abs(), high.abs())).double().mean())
