r"""Straight-through estimator: sign forward, a surrogate derivative backward, for weights and activations.

    forward:   w_q = sign(w)                          a_q = sign(z)          sign(0) = +1
    backward:  dL/dw = dL/dw_q * d(w)                 dL/dz = dL/da_q * d(z)

d is any surrogate of `qlab.quantizers.surrogates`, or a function of the user's own. With `activations="sign"` the
nonlinearities before quantized layers are replaced by signs and the net is a binary neural network (BNN); first and
last layer are then usually kept in float: `keep=("first", "last")`. With `clamp` latent weights stay within [-1, 1]:
identity with clamp is BinaryConnect.

Source: Hubara et al., Binarized Neural Networks, NeurIPS 2016, arXiv 1602.02830; surrogates as listed in their
module.

Shapes: latent and quantized tensors are those of the plain net.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, Sign, Surrogate, quantized_tensors, surrogate
from qlab.quantizers.surrogates import SurrogateName

__all__ = ["STE"]


class STE(Method):
    """Straight-through estimator with any surrogate.

    Args:
        net: a plain net or the spec of one.
        surrogate: "identity", "clipped", "polynomial", "tanh", "swish", "erf", or an elementwise function d(x). A
            checkpoint holds only the name, so a function has to be passed again: `STE.load(path, surrogate=d)`.
        sharpness: k or b of tanh, swish, erf; None is the surrogate's default.
        activations: "sign" binarizes activations too; "float" leaves the nonlinearities.
        activation_surrogate: surrogate of the activations; None is that of the weights.
        clamp: clip latent weights to [-1, 1] after every step.

    Raises:
        UnknownNameError, InputError: for a surrogate that is none.
    """

    info = CATALOG["ste"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        surrogate: SurrogateName | Callable[[Tensor], Tensor] = "clipped",
        sharpness: float | None = None,
        activations: Literal["float", "sign"] = "float",
        activation_surrogate: SurrogateName | Callable[[Tensor], Tensor] | None = None,
        clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        if activations not in ("float", "sign"):
            raise InputError(f"activations must be 'float' or 'sign', not {activations!r}")
        # Kept in one dictionary: the hooks below run within the base constructor, and functions must not reach the checkpoint.
        self.__dict__["_surrogates"] = {
            "weight": _lookup(surrogate, sharpness),
            "activation": _lookup(surrogate if activation_surrogate is None else activation_surrogate, sharpness),
        }
        super().__init__(net, **kwargs)
        for name in ("surrogate", "activation_surrogate"):
            if callable(self.hparams[name]):
                self.hparams[name] = "custom"

    def weight_quantizer(self) -> Quantizer:
        """Return sign with the weights' surrogate."""
        return Sign(self.__dict__["_surrogates"]["weight"])

    def activation_quantizer(self) -> Quantizer | None:
        """Return sign with the activations' surrogate, or None."""
        return Sign(self.__dict__["_surrogates"]["activation"]) if self.h.activations == "sign" else None

    def post_step(self) -> None:
        """Clip latent weights to [-1, 1]."""
        if self.h.clamp:
            for t in quantized_tensors(self.net):
                t.latent.clamp_(-1, 1)


def _lookup(which: str | Callable[[Tensor], Tensor], sharpness: float | None) -> Surrogate:
    if which == "custom":
        raise InputError(
            "this net was trained with a surrogate function of the user's own: pass it again, load(path, surrogate=d)"
        )
    return surrogate(which, sharpness)
