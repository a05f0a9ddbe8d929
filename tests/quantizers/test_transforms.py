"""torch.func through each quantizer, and through nets with quantized weights and activations."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import qlab.models
from qlab.quantizers import SURROGATES, Sign, Uniform, quantize, quantized_tensors, reestimate_batch_norm

# torch 2.13 warns about its own use of torch.jit.script on the first forward-mode derivative, even of torch.tanh.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def bump(x):
    return 1 / (1 + x.square())


def inside(low, high):
    return lambda x: ((x >= low) & (x <= high)).to(x.dtype)


# Each quantizer with its declared derivative.
QUANTIZERS = {name: (lambda name=name: Sign(name), Sign(name).surrogate.derivative) for name in SURROGATES}
QUANTIZERS |= {
    "own function": (lambda: Sign(bump), bump),
    "uniform, 4 bits": (lambda: Uniform(4, limit=1.0), inside(-1, 1)),
    "uniform, 3 bits, unsigned": (lambda: Uniform(3, signed=False, limit=1.0), inside(0, 1)),
}


@pytest.fixture(params=QUANTIZERS)
def case(request):
    make, derivative = QUANTIZERS[request.param]
    return make(), derivative


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_vmap_equals_a_loop(case):
    quantizer, _ = case
    x = draw(6, 5)
    assert torch.equal(vmap(quantizer)(x), torch.stack([quantizer(row) for row in x]))
    assert torch.equal(vmap(quantizer, in_dims=1, out_dims=1)(x), quantizer(x))
    assert torch.equal(vmap(vmap(quantizer))(x), quantizer(x))


def test_jacrev_is_the_diagonal_of_the_declared_derivative(case):
    quantizer, derivative = case
    x = draw(7)
    assert torch.equal(jacrev(quantizer)(x), torch.diag(derivative(x)))


def test_jacfwd_is_the_diagonal_of_the_declared_derivative(case):
    quantizer, derivative = case
    x = draw(7)
    assert torch.equal(jacfwd(quantizer)(x), torch.diag(derivative(x)))


def test_vmap_of_jacrev_equals_a_loop(case):
    quantizer, derivative = case
    x = draw(4, 3)
    assert torch.equal(vmap(jacrev(quantizer))(x), torch.diag_embed(derivative(x)))
    assert torch.equal(vmap(jacfwd(quantizer))(x), torch.diag_embed(derivative(x)))


def test_grad_vjp_and_jvp_apply_the_declared_derivative(case):
    quantizer, derivative = case
    x, c = draw(9), draw(9, seed=1)
    assert torch.equal(grad(lambda x: (c * quantizer(x)).sum())(x), c * derivative(x))
    out, pull = vjp(quantizer, x)
    assert torch.equal(out, quantizer(x))
    assert torch.equal(pull(c)[0], c * derivative(x))
    out, push = jvp(quantizer, (x,), (c,))
    assert torch.equal(out, quantizer(x))
    assert torch.equal(push, c * derivative(x))


def test_per_sample_gradients_equal_a_loop(case):
    quantizer, _ = case
    w, x = draw(3), draw(5, 3, seed=1)

    def loss(w, x):
        return (quantizer(w) @ x) ** 2

    together = vmap(grad(loss), in_dims=(None, 0))(w, x)
    torch.testing.assert_close(together, torch.stack([grad(loss)(w, row) for row in x]), rtol=1e-12, atol=1e-12)


def test_second_derivatives_agree_forward_and_backward(case):
    """Of a quadratic in the quantized tensor: H = D A D + diag(A q + b) D', D the declared derivative."""
    quantizer, derivative = case
    a, b, x = draw(4, 4), draw(4, seed=1), 0.9 * draw(4, seed=2)
    a = a + a.T

    def loss(x):
        q = quantizer(x)
        return q @ a @ q / 2 + b @ q

    d, q = derivative(x), quantizer(x)
    slope = torch.diag(jacrev(derivative)(x))
    expected = d[:, None] * a * d + torch.diag((a @ q + b) * slope)
    torch.testing.assert_close(jacrev(grad(loss))(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(jacfwd(grad(loss))(x), expected, rtol=1e-10, atol=1e-12)


NETS = {
    "mlp": ("mlp", (6,), {"hidden": (8, 8)}),
    "lenet": ("lenet", (1, 12, 12), {}),
    "resnet20": ("resnet20", (3, 8, 8), {"width": 4, "shortcut": "B"}),
    "bireal18": ("bireal18", (3, 8, 8), {"width": 2}),
}
WEIGHTS = {"sign": Sign, "uniform": lambda: Uniform(3)}


@pytest.fixture(params=[(n, w) for n in NETS for w in WEIGHTS], ids=lambda p: f"{p[0]}, {p[1]}")
def net(request):
    name, shape, options = NETS[request.param[0]]
    plain = qlab.models.build(name, shape, 3, seed=0, **options)
    activations = lambda: Sign("polynomial") if request.param[1] == "sign" else Uniform(3, limit=2.0)  # noqa: E731
    net = quantize(plain, WEIGHTS[request.param[1]], activations, keep=("first",)).double().eval()
    return reestimate_batch_norm(net, [inputs(net, 16)])  # else most activations lie outside the surrogate's window


def inputs(net, n=4):
    return draw(n, *net.input_shape, seed=5)


def test_functional_call_computes_with_the_latents_it_is_given(net):
    x, other = inputs(net), copy.deepcopy(net)
    with torch.no_grad():
        for _, latent, _ in quantized_tensors(other):
            latent.copy_(latent.flip(0))
    params = {k: v.detach() for k, v in other.named_parameters()}
    assert torch.equal(functional_call(net, params, (x,)), other(x))
    assert not torch.equal(other(x), net(x))


def test_vmap_over_a_stack_of_quantized_nets_equals_a_loop(net):
    nets = [net, copy.deepcopy(net)]
    with torch.no_grad():
        for _, latent, _ in quantized_tensors(nets[1]):
            latent.copy_(latent.flip(0))
    x = inputs(net)
    params, buffers = stack_module_state(nets)
    together = vmap(lambda p, b: functional_call(net, (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(together, torch.stack([m(x) for m in nets]), rtol=1e-9, atol=1e-9)


def test_gradients_of_latents_are_those_of_autograd(net):
    x = inputs(net)
    params = {k: v.detach() for k, v in net.named_parameters()}
    by_func = grad(lambda p: functional_call(net, p, (x,)).square().mean())(params)
    net(x).square().mean().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(by_func[name], parameter.grad, rtol=1e-10, atol=1e-12)
    assert any(by_func[k].any() for k in by_func if k.endswith("weight.original"))


def test_input_jacobian_forward_equals_backward(net):
    x = inputs(net, 1)
    backward, forward = jacrev(net)(x), jacfwd(net)(x)
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-10)
    assert backward.any()


def test_input_jacobian_of_a_layer_is_written_by_hand():
    """y = W_q sign(x): dy/dx = W_q diag(d(x)), with W_q = sign(W)."""
    plain = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)).double()
    net = quantize(plain, Sign, lambda: Sign("tanh"), keep=("first",))
    x = draw(4)
    z = plain[0].weight.detach() @ x
    w_q = torch.where(plain[2].weight >= 0, 1.0, -1.0).double().detach()
    expected = w_q @ torch.diag(1 / torch.cosh(z) ** 2) @ plain[0].weight.detach()
    torch.testing.assert_close(jacrev(net)(x), expected, rtol=1e-12, atol=1e-12)
