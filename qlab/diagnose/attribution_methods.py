r"""The attribution methods, each a function of one `Problem`, all through captum.

| name                 | asks for      | scores                                                               | complete |
|----------------------|---------------|----------------------------------------------------------------------|----------|
| saliency             | gradient      | |dF/dx|                                                              |          |
| input_x_gradient     | gradient      | x dF/dx                                                              |          |
| smoothgrad           | gradient      | mean over noise e of dF/dx (x + e)                                   |          |
| integrated_gradients | gradient      | (x - x0) mean over the path of dF/dx                                 | yes      |
| layer_gradcam        | gradient      | sum over channels of mean dF/dA times A, on the pixels               |          |
| guided_backprop      | gradient      | gradient that passes ReLUs only where it is positive                 |          |
| deconvolution        | gradient      | the same, whatever the ReLU's input                                  |          |
| deeplift             | rescale rule  | (x - x0) product of delta_out / delta_in; see `attribution_deeplift` | yes      |
| feature_ablation     | values        | F(x) - F(x with the feature at its baseline)                         |          |
| occlusion            | values        | the same for a window that slides, averaged over windows             |          |
| shapley_sampling     | values        | mean over random orders of a feature's difference when it joins      | yes      |

Source: Kokhlikyan et al. 2020, arXiv 2009.07896 (captum); Smilkov et al. 2017, arXiv 1706.03825; Sundararajan et al. 2017, arXiv
1703.01365; Selvaraju et al. 2017, arXiv 1610.02391; Castro et al. 2009 (Shapley sampling).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from qlab.diagnose.attribution_deeplift import deeplift
from qlab.errors import InputError

__all__ = ["METHODS", "OUTPUTS", "Head", "MethodInfo", "Problem", "gradcam_layer", "values"]

OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "logit": lambda z: z,
    "log_probability": lambda z: z.log_softmax(-1),
    "probability": lambda z: z.softmax(-1),
}


class Head(nn.Module):
    """A net with the output to explain on top: `OUTPUTS` of its logits."""

    def __init__(self, net: nn.Module, output: str) -> None:
        super().__init__()
        self.net, self.output = net, output

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (N, d)."""
        return OUTPUTS[self.output](self.net(x))


@dataclass(frozen=True)
class Problem:
    """What the methods share.

    Attributes:
        F: the deployed net with its output, parameters frozen.
        x, x0: (N, *shape) inputs and baselines.
        target: (N,) classes.
        groups: (*shape) numbers of features, 0 to M - 1.
        layer: the convolution that Grad-CAM looks at; empty for the last.
        relu: whether Grad-CAM ends in a ReLU.
        steps: points on the path of integrated gradients.
        samples: noisy inputs of SmoothGrad, orders of Shapley sampling.
        noise: standard deviation of SmoothGrad's noise, of the range of the data.
        window: side of the window that occlusion slides.
        seed: of everything random.
    """

    F: Head
    x: Tensor
    x0: Tensor
    target: Tensor
    groups: Tensor
    layer: str
    relu: bool
    steps: int
    samples: int
    noise: float
    window: int
    seed: int

    def at(self, x: Tensor) -> Problem:
        """Return the same problem at other inputs (k N, *shape): input i k + j belongs to example i."""
        k = len(x) // len(self.x)
        return replace(self, x=x, x0=self.x0.repeat_interleave(k, 0), target=self.target.repeat_interleave(k, 0))


def _saliency(p: Problem) -> Tensor:
    from captum.attr import Saliency

    return Saliency(p.F).attribute(p.x, target=p.target)


def _input_x_gradient(p: Problem) -> Tensor:
    from captum.attr import InputXGradient

    return InputXGradient(p.F).attribute(p.x, target=p.target)


def _smoothgrad(p: Problem) -> Tensor:
    """The average that captum's NoiseTunnel takes, of noise from a generator of our own: NoiseTunnel draws from the global one.

    All examples get the same noise, or `sensitivity` would measure how far two draws of it lie apart.
    """
    from captum.attr import Saliency

    g = torch.Generator().manual_seed(p.seed)
    spread = p.noise * (p.x.max() - p.x.min())
    e = torch.randn(p.samples, *p.x.shape[1:], dtype=p.x.dtype, generator=g).to(p.x.device)
    total = torch.empty_like(p.x)
    for i in range(len(p.x)):
        noisy = p.x[i] + spread * e
        total[i] = Saliency(p.F).attribute(noisy, target=p.target[i].expand(p.samples), abs=False).mean(0)
    return total


def _integrated_gradients(p: Problem) -> Tensor:
    from captum.attr import IntegratedGradients

    return IntegratedGradients(p.F).attribute(
        p.x, p.x0, target=p.target, n_steps=p.steps, internal_batch_size=max(256, len(p.x))
    )


