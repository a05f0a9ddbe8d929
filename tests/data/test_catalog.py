"""The shelf of data sets: listed without torch, honest about options."""

import inspect
import subprocess
import sys

import pytest

import qlab.data
from qlab.data import DATA
from qlab.errors import InputError, UnknownNameError

COMMON = {
    "batch_size": 128,
    "val_fraction": 0.1,
    "seed": 0,
    "augment": None,
    "subset": None,
    "root": None,
}
OFFLINE = ["digits", "two_moons", "circles", "spirals", "text"]


def test_listing_the_shelf_imports_neither_torch_nor_lightning():
    code = (
        "import sys, qlab.data; [e.title for e in qlab.data.DATA.values()]; dir(qlab.data);"
        "bad = {'torch', 'pytorch_lightning', 'numpy', 'sklearn', 'pooch', 'PIL'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_what_they_say():
    for name in qlab.data.__all__:
        assert getattr(qlab.data, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qlab.data.no_such_name


def test_unknown_name_names_the_closest_one():
    with pytest.raises(UnknownNameError, match="Did you mean 'fashion_mnist'"):
        qlab.data.load("fashionmnist")


def test_unknown_option_names_the_closest_and_all_others():
    with pytest.raises(InputError, match=r"no option 'batchsize'.*Did you mean 'batch_size'.*val_fraction, seed"):
        qlab.data.load("digits", batchsize=3)


@pytest.mark.parametrize("name", DATA)
def test_every_set_takes_the_common_options_with_types_and_the_common_defaults(name):
    parameters = inspect.signature(DATA.load(name)).parameters
    for option, default in COMMON.items():
        assert parameters[option].default == default, option
    for parameter in parameters.values():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize("name", DATA)
def test_hyperparameters_are_primitives_from_which_the_set_can_be_loaded_again(name, tmp_path):
    root = {} if name in OFFLINE else {"root": tmp_path}  # a Path becomes a string: checkpoints hold primitives only
    data = qlab.data.load(name, seed=3, batch_size=7, **root)
    assert data.name == name
    assert all(value is None or type(value) in (bool, int, float, str) for value in data.hparams.values())
    again = qlab.data.load(data.name, **data.hparams)
    assert dict(again.hparams) == dict(data.hparams)
    assert again.hparams["seed"] == 3


@pytest.mark.parametrize("name", DATA)
def test_the_command_line_builds_every_set_from_its_signature(name, tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DATA.load(name), "data")
    root = [] if name in OFFLINE else [f"--data.root={tmp_path}"]
    arguments = parser.parse_args(["--data.batch_size=5", "--data.val_fraction=0.2", "--data.subset=40", *root])
    data = DATA.load(name)(**arguments.data.as_dict())
    assert (data.batch_size, data.val_fraction, data.subset) == (5, 0.2, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"val_fraction": float("nan")}, "val_fraction"),
        ({"seed": -1}, "seed"),
        ({"augment": 1}, "augment must be True, False or None"),
        ({"subset": 0}, "subset"),
        ({"cutout": -1}, "cutout"),
        ({"cutout": 2, "augment": False}, "contradicts"),
        ({"root": "somewhere"}, "takes no root"),
    ],
)
def test_an_option_out_of_range_is_refused_at_once(options, message):
    with pytest.raises(InputError, match=message):
        qlab.data.load("digits", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3}, "n must"),
        ({"noise": -1.0}, "noise"),
        ({"noise": float("inf")}, "noise"),
        ({"augment": True}, "no augment"),
    ],
)
def test_planar_options_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(InputError, match=message):
        qlab.data.load("spirals", **options)
