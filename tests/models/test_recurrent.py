"""The recurrent nets: those of torch with the same weights, the places of their quantizers, and the tools that work on them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from qlab.errors import InputError
from qlab.models import MODELS, build
from qlab.quantizers import Sign, Uniform, harden, layers, quantize, quantized_tensors

NAMES = sorted(name for name, entry in MODELS.items() if entry.takes == "tokens")
T, V, H, E = 7, 11, 6, 4
F64 = torch.float64


@pytest.fixture(params=NAMES)
def net(request):
    return small(request.param)


def small(name, seed=1):
    return build(name, (T,), V, hidden=H, embedding=E, seed=seed).double()


def tokens(n=5, seed=0):
    return torch.randint(V, (n, T), generator=torch.Generator().manual_seed(seed))


def torch_twin(net):
    """torch's own recurrent layer with the weights of `net`; its second bias is zero."""
    twin = {"lstm": nn.LSTM, "char_rnn": nn.RNN}[net.name](E, H, batch_first=True).double()
    with torch.no_grad():
        twin.weight_ih_l0.copy_(net.input.weight)
        twin.bias_ih_l0.copy_(net.input.bias)
        twin.weight_hh_l0.copy_(net.recurrent.weight)
        twin.bias_hh_l0.zero_()
    return twin


