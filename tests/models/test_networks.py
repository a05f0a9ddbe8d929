"""The networks: published sizes, shapes, the order of their modules, and the tools of torch that must work on them."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from qlab.errors import InputError
from qlab.models import MODELS, build

NONLINEARITIES = (nn.ReLU, nn.Hardtanh)
FLOATS = sorted(name for name, entry in MODELS.items() if entry.takes == "floats")  # the others: test_recurrent.py
SMALL = {
    "mlp": ("mlp", (3, 8, 8), {"hidden": (8, 6)}),
    "mlp without norm": ("mlp", (5,), {"hidden": (8, 6), "norm": False}),
    "mlp, norm on the logits": ("mlp", (5,), {"hidden": (8,), "affine": False, "final_norm": True}),
    "lenet": ("lenet", (3, 16, 16), {}),
    "vgg_small": ("vgg_small", (3, 8, 8), {"width": 4}),
    "vgg16": ("vgg16", (3, 8, 8), {"width": 4, "hidden": (8, 6)}),
    "vgg16, images of 32": ("vgg16", (3, 32, 32), {"width": 2, "hidden": (8,), "final_norm": True}),
    "resnet20 A": ("resnet20", (3, 8, 8), {"width": 4, "shortcut": "A"}),
    "resnet20 B": ("resnet20", (3, 8, 8), {"width": 4, "shortcut": "B"}),
    "resnet18": ("resnet18", (3, 8, 8), {"width": 4}),
    "bireal18": ("bireal18", (3, 8, 8), {"width": 4}),
    "bireal18, norm on the logits": ("bireal18", (3, 8, 8), {"width": 4, "final_norm": True}),
}


@pytest.fixture(params=SMALL)
def net(request):
    """A small net of each kind, in eval mode, with batch-norm statistics and scales that differ from their start."""
    name, shape, options = SMALL[request.param]
    net = build(name, shape, 5, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return net.eval()


def batch(net, n=3, dtype=torch.float32):
    return torch.randn(n, *net.input_shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "options", "published"),
    [
        # 61,706 with biases (LeCun et al. with all maps connected); our batch norms trade 226 biases for 452 parameters.
        ("lenet", (1, 32, 32), {}, 61_706 + 226),
        ("lenet", (1, 28, 28), {}, 61_706 + 226),
        ("resnet20", (3, 32, 32), {"shortcut": "A"}, 269_722),  # akamaster/pytorch_resnet_cifar10
        ("resnet20", (3, 32, 32), {"shortcut": "B"}, 272_474),
        ("resnet18", (3, 32, 32), {}, 11_173_962),  # kuangliu/pytorch-cifar
        ("bireal18", (3, 32, 32), {}, 11_173_962),  # the same layers, wired otherwise
        # VGG-small of IR-Net: convolutions, batch norms, linear layer of 8192 features
        ("vgg_small", (3, 32, 32), {}, 4_574_592 + 2 * 1792 + 81_930),
        # 15,253,578 of the VGG-16 for CIFAR with linear layers of 512 (chengyangfu/pytorch-vgg-cifar10), whose biases before
        # batch norm, 4224 and 1024, are not here; the two batch norms of the linear layers, 2 x 1024, are
        ("vgg16", (3, 32, 32), {}, 15_253_578 - 4224 - 1024 + 2048),
        ("vgg16", (3, 32, 32), {"hidden": ()}, 14_728_266 - 4224),  # kuangliu/pytorch-cifar, its biases too
        ("mlp", (784,), {"hidden": (1024, 1024, 1024), "norm": False}, 784 * 1024 + 2 * 1024**2 + 3 * 1024 + 10_250),
    ],
)
def test_number_of_parameters_is_the_published_one(name, shape, options, published):
    with torch.device("meta"):
        assert parameters(build(name, shape, 10, **options)) == published


def test_resnet20_has_the_binary_macs_of_the_literature():
    """40,108,032 multiply-accumulates in the 18 inner convolutions at 32x32, 442,368 in the first."""
    macs = {}
    net = build("resnet20", (3, 32, 32), 10)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda m, _, out, name=name: macs.update({name: m.weight.numel() * out[0, 0].numel()})
            )
    net.eval()(torch.zeros(1, 3, 32, 32))
    first, *inner = macs.values()
    assert (first, sum(inner), len(inner)) == (442_368, 40_108_032, 18)


@pytest.mark.parametrize(("name", "depth"), [("vgg16", 16), ("resnet20", 20), ("resnet18", 18), ("bireal18", 18)])
def test_depth_is_what_the_name_says(name, depth):
    layers = [
        n for n, m in build(name, (3, 32, 32), 10, width=4).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    assert len([n for n in layers if "shortcut" not in n]) == depth


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 13, 21)])
def test_logits_have_one_row_per_input(name, shape):
    options = {} if name in ("mlp", "lenet") else {"width": 4}
    net = build(name, shape, 7, **options)
    assert net(torch.zeros(2, *shape)).shape == (2, 7)
    assert net.eval()(torch.zeros(1, *shape)).shape == (1, 7)


def test_modules_are_registered_in_the_order_in_which_they_run(net):
    leaves = [name for name, module in net.named_modules() if not list(module.children())]
    ran = []
    for name, module in net.named_modules():
        if name in leaves:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    net(batch(net))
    assert ran == leaves


def test_a_layer_reads_the_nonlinearity_that_is_registered_between_it_and_the_layer_before(net):
    """None stands before the first layer, the shortcuts' convolutions and the last layer of bireal18 (real sums)."""
    between: list[torch.Tensor] = []  # outputs of nonlinearities since the last layer ran
    unfed, mistakes = [], []

    def read(name, x):
        if not between:
            unfed.append(name)
        elif len(between) > 1 or not (torch.equal(x, between[0]) or torch.equal(x, pooled_or_flat(between[0], x))):
            mistakes.append(name)
        between.clear()

    def pooled_or_flat(a, x):
        return a.flatten(1) if a[0].numel() == x[0].numel() else a.mean((2, 3))

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda m, inputs, name=name: read(name, inputs[0]))
        elif isinstance(module, NONLINEARITIES):
            module.register_forward_hook(lambda m, inputs, out: between.append(out))
    net(batch(net))
    layers = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    real = [n for n in layers if n.startswith("fc")] if net.spec["name"] == "bireal18" else []
    assert sorted(unfed) == sorted({layers[0], *(n for n in layers if "shortcut" in n), *real})
    assert not mistakes


