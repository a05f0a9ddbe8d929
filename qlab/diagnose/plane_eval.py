r"""One function of a net on one batch, for many of its tensors at once: loss, accuracy and their noise.

    many = Many(net, x, y)
    many({"0.weight": stack})                     # (K, O, I) weights -> Values of K points
    Affine(many, (d1, d2))(coefficients)          # (K, 2) -> Values at w + a d1 + b d2

Three ways give the same numbers up to rounding, from fast to general:

- chain: where layers run one after the other (Linear, batch norm, elementwise maps), one batched product per layer, (K, O, I) with
  (K, I, N), in chunks that stay in the cache. While w moves on a plane, the first layer is linear in (a, b) unless it is
  quantized: x W + a x D1 + b x D2, three products for all points. Frozen batch norm is folded into the layer before it where a
  continuous map follows; before a step it is not, for a rounding error could move a value across the jump.
- vmap: any net that torch.func can batch.
- loop: any net at all, one point after the other; what the net itself raises comes out here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.diagnose.chain import CONTINUOUS, SAME_SHAPE, chain, latent_of, mapped, plain_map
from qlab.diagnose.objective import Loss, cross_entropy, loss_of
from qlab.errors import InputError

__all__ = ["Affine", "BatchNormMode", "Many", "Values"]

BatchNormMode = Literal["frozen", "reestimated"]
Stack = Mapping[str, Tensor]
CACHE = 4 << 20
"""Bytes of a layer's outputs in a chunk of a chain: enough to share among cores, little enough for their caches."""


BLOCK = 1 << 19
"""Numbers of moved tensors that are put together at once: a call of torch for each chunk would cost as much as the work."""


class Values(NamedTuple):
    """What is known of K points.

    Args:
        loss: (K,) mean loss, float64.
        accuracy: (K,) share of the examples that are classified right, float64.
        noise: (K,) standard deviation of the mean loss over disjoint mini-batches, float64; NaN where there is one batch only.
    """

    loss: Tensor
    accuracy: Tensor
    noise: Tensor