def test_states_and_gradients_are_those_of_torch(net):
    twin, s = torch_twin(net), tokens()
    with torch.no_grad():
        net.input.bias.copy_(torch.linspace(-1, 1, len(net.input.bias), dtype=F64))
        twin.bias_ih_l0.copy_(net.input.bias)
        net.recurrent.weight.mul_(3)  # far from the linear region
        twin.weight_hh_l0.copy_(net.recurrent.weight)
    table = net.embedding.weight.detach().t().clone().requires_grad_()
    expected, _ = twin(F.embedding(s, table))
    states = net.states(s)
    torch.testing.assert_close(states, expected, atol=1e-10, rtol=0)
    weights = torch.randn(states.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad(
        (states * weights).sum(), [net.embedding.weight, net.input.weight, net.input.bias, net.recurrent.weight]
    )
    theirs = torch.autograd.grad(
        (expected * weights).sum(), [table, twin.weight_ih_l0, twin.bias_ih_l0, twin.weight_hh_l0]
    )
    for mine, other in zip(ours, (theirs[0].t(), *theirs[1:]), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


def test_logits_of_a_symbol_come_from_its_state(net):
    s = tokens()
    z, h = net(s), net.states(s)
    assert z.shape == (5, V, T)
    for t in range(T):
        torch.testing.assert_close(z[:, :, t], h[:, t] @ net.fc.weight.t() + net.fc.bias, atol=1e-12, rtol=0)


def test_logits_see_no_symbol_to_come(net):
    s, other = tokens(), tokens()
    other[:, 4:] = tokens(seed=9)[:, 4:]
    assert torch.equal(net(s)[:, :, :4], net(other)[:, :, :4])
    assert not torch.equal(net(s)[:, :, 4:], net(other)[:, :, 4:])


def test_index_is_the_product_with_a_one_hot_vector(net):
    s = tokens()
    assert torch.equal(net.embed(s), net.embedding(F.one_hot(s, V).to(F64)))
    quantized = quantize(net, Sign)
    assert torch.equal(quantized.embed(s), quantized.embedding(F.one_hot(s, V).to(F64)))


def test_gradient_of_the_index_is_that_of_the_product(net):
    s = tokens()
    a = torch.autograd.grad(net.embed(s).square().sum(), net.embedding.weight)[0]
    b = torch.autograd.grad(net.embedding(F.one_hot(s, V).to(F64)).square().sum(), net.embedding.weight)[0]
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_forget_biases_start_at_one_and_the_others_at_zero():
    bias = small("lstm").input.bias
    assert bias.tolist() == [0.0] * H + [1.0] * H + [0.0] * 2 * H
    assert not small("char_rnn").input.bias.any()


def test_embedding_starts_within_the_range_of_its_bound(net):
    x = net.embed(torch.arange(V))
    assert torch.equal(net.bound_x(x), x)
    assert x.abs().max() > 0.8


# ---- quantizers


def test_every_matrix_is_quantized(net):
    names = ["embedding", "input", "recurrent", "fc"]
    assert list(layers(net)) == names
    assert [t.name for t in quantized_tensors(quantize(net, Sign))] == names


@pytest.mark.parametrize(
    ("keep", "places"),
    [
        ((), {"bound_x", "bound_h"}),
        (("first", "last"), {"bound_x", "bound_h"}),
        (("input",), {"bound_h"}),
        (("recurrent", "last"), {"bound_x"}),
    ],
)
def test_quantizers_stand_where_a_quantized_layer_reads(net, keep, places):
    quantized = quantize(net, Sign, Sign, keep=keep)
    assert {name for name in ("bound_x", "bound_h") if isinstance(getattr(quantized, name), Sign)} == places


def test_inputs_of_every_product_lie_on_the_grid(net):
    quantized = quantize(net, lambda: Uniform(4), lambda: Sign())
    seen = {}
    quantized.input.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    quantized.fc.register_forward_pre_hook(lambda _, inputs: seen.update(h=inputs[0]))
    quantized(tokens())
    assert seen["x"].unique().tolist() == [-1.0, 1.0]
    assert seen["h"].unique().tolist() == [-1.0, 1.0]
    assert torch.equal(quantized.states(tokens()), seen["h"])


def test_quantized_states_follow_the_equations(net):
    """Step by step with matrices written out: what is read in the loop is what was put on the grid the step before."""
    quantized = quantize(net, Sign, Sign)
    s = tokens()
    W_e, W_x, W_h = (t.quantizer.hard(t.latent) for t in list(quantized_tensors(quantized))[:3])
    h = c = torch.zeros(len(s), H, dtype=F64)
    sign = lambda a: torch.where(a >= 0, 1.0, -1.0).double()  # noqa: E731
    for t in range(T):
        z = sign(W_e[:, s[:, t]].t()) @ W_x.t() + net.input.bias + h @ W_h.t()
        if net.name == "lstm":
            i, f, g, o = (
                z[:, :H].sigmoid(),
                z[:, H : 2 * H].sigmoid(),
                z[:, 2 * H : 3 * H].tanh(),
                z[:, 3 * H :].sigmoid(),
            )
            c = f * c + i * g
            h = sign(o * c.tanh())
        else:
            h = sign(z.tanh())
        assert torch.equal(quantized.states(s)[:, t], h)


def test_hardened_net_gives_the_same_logits(net):
    quantized = quantize(net, Sign, Sign)
    torch.testing.assert_close(harden(quantized)(tokens()), quantized(tokens()), atol=1e-12, rtol=0)


# ---- tools of torch


def test_every_parameter_gets_a_gradient(net):
    F.cross_entropy(net(tokens()), tokens(seed=1)).backward()
    assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in net.parameters())


def test_gradient_is_that_of_differences(net):
    latent = [p.detach() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]
    s, y = tokens(2), tokens(2, seed=1)

    def loss(*values):
        return F.cross_entropy(functional_call(net, dict(zip(names, values, strict=True)), (s,)), y)

    assert torch.autograd.gradcheck(loss, [p.clone().mul_(0.9).requires_grad_() for p in latent])


def test_fx_traces_the_net(net):
    for n in (1, 5):
        assert torch.equal(torch.fx.symbolic_trace(net)(tokens(n)), net(tokens(n)))


def test_vmap_over_stacked_parameters_equals_a_loop(net):
    nets = [net, small(net.name, seed=2)]
    parameters, buffers = stack_module_state(nets)
    s = tokens()
    stacked = vmap(lambda p, b: functional_call(net, (p, b), (s,)))(parameters, buffers)
    torch.testing.assert_close(stacked, torch.stack([m(tokens()) for m in nets]), atol=1e-10, rtol=0)


def test_one_window_gives_what_it_gives_in_a_batch(net):
    whole = net(tokens())
    torch.testing.assert_close(torch.cat([net(w[None]) for w in tokens()]), whole, atol=1e-12, rtol=0)


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(4, T), r"input is torch\.float32; expected tokens \(N, 7\) int64"),
        (torch.zeros(4, T + 1, dtype=torch.int64), r"shape \(4, 8\); expected \(N, 7\)"),
        (torch.zeros(T, dtype=torch.int64), r"shape \(7,\); expected \(N, 7\)"),
        ([[0]], "input is list"),
        (torch.full((2, T), V), "tokens run from 11 to 11; this net knows 0 to 10"),
        (torch.full((2, T), -1), "tokens run from -1 to -1; this net knows 0 to 10"),
    ],
)
def test_wrong_input_raises_one_clear_error(net, given, message):
    with pytest.raises(InputError, match=message):
        net(given)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_refused(name):
    with pytest.raises(InputError, match=r"takes windows of tokens: input_shape is \(3, 8, 8\)"):
        build(name, (3, 8, 8), 10)