def test_every_nonlinearity_object_stands_in_one_place(net):
    count = {}
    for module in net.modules():
        if isinstance(module, NONLINEARITIES):
            module.register_forward_hook(lambda m, *_: count.update({m: count.get(m, 0) + 1}))
    net(batch(net))
    assert count
    assert set(count.values()) == {1}
    assert len(count) == sum(isinstance(m, NONLINEARITIES) for m in net.modules())


def test_layers_before_batch_norm_have_no_bias(net):
    runs = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d)]
    for layer, after in zip(runs, [*runs[1:], None], strict=True):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert (layer.bias is None) == isinstance(after, nn.BatchNorm1d | nn.BatchNorm2d)


@pytest.mark.parametrize("name", FLOATS)
def test_affine_and_final_norm_reach_every_batch_norm(name):
    options = {} if name in ("mlp", "lenet") else {"width": 4}
    net = build(name, (3, 16, 16), 5, affine=False, final_norm=True, **options)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert norms[-1].num_features == 5
    assert not any(m.affine for m in norms)
    logits = net(torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(logits.mean(0), torch.zeros(5), atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient(net):
    net.train()
    net(batch(net, 4)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert sum(bool(p.grad.any()) for p in net.parameters()) > len(list(net.parameters())) // 2


def test_one_image_gives_what_it_gives_in_a_batch(net):
    net, x = net.double(), batch(net, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([net(x[i : i + 1]) for i in range(len(x))]), net(x), atol=1e-12, rtol=1e-12)


def test_memory_format_of_the_input_does_not_matter(net):
    net, x = net.double(), batch(net, dtype=torch.float64)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(net(strided), net(x), atol=1e-12, rtol=1e-12)
    if x.dim() == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(net(last), net(x), atol=1e-12, rtol=1e-12)


def test_fx_traces_the_net_and_a_module_around_it(net):
    x = batch(net)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
    around = nn.Sequential(net, nn.Softmax(dim=1)).eval()
    assert torch.equal(torch.fx.symbolic_trace(around)(x), around(x))


def test_vmap_over_stacked_parameters_equals_a_loop(net):
    net = net.double()
    nets = [net, copy.deepcopy(net)]
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in nets[1].parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.05)
    x = batch(net, dtype=torch.float64)
    params, buffers = stack_module_state(nets)

    def call(p, b):
        return functional_call(net, (p, b), (x,))

    stacked = vmap(call)(params, buffers)
    torch.testing.assert_close(stacked, torch.stack([m(x) for m in nets]), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(stacked[0], stacked[1])


def test_deep_copy_still_checks_its_input(net):
    with pytest.raises(InputError, match="expected"):
        copy.deepcopy(net)(torch.zeros(2, 9, 9))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(4, 1, 32, 32), r"input has shape \(4, 1, 32, 32\); expected \(N, 3, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"input has shape \(3, 32, 32\); expected \(N, 3, 32, 32\)"),
        (torch.zeros(4, 3, 28, 28), r"expected \(N, 3, 32, 32\)"),
        (torch.zeros(4, 3 * 32 * 32), r"expected \(N, 3, 32, 32\)"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "input is torch.uint8; expected floating point"),
        ([[0.0]], "input is list; expected floating point"),
    ],
)
@pytest.mark.parametrize("name", FLOATS)
def test_wrong_input_raises_one_clear_error(name, given, message):
    options = {} if name in ("mlp", "lenet") else {"width": 2}
    net = build(name, (3, 32, 32), 10, **options)
    with pytest.raises(InputError, match=message):
        net(given)


def test_deeplift_of_captum_takes_a_net_as_it_is():
    from captum.attr import DeepLift

    net, x = (
        build("mlp", (6,), 3, hidden=(8,), seed=0).double().eval(),
        torch.rand(4, 6, dtype=torch.float64, requires_grad=True),
    )
    with pytest.warns(UserWarning, match="Setting forward"):
        scores = DeepLift(net).attribute(x, torch.zeros_like(x), target=1)
    torch.testing.assert_close(scores.sum(1), (net(x) - net(torch.zeros_like(x)))[:, 1])


def test_a_later_hook_does_not_switch_the_check_off():
    net = build("mlp", (6,), 3)
    net.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"expected \(N, 6\)"):
        net(torch.zeros(4, 5))


