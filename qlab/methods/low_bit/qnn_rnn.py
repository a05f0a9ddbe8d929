r"""QNN for recurrent nets: every matrix and both inputs of every product on 2^k levels, the memory in float.

    q_k(x) = sign(x) (2 floor(n |x| / 2) + 1) / n,   n = 2^k - 1,  |x| <= 1            the nearest of -1, ..., -1/n, 1/n, ..., 1
    weights:      W_q = s q_k(W / s),   s = max|W| of each row for k > 1, mean|W| for k = 1      gradient: identity
    activations:  Qa(a) = q_k(clip(a, -1, 1))                                                    gradient: 1[|a| <= 1]

    lstm:         z_t = W_x Qa(x_t) + W_h Qa(h_{t-1}) + b,   h_t = Qa(o tanh(c_t)),   c_t in float

after a step: W <- clip(W, -1, 1). The levels are odd-symmetric, an even number and none at zero: k = 1 is sign, with sign(0) =
+1, so one code serves all k. |o tanh(c)| < 1 fits the range of Qa, so no batch norm is needed; the scale of each row keeps the
gates out of saturation. The gradient is clipped by its norm, for it passes through T products. Where the quantizers stand in
the nets says `qlab.models.recurrent`; on any other net Qa takes the place of the nonlinearities.

Source: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Quantized Neural Networks, JMLR 18 (2018), arXiv 1609.07061: the
Penn-Treebank experiments; the levels with both ends as in Xu et al., ICLR 2018, which repeat them. No code of these
experiments is public: the row scales, where Qa stands in the cell and the clip of the gradient are a reconstruction.
Deviation: first and last matrix are quantized as in the paper (DoReFa keeps them in float); `keep` changes that.

Shapes: W (O, K, ...), s (O, 1, ...); a any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlab.errors import InputError
from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG
from qlab.quantizers import Quantizer, quantized_tensors
from qlab.quantizers.kbit import KBit

__all__ = ["QNNRNN"]


class QNNRNN(Method):
    """QNN with odd-symmetric levels, for recurrent nets; works on any net.

    Args:
        net: a plain net or the spec of one.
        weight_bits: k of the weights, 1 to 16; None leaves them in float.
        activation_bits: k of the activations, 1 to 16; None leaves the nonlinearities.
        grad_clip: largest norm of the gradient, 0 for no limit. One given to the trainer goes before it.
        clip: keep latent weights within [-1, 1].
        lr: learning rate. The paper's is not known for recurrent nets.

    Raises:
        InputError: for a hyperparameter out of range.
    """

    info = CATALOG["qnn_rnn"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        weight_bits: int | None = 4,
        activation_bits: int | None = 4,
        grad_clip: float = 1.0,
        clip: bool = True,
        lr: float = 4e-3,
        **kwargs: Any,
    ) -> None:
        for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16):
                raise InputError(f"{name} must be a whole number from 1 to 16, or None for float, not {bits!r}")
        if isinstance(grad_clip, bool) or not isinstance(grad_clip, int | float) or not grad_clip >= 0:
            raise InputError(f"grad_clip must be a number of at least 0, not {grad_clip!r}")
        super().__init__(net, lr=lr, **kwargs)

    def weight_quantizer(self) -> Quantizer | None:
        """Return the row-scaled levels of one matrix."""
        return None if self.h.weight_bits is None else KBit(self.h.weight_bits, rows=True, window=math.inf)

    def activation_quantizer(self) -> Quantizer | None:
        """Return Qa."""
        return None if self.h.activation_bits is None else KBit(self.h.activation_bits)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm; called by Lightning before every optimizer step."""
        limit = self.h.grad_clip or None if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, limit, gradient_clip_algorithm)

    def post_step(self) -> None:
        """Clip latent weights to [-1, 1]."""
        if self.h.clip:
            for t in quantized_tensors(self.net):
                t.latent.clamp_(-1, 1)
