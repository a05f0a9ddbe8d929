r"""Training with few multiplications: batch norm and AdaMax whose normalisers are powers of two, that is, bit shifts.

AP2(x) = sign(x) 2^round(log2 |x|); a product with it is a shift.

Shift-based batch norm, for one feature of a batch x_1 ... x_m:

    mu = mean x,   c = x - mu,   var = mean c AP2(c),   p = AP2(1 / sqrt(var + eps)),   xh = c p,   y = AP2(gamma) xh + beta
    g_x     = AP2(gamma) p [g - mean g - AP2(c) p^2 mean(AP2(c) g)]
    g_gamma = sum AP2(xh) g,   g_beta = sum g

The backward pass uses the powers of two in place of the exact quantities; with AP2 replaced by the identity both passes are
those of batch norm. Running averages, with momentum 1/8, are of mu and of the *inverse* deviation 1 / sqrt(var + eps). Deployed
it is an ordinary batch norm with eps = 0, variance AP2(average inverse deviation)^-2 and scale AP2(gamma): products with its
factors are exact. The mean costs a division unless m is a power of two. The scale of the output is a saw-tooth of that of the
input, between 1 / sqrt(2) and sqrt(2) up to the error of var, and training and deployment may differ by a factor of 2 where the
inverse deviation lies between two powers.

Shift-based AdaMax, with gamma_k the factor of a layer:

    m <- b1 m + (1 - b1) g,   v <- max(b2 v, |g|),   theta <- theta - gamma_k AP2(alpha / (1 - b1^t)) m / (AP2(v) + eps)

Source: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Quantized Neural Networks, arXiv 1609.07061, and Binarized Neural Networks,
arXiv 1602.02830; backward pass, running averages and constants as in the authors' Torch code (itayhubara/BinaryNet).
Deviations: that code compares nothing at test time but multiplies by AP2 of its average, as here; it stores AP2(v) + eps in
place of v, which is `rounded=True`.

Shapes: x (N, C, ...); statistics, gamma and beta (C,).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.errors import InputError
from qlab.quantizers import PseudoDerivative, layers
from qlab.quantizers.base import Rule
from qlab.quantizers.kbit import ap2

__all__ = ["ShiftAdaMax", "ShiftBatchNorm", "plain_norms", "shift_normalize", "with_shift_norm"]


class _ShiftNorm(torch.autograd.Function):
    """y = r(gamma) (x - mu) p + beta with mu and p of the batch; r is AP2, the tensors of features are (1, C, 1, ...)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, mu: Tensor, p: Tensor, r: Rule) -> Tensor:
        return r(gamma) * ((x - mu) * p) + beta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gamma, _, mu, p, ctx.r = inputs
        ctx.save_for_backward(x, gamma, mu, p)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mu, p = ctx.saved_tensors
        r, dims = ctx.r, _batch(x)
        c = x - mu
        ca = r(c)
        centred = g - g.mean(dims, keepdim=True) - ca * p**2 * (ca * g).mean(dims, keepdim=True)
        g_gamma = (r(c * p) * g).sum(dims, keepdim=True)
        return r(gamma) * p * centred, g_gamma, g.sum(dims, keepdim=True), None, None, None


def _batch(x: Tensor) -> tuple[int, ...]:
    return tuple(d for d in range(x.dim()) if d != 1)


def _of_features(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *(1,) * (x.dim() - 2))


