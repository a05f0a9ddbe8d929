"""Plain full-precision networks that know nothing of quantization.

`build(name, input_shape, num_classes, **options)` gives an `nn.Module` that maps a float batch (N, *input_shape) to
logits (N, num_classes); a recurrent one maps tokens (N, T) to logits (N, num_classes, T). Importing this package does not
import torch; a network is imported when it is built.

What every network here promises, because `qlab.quantize` and the tools of torch rely on it:

* nonlinearities that a layer reads are modules, one object per place, and modules are registered in the order in which they
  run;
* a nonlinearity that stands, in that order, between a layer and the layer before it is the input of that layer (pooling
  comes before batch norm), so that replacing it by a quantizer puts the layer's input on the quantizer's grid;
* a layer followed by batch norm has no bias;
* `torch.fx`, `torch.func.functional_call` and `torch.vmap` (batch norm in eval mode) work on it;
* `net.spec` is a dictionary of primitives, and `build(net.spec)` gives the same architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qlab.errors import InputError
from qlab.registry import Entry, Registry

if TYPE_CHECKING:
    from qlab.models.base import Net

__all__ = ["MODELS", "NetInfo", "build"]


@dataclass(frozen=True)
class NetInfo(Entry):
    """What the lab knows of a network without importing it.

    Args:
        takes: "floats", images or vectors; or "tokens", windows of a text.
    """

    takes: Literal["floats", "tokens"] = "floats"


MODELS: Registry[NetInfo] = Registry(
    "model",
    [
        NetInfo("mlp", "Multilayer perceptron on the flattened input", "qlab.models.mlp:MLP"),
        NetInfo(
            "lenet", "LeNet-5 with batch norm and ReLU, for small grey or colour images", "qlab.models.lenet:LeNet"
        ),
        NetInfo(
            "vgg_small", "VGG-small of the binary-network papers: six 3x3 convolutions", "qlab.models.vgg:VGGSmall"
        ),
        NetInfo("vgg16", "VGG-16 with batch norm, for images of 32x32 pixels", "qlab.models.vgg:VGG16"),
        NetInfo("resnet20", "ResNet-20 for CIFAR, shortcuts of type A or B", "qlab.models.resnet:ResNet20"),
        NetInfo(
            "resnet18",
            "ResNet-18, with a stem for small or for large images",
            "qlab.models.resnet:ResNet18",
        ),
        NetInfo(
            "bireal18", "Bi-Real Net 18: every 3x3 convolution has its own shortcut", "qlab.models.bireal:BiReal18"
        ),
        NetInfo("repair20", "ResNet-20 with every topology repair of binary nets", "qlab.models.repairable:Repair20"),
        NetInfo("repair18", "ResNet-18 with every topology repair of binary nets", "qlab.models.repairable:Repair18"),
        NetInfo("lstm", "LSTM language model of one layer", "qlab.models.recurrent:LSTM", takes="tokens"),
        NetInfo(
            "char_rnn", "Simple recurrent language model of one layer", "qlab.models.recurrent:CharRNN", takes="tokens"
        ),
    ],
)


def build(
    name_or_spec: str | Mapping[str, Any],
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    *,
    seed: int | None = None,
    **options: Any,
) -> Net:
    """Return a freshly initialised network.

    Args:
        name_or_spec: a name in `MODELS`, or a spec as `net.spec` holds it; further arguments override the spec's.
        input_shape: (C, H, W) of one image, or (D,) of one vector; the mlp takes either. (T,) of one window of tokens.
        num_classes: number of logits, at least 2.
        seed: draws the initial weights on the CPU from this seed alone: they are the same on every device, and torch's
            global generator is left as it was. None: from torch's global generator, as in torch.
        **options: of the network; `affine` (batch norm has scale and shift) and `final_norm` (batch norm on the
            logits) are common to all but the recurrent ones.

    Returns:
        The network in training mode, on torch's default device and in its default dtype.

    Raises:
        UnknownNameError: no such network.
        InputError: an option the network does not have, a value of the wrong type or range, an image too small for
            the network, or a network so large that it cannot be meant. Nothing is allocated before this is known: a
            spec may come out of a file from a stranger.
    """
    spec: dict[str, Any] = dict(name_or_spec) if isinstance(name_or_spec, Mapping) else {"name": name_or_spec}
    spec |= options
    spec |= {} if input_shape is None else {"input_shape": input_shape}
    spec |= {} if num_classes is None else {"num_classes": num_classes}
    entry = MODELS[spec.pop("name", None)]
    for key, example in (("input_shape", "(1, 28, 28)"), ("num_classes", "10")):
        if spec.get(key) is None:
            raise InputError(f"{entry.name} needs {key}; none was given. Say for example {key}={example}.")

    from qlab.models.base import construct  # imports torch

    return construct(MODELS.load(entry.name), spec.pop("input_shape"), spec.pop("num_classes"), spec, seed)
