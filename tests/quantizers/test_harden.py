"""`harden` takes quantizers off a net; state dicts, copies and batch-norm statistics of quantized nets."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import qlab.models
from qlab.errors import InputError
from qlab.quantizers import Sign, Uniform, harden, layers, quantize, quantized_tensors, reestimate_batch_norm
from tests.quantizers.nets import WEIGHTS, inputs, make, on_levels


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("make_quantizer", WEIGHTS.values(), ids=WEIGHTS)
def test_hardened_net_is_plain_on_the_levels_and_computes_the_same(plain, make_quantizer, biases):
    net = quantize(plain, make_quantizer, Sign, keep=("first",), biases=biases)
    net(inputs(net, 16))  # moves the batch-norm statistics
    hard = harden(net)
    net.eval()
    assert not hard.training
    assert torch.equal(hard(inputs(net)), net(inputs(net)))
    for name, layer in layers(hard).items():
        assert type(layer) is type(layers(plain)[name])
        assert not parametrize.is_parametrized(layer)
    for name, _, quantizer in quantized_tensors(net):
        value = hard.get_parameter(name if name.endswith(".bias") else f"{name}.weight")
        assert isinstance(value, nn.Parameter)
        assert on_levels(value.detach(), quantizer)
    assert not any(isinstance(m, nn.Module) and "arametrization" in n for n, m in hard.named_modules())


def test_hardened_state_fits_the_plain_net(plain):
    net = quantize(plain, Sign, biases=True)
    hard = harden(net)
    again = copy.deepcopy(plain)
    again.load_state_dict(hard.state_dict())
    assert list(hard.state_dict()) == list(plain.state_dict())
    assert torch.equal(again.eval()(inputs(net)), hard(inputs(net)))


def test_harden_leaves_the_quantized_net_and_its_copies_usable(plain):
    net = quantize(plain, Sign, Sign)
    twin = copy.deepcopy(net)
    before = twin.eval()(inputs(net)).detach()
    hard = harden(net)
    with torch.no_grad():
        for parameter in hard.parameters():
            parameter.fill_(0.5)
    for still in (net.eval(), twin):
        assert torch.equal(still(inputs(net)), before)
        assert len(list(quantized_tensors(still))) == len(layers(net))
    net.train()(inputs(net)).sum().backward()
    assert all(latent.grad is not None for _, latent, _ in quantized_tensors(net))


def test_harden_of_a_float_net_is_a_copy_in_eval_mode(plain):
    hard = harden(plain.train())
    assert plain.training
    assert not hard.training
    assert torch.equal(hard(inputs(plain)), plain.eval()(inputs(plain)))


def test_hardened_net_can_be_hardened_and_quantized_again():
    net = quantize(make(), Sign)
    hard = harden(harden(net))
    again = quantize(hard, Sign)
    assert torch.equal(again.eval()(inputs(net)), net.eval()(inputs(net)))


# ---- keeping: state dict, deep copy, spec


def test_state_dict_round_trip(plain):
    make_net = lambda p: quantize(p, lambda: Uniform(3), lambda: Uniform(2, signed=False, limit=2.0))  # noqa: E731
    net = make_net(plain)
    net(inputs(net, 16))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = make_net(qlab.models.build(plain.spec, seed=99))
    assert not torch.equal(other.eval()(inputs(net)), net.eval()(inputs(net)))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(inputs(net)), net(inputs(net)))


def test_deep_copy_is_independent(plain):
    net = quantize(plain, Sign, Sign).eval()
    before = net(inputs(net)).detach()
    twin = copy.deepcopy(net)
    assert torch.equal(twin(inputs(net)), before)
    with torch.no_grad():
        for _, latent, _ in quantized_tensors(twin):
            latent.neg_()
    assert torch.equal(net(inputs(net)), before)
    assert not torch.equal(twin(inputs(net)), before)


def test_spec_travels_with_the_quantized_and_the_hardened_net(plain):
    net = quantize(plain, Sign)
    assert json.dumps(net.spec) == json.dumps(harden(net).spec) == json.dumps(plain.spec)


def test_quantized_net_still_checks_its_input(plain):
    net = quantize(plain, Sign, Sign)
    for each in (net, harden(net)):
        with pytest.raises(InputError, match="expected"):
            each(torch.zeros(2, 9, 9, 9, 9))


# ---- batch-norm statistics


def test_reestimated_statistics_are_the_averages_over_the_batches():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).double().eval()
    net[0].running_mean.fill_(9)
    x = torch.randn(4, 32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert reestimate_batch_norm(net, list(x)) is net
    torch.testing.assert_close(net[0].running_mean, x.mean((0, 1)))
    torch.testing.assert_close(net[0].running_var, x.var(1).mean(0))
    assert not any(m.training for m in net.modules())
    assert net[0].momentum == 0.1


def test_reestimation_leaves_weights_and_the_generator_alone(plain):
    hard = harden(quantize(plain, Sign, Sign))
    weights = copy.deepcopy(dict(hard.named_parameters()))
    before = torch.get_rng_state()
    reestimate_batch_norm(hard, [inputs(plain, 8), inputs(plain, 8)])
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, weights[n]) for n, p in hard.named_parameters())


def test_reestimation_twice_gives_the_same(plain):
    hard = harden(quantize(plain, Sign, Sign))
    batches = [inputs(plain, 8), 2 * inputs(plain, 8)]
    once = copy.deepcopy(reestimate_batch_norm(hard, batches).state_dict())
    twice = reestimate_batch_norm(hard, batches).state_dict()
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_reestimation_restores_the_net_when_a_batch_fails():
    net = make().eval()
    with pytest.raises(InputError):
        reestimate_batch_norm(net, [torch.zeros(4, 99)])
    assert not any(m.training for m in net.modules())
    assert all(m.momentum == 0.1 for m in net.modules() if isinstance(m, nn.BatchNorm1d))


def test_reestimation_without_batches_is_an_error_only_where_there_is_batch_norm():
    with pytest.raises(InputError, match="at least one batch"):
        reestimate_batch_norm(make(), [])
    net = make("mlp without norm")
    assert reestimate_batch_norm(net, []) is net
