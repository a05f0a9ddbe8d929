"""`quantize` puts quantizers on a net, `harden` takes them off."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from qlab.errors import InputError, UnknownNameError
from qlab.quantizers import (
    Sign,
    Uniform,
    harden,
    layers,
    quantize,
    quantized_tensors,
    quantizers,
)
from tests.quantizers.nets import WEIGHTS, Soft, inputs, make, nonlinearities, on_levels

# ---- what quantize returns


def test_the_original_net_is_untouched(plain):
    state, text, out = copy.deepcopy(plain.state_dict()), str(plain), plain.eval()(inputs(plain)).detach()
    net = quantize(plain, Sign, Sign, biases=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7)
    assert str(plain) == text
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert list(plain.state_dict()) == list(state)
    assert torch.equal(plain(inputs(plain)), out)
    assert {type(m) for m in plain.modules()}.isdisjoint(
        {type(m) for m in net.modules() if "Parametrized" in str(type(m))}
    )


def test_copy_shares_no_storage_with_the_original(plain):
    net = quantize(plain, Sign, Sign)
    mine = {p.data_ptr() for p in plain.state_dict().values()}
    assert mine.isdisjoint(p.data_ptr() for p in net.state_dict().values())


@pytest.mark.parametrize("make_quantizer", WEIGHTS.values(), ids=WEIGHTS)
def test_every_weight_lies_on_its_levels_and_its_latent_is_the_old_weight(plain, make_quantizer):
    net = quantize(plain, make_quantizer)
    assert list(layers(net)) == list(layers(plain))
    for name, layer in layers(net).items():
        (quantizer,) = layer.parametrizations.weight
        assert torch.equal(layer.parametrizations.weight.original, layers(plain)[name].weight)
        assert isinstance(layer.parametrizations.weight.original, nn.Parameter)
        assert on_levels(layer.weight, quantizer)


def test_every_place_has_a_quantizer_of_its_own(plain):
    net = quantize(plain, lambda: Uniform(4), lambda: Uniform(3, signed=False, limit=4.0))
    found = list(quantizers(net))
    assert len(found) == len({id(q) for q in found})
    assert len({q.limit.data_ptr() for q in found}) == len(found)


def test_weights_alone_leave_the_nonlinearities(plain):
    net = quantize(plain, weights=Sign)
    assert nonlinearities(net) == nonlinearities(plain)


def test_nothing_asked_for_gives_a_plain_copy(plain):
    net = quantize(plain)
    assert not list(quantizers(net))
    assert torch.equal(net.eval()(inputs(net)), plain.eval()(inputs(net)))


def test_dtype_and_mode_are_kept(plain):
    net = quantize(plain.double().eval(), Sign, Sign)
    assert all(p.dtype == torch.float64 for p in net.parameters())
    assert not any(m.training for m in net.modules())
    net = quantize(plain.train(), Sign, Sign)
    assert all(m.training for m in net.modules())


def test_global_generator_is_left_alone(plain):
    before = torch.get_rng_state()
    quantize(plain, Sign, Sign)
    assert torch.equal(before, torch.get_rng_state())


def test_forward_computes_with_the_quantized_weight():
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    signs = [torch.where(plain[i].weight >= 0, 1.0, -1.0) for i in (0, 2)]
    expected = F.linear(F.conv2d(x, signs[0], plain[0].bias).flatten(1), signs[1], plain[2].bias)
    assert torch.equal(quantize(plain, Sign)(x), expected)


def test_latent_gradient_is_that_of_the_weight_times_the_declared_derivative():
    plain = nn.Linear(4, 3).double()
    net = quantize(plain, lambda: Sign("tanh", sharpness=2.0))
    x, g = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = g[:, :3]
    net(x).backward(g)
    latent = net.parametrizations.weight.original
    expected = (g.T @ x) * net.parametrizations.weight[0].surrogate.derivative(latent.detach())
    assert torch.equal(latent.grad, expected)


def test_optimizer_step_moves_the_latents():
    """One step of SGD on the clipped straight-through estimator, beside the same step written by hand."""
    plain = nn.Linear(3, 1, bias=False).double()
    plain.weight.data = torch.tensor([[0.5, -2.0, -0.01]], dtype=torch.float64)
    net = quantize(plain, Sign)
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()  # y = 1 - 2 - 3 = -4;  dL/dw_q = 2 y x = -8 x;  |-2| > 1 gets no gradient
    optimizer.step()
    expected = torch.tensor([[0.5 + 0.8, -2.0, -0.01 + 2.4]], dtype=torch.float64)
    torch.testing.assert_close(net.parametrizations.weight.original.detach(), expected)
    assert net.weight.tolist() == [[1, -1, 1]]


# ---- which layers


def test_keep_leaves_first_and_last_in_float(plain):
    net = quantize(plain, Sign, keep=("first", "last"))
    names = list(layers(plain))
    assert [t.name for t in quantized_tensors(net)] == names[1:-1]
    for name in (names[0], names[-1]):
        assert not parametrize.is_parametrized(layers(net)[name])
        assert torch.equal(layers(net)[name].weight, layers(plain)[name].weight)


def test_keep_takes_module_names(plain):
    second = list(layers(plain))[1]
    net = quantize(plain, Sign, keep=(second, "last"))
    assert [t.name for t in quantized_tensors(net)] == [n for n in list(layers(plain))[:-1] if n != second]


def test_unknown_name_in_keep_names_the_closest():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'hidden\.0'"):
        quantize(make(), Sign, keep=("hidden.00",))


def test_keep_as_a_bare_string_is_an_error():
    with pytest.raises(InputError, match="not the string 'first'"):
        quantize(make(), Sign, keep="first")


def test_a_net_of_one_layer_is_both_first_and_last():
    assert not list(quantizers(quantize(nn.Linear(2, 2), Sign, keep=("first", "last"))))


def test_a_bare_layer_can_be_quantized():
    layer = nn.Linear(3, 2)
    assert torch.equal(quantize(layer, Sign).weight, torch.where(layer.weight >= 0, 1.0, -1.0))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 3, 3),
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv3d(2, 3, 2),
        nn.ConvTranspose2d(2, 3, 2),
        nn.Linear(3, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_linear_and_convolutions_of_any_dimension(layer):
    with torch.no_grad():
        layer.weight.copy_(
            torch.linspace(-1, 1, layer.weight.numel()).view_as(layer.weight)
        )  # both signs, whatever the seed
    net = harden(quantize(nn.Sequential(layer), Sign))
    assert type(net[0]) is type(layer)
    assert set(net[0].weight.unique().tolist()) == {-1, 1}


def test_a_net_without_layers_is_an_error():
    with pytest.raises(InputError, match="no Linear or Conv layer"):
        quantize(nn.Sequential(nn.ReLU()), Sign)


def test_quantizing_twice_is_an_error():
    with pytest.raises(InputError, match="quantized already"):
        quantize(quantize(make(), Sign), Sign)
    with pytest.raises(InputError, match="quantized already"):
        quantize(quantize(make(), activations=Sign), Sign)


@pytest.mark.parametrize("factory", [Sign(), "sign", nn.Identity, lambda: None])
@pytest.mark.parametrize("role", ["weights", "activations"])
def test_what_does_not_make_quantizers_is_an_error(factory, role):
    with pytest.raises(InputError, match=role):
        quantize(make(), **{role: factory})


# ---- activations


def test_activation_quantizers_take_the_place_of_nonlinearities(plain):
    """All of them, when no layer is kept: each of these nets has its nonlinearities before layers."""
    net = quantize(plain, activations=Sign)
    assert nonlinearities(net) == []
    assert [n for n, m in net.named_modules() if isinstance(m, Sign)] == nonlinearities(plain)


def test_activations_are_replaced_not_appended():
    """A sign after the ReLU would be +1 everywhere: with the ReLU gone both signs occur, in a layer's input."""
    plain = make("mlp without norm")
    net, seen = quantize(plain, activations=Sign).eval(), []
    for layer in list(layers(net).values())[1:]:
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net(inputs(net, 50))
    assert len(seen) == 2
    for x in seen:
        assert set(x.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize("name", ["lenet", "resnet20", "bireal18"])
def test_every_quantized_inner_layer_reads_quantized_activations(name):
    plain = make(name)
    shortcuts = [n for n in layers(plain) if "shortcut" in n]
    net, seen = quantize(plain, Sign, Sign, keep=("first", "last", *shortcuts)).eval(), {}
    for layer_name, layer in layers(net).items():
        layer.register_forward_pre_hook(lambda m, args, n=layer_name: seen.update({n: args[0]}))
    net(inputs(net))
    for layer_name, layer in layers(net).items():
        if parametrize.is_parametrized(layer):
            assert set(seen[layer_name].unique().tolist()) <= {-1, 1}, layer_name
    assert sum(parametrize.is_parametrized(layer) for layer in layers(net).values()) >= 3


def test_activation_before_a_kept_layer_stays():
    plain = make("mlp")  # linear, norm, relu, linear, norm, relu, linear
    first, second = nonlinearities(plain)
    assert nonlinearities(quantize(plain, Sign, Sign, keep=("first", "last"))) == [second]
    assert nonlinearities(quantize(plain, Sign, Sign, keep=("hidden.3",))) == [first]
    assert nonlinearities(quantize(plain, Sign, Sign, keep=("first",))) == []


def test_nonlinearity_after_the_last_layer_stays():
    net = quantize(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()), Sign, Sign)
    assert [type(m) for m in net] == [type(net[0]), Sign, type(net[2]), nn.ReLU]


