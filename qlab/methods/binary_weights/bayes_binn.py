r"""BayesBiNN: a probability for each sign, learned with the Bayesian learning rule and relaxed samples.

The posterior of a weight is q(w = +1) = sigmoid(2 lambda), its mean mu = tanh(lambda). A step draws S relaxed samples

    eps ~ U(0, 1),   delta = 1/2 log(eps / (1 - eps)),   w = tanh((lambda + delta) / tau)          P(w > 0) = sigmoid(2 lambda)
    s = (1 - w^2 + e) / (tau (1 - mu^2 + e)),   e = 1e-10                                           (dw/dmu, guarded)
    m <- rho m + (1 - rho) { N 1/S sum s dl/dw + r lambda }
    lambda <- lambda - lr m / (1 - rho^step)

N is the number of training samples: l is a mean, the posterior wants the sum. r lambda comes from the prior lambda_0 = 0.
S = 0 trains at the mean: w = mu, s = 1. Deployed: sign(lambda), the mode; `acc_latent` is that of the mean, w = mu.

A numerical fact. The authors' tau = 1e-10 and start |lambda| = 10 give, in float32, w = +-1 and mu = +-1 exactly and so
s = e / (tau e) = 1e10: a straight-through estimator with a huge constant step on saturated weights. In float64 1 - mu^2 is
8.2e-9 there and s is 1.2e8. The formula above is evaluated as it stands, in the dtype of the weights. With tau of order 1
it is the relaxation that it looks like.

Source: Meng, Bachmann, Khan, Training Binary Neural Networks using the Bayesian Learning Rule, ICML 2020, arXiv 2002.10778;
constants from the authors' code (team-approx-bayes/BayesBiNN). CIFAR-10: tau 1e-10, lr 3e-4 with cosine to zero, rho 0.9,
lambda = +-10, S = 1, batch 128, N ten times the number of samples because data are augmented, every parameter binary, batch
norm without scale and shift. Two moons: tau 1, lr 1e-3, rho 0.99, lambda = +-15, S = 5.
On the numerical fact: Shekhovtsov, Bias-variance tradeoffs in single-sample binary gradient estimators, 2021.
Deviations: mu in s is that of the present lambda; in their code it lags one step behind. The defaults are those of CIFAR-10,
but for N, which `augmentation` multiplies. lambda_0 = 0 always (another prior is for continual learning).

Shapes: lambda, mu, w, s are those of the weight; delta has the S samples as a first axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.methods.momentum import BiasCorrectedMomentum
from qlab.quantizers import Quantizer, hard_sign, quantized_tensors
from qlab.quantizers.declared import Declared

__all__ = ["BayesBiNN", "Bernoulli", "half_logit", "sample_slope"]

GUARD = 1e-10


def half_logit(eps: Tensor) -> Tensor:
    """Return delta = 1/2 log(eps / (1 - eps)) for eps in [0, 1)."""
    eps = eps.clamp(min=torch.finfo(eps.dtype).tiny)
    return 0.5 * (eps.log() - torch.log1p(-eps))


def sample_slope(w: Tensor, lambda_: Tensor, tau: float) -> Tensor:
    """Return s = (1 - w^2 + e) / (tau (1 - mu^2 + e)), mu = tanh(lambda), in the arithmetic of their dtype."""
    mu = torch.tanh(lambda_)
    return (1 - w * w + GUARD) / tau / (1 - mu * mu + GUARD)


class Bernoulli(Quantizer):
    """Relaxed samples of a binary weight while training, its mean in eval mode; deployed sign(lambda).

    Args:
        tau: temperature.
        samples: S; 0 for the mean.
        start: latents start at +-start, the sign drawn; None takes the net's own weights.
    """

    bits = 1
    delta: Tensor

    def __init__(self, tau: float = 1.0, samples: int = 1, start: float | None = 10.0) -> None:
        super().__init__()
        self.tau, self.samples, self.start = tau, samples, start
        self.stochastic = samples > 0
        self.sample = 0  # which of the samples `forward` shows
        self.register_buffer("delta", torch.empty(0), persistent=False)

    def init(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Make room for the noise; draw latents at +-start."""
        self.delta = torch.zeros(self.samples, *latent.shape, dtype=latent.dtype, device=self.delta.device)
        if self.start is None:
            return latent
        return self.start * hard_sign(torch.rand(latent.shape, generator=generator) - 0.5)

    def resample(self, generator: torch.Generator) -> None:
        """Draw delta for every sample of this step."""
        self.sample = 0  # what is asked outside of `objective`, an inner attack say, sees the first one
        if self.samples:
            self.delta.copy_(half_logit(torch.rand(self.delta.shape, generator=generator)))

    def forward(self, latent: Tensor) -> Tensor:
        """Return the present sample w with slope s; in eval mode, or without samples, mu with slope 1."""
        lambda_ = latent.detach()
        if not (self.training and self.samples):
            return Declared.apply(latent, torch.tanh(lambda_), latent.new_ones(()))
        w = torch.tanh((lambda_ + self.delta[self.sample].to(latent.dtype)) / self.tau)
        return Declared.apply(latent, w, sample_slope(w, lambda_, self.tau))

    def hard(self, latent: Tensor) -> Tensor:
        """Return sign(lambda), the mode."""
        return hard_sign(latent)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (-1, +1)."""
        return torch.tensor([-1, 1], dtype=dtype)

    def extra_repr(self) -> str:
        """Name temperature and samples."""
        return f"tau={self.tau:g}, samples={self.samples}"


class BayesBiNN(Method):
    """BayesBiNN with the authors' optimizer.

    Args:
        net: a plain net or the spec of one.
        tau: temperature of the relaxation; the authors' 1e-10 (CIFAR), 1 (two moons).
        samples: S, relaxed samples for each step, every one a forward and a backward pass; 0 trains at the mean.
        N: number of training samples in the rule. None asks the data.
        augmentation: factor of N; the authors' 10 where data are augmented.
        start: lambda starts at +-start with random signs; None takes the net's own weights. The authors' 10 (CIFAR), 15
            (two moons).
        prior: r, the weight of the prior lambda_0 = 0.
        lr: learning rate of lambda; the authors' 3e-4 (CIFAR), 1e-3 (two moons).
        momentum: rho.
        float_lr: learning rate of parameters left in float.
        lr_schedule: "cosine" to zero over the run, "exponential" to `lr_end` times the start, or "constant".
        lr_end: share of the learning rate left at the end of an exponential schedule.
        loss: "cross_entropy" or "squared_hinge".
        keep: layers left in float: "first", "last", or module names.
        biases: binarize biases too, as the authors do with every parameter.
        reestimate_bn: re-estimate batch-norm statistics with the hard weights before evaluation.
        seed: of the start and the samples.

    Raises:
        InputError: for a hyperparameter out of range; in training, where N is not given and cannot be known.
    """

    info = CATALOG["bayes_binn"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        tau: float = 1e-10,
        samples: int = 1,
        N: int | None = None,
        augmentation: float = 1.0,
        start: float | None = 10.0,
        prior: float = 1.0,
        lr: float = 3e-4,
        momentum: float = 0.9,
        float_lr: float = 0.1,
        lr_schedule: Literal["cosine", "exponential", "constant"] = "cosine",
        lr_end: float = 1e-3,
        loss: Literal["cross_entropy", "squared_hinge"] = "cross_entropy",
        keep: Sequence[str] = (),
        biases: bool = True,
        reestimate_bn: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value, good, expected in (
            ("tau", tau, 0 < tau < math.inf, "a positive number"),
            ("samples", samples, samples >= 0, "at least 0"),
            ("N", N, N is None or N >= 1, "at least 1, or None"),
            ("augmentation", augmentation, 0 < augmentation < math.inf, "a positive number"),
            ("start", start, start is None or 0 < start < math.inf, "a positive number, or None"),
            ("prior", prior, 0 <= prior < math.inf, "a number of at least 0"),
        ):
            if not good:
                raise InputError(f"{name} must be {expected}, not {value!r}")
        super().__init__(
            net,
            lr=lr,
            momentum=momentum,
            lr_schedule=lr_schedule,
            lr_end=lr_end,
            loss=loss,
            keep=keep,
            biases=biases,
            reestimate_bn=reestimate_bn,
            seed=seed,
        )

    def weight_quantizer(self) -> Quantizer:
        """Return the posterior of one weight."""
        return Bernoulli(self.h.tau, self.h.samples, self.h.start)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss over the step's samples."""
        chosen = [t.quantizer for t in quantized_tensors(self.net)]
        losses = []
        for sample in range(max(self.h.samples, 1)):
            for quantizer in chosen:
                quantizer.sample = sample  # type: ignore[assignment]
            losses.append(self.loss(self.net(x), y))
        return torch.stack(losses).mean()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the authors' optimizer on lambda, with plain momentum on float parameters; N comes when training starts."""
        h = self.h
        latent = [t.latent for t in quantized_tensors(self.net)]
        binary = {id(p) for p in latent}
        groups: list[dict[str, Any]] = [{"params": latent, "decay": h.prior}]
        rest = [p for p in self.parameters() if id(p) not in binary]
        if rest:
            groups.append({"params": rest, "lr": h.float_lr})
        return BiasCorrectedMomentum(groups, h.lr, h.momentum)

    def on_train_start(self) -> None:
        """Learn N, which is known only now, and give it to the optimizer."""
        super().on_train_start()
        n = self.training_samples() if self.h.N is None else self.h.N
        if n is None:
            raise InputError(
                "BayesBiNN multiplies gradients by the number of training samples, not known here: give N=..."
            )
        self.optimizers().param_groups[0]["scale"] = float(n * self.h.augmentation)  # type: ignore[union-attr]