class Many:
    """Loss and accuracy of a net with some of its tensors replaced, for K values of them at once.

    Args:
        net: in eval mode, checked (`qlab.diagnose.base.check`).
        x: (N, ...) inputs.
        y: (N,) labels.
        loss: a name of `LOSSES`, or logits and labels to one loss per example.
        batch_norm: "frozen" keeps the running statistics (or moves them, where they are among the tensors); "reestimated" sets
            them, for every value, to those of the batch, as `qlab.quantizers.reestimate_batch_norm` would.
        batches: mini-batches of the noise; 0 or 1 for none.
        accuracy: whether it is wanted too; NaN where not.
        way: "chain", "vmap" or "loop"; by default the fastest that the net allows.

    Raises:
        UnknownNameError, InputError: a loss, mode or number of mini-batches that there is not.
    """

    def __init__(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: str | Loss = "cross_entropy",
        batch_norm: BatchNormMode = "frozen",
        batches: int = 0,
        accuracy: bool = True,
        way: Literal["chain", "vmap", "loop"] | None = None,
    ) -> None:
        if batch_norm not in ("frozen", "reestimated"):
            raise InputError(f"batch_norm is {batch_norm!r}; expected 'frozen' or 'reestimated'")
        if not isinstance(batches, int) or isinstance(batches, bool) or not 0 <= batches <= len(x):
            raise InputError(f"batches is {batches!r}; expected a whole number from 0 to the {len(x)} examples")
        self.net, self.x, self.y, self.batches, self.accuracy = net, x, y, batches, accuracy
        self.loss = loss_of(loss)
        self.columns = x.flatten(1).T.contiguous()
        self._spaces: dict[object, Tensor] = {}
        self.tensors = {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}
        if batch_norm == "reestimated" and len(x) < 2:
            raise InputError("re-estimating batch norm needs at least two examples; it was given one")
        self._norms = [name for name, m in net.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        with torch.no_grad():
            z = net(x)
            each = self.loss(z, y)
        if not isinstance(each, Tensor) or each.shape != y.shape:
            given = f"shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            raise InputError(
                f"the loss returns {given} for {len(x)} examples; expected one number for each, shape ({len(x)},)"
            )
        classes = torch.arange(z.shape[1], device=y.device)[:, None]
        self._earlier = x.new_zeros(()).masked_fill(
            classes >= y, float("-inf")
        )  # (d, N): 0 for the classes before the label
        self.reestimated = batch_norm == "reestimated" and bool(self._norms)
        self._twin = _estimating(net) if self.reestimated else None
        self.steps = None if self.reestimated or way in ("vmap", "loop") else chain(net, x)
        if way == "chain" and self.steps is None:
            raise InputError("this net is no chain of linear layers, frozen batch norms and elementwise maps")
        self.way = way or ("vmap" if self.steps is None else "chain")
        width = max((m.out_features for _, m in self.steps or () if isinstance(m, nn.Linear)), default=1)
        weights = sum(p.numel() for p in net.parameters())
        if self.steps is None:
            room, size = 16 * CACHE, max(x.numel(), len(x) * width, weights)
        else:
            room, size = CACHE, max(len(x) * width, weights // 4)
        self.chunk = max(1, room // (size * x.element_size()))

    @torch.no_grad()
    def __call__(self, stack: Stack) -> Values:
        """Return the values of K points; `stack` is name of a parameter or buffer -> (K, *shape)."""
        k = len(next(iter(stack.values())))
        parts = [
            self.values({name: t[i : i + self.chunk] for name, t in stack.items()}) for i in range(0, k, self.chunk)
        ]
        return joined(parts)

    def values(self, stack: Stack, first: Tensor | None = None, begin: int = 0) -> Values:
        """Return the values of one chunk; `first` is what goes into step `begin` of the chain, (K, M, N)."""
        if self.way == "chain":
            z = self._chained(stack, first, begin)
            return self._judged(z)
        if self.way == "vmap":
            try:
                z = torch.func.vmap(self._logits)(dict(stack))
            except (RuntimeError, ValueError):
                self.way = "loop"  # torch.func cannot batch this net; plain calls can, or raise the net's own error
            else:
                return self._judged(z.mT)
        rows = [self._logits({name: t[i] for name, t in stack.items()}) for i in range(len(next(iter(stack.values()))))]
        return self._judged(torch.stack(rows).mT)

    # ---- any net --------------------------------------------------------------------------------------------------------

    def _logits(self, some: Stack) -> Tensor:
        tensors = self.tensors | dict(some)
        if self._twin is not None:
            # A pass in training mode writes the batch's statistics into tensors of its own, which the second pass then reads.
            moved = (
                next(iter(some.values())).reshape(-1)[0] * 0
            )  # batched under vmap, so that what is written may be too
            for norm in self._norms:
                for name in (f"{norm}.running_mean", f"{norm}.running_var"):
                    tensors[name] = torch.zeros_like(tensors[name]) + moved
            torch.func.functional_call(self._twin, tensors, (self.x,))
        return torch.func.functional_call(self.net, tensors, (self.x,))

    # ---- chains ---------------------------------------------------------------------------------------------------------

    def _chained(self, stack: Stack, first: Tensor | None, begin: int) -> Tensor:
        """Return logits (K, d, N): features stand before examples, so that every product is one (O, I) x (I, N) per point."""
        assert self.steps is not None
        h, own = (self.columns, False) if first is None else (first, True)
        i = begin
        while i < len(self.steps):
            name, module = self.steps[i]
            i += 1
            if isinstance(module, nn.Linear):
                norm = self._folded(i - 1)
                h, own = self._linear(i, name, module, h, stack, norm), True
                i += norm is not None
            elif isinstance(module, _BatchNorm):
                scale, shift = self._affine(name, module, stack)
                out = h if own and scale.dim() < h.dim() else None
                h, own = torch.addcmul(shift[..., None], h, scale[..., None], out=out), True
            else:
                h, own = mapped(module, h, own), True
        if h.dim() == 2:  # nothing that moves reaches the logits
            h = h.expand(len(next(iter(stack.values()))), *h.shape)
        return h

    def space(self, key: object, k: int, *shape: int) -> Tensor:
        """Return (K, *shape) to write to: kept between chunks, since fresh memory costs more than the arithmetic."""
        if key not in self._spaces or self._spaces[key].shape[0] < k or self._spaces[key].shape[1:] != shape:
            self._spaces[key] = self.x.new_empty(k, *shape)
        return self._spaces[key][:k]

    def _folded(self, i: int) -> str | None:
        """Return the name of the batch norm after linear step i, where it may be folded into it."""
        assert self.steps is not None
        after = [m for _, m in self.steps[i + 1 : i + 3]]
        if not after or not isinstance(after[0], _BatchNorm):
            return None
        return self.steps[i + 1][0] if len(after) == 1 or isinstance(after[1], (*CONTINUOUS, nn.Linear)) else None

    def _linear(self, i: int, name: str, module: nn.Linear, h: Tensor, stack: Stack, norm: str | None) -> Tensor:
        w, c = self._tensor(name, module, "weight", stack), self._tensor(name, module, "bias", stack)
        assert w is not None
        if norm is not None:
            scale, shift = self._affine(norm, self.net.get_submodule(norm), stack)
            w = w * scale[..., None]
            c = shift if c is None else c * scale + shift
        if w.dim() == 3:
            k, o, _ = w.shape
            z = self.space(i, k, o, h.shape[-1])
            if h.dim() == 3 and c is not None:
                return torch.baddbmm(c[..., None], w, h, out=z)
            if h.dim() == 3:
                return torch.bmm(w, h, out=z)
            torch.mm(w.reshape(k * o, -1), h, out=z.view(k * o, -1))
            return z if c is None else z.add_(c[..., None])
        z = w @ h
        return z if c is None else z + c[..., None]

    def _tensor(self, name: str, module: nn.Module, which: str, stack: Stack) -> Tensor | None:
        """Return a layer's weight or bias as it computes with it: (K, *shape) where it moves, *shape where it does not."""
        latent, steps = latent_of(name, module, which)
        if latent not in stack:
            value: Tensor | None = getattr(module, which)
            return None if value is None else value.detach()
        value = stack[latent]
        for step in steps:
            value = mapped(step, value) if isinstance(step, SAME_SHAPE) and plain_map(step) else by_rows(step, value)
        return value

    def _affine(self, name: str, module: Any, stack: Stack) -> tuple[Tensor, Tensor]:
        """Return scale and shift, (O,) or (K, O), of a frozen batch norm."""
        found = {
            key: stack.get(f"{name}.{key}", self.tensors.get(f"{name}.{key}"))
            for key in ("weight", "bias", "running_mean", "running_var")
        }
        var, mean = found["running_var"], found["running_mean"]
        assert var is not None
        assert mean is not None
        scale = (var + module.eps).rsqrt()
        if found["weight"] is not None:
            scale = scale * found["weight"]
        shift = -mean * scale
        return scale, shift if found["bias"] is None else shift + found["bias"]

    # ---- loss and accuracy ----------------------------------------------------------------------------------------------

    def _judged(self, z: Tensor) -> Values:
        """Return the values of logits (K, d, N)."""
        k, _, n = z.shape
        at = self.y.expand(k, 1, n)
        if self.loss is cross_entropy:
            each = -z.log_softmax(1).gather(1, at)[:, 0]
        else:
            each = by_rows(lambda logits: self.loss(logits, self.y), z.mT)
        noise = each.new_full((k,), float("nan"))
        if self.batches > 1:
            noise = torch.stack([part.mean(1) for part in each.tensor_split(self.batches, 1)]).std(0)
        loss = each.mean(1).double()
        if not self.accuracy:
            return Values(loss, torch.full_like(loss, float("nan")), noise.double())
        own = z.gather(1, at)[:, 0]
        # as argmax, which counts the first of equal logits, and several times as fast
        right = (own == z.amax(1)) & (own > (z + self._earlier).amax(1))
        return Values(loss, right.double().mean(1), noise.double())


class Affine:
    """The values at w + sum_m c_m d_m.

    Args:
        many: the function.
        directions: dictionaries name -> tensor, of parameters and buffers.
    """

    def __init__(self, many: Many, directions: Sequence[Stack]) -> None:
        self.many = many
        self.names = [name for name in many.tensors if any(bool(d[name].any()) for d in directions if name in d)]
        self.basis = {
            name: torch.stack(
                [many.tensors[name]]
                + [
                    d[name].to(many.tensors[name]) if name in d else torch.zeros_like(many.tensors[name])
                    for d in directions
                ]
            )
            for name in self.names
        }
        self._begin, self._first = self._linear_start() if many.steps is not None and self.names else (0, None)

    @torch.no_grad()
    def __call__(self, coefficients: Tensor) -> Values:
        """Return the values at coefficients (K, M)."""
        many = self.many
        c = torch.cat([torch.ones(len(coefficients), 1, dtype=torch.float64), coefficients.double()], 1)
        if not self.names:  # nothing moves
            some = next(iter(many.tensors))
            one = many.values({some: many.tensors[some][None]})
            return Values(*(v.expand(len(c)).clone() for v in one))
        parts = []
        moving = {name: b for name, b in self.basis.items() if name not in self._done}
        for rows in c.split(max(many.chunk, BLOCK // max(1, sum(b[0].numel() for b in moving.values())))):
            stack = {name: (rows.to(b) @ b.flatten(1)).view(len(rows), *b.shape[1:]) for name, b in moving.items()}
            for i in range(0, len(rows), many.chunk):
                here = rows[i : i + many.chunk]
                first = None
                if self._first is not None:
                    first = many.space("first", len(here), *self._first.shape[1:])
                    combine(here.to(first), self._first, first)
                parts.append(many.values({n: t[i : i + many.chunk] for n, t in stack.items()}, first, self._begin))
        return joined(parts)

    _done: frozenset[str] = frozenset()  # tensors that the linear start has used up

    def _linear_start(self) -> tuple[int, Tensor | None]:
        """Return the step after the first layer and the layer's outputs (1 + M, O, N), where these are linear in what moves."""
        steps = self.many.steps
        assert steps is not None
        name, module = steps[0]
        if not isinstance(module, nn.Linear):
            return 0, None
        (weight, chain_w), (bias, chain_b) = (latent_of(name, module, which) for which in ("weight", "bias"))
        if any(not isinstance(step, nn.Identity) for step in (*chain_w, *chain_b)) or weight not in self.basis:
            return 0, None
        if sum(m is module for _, m in steps) > 1:
            return 0, None
        z = self.basis[weight] @ self.many.columns
        if bias in self.basis:
            z = z + self.basis[bias][..., None]
        elif isinstance(module.bias, Tensor):
            z[0] += module.bias.detach()[:, None]
        norm = self.many._folded(0)
        if norm is not None:
            if any(moved.startswith(f"{norm}.") for moved in self.basis):
                norm = None
            else:
                scale, shift = self.many._affine(norm, self.many.net.get_submodule(norm), {})
                z = z * scale[:, None]
                z[0] += shift[:, None]
        left = set(self.basis) - {weight, bias}
        self._done = frozenset(
            {weight, bias} if left else {bias}
        )  # one tensor stays, to tell how many points there are
        return (2 if norm else 1), z


def combine(rows: Tensor, basis: Tensor, out: Tensor) -> None:
    """Write rows[:, 0] basis[0] + rows[:, 1] basis[1] + ... to out (K, *shape), where rows[:, 0] is 1.

    Not a product of matrices: with so few rows torch.mm took three times as long in one process of eight.
    """
    torch.addcmul(basis[0], rows[:, 1, None, None], basis[1], out=out)
    for m in range(2, len(basis)):
        out.addcmul_(rows[:, m, None, None], basis[m])


def by_rows(f: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """Return f of every row (K, ...), batched where torch.func can; else one after the other, where f's own errors show."""
    try:
        return torch.func.vmap(f)(stack)
    except (RuntimeError, ValueError):
        return torch.stack([f(row) for row in stack])


def joined(parts: Sequence[Values]) -> Values:
    """Return the values of chunks one after the other."""
    return Values(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _estimating(net: nn.Module) -> nn.Module:
    """Return a copy whose batch norms take over the statistics of the batch they see."""
    twin = copy.deepcopy(net)
    for m in twin.modules():
        if isinstance(m, _BatchNorm) and m.track_running_stats:
            m.train()
            m.momentum = 1.0
            m.num_batches_tracked = None
    return twin
