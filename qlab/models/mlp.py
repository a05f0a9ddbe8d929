"""Multilayer perceptron: flatten, then (linear, batch norm, ReLU) per hidden layer, then linear.

    h_0 = vec(x),   h_l = relu(BN(W_l h_{l-1})),   logits = W h_L + b

Shapes: (N, *input_shape) to (N, num_classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from qlab.models.base import Net, batch_norm, logits

__all__ = ["MLP"]


class MLP(Net):
    """Multilayer perceptron.

    Args:
        input_shape: any; the input is flattened.
        num_classes: number of logits.
        hidden: width of each hidden layer; empty for a linear classifier.
        norm: batch norm after each hidden layer; without it the hidden layers have biases.
        affine: batch norm has scale and shift.
        final_norm: batch norm on the logits.
    """

    name = "mlp"

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        hidden: Sequence[int] = (64, 32),
        norm: bool = True,
        affine: bool = True,
        final_norm: bool = False,
    ) -> None:
        super().__init__(input_shape, num_classes, hidden=hidden, norm=norm, affine=affine, final_norm=final_norm)
        layers: list[nn.Module] = []
        features = prod(self.input_shape)
        for width in hidden:
            layers.append(nn.Linear(features, width, bias=not norm))
            if norm:
                layers.append(batch_norm(width, affine, dimensions=1))
            layers.append(nn.ReLU())
            features = width
        self.hidden = nn.Sequential(*layers)
        self.fc = logits(features, num_classes, affine, final_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for x (N, *input_shape)."""
        return self.fc(self.hidden(x.flatten(1)))
