r"""Recurrent language models: from each symbol of a window, and those before it, the next one.

    x_t = bound(W_e onehot(s_t))                          a column of W_e
    z_t = W_x x_t + b + W_h h_{t-1},   h_0 = 0

    lstm       i, f, o = sigmoid(z_i, z_f, z_o),  g = tanh(z_g)          char_rnn       h_t = bound(tanh(z_t))
               c_t = f c_{t-1} + i g,  c_0 = 0
               h_t = bound(o tanh(c_t))

    logits_t = W_s h_t + b_s

The four matrices are `nn.Linear` and bound(a) = clip(a, -1, 1) is `nn.Hardtanh`, so that `qlab.quantize` quantizes all matrices
and puts both inputs of every product on a grid. In the float net bound changes no h_t, for |o tanh(c)| < 1, and keeps x_t in the
range that a quantizer has. Gates are functions, not modules: they and the memory c_t stay in float, as in the recurrent
networks of Hubara et al.

One product serves the inputs of all T steps; the loop holds the recurrent one alone. It takes `recurrent.weight` once, for under a
quantizer each access would quantize it anew; hooks on `recurrent` and on `embedding`, whose product is an index, see nothing.
The start h_0 = 0 lies on no grid without a zero; its product is 0 in any arithmetic.

Forget biases start at 1, the other biases of the cell at 0; weights as in torch, U(-1/sqrt(H), 1/sqrt(H)) of W_h and
U(-1/sqrt(E), 1/sqrt(E)) of W_x; W_e from U(-1, 1), which fills the range of bound.

Source: Hochreiter, Schmidhuber 1997; Gers et al. 2000 (forget gates); quantized inputs and matrices: Hubara et al., arXiv
1609.07061. Deviation: torch has two biases, of which only the sum matters; here is one.

Shapes: s (N, T) int64 to logits (N, V, T); E entries of x_t, H of h_t and c_t; gates in torch's order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from qlab.errors import InputError
from qlab.models.base import Net

__all__ = ["LSTM", "CharRNN"]

State = tuple[Tensor, ...]


class _Recurrent(Net):
    """The frame around a cell: embedding, products, loop and logits."""

    gates: ClassVar[int]  # rows of W_x and W_h for each entry of h
    memories: ClassVar[int]  # tensors (N, H) that the cell keeps besides h

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, hidden: int, embedding: int) -> None:
        super().__init__(input_shape, num_classes, hidden=hidden, embedding=embedding)
        if len(self.input_shape) != 1:
            raise InputError(
                f"{self.name} takes windows of tokens: input_shape is {self.input_shape}, expected (T,). For images use 'lenet'."
            )
        self._forward_pre_hooks.clear()  # the check of float inputs
        self.register_forward_pre_hook(_check_tokens)
        # In this order a quantizer takes the place of bound_x for `input`, and of bound_h for `recurrent`.
        self.embedding = nn.Linear(self.num_classes, embedding, bias=False)
        self.bound_x = nn.Hardtanh()
        self.input = nn.Linear(embedding, self.gates * hidden)
        self.bound_h = nn.Hardtanh()
        self.recurrent = nn.Linear(hidden, self.gates * hidden, bias=False)
        self.fc = nn.Linear(hidden, self.num_classes)
        nn.init.uniform_(self.embedding.weight, -1, 1)
        nn.init.zeros_(self.input.bias)

    def cell(self, z: Tensor, memory: State) -> tuple[Tensor, State]:
        """Return the unbounded output (N, H) and the new memory for pre-activations z (N, gates H)."""
        raise NotImplementedError

    def embed(self, s: Tensor) -> Tensor:
        """Return W_e onehot(s), tokens (...) to (..., E): the product by an index."""
        try:
            return F.embedding(s, self.embedding.weight.t())
        except IndexError:
            raise InputError(
                f"tokens run from {int(s.min())} to {int(s.max())}; this net knows 0 to {self.num_classes - 1}."
            ) from None

    def states(self, s: Tensor) -> Tensor:
        """Return h_1 .. h_T, (N, T, H), for tokens (N, T)."""
        z_x = self.input(self.bound_x(self.embed(s.t()))).unbind(0)  # T times (N, gates H)
        W_h = self.recurrent.weight.t()
        h = z_x[0].new_zeros(s.shape[0], self.recurrent.in_features)
        memory: State = (h,) * self.memories
        outputs = []
        for t in range(self.input_shape[0]):
            h, memory = self.cell(torch.addmm(z_x[t], h, W_h), memory)
            h = self.bound_h(h)
            outputs.append(h)
        return torch.stack(outputs, 1)

    def forward(self, s: Tensor) -> Tensor:
        """Return logits (N, V, T) for tokens (N, T): logits[n, :, t] predict the symbol after s[n, t]."""
        return self.fc(self.states(s)).transpose(1, 2)


class LSTM(_Recurrent):
    """Long short-term memory of one layer.

    Args:
        input_shape: (T,), the length of a window.
        num_classes: V, number of symbols.
        hidden: H, entries of the state.
        embedding: E, entries of a symbol's vector.
    """

    name = "lstm"
    gates = 4
    memories = 1

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, hidden: int = 96, embedding: int = 32) -> None:
        super().__init__(input_shape, num_classes, hidden=hidden, embedding=embedding)
        nn.init.ones_(self.input.bias[hidden : 2 * hidden])

    def cell(self, z: Tensor, memory: State) -> tuple[Tensor, State]:
        """Return o tanh(c) and the new c."""
        (c,) = memory
        z_i, z_f, z_g, z_o = z.chunk(4, 1)
        c = torch.sigmoid(z_f) * c + torch.sigmoid(z_i) * torch.tanh(z_g)
        return torch.sigmoid(z_o) * torch.tanh(c), (c,)


class CharRNN(_Recurrent):
    """Simple recurrent net of one layer with tanh.

    Args:
        input_shape: (T,), the length of a window.
        num_classes: V, number of symbols.
        hidden: H, entries of the state.
        embedding: E, entries of a symbol's vector.
    """

    name = "char_rnn"
    gates = 1
    memories = 0

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, hidden: int = 128, embedding: int = 32) -> None:
        super().__init__(input_shape, num_classes, hidden=hidden, embedding=embedding)

    def cell(self, z: Tensor, memory: State) -> tuple[Tensor, State]:
        """Return tanh(z)."""
        return torch.tanh(z), memory


def _check_tokens(net: _Recurrent, inputs: tuple[Any, ...]) -> None:
    """Forward pre-hook: raise one clear InputError for a batch that the network cannot take."""
    if not inputs or isinstance(inputs[0], Proxy):  # symbolic tracing of a module that contains this net
        return
    s, (length,) = inputs[0], net.input_shape
    if not isinstance(s, Tensor) or s.dtype != torch.int64:
        kind = s.dtype if isinstance(s, Tensor) else type(s).__name__
        raise InputError(f"input is {kind}; expected tokens (N, {length}) int64, as the data set 'text' gives them.")
    if s.dim() != 2 or s.shape[1] != length:
        raise InputError(f"input has shape {tuple(s.shape)}; expected (N, {length}), a batch of N windows.")
