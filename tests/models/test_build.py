"""Building networks: names, specs, seeds, and specs that come from a stranger."""

import json
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.errors import InputError, QlabError, UnknownNameError
from qlab.models import MODELS, build

SPECS = [
    {"name": "mlp", "input_shape": [2], "num_classes": 2, "hidden": [8], "norm": False},
    {"name": "mlp", "input_shape": [1, 8, 8], "num_classes": 10, "hidden": [], "affine": False},
    {"name": "lenet", "input_shape": [1, 28, 28], "num_classes": 10, "final_norm": True},
    {"name": "vgg_small", "input_shape": [3, 8, 8], "num_classes": 3, "width": 4},
    {"name": "vgg16", "input_shape": [3, 8, 8], "num_classes": 3, "width": 2, "hidden": [6, 5]},
    {"name": "resnet20", "input_shape": [3, 32, 32], "num_classes": 10, "width": 4, "shortcut": "B"},
    {"name": "resnet18", "input_shape": [3, 8, 8], "num_classes": 10, "width": 4, "affine": False},
    {"name": "bireal18", "input_shape": [3, 8, 8], "num_classes": 10, "width": 4, "final_norm": True},
    {"name": "repair20", "input_shape": [3, 8, 8], "num_classes": 10, "width": 4, "ensemble": 2, "order": "bn_conv"},
    {
        "name": "repair18",
        "input_shape": [3, 8, 8],
        "num_classes": 10,
        "width": 4,
        "blocks": [1, 1],
        "scaling": "xnorpp",
    },
    {"name": "lstm", "input_shape": [12], "num_classes": 30, "hidden": 8, "embedding": 4},
    {"name": "char_rnn", "input_shape": [12], "num_classes": 30, "hidden": 8},
]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def layout(net: torch.nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape) for name, value in net.state_dict().items()]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["name"])
def test_spec_gives_the_same_architecture_after_json(spec):
    net = build(spec)
    again = build(json.loads(json.dumps(net.spec)))
    assert str(again) == str(net)
    assert layout(again) == layout(net)
    assert again.spec == net.spec
    assert spec.items() <= net.spec.items()  # what was asked for stands in the spec, beside the defaults


def test_every_model_of_the_shelf_is_covered_here():
    assert {spec["name"] for spec in SPECS} == set(MODELS)


def test_arguments_override_the_spec():
    net = build({"name": "mlp", "hidden": [4], "num_classes": 7}, (3,), 5, hidden=(6,))
    assert net.spec["hidden"] == [6]
    assert net(torch.zeros(2, 3)).shape == (2, 5)


def test_build_leaves_the_given_spec_alone():
    spec = {"name": "mlp", "input_shape": [2], "num_classes": 2}
    build(spec, hidden=(4,))
    assert spec == {"name": "mlp", "input_shape": [2], "num_classes": 2}


def test_numpy_integers_become_primitives_in_the_spec():
    net = build("mlp", (np.int64(2),), np.int64(3), hidden=(np.int32(4),))
    assert json.loads(json.dumps(net.spec)) == net.spec


