"""A method that draws at random is not deployed before its first step; one that does not, and every evaluation, may be."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from qlab.errors import InputError
from qlab.methods import create
from qlab.stepping import Stepper
from tests.methods.conftest import moons, small_net, train

DRAWN: list[tuple[str, dict[str, Any]]] = [
    ("binary_connect", {"stochastic": True}),
    ("bayes_binn", {}),
    ("qnn", {"stochastic_weights": True}),
    ("qnn", {"stochastic_neurons": True}),
]
FIXED: list[tuple[str, dict[str, Any]]] = [
    ("binary_connect", {}),
    ("bayes_binn", {"samples": 0}),
    ("qnn", {}),
    ("qnn", {"gradient_bits": 6, "gradient_stochastic": True}),  # drawn gradients move weights that are not drawn
]


@pytest.mark.parametrize(("name", "options"), DRAWN)
def test_a_drawn_method_is_refused_before_its_first_step_and_deployed_after_it(
    name: str, options: dict[str, Any]
) -> None:
    method, batches = create(name, small_net(), **options), moons().calibration(2)
    assert method.stochastic
    with pytest.raises(
        InputError, match=f"{name} draws at random in training, and no step was taken yet.*Train it first"
    ):
        method.deployed(batches)
    assert method._statistics == {}  # nothing was computed on the way
    method.begin_step(1)
    method.end_step()
    assert torch.isfinite(method.deployed(batches)(batches[0])).all()


@pytest.mark.parametrize(("name", "options"), FIXED)
def test_a_method_without_draws_is_deployed_at_any_moment(name: str, options: dict[str, Any]) -> None:
    method, batches = create(name, small_net(), **options), moons().calibration(2)
    assert not method.stochastic
    assert torch.equal(method.deployed(batches)(batches[0]), method.hardened(batches)(batches[0]))


@pytest.mark.parametrize(("name", "options"), DRAWN)
def test_an_untrained_drawn_method_is_evaluated_and_drawn_in_pictures(name: str, options: dict[str, Any]) -> None:
    method, data = create(name, small_net(), **options), moons()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (metrics,) = trainer.test(method, data, verbose=False)
    assert 0 <= metrics["test/acc"] <= 1
    assert Stepper(create(name, small_net(), **options), data, epochs=1).deployed() is not None


def test_a_restored_run_of_a_drawn_method_is_deployed() -> None:
    run, batches = train("bayes_binn", epochs=1), moons().calibration(2)
    method = type(run.method).load(run.checkpoint, small_net())
    assert torch.equal(method.deployed(batches)(batches[0]), run.method.deployed(batches)(batches[0]))
