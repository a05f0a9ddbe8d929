"""What every method of the catalog promises; see docs/architecture.md, section 3."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import CheckpointError, InputError, UnknownNameError
from qlab.methods import CATALOG, Method, create, hyperparameters
from qlab.quantizers import layers, quantized_tensors
from tests.methods.conftest import moons, small_net, train


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class StopAt(pl.Callback):
    """Stop after so many steps, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


# ---- construction ---------------------------------------------------------------------------------------------------


def test_builds_from_defaults_with_hyperparameters_that_are_plain_values(name: str) -> None:
    method = create(name, small_net())
    assert method.info is CATALOG[name]
    assert json.loads(json.dumps(dict(method.hparams)))["net"]["name"] == "mlp"
    assert {h.name for h in hyperparameters(type(method))} == set(method.hparams) - {"net"}


def test_every_hyperparameter_is_documented(name: str) -> None:
    undocumented = [h.name for h in hyperparameters(CATALOG.load(name)) if not h.help]
    assert undocumented == []


def test_the_users_net_is_left_alone(name: str) -> None:
    net = small_net()
    before = bits(net)
    run = train(name, method=create(name, net), epochs=1)
    assert same(before, bits(net))
    assert run.method.net is not net


def test_builds_from_the_spec_of_a_net(name: str) -> None:
    spec = small_net().spec
    assert layers(create(name, spec).net).keys() == layers(small_net()).keys()


def test_unknown_hyperparameter_names_the_closest(name: str) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'seed'"):
        create(name, small_net(), sed=3)


def test_wrong_common_hyperparameters_are_refused(name: str) -> None:
    for options in ({"lr": float("nan")}, {"lr": -1.0}, {"loss": "mse"}, {"keep": "first"}, {"keep": ("nowhere",)}):
        if name == "full_precision" and "keep" in options:
            continue  # it quantizes nothing, so there is nothing to keep
        with pytest.raises((InputError, UnknownNameError)):
            create(name, small_net(), **options)


# ---- training -------------------------------------------------------------------------------------------------------


def test_learns_two_moons_with_its_defaults(name: str) -> None:
    # Signs of sums without a threshold of their own cut the plane through the centre only, and 0.86 is then the most to be had:
    # a net with binary activations needs batch norm with a shift.
    options = {"affine": True} if CATALOG[name].activation_bits == 1 else {"affine": False, "final_norm": True}
    method = create(name, qlab.build("mlp", (2,), 2, hidden=(32, 32), seed=0, **options))
    run = qlab.fit(method, moons(n=1000), epochs=30, progress=False, validate_every=0)
    assert run.metrics["test/acc"] >= 0.95


def test_one_step_moves_the_latents_and_nothing_that_is_not_trained(name: str) -> None:
    method = create(name, small_net())
    before = bits(method)
    run = qlab.fit(method, moons(), epochs=1, max_steps=1, progress=False, test=False)
    after = bits(run.method)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    trained = {f"net.{k}" for k, _ in method.net.named_parameters()}
    assert changed & trained
    statistics = {k for k in before if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    scheduled = {f"net.{k}" for k, _ in method.net.named_buffers() if ".parametrizations." in f".{k}"}
    assert changed <= trained | statistics | scheduled
    assert run.method.steps == 1


def test_same_seed_gives_the_same_bits(name: str) -> None:
    first, second = train(name, seed=3), train(name, seed=3)
    assert same(bits(first.method), bits(second.method))
    assert first.history.equals(second.history)
    assert first.metrics == second.metrics


def test_another_seed_gives_other_bits(name: str) -> None:
    assert not same(bits(train(name, seed=3, epochs=1).method), bits(train(name, seed=4, epochs=1).method))


@pytest.mark.parametrize("stop", [4, 9, 14])  # of 9 steps an epoch: within the first, at its end, within the second
def test_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name: str, stop: int) -> None:
    whole = train(name, epochs=3)
    part = train(name, epochs=3, callbacks=[StopAt(stop)])
    assert part.method.steps == stop
    assert not part.completed

    rest = train(name, epochs=3, method=create(name, small_net(), seed=0), resume=part)
    assert rest.completed
    assert same(bits(whole.method), bits(rest.method))
    assert rest.metrics["test/acc"] == whole.metrics["test/acc"]