def test_one_relu_object_in_two_places_is_replaced_in_both():
    """torchvision's blocks reuse one module; both places feed a quantized layer."""
    relu = nn.ReLU()
    net = quantize(nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu, nn.Linear(3, 2)), Sign, Sign)
    assert isinstance(net[1], Sign)
    assert isinstance(net[3], Sign)


# ---- biases


def test_biases_are_quantized_on_request_only():
    plain = make("mlp without norm")
    assert [t.name for t in quantized_tensors(quantize(plain, Sign))] == ["hidden.0", "hidden.2", "fc"]
    net = quantize(plain, Sign, biases=True, keep=("last",))
    assert [t.name for t in quantized_tensors(net)] == ["hidden.0", "hidden.0.bias", "hidden.2", "hidden.2.bias"]
    assert set(net.hidden[0].bias.tolist()) <= {-1, 1}
    assert torch.equal(net.fc.bias, plain.fc.bias)
    assert torch.equal(net.hidden[0].parametrizations.bias.original, plain.hidden[0].bias)


def test_layers_without_bias_are_no_obstacle(plain):
    net = quantize(plain, Sign, biases=True)
    assert net(inputs(net)).isfinite().all()


# ---- a quantizer that rewrites the starting latent, and one that anneals


def test_init_may_rewrite_the_latents_from_the_seed():
    one, two, other = (quantize(make(), Soft, seed=s) for s in (4, 4, 5))
    for (name, a, _), (_, b, _), (_, c, _) in zip(*map(quantized_tensors, (one, two, other)), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
    drawn = torch.randn(8, 5, generator=torch.Generator().manual_seed(4))
    assert torch.equal(one.hidden[0].parametrizations.weight.original, drawn)


def test_anneal_sets_the_buffer_and_harden_deploys_the_hard_map():
    net = quantize(make(), Soft)
    for quantizer in quantizers(net):
        quantizer.anneal(beta=3.0, other=1.0)
    layer = net.hidden[0]
    latent = layer.parametrizations.weight.original
    torch.testing.assert_close(layer.weight, torch.tanh(3 * latent))
    assert torch.equal(harden(net).hidden[0].weight, torch.where(latent >= 0, 1.0, -1.0))