def test_a_tuple_is_refused_where_no_later_hook_makes_a_batch_of_it():
    net = build("mlp", (6,), 3)
    with pytest.raises(InputError, match="input is tuple; expected floating point"):
        net((torch.zeros(4, 6),))


def test_input_check_survives_functional_call_and_vmap():
    net = build("mlp", (3,), 2).eval()
    params = dict(net.named_parameters())
    with pytest.raises(InputError, match=r"expected \(N, 3\)"):
        functional_call(net, params, (torch.zeros(2, 4),))
    with pytest.raises(InputError, match=r"expected \(N, 3\)"):
        vmap(net)(torch.zeros(5, 3))  # each call sees (3,), no batch


def test_resnet20_type_a_shortcut_takes_every_second_pixel_and_adds_no_parameters():
    net = build("resnet20", (3, 8, 8), 10, width=4, shortcut="A")
    shortcut = net.stages[1][0].shortcut
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    y = shortcut(x)
    assert y.shape == (2, 8, 4, 4)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()
    assert parameters(shortcut) == 0


def test_bireal_unit_adds_its_input_to_one_convolution():
    net = build("bireal18", (3, 8, 8), 10, width=4, seed=0).double().eval()
    x = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = net.stages[0][0]
    weight = unit.conv.weight / (1 + unit.bn.eps) ** 0.5  # running statistics are 0 and 1
    expected = x + nn.functional.conv2d(x.clamp(-1, 1), weight, padding=1)
    torch.testing.assert_close(unit(x), expected, atol=1e-12, rtol=1e-12)


def test_bireal_shortcut_is_the_average_of_real_values():
    net = build("bireal18", (3, 8, 8), 10, width=4, seed=0).double().eval()
    x = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shortcut = net.stages[1][0].shortcut
    _, conv, norm = shortcut
    pooled = x.reshape(2, 4, 4, 2, 4, 2).mean((3, 5))
    expected = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], pooled) / (1 + norm.eps) ** 0.5
    torch.testing.assert_close(shortcut(x), expected, atol=1e-12, rtol=1e-12)
