"""The loss of many weights at once equals the loss of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.diagnose.objective import Objective, margin
from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import Sign, quantize


def problem(model: str, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    net = quantize(qlab.build(model, shape, 3, seed=0).double(), weights=Sign, activations=Sign, keep=("last",)).eval()
    return net, torch.randn(7, *shape, dtype=torch.float64, generator=g), torch.randint(0, 3, (7,), generator=g)


@pytest.mark.parametrize(("model", "shape"), [("mlp", (6,)), ("lenet", (1, 16, 16))])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_losses_of_stacked_weights_equal_the_losses_of_each(
    model: str, shape: tuple[int, ...], chunk: int | None
) -> None:
    net, x, y = problem(model, shape)
    J = Objective(net, x, y, beta=0.3)
    g = torch.Generator().manual_seed(3)
    stack = {
        name: torch.randn(5, *w.shape, dtype=w.dtype, generator=g)
        for name, w in J.theta.items()
        if "original" in name or "bias" in name
    }
    expected = []
    for k in range(5):
        with torch.no_grad():
            for name, w in net.named_parameters():
                if name in stack:
                    w.copy_(stack[name][k])
            expected.append(F.cross_entropy(0.3 * net(x), y))
    torch.testing.assert_close(J.losses(stack, chunk), torch.stack(expected), rtol=1e-12, atol=1e-12)
    z = J.logits(stack, chunk)
    assert z.shape == (5, 7, 3)
    torch.testing.assert_close(z[4], net(x).detach(), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_what_backward_gives() -> None:
    net, x, y = problem("mlp", (6,))
    F.cross_entropy(2.0 * net(x), y).backward()
    g = Objective(net, x, y, beta=2.0).gradient()
    for name, p in net.named_parameters():
        torch.testing.assert_close(g[name], p.grad, rtol=1e-12, atol=1e-14)


def test_the_gradient_is_zero_where_the_graph_is_cut() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    net = nn.Sequential(nn.Linear(4, 3), Cut()).eval()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    g = Objective(net, x, torch.tensor([0, 1])).gradient()
    assert all(not bool(w.any()) for w in g.values())


def test_the_margin_is_positive_exactly_where_another_class_leads() -> None:
    z = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [1.0, 1.0, 0.0]])
    assert margin(z, torch.tensor([0, 0, 0])).tolist() == [-1.0, 5.0, 0.0]


def test_what_does_not_fit_is_named() -> None:
    net, x, y = problem("mlp", (6,))
    J = Objective(net, x, y)
    with pytest.raises(UnknownNameError, match=r"unknown parameter 'fc\.wight'"):
        J.losses({"fc.wight": torch.zeros(2, 3, 3)})
    with pytest.raises(InputError, match=r"have shape \(3, 256\); expected \(K, \*\("):
        J.losses({"fc.weight": torch.zeros(3, 256)})
    with pytest.raises(InputError, match="no weights were given"):
        J.losses({})
    with pytest.raises(UnknownNameError, match="unknown loss 'hinge'"):
        Objective(net, x, y, loss="hinge")
    with pytest.raises(InputError, match="beta must be positive"):
        Objective(net, x, y, beta=0)


def test_one_logit_is_no_classification_but_fits_a_loss_of_ones_own() -> None:
    net = nn.Linear(4, 1).double().eval()
    x, y = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.zeros(3).long()
    for loss in ("margin", "cross_entropy"):
        with pytest.raises(InputError, match=f"one logit, and '{loss}' compares classes"):
            Objective(net, x, y, loss=loss)
    J = Objective(net, x, y, loss=lambda z, y: z[..., 0])
    torch.testing.assert_close(J.gradient()["weight"][0], x.mean(0))