def gradcam_layer(net: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return the convolution that Grad-CAM looks at, the last unless one is named.

    Raises:
        InputError: the net has no two-dimensional convolution, or no module of that name.
    """
    modules = dict(net.named_modules())
    if name:
        if name not in modules:
            raise InputError(
                f"the net has no module {name!r} for Grad-CAM; it has {', '.join(n for n in modules if n)}"
            )
        return name, modules[name]
    convolutions = [(n, m) for n, m in modules.items() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise InputError("Grad-CAM needs a convolution (nn.Conv2d) in the net; leave layer_gradcam out for this one")
    return convolutions[-1]


def _layer_gradcam(p: Problem) -> Tensor:
    from captum.attr import LayerAttribution, LayerGradCam

    _, layer = gradcam_layer(p.F.net, p.layer)
    cam = LayerGradCam(p.F, layer).attribute(p.x, target=p.target, relu_attributions=p.relu)
    if cam.dim() != 4 or p.x.dim() != 4:
        raise InputError(f"Grad-CAM needs pictures (N, C, H, W); here the layer returns {tuple(cam.shape)}")
    return LayerAttribution.interpolate(cam.detach(), p.x.shape[2:], "bilinear").expand_as(p.x)


def _relu_only(p: Problem, name: str) -> None:
    if not any(isinstance(m, nn.ReLU) for m in p.F.modules()):
        raise InputError(
            f"{name} changes the gradient at nn.ReLU modules only, and this net has none: the result would be the plain gradient "
            "to the last bit, under another name. Use saliency"
        )


def _guided_backprop(p: Problem) -> Tensor:
    from captum.attr import GuidedBackprop

    _relu_only(p, "guided_backprop")
    return GuidedBackprop(p.F).attribute(p.x, target=p.target)


def _deconvolution(p: Problem) -> Tensor:
    from captum.attr import Deconvolution

    _relu_only(p, "deconvolution")
    return Deconvolution(p.F).attribute(p.x, target=p.target)


def _deeplift(p: Problem) -> Tensor:
    if p.F.output != "logit":
        raise InputError(
            f"deeplift explains logits, for its rule does not hold through a softmax; output is {p.F.output!r}"
        )
    return deeplift(p.F, p.x, p.x0, p.target)


def _feature_ablation(p: Problem) -> Tensor:
    from captum.attr import FeatureAblation

    return FeatureAblation(p.F).attribute(
        p.x, p.x0, target=p.target, feature_mask=p.groups[None], perturbations_per_eval=_together(p)
    )


def _occlusion(p: Problem) -> Tensor:
    from captum.attr import Occlusion

    shape = tuple(p.x.shape[1:])
    window = tuple(min(p.window, side) for side in shape)
    if len(shape) == 3:  # a window covers all channels
        window = (shape[0], *window[1:])
    return Occlusion(p.F).attribute(p.x, window, baselines=p.x0, target=p.target, perturbations_per_eval=_together(p))


def _shapley_sampling(p: Problem) -> Tensor:
    from captum.attr import ShapleyValueSampling

    g = torch.Generator().manual_seed(p.seed)

    def orders(features: int, samples: int) -> Iterator[list[int]]:
        for _ in range(samples):
            yield torch.randperm(features, generator=g).tolist()

    method = ShapleyValueSampling(p.F)
    method.permutation_generator = orders  # captum's own draws from the global generator
    return method.attribute(
        p.x,
        p.x0,
        target=p.target,
        feature_mask=p.groups[None],
        n_samples=p.samples,
        perturbations_per_eval=_together(p),
    )


def _together(p: Problem) -> int:
    """Return how many perturbed batches run at once: about 512 examples."""
    return max(1, min(64, 512 // len(p.x)))


class MethodInfo(NamedTuple):
    """A method.

    Attributes:
        run: problem to values of the shape of the inputs.
        asks: what it asks the net for.
        signed: whether scores have a sign; if not, they are ranked against magnitudes.
        complete: whether the scores claim to sum to F(x) - F(x0).
        multiplies: whether a feature that stands at its baseline gets zero whatever the net.
        spread: whether a feature's score stands on each of its inputs (mean) rather than being shared among them (sum).
        title: for pictures.
    """

    run: Callable[[Problem], Tensor]
    asks: Literal["gradient", "rescale", "values"]
    signed: bool
    complete: bool
    multiplies: bool
    spread: bool
    title: str


METHODS: dict[str, MethodInfo] = {
    "saliency": MethodInfo(_saliency, "gradient", False, False, False, False, "Saliency"),
    "input_x_gradient": MethodInfo(_input_x_gradient, "gradient", True, False, True, False, "Input x gradient"),
    "smoothgrad": MethodInfo(_smoothgrad, "gradient", True, False, False, False, "SmoothGrad"),
    "integrated_gradients": MethodInfo(
        _integrated_gradients, "gradient", True, True, True, False, "Integrated gradients"
    ),
    "layer_gradcam": MethodInfo(_layer_gradcam, "gradient", True, False, False, True, "Grad-CAM"),
    "guided_backprop": MethodInfo(_guided_backprop, "gradient", True, False, False, False, "Guided backprop"),
    "deconvolution": MethodInfo(_deconvolution, "gradient", True, False, False, False, "Deconvolution"),
    "deeplift": MethodInfo(_deeplift, "rescale", True, True, True, False, "DeepLift"),
    "feature_ablation": MethodInfo(_feature_ablation, "values", True, False, True, True, "Ablation"),
    "occlusion": MethodInfo(_occlusion, "values", True, False, True, True, "Occlusion"),
    "shapley_sampling": MethodInfo(_shapley_sampling, "values", True, True, True, True, "Shapley sampling"),
}


def _differentiable(p: Problem) -> bool:
    probe = p.x[:1].detach().clone().requires_grad_()
    with torch.enable_grad():
        out = p.F(probe).sum()
        return out.requires_grad and torch.autograd.grad(out, probe, allow_unused=True)[0] is not None


def values(name: str, p: Problem) -> Tensor:
    """Return a method's values, of the shape of p.x, without captum's remarks on its own hooks and on gradients of inputs.

    Where the net passes no gradient to its input at all (a detached or integer step) a gradient method's values are zero.
    """
    if METHODS[name].asks != "values" and not _differentiable(p):
        return torch.zeros_like(p.x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.enable_grad():
            return METHODS[name].run(replace(p, x=p.x.detach().clone())).detach()