def test_global_generator_is_untouched(name: str) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    run = train(name, epochs=1)
    run.method.deployed()
    assert torch.equal(torch.get_rng_state(), state)


def test_latent_and_deployed_accuracy_are_both_logged(name: str) -> None:
    run = train(name)
    assert {"train/loss", "val/loss", "val/acc", "val/acc_latent", "test/acc", "test/acc_latent"} <= set(run.metrics)
    logged = set(run.history.metric)
    assert ("quant/flip_ratio" in logged) == (CATALOG[name].weight_bits < 32)


def test_schedule_is_pure_and_moves_as_declared(name: str) -> None:
    method = create(name, small_net())
    grid = [i / 500 for i in range(501)]
    values = [method.schedule(p) for p in grid]
    assert values == [method.schedule(p) for p in grid]
    for quantity in CATALOG[name].schedule:
        track = [v[quantity] for v in values]
        assert track == sorted(track)
        assert track[0] < track[-1]


def test_annealing_sets_what_the_schedule_says(name: str) -> None:
    method = create(name, small_net())
    method.anneal(0.5)
    for quantity, value in method.schedule(0.5).items():
        buffers = [b for k, b in method.named_buffers() if k.endswith(f".{quantity}")]
        assert buffers
        assert all(float(b) == pytest.approx(value) for b in buffers)


# ---- deployment -----------------------------------------------------------------------------------------------------


def test_deployed_weights_lie_on_the_declared_grid(name: str) -> None:
    run = train(name)
    net = run.deployed
    assert not any(hasattr(m, "parametrizations") for m in net.modules())
    assert not net.training
    tensors = dict(net.named_parameters())
    quantized = list(quantized_tensors(run.method.net))
    assert bool(quantized) == (CATALOG[name].weight_bits < 32)
    for t in quantized:
        weight = tensors[t.name if t.name in tensors else f"{t.name}.weight"]
        grid, level, scale = t.quantizer.levels(), t.quantizer.level(t.latent), t.quantizer.scale(t.latent)
        assert grid is not None
        assert len(grid) <= 2 ** CATALOG[name].weight_bits
        assert torch.isin(level, grid).all()
        assert scale is None or (scale > 0).all()
        assert torch.equal(weight, level if scale is None else scale * level)
    for layer, hard in run.method.hard_weights().items():
        assert torch.equal(tensors[layer if layer in tensors else f"{layer}.weight"], hard)


def test_deploying_leaves_the_training_net_alone_and_shares_nothing_with_it(name: str) -> None:
    run = train(name, epochs=1)
    before = bits(run.method)
    net = run.deployed
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
        for b in net.buffers():
            b.add_(1)
    assert same(before, bits(run.method))
    x = moons().calibration(1)[0]
    run.method.eval()(x)  # still works


