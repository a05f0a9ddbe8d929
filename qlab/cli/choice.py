"""Which method, data set and net a `fit` or `test` command means, found before Lightning is imported.

`--method NAME`, `--data NAME`, `--net NAME` and `--robust NAME` choose; everything else (`--method.lr 0.1`,
`--trainer.max_epochs 3`) belongs to `qlab.cli.training`, whose options depend on the choice. A config file and the config.yaml
beside a checkpoint choose too; the command line wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlab.data import DATA
from qlab.errors import InputError
from qlab.methods.catalog import CATALOG
from qlab.methods.robust import ROBUST
from qlab.models import MODELS
from qlab.registry import Registry

__all__ = ["Choice", "beside", "choose", "main"]

DEFAULT_DATA = "digits"
CONFIG_NAME = "config.yaml"
SHELVES: Mapping[str, Registry[Any]] = {"method": CATALOG, "data": DATA, "net": MODELS, "robust": ROBUST}


@dataclass(frozen=True)
class Choice:
    """What a command names.

    Args:
        stage: "fit" or "test".
        method: name, or None where the checkpoint says it.
        data: name of the data set.
        net: name of the net.
        config: a config file's content, or that of the config.yaml beside the checkpoint; defaults of the typed options.
        arguments: what is left for the typed options.
        robust: name of the training for robustness, or None for none.
    """

    stage: str
    method: str | None
    data: str | None
    net: str | None
    config: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    robust: str | None = None


def _take(arguments: list[str], *options: str) -> tuple[str | None, list[str]]:
    """Return the last value given for an option, and the arguments without it."""
    value, rest, i = None, [], 0
    while i < len(arguments):
        word, equals, attached = arguments[i].partition("=")
        if word not in options:
            rest.append(arguments[i])
            i += 1
        elif equals:
            value = attached
            i += 1
        elif i + 1 < len(arguments) and not arguments[i + 1].startswith("-"):
            value = arguments[i + 1]
            i += 2
        else:
            raise InputError(f"{word} needs a value: {word} {'FILE' if word in ('-c', '--config') else 'NAME'}")
    return value, rest


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config file as `fit` saves it: options by group, all primitives.

    Raises:
        InputError: it is not there, or no such file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable config file ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a config file: expected groups of options such as method, data, net, trainer")
    return content


def beside(checkpoint: str | None) -> dict[str, Any]:
    """Return the config that `qlab fit` saved beside a checkpoint, or nothing."""
    path = Path(checkpoint).with_name(CONFIG_NAME) if checkpoint else None
    return read_config(path) if path and path.is_file() else {}


def choose(stage: str, arguments: list[str]) -> Choice:
    """Read the names in a command line.

    Raises:
        UnknownNameError: a name that is not on its shelf.
        InputError: an option without a value, or a config file that cannot be read.
    """
    names: dict[str, str | None] = {}
    for kind in SHELVES:
        names[kind], arguments = _take(arguments, f"--{kind}")
    path, arguments = _take(arguments, "-c", "--config")
    checkpoint, _ = _take(arguments, "--ckpt_path")
    config = read_config(Path(path)) if path else beside(checkpoint)
    config.pop("ckpt_path", None)
    for kind, shelf in SHELVES.items():
        group = config.get(kind)
        saved = group.get("name") if isinstance(group, Mapping) else None
        if names[kind] is None:
            names[kind] = saved
        elif saved != names[kind]:
            config.pop(kind, None)  # the options of another method, data set or net mean nothing here
        name = names[kind]
        if name is not None:
            _ = shelf[name]  # raises for an unknown name
    lost = next((word for word in arguments if word.startswith("--robust.")), None)
    if lost is not None and names["robust"] is None:
        raise InputError(
            f"{lost.partition('=')[0]} needs to know of which training: --robust NAME, one of {_listed(ROBUST)}"
        )
    return Choice(stage, names["method"], names["data"], names["net"], config, tuple(arguments), names["robust"])


def _listed(shelf: Registry[Any]) -> str:
    return ", ".join(shelf)


FIT_HELP = """usage: qlab fit --method NAME [--data NAME] [--net NAME] [options]

Train a network, then test it as it would be deployed.

  --method NAME               {methods}
  --data NAME                 {data}
                              default: {default_data}
  --net NAME                  {nets}
                              default: the data set's usual one
  --robust NAME               train for robustness: {robust}
  --method.OPTION VALUE       a hyperparameter, such as --method.lr 0.1
  --data.OPTION VALUE         such as --data.batch_size 64
  --net.OPTION VALUE          such as --net.width 16
  --robust.OPTION VALUE       such as --robust.eps 0.1, in the units of the data set
  --trainer.max_epochs N      default: {epochs}; every option of Lightning's Trainer works
  --seed_everything N         one seed for data order, initial weights and noise; default: 0
  --ckpt_path FILE            go on from a checkpoint; the settings of its run stand unless given anew
  -c, --config FILE           settings from a config.yaml, as every run saves one; the command line wins
  --print_config              show all settings and exit
  --method NAME --help        all options of this method, its data set and net, with types and defaults

Checkpoints, metrics.csv and config.yaml go to runs/METHOD-DATA/version_N; --trainer.default_root_dir changes that.
"""

TEST_HELP = """usage: qlab test --ckpt_path FILE [--data NAME] [options]

Test a checkpoint as it would be deployed. Nothing in the file is executed.

  --ckpt_path FILE            a checkpoint of `qlab fit`; it says which method and net
  --data NAME                 {data}
                              default: what the run was trained on, where its config.yaml stands beside the checkpoint
  --data.OPTION VALUE         such as --data.batch_size 64
  --trainer.OPTION VALUE      every option of Lightning's Trainer
  --data NAME --help          all options of this data set, with types and defaults
"""

MAX_EPOCHS = 20


def main(stage: str, arguments: list[str]) -> int:
    """Run `qlab fit` or `qlab test`: read the names, then import Lightning and run."""
    wants_help = any(word in ("-h", "--help") for word in arguments)
    choice = choose(stage, [word for word in arguments if word not in ("-h", "--help")])
    named = choice.method if stage == "fit" else choice.data
    if wants_help and named is None:
        text = FIT_HELP if stage == "fit" else TEST_HELP
        names = {"methods": _listed(CATALOG), "data": _listed(DATA), "nets": _listed(MODELS), "robust": _listed(ROBUST)}
        print(text.format(**names, default_data=DEFAULT_DATA, epochs=MAX_EPOCHS), end="")
        return 0
    if stage == "fit" and choice.method is None:
        raise InputError(f"fit needs a method: qlab fit --method NAME, one of {_listed(CATALOG)}. See qlab fit --help.")

    from qlab.cli import training

    return (training.fit if stage == "fit" else training.test)(choice, wants_help)