def test_weights_come_from_the_global_generator_by_default():
    torch.manual_seed(3)
    first = build("mlp", (2,), 2).state_dict()
    torch.manual_seed(3)
    second = build("mlp", (2,), 2).state_dict()
    # The size check before it must draw nothing: the weights are those of the layers made straight after the seed.
    torch.manual_seed(3)
    plain = torch.nn.Linear(2, 64, bias=False).weight
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(first["hidden.0.weight"], plain)


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, two, other = (build("lenet", (1, 28, 28), 10, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


def test_seeded_builds_in_two_threads_do_not_mix():
    alone = [build("resnet20", (3, 8, 8), 10, width=4, seed=seed).state_dict() for seed in range(8)]
    built: dict[int, dict[str, torch.Tensor]] = {}

    def work(seed: int) -> None:
        built[seed] = build("resnet20", (3, 8, 8), 10, width=4, seed=seed).state_dict()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, state in enumerate(alone):
        assert all(torch.equal(state[key], built[seed][key]) for key in state)


def test_seeded_net_follows_the_default_dtype_and_device():
    torch.set_default_dtype(torch.float64)
    try:
        assert build("mlp", (2,), 2, seed=0).fc.weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert build("mlp", (2,), 2, seed=0).fc.weight.is_meta


def test_listing_models_does_not_import_torch():
    code = "import sys, qlab.models as m; assert len(m.MODELS) == 11; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_model_names_the_closest():
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet20'"):
        build("resnet2", (3, 32, 32), 10)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("mlp",), {}, "needs input_shape"),
        (("mlp", (2,)), {}, "needs num_classes"),
        (("mlp", (2,), 1), {}, "num_classes is 1; expected an integer from 2"),
        (("mlp", (2,), 2.0), {}, "num_classes is 2.0"),
        (("mlp", (2,), True), {}, "num_classes is True"),
        (("mlp", (), 2), {}, "input_shape is empty"),
        (("mlp", 5, 2), {}, "input_shape is 5"),
        (("mlp", (0,), 2), {}, r"input_shape\[0\] is 0"),
        (("mlp", (-3, 4, 4), 2), {}, r"input_shape\[0\] is -3"),
        (("mlp", "28", 2), {}, "input_shape is '28'"),
        (("mlp", (2,), 2), {"depth": 3}, "no option 'depth'. It has: hidden, norm, affine, final_norm"),
        (("mlp", (2,), 2), {"hidden": 64}, "hidden is 64"),
        (("mlp", (2,), 2), {"hidden": (64, 1.5)}, r"hidden\[1\] is 1.5"),
        (("mlp", (2,), 2), {"norm": 1}, "norm is 1; expected True or False"),
        (("mlp", (2,), 2), {"seed": -1}, "seed is -1"),
        (("lenet", (2,), 2), {}, r"takes images: input_shape is \(2,\), expected \(C, H, W\)"),
        (("lenet", (1, 8, 8), 2), {}, "at least 12x12 pixels"),
        (("vgg_small", (3, 7, 32), 2), {}, "at least 8x8 pixels"),
        (("vgg16", (3, 7, 32), 2), {}, "at least 8x8 pixels"),
        (("vgg16", (3, 32, 32), 2), {"hidden": 512}, "hidden is 512"),
        (("resnet18", (3, 4, 4), 2), {}, "at least 8x8 pixels"),
        (("resnet20", (3, 32, 32), 2), {"shortcut": "C"}, "shortcut is 'C'; expected 'A'"),
        (("resnet20", (3, 32, 32), 2), {"shortcut": 1}, "shortcut is 1"),
        (("resnet20", (3, 32, 32), 2), {"width": 0}, "width is 0; expected an integer from 1"),
        (("resnet20", (3, 32, 32), 2), {"width": "16"}, "width is '16'"),
    ],
)
def test_bad_argument_raises_one_clear_error(arguments, options, message):
    with pytest.raises(InputError, match=message):
        build(*arguments, **options)


@pytest.mark.parametrize(
    "hostile",
    [
        {"name": "resnet18", "width": 65536},
        {"name": "resnet18", "width": 10**5000},
        {"name": "resnet18", "width": [64]},
        {"name": "vgg_small", "input_shape": [3, 65536, 65536]},
        {"name": "vgg_small", "input_shape": [1, 2048, 65536], "num_classes": 65536},
        {"name": "mlp", "hidden": [65536] * 64},
        {"name": "lstm", "input_shape": [10], "num_classes": 65536, "hidden": 65536},
        {"name": "mlp", "hidden": [1] * 10**6},
        {"name": "mlp", "hidden": "x" * 10**6},
        {"name": "mlp", "input_shape": [65536] * 8},
        {"name": "mlp", "num_classes": 10**9},
        {"name": "mlp", "self": None},
        {"name": "mlp", 3: 4},
        {"name": "mlp", "__class__": "os.system"},
        {"name": "os:system"},
        {"name": ["mlp"]},
        {"name": None},
        {},
    ],
    ids=lambda spec: str(spec.get("name")),
)
def test_hostile_spec_is_refused_before_anything_is_allocated(hostile):
    before = peak_bytes()
    with pytest.raises((InputError, UnknownNameError)) as error:
        build({"input_shape": [3, 32, 32], "num_classes": 10} | hostile)
    assert peak_bytes() - before < 64 * 2**20
    assert len(str(error.value)) < 500


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.just(2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {"name": st.sampled_from(sorted(MODELS)), "input_shape": json_values | st.just([3, 8, 8])},
        optional=dict.fromkeys(("num_classes", "hidden", "width", "shortcut", "affine", "final_norm"), json_values),
    )
)
def test_any_json_spec_builds_or_raises_a_qlab_error(spec):
    try:
        net = build(spec)
    except QlabError:
        return
    assert build(net.spec).spec == net.spec