def test_batch_norm_statistics_are_those_of_the_hard_weights(name: str) -> None:
    run = train(name)
    data = moons()
    batches = data.calibration(run.method.calibration_batches)
    net = run.method.deployed(batches)
    first_norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm1d))
    first_layer = next(iter(layers(net).values()))
    z = [first_layer(x.flatten(1)) for x in batches]
    mean = torch.stack([v.mean(0) for v in z]).mean(0)
    var = torch.stack([v.var(0) for v in z]).mean(0)
    assert torch.allclose(first_norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(first_norm.running_var, var, rtol=1e-4)


def test_switch_keeps_the_statistics_of_training(name: str) -> None:
    run = train(name, method=create(name, small_net(), reestimate_bn=False))
    trained, shipped = bits(run.method.net), bits(run.deployed)
    for key in (k for k in shipped if k.endswith(("running_mean", "running_var"))):
        assert torch.equal(trained[key], shipped[key])


def test_changed_weights_do_not_reuse_old_statistics(name: str) -> None:
    run = train(name, epochs=1)
    old = run.method.deployed()
    with torch.no_grad():
        for p in run.method.net.parameters():
            p.mul_(-1)
    run.method._trainer = None
    with pytest.warns(UserWarning, match="batch-norm statistics"):
        new = run.method.deployed()
    assert not same(bits(old), bits(new))


def test_batch_of_one_and_noncontiguous_input_are_taken(name: str) -> None:
    net = train(name, epochs=1).deployed
    x = moons().calibration(1)[0]
    whole = net(x)
    assert torch.allclose(net(x[:1]), whole[:1], atol=1e-6)
    assert torch.equal(net(x.t().contiguous().t()), whole)
    assert torch.allclose(net(x[::2]), whole[::2], atol=1e-6)


def test_layers_to_keep_stay_in_float(name: str) -> None:
    if CATALOG[name].weight_bits == 32:
        return  # nothing is quantized, so nothing is kept apart
    run = train(name, method=create(name, small_net(), keep=("first", "last")))
    names = list(layers(run.method.net))
    quantized = {t.name.removesuffix(".bias") for t in quantized_tensors(run.method.net)}
    assert quantized == set(names[1:-1])
    for layer in (names[0], names[-1]):
        assert len(run.deployed.get_submodule(layer).weight.unique()) > 2


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_state_dict_round_trip(name: str) -> None:
    run = train(name, epochs=1)
    other = create(name, small_net(seed=9), seed=0)
    other.load_state_dict(copy.deepcopy(run.method.state_dict()))
    assert same(bits(other), bits(run.method))
    assert other.steps == run.method.steps


def test_checkpoint_loads_without_running_code_and_deploys_the_same_net(name: str, tmp_path: Path) -> None:
    run = train(name)
    path = run.save(tmp_path) / "checkpoint.ckpt"
    torch.load(path, weights_only=True)
    method = qlab.load(path)
    assert type(method) is type(run.method)
    assert dict(method.hparams) == dict(run.method.hparams)
    x = moons().calibration(1)[0]
    assert torch.equal(method.deployed()(x), run.deployed(x))  # its statistics travel with it: no data, no warning


def test_foreign_net_is_given_back_at_loading(name: str, tmp_path: Path) -> None:
    def net() -> nn.Module:
        first = [nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
        return nn.Sequential(*first, nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    torch.manual_seed(0)
    run = train(name, method=create(name, net()), epochs=1)
    path = run.save(tmp_path) / "checkpoint.ckpt"
    with pytest.raises(CheckpointError, match="net="):
        qlab.load(path)
    assert same(bits(qlab.load(path, net=net())), bits(run.method))


def test_checkpoint_of_another_method_is_refused(name: str, tmp_path: Path) -> None:
    other = next(n for n in CATALOG if n != name)
    path = train(other, epochs=1).save(tmp_path) / "checkpoint.ckpt"
    with pytest.raises(CheckpointError, match=f"written by {other}, not by {name}"):
        CATALOG.load(name).load(path)
    with pytest.raises(CheckpointError, match=f"written by {other}"):
        train(name, epochs=2, resume=path)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_nan_in_the_data_is_said_in_one_error(name: str) -> None:
    x = torch.randn(64, 2)
    x[5, 1] = float("nan")
    loader = torch.utils.data.DataLoader([(x, torch.randint(0, 2, (64,)))], batch_size=None)
    method: Method = create(name, small_net())
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    with pytest.raises(InputError, match="1 values that are NaN"):
        trainer.fit(method, loader)


def test_wrong_input_shape_is_said_in_one_error(name: str) -> None:
    with pytest.raises(InputError, match="expected"):
        create(name, small_net())(torch.randn(4, 3))


def test_a_net_that_is_kept_in_float_whole_is_refused(name: str) -> None:
    if CATALOG[name].weight_bits == 32:
        return  # it quantizes nothing, whatever the net
    with pytest.raises(InputError, match=f"{name} has nothing to quantize.*leaves every layer"):
        create(name, torch.nn.Linear(2, 2), keep=("first",))