def shift_normalize(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5, r: Rule = ap2
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and the mu and 1 / sqrt(var + eps) of the batch.

    Args:
        x: (N, C, ...).
        gamma, beta: (C,).
        eps: added to the variance.
        r: what rounds; the identity gives ordinary batch norm.
    """
    with torch.no_grad():
        mu = x.mean(_batch(x), keepdim=True)
        c = x - mu
        inverse = 1 / ((c * r(c)).mean(_batch(x), keepdim=True) + eps).sqrt()
        p = r(inverse)
    y = _ShiftNorm.apply(x, _of_features(gamma, x), _of_features(beta, x), mu, p, r)
    return y, mu.flatten(), inverse.flatten()


class ShiftBatchNorm(_BatchNorm):
    """Shift-based batch norm in place of an ordinary one, with its scale, shift and switches.

    `running_var` is kept as the variance that the averaged inverse deviation belongs to, 1 / inverse^2 - eps: what reads batch
    norms, checkpoints and the re-estimation of statistics among them, reads this one.

    Args:
        norm: what it takes the place of.
        eps: added to the variance.
        momentum: of the running averages.
    """

    def __init__(self, norm: _BatchNorm, eps: float = 1e-5, momentum: float = 0.125) -> None:
        like = norm.weight if norm.weight is not None else norm.running_mean
        where: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        super().__init__(norm.num_features, eps, momentum, norm.affine, norm.track_running_stats, **where)
        self.load_state_dict(norm.state_dict())
        self.kind = type(norm)
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise InputError(f"batch norm takes (N, C, ...); its input has shape {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Return y; in training mode by the statistics of the batch, which the running ones follow."""
        self._check_input_dim(x)
        one = x.new_ones(())
        gamma = one.expand(self.num_features) if self.weight is None else self.weight
        beta = 0 * one.expand(self.num_features) if self.bias is None else self.bias
        if self.training or self.running_mean is None:
            if x.numel() == x.shape[1]:
                raise InputError(
                    f"batch norm needs several values of each channel; its input has shape {tuple(x.shape)}"
                )
            y, mu, inverse = shift_normalize(x, gamma, beta, self.eps)
            if self.training and self.track_running_stats:
                self._follow(mu, inverse)
            return y
        scale = PseudoDerivative.apply(gamma, ap2, torch.ones_like)
        xh = (x - _of_features(self.running_mean, x)) * _of_features(self.power(), x)
        return _of_features(scale, x) * xh + _of_features(beta, x)

    @torch.no_grad()
    def _follow(self, mu: Tensor, inverse: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if share is None else share
        share = 1.0 if share is None else share
        average = torch.lerp(1 / (self.running_var + self.eps).sqrt(), inverse.to(self.running_var), share)
        self.running_var.copy_((1 / average**2 - self.eps).clamp(min=0))
        self.running_mean.lerp_(mu.to(self.running_mean), share)

    def power(self) -> Tensor:
        """Return p of evaluation: AP2 of the averaged inverse deviation, (C,)."""
        assert self.running_var is not None
        return ap2(1 / (self.running_var + self.eps).sqrt())

    @torch.no_grad()
    def plain(self) -> _BatchNorm:
        """Return the ordinary batch norm, in eval mode, that computes the same from the running statistics."""
        assert self.running_mean is not None
        assert self.running_var is not None
        where: dict[str, Any] = {"device": self.running_mean.device, "dtype": self.running_mean.dtype}
        norm: _BatchNorm = self.kind(self.num_features, eps=0.0, momentum=self.momentum, affine=self.affine, **where)
        norm.load_state_dict(self.state_dict())
        assert norm.running_var is not None
        norm.running_var.copy_(1 / self.power() ** 2)
        if self.affine:
            norm.weight.copy_(ap2(self.weight))
        return norm.eval()


def with_shift_norm(net: nn.Module) -> nn.Module:
    """Return a copy of a net with shift-based batch norm in place of every one before its last layer.

    The last, on the logits, stays an ordinary one, as in the authors' nets.

    Raises:
        InputError: for a net without batch norm there.
    """
    net = copy.deepcopy(net)
    names = [name for name, _ in net.named_modules(remove_duplicate=False)]
    last = names.index(list(layers(net))[-1])
    before = {name for name in names[:last] if isinstance(net.get_submodule(name), _BatchNorm)}
    if not before:
        raise InputError("this net has no batch norm before its last layer, so there is nothing to make shift-based")
    return _replaced(net, lambda name, m: ShiftBatchNorm(m) if name in before and isinstance(m, _BatchNorm) else None)


def plain_norms(net: nn.Module) -> nn.Module:
    """Put ordinary batch norm in place of every shift-based one with running statistics, in place; return the net."""

    def made(name: str, m: nn.Module) -> nn.Module | None:
        return m.plain() if isinstance(m, ShiftBatchNorm) and m.running_var is not None else None

    return _replaced(net, made)


def _replaced(net: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """Replace modules, one that stands in several places by one in all of them."""
    made: dict[int, nn.Module] = {}
    for name, module in list(net.named_modules(remove_duplicate=False)):
        new = made.get(id(module)) or make(name, module)
        if new is not None:
            made[id(module)] = new
            net.set_submodule(name, new)
    return net


class ShiftAdaMax(torch.optim.Optimizer):
    """AdaMax with the step size and the norm of every coordinate rounded to powers of two.

    Args:
        params: parameters or groups; `scale`, the layer's factor gamma_k, may differ by group.
        lr: alpha.
        betas: b1 and b2; the authors' code has 0.9 and 0.999.
        eps: added to AP2(v).
        scale: gamma_k.
        rounded: v goes on from AP2(v) + eps, as in the authors' code.

    Raises:
        InputError: for betas outside [0, 1).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2.0**-10,
        betas: tuple[float, float] = (1 - 2.0**-3, 1 - 2.0**-10),
        eps: float = 2.0**-27,
        scale: float = 1.0,
        rounded: bool = False,
    ) -> None:
        if not all(0 <= b < 1 for b in betas):
            raise InputError(f"betas must lie in [0, 1), not {betas!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "scale": scale, "rounded": rounded})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                state = self.state[theta]
                if not state:
                    state["step"], state["m"], state["v"] = 0, torch.zeros_like(theta), torch.zeros_like(theta)
                state["step"] += 1
                m = state["m"].lerp_(theta.grad, 1 - b1)
                v = torch.maximum(state["v"].mul_(b2), theta.grad.abs(), out=state["v"])
                norm = ap2(v).add_(group["eps"])
                if group["rounded"]:
                    v.copy_(norm)
                alpha = ap2(torch.tensor(group["lr"] / (1 - b1 ** state["step"]), dtype=torch.float64))
                theta.addcdiv_(m, norm, value=-group["scale"] * float(alpha))
        return loss
