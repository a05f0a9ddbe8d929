"""Transfer attacks: found on the twin, tested on the victim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlab.attacks.pgd import PGD
from qlab.attacks.transfer import Transfer
from qlab.errors import InputError


class Linear2(nn.Module):
    """Logits (0, w x + b) of two classes; `cut` takes the gradient off."""

    def __init__(self, w: list[float], b: float = 0.0, cut: bool = False) -> None:
        super().__init__()
        self.register_buffer("w", torch.tensor(w, dtype=torch.float64))
        self.b, self.cut = b, cut
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach() if self.cut else x
        z = x @ self.w + self.b
        return torch.stack([0 * z, z], 1)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    x = torch.rand(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return x, (Linear2([1.0, -2.0, 3.0])(x)[:, 1] > 0).long()


def test_a_twin_of_the_same_boundary_breaks_all_that_can_be_broken_without_the_victim_s_gradient(
    batch: tuple[Tensor, Tensor],
) -> None:
    x, y = batch
    victim, twin = Linear2([1.0, -2.0, 3.0], cut=True), Linear2([10.0, -20.0, 30.0])
    found = Transfer(twin)(victim, x, y, 0.2, low=-2.0, high=2.0)
    distance = (x @ victim.w).abs() / 6  # to the boundary, in l_inf: |w x| / ||w||_1
    assert np.array_equal(found.success, (distance < 0.2).numpy())
    assert 0 < found.success.sum() < len(x)
    assert found.backward == 0
    # One question for each example that was right, beside the one that all attacks begin with.
    assert found.forward == len(x) + int(found.clean.sum())


def test_a_twin_with_another_direction_finds_less(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    victim = Linear2([1.0, -2.0, 3.0])
    close = Transfer(Linear2([1.0, -2.0, 3.0]))(victim, x, y, 0.2, low=-2.0, high=2.0)
    away = Transfer(Linear2([-1.0, 2.0, -3.0]))(victim, x, y, 0.2, low=-2.0, high=2.0)
    assert not (away.success & away.clean).any()
    assert (close.success & close.clean).any()


def test_examples_that_the_twin_has_wrong_are_attacked_too(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    victim, twin = Linear2([1.0, -2.0, 3.0]), Linear2([1.0, -2.0, 3.0], b=2.0)
    wrong = (twin(x).argmax(1) != y).numpy()
    found = Transfer(twin)(victim, x, y, 0.2, low=-2.0, high=2.0)
    distance = ((x @ victim.w).abs() / 6).numpy()
    assert (wrong & (distance < 0.2)).any()
    assert np.array_equal(found.success, distance < 0.2)


def test_what_is_found_lies_in_ball_and_range(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    for norm in ("linf", "l2", "l1"):
        found = Transfer(Linear2([1.0, -2.0, 3.0]), PGD(steps=30, early_stop=False))(
            Linear2([1.0, -2.0, 2.9]),
            x,
            y,
            0.3,
            norm=norm,
            low=-1.0,
            high=1.0,  # type: ignore[arg-type]
        )
        assert (found.adversarial.abs() <= 1).all()
        size = torch.linalg.vector_norm(found.adversarial - x, ord={"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)
        assert (size <= 0.3).all()
        assert (found.success & found.clean).any()


def test_the_twin_is_named_in_a_few_words() -> None:
    assert Transfer(Linear2([1.0])).described == "Transfer (PGD on a Linear2)"


def test_what_is_no_twin_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    with pytest.raises(InputError, match="source is a str"):
        Transfer("twin")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="attack is a str"):
        Transfer(Linear2([1.0]), "PGD")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not take inputs"):
        Transfer(Linear2([1.0]))(Linear2([1.0, -2.0, 3.0]), x, y, 0.1, low=-1.0, high=1.0)
