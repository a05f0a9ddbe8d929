"""Attribution: what the guard costs over bare captum, and exact ablation against captum's.

    qlab bench attribution

A binary net for pictures of 28 x 28 and a batch of 16. Bare captum returns a map; ours returns the map with what it explains, its
completeness gap, exact ablation and flips of 4 x 4 patches (49 features) and the ranking against them. The peers get the same net,
batch and settings; exact ablation's peer is captum's FeatureAblation as it comes, one perturbation at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import qlab
from qlab.bench import Comparison
from qlab.diagnose import guard
from qlab.diagnose.attribution import attribute, patches
from qlab.diagnose.attribution_deeplift import rescaled
from qlab.diagnose.attribution_methods import Head
from qlab.quantizers import Sign


def problem() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    net = qlab.quantize(qlab.build("lenet", (1, 28, 28), 10, seed=0), Sign, Sign, keep=("first", "last")).eval()
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(16, 1, 28, 28, generator=g), torch.randint(0, 10, (16,), generator=g)
    return net, Head(qlab.harden(net), "logit").eval().requires_grad_(False), x, y


def captum_alone(net: nn.Module, x: Tensor, y: Tensor, groups: Tensor) -> None:
    """Run the same four methods, DeepLift with the rule on signs."""
    from captum.attr import DeepLift, FeatureAblation, IntegratedGradients, Saliency

    x = x.clone().requires_grad_()
    Saliency(net).attribute(x, target=y)
    IntegratedGradients(net).attribute(x, target=y)
    with rescaled([Sign]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DeepLift(net).attribute(x, torch.zeros_like(x), target=y)
    FeatureAblation(net).attribute(x, target=y, feature_mask=groups[None])


def comparisons() -> Iterator[Comparison]:
    from captum.attr import FeatureAblation, IntegratedGradients

    net, bare, x, y = problem()
    groups = patches((1, 28, 28), 4)

    def ours(*methods: str) -> Callable[[], object]:
        return lambda: attribute(net, x, y, methods, features=4)

    yield Comparison(
        "exact ablation, 49 patches",
        lambda: guard.ablations(bare, x, torch.zeros_like(x), y, groups),
        lambda: FeatureAblation(bare).attribute(x, target=y, feature_mask=groups[None]),
        "captum FeatureAblation",
        goal=1.0,
        goal_kind="ratio",
        rounds=7,
        warmup=2,
    )
    yield Comparison(
        "integrated gradients with its guard",
        ours("integrated_gradients"),
        lambda: IntegratedGradients(bare).attribute(x.clone().requires_grad_(), target=y),
        "captum, no checks",
        rounds=5,
        warmup=1,
    )
    yield Comparison(
        "four maps with their guard",
        ours("saliency", "integrated_gradients", "deeplift", "feature_ablation"),
        lambda: captum_alone(bare, x, y, groups),
        "captum, no checks",
        rounds=5,
        warmup=1,
    )
