"""`qlab fit` and `qlab test` on LightningCLI: the chosen method, data set and net as typed options beside Lightning's Trainer.

LightningCLI knows one "model" and one "data" group. The lab's model is two things, a net and the method that trains it, and all
three are named on shelves. `LabCLI` therefore adds the groups itself, each from the signature of the chosen class, and builds
them in order, for the net's input shape and number of classes come from the data.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from qlab import data as datasets
from qlab import models
from qlab.callbacks import FlipRatio
from qlab.cli.choice import CONFIG_NAME, DEFAULT_DATA, MAX_EPOCHS, Choice
from qlab.data import DATA
from qlab.errors import InputError
from qlab.methods import CATALOG, checkpoints
from qlab.methods.base import Method
from qlab.methods.robust import ROBUST
from qlab.models import MODELS
from qlab.runs import quiet

__all__ = ["LabCLI", "fit", "test"]

EXPECTED = (  # warnings of Lightning that a sound run meets, each with its reason
    "Checkpoint directory .* exists and is not empty",  # the run's config.yaml is written first
    "The dirpath has changed",  # a resumed run has a folder of its own
    "The number of training batches .* is smaller than the logging interval",  # a small set; its epochs are logged
    "Total length of .* across ranks is zero",  # val_fraction is 0
    ".*isinstance.treespec, LeafSpec.* is deprecated",  # Lightning 2.6 calls what torch has renamed
)
LAST, BEST = "last", "best"
SHAPE = {"input_shape", "num_classes"}  # of a net: the data say them


class SaveConfig(SaveConfigCallback):
    """Write the run's options, every one of them, beside its checkpoints."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write config.yaml. Lightning's own way calls what jsonargparse has deprecated."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(self.parser.dump(self.config, skip_unset=False), encoding="utf-8")


class LabCLI(LightningCLI):
    """LightningCLI with the groups data, net and method of a `Choice`.

    Args:
        choice: what the command names. For "test" method and net come from the checkpoint.
        arguments: the typed options.

    Raises:
        InputError: an option that there is not, or of the wrong type.
    """

    def __init__(self, choice: Choice, arguments: list[str]) -> None:
        self.choice = choice
        fitting = choice.stage == "fit"
        trainer: dict[str, Any] = {
            "deterministic": True,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "log_every_n_steps": 10,
        }
        if fitting:
            trainer |= {"max_epochs": MAX_EPOCHS, "default_root_dir": f"runs/{choice.method}-{choice.data}"}
        else:
            trainer |= {"logger": False}
        super().__init__(
            trainer_defaults=trainer,
            seed_everything_default=0,
            save_config_callback=SaveConfig if fitting else None,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"prog": f"qlab {choice.stage}", "exit_on_error": False},
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # ---- options ----------------------------------------------------------------------------------------------------

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups trainer, data, net, method and, where it is wanted, robust."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        self._add_group(parser, "data", self.choice.data, DATA.load(str(self.choice.data)), set())
        if self.choice.stage == "fit":
            self._add_group(parser, "net", self.choice.net, MODELS.load(str(self.choice.net)), SHAPE)
            self._add_group(parser, "method", self.choice.method, CATALOG.load(str(self.choice.method)), {"net"})
            if self.choice.robust is not None:
                self._add_group(parser, "robust", self.choice.robust, ROBUST.load(self.choice.robust), set())
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="a checkpoint to go on from, or to test")

    @staticmethod
    def _add_group(parser: LightningArgumentParser, group: str, name: str | None, cls: type, skip: set[str]) -> None:
        parser.add_argument(f"--{group}.name", type=str, default=name, help=f"also --{group} NAME")
        added = parser.add_class_arguments(cls, group, skip=skip, instantiate=False, fail_untyped=False)
        if f"{group}.seed" in added:  # None until _set_seed has chosen the seed of the run
            parser.set_defaults({f"{group}.seed": None})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the typed options."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            hint = f"qlab {self.choice.stage} {self._names()} --help"
            raise InputError(f"{' '.join(str(error).split())}\nAll options: {hint}") from error

    def _names(self) -> str:
        kinds = ("method", "data", "net", "robust") if self.choice.stage == "fit" else ("data",)
        named = {kind: getattr(self.choice, kind) for kind in kinds}
        return " ".join(f"--{kind} {name}" for kind, name in named.items() if name is not None)

    # ---- objects ----------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Give the run's seed to the data's order and the method's noise where they have none of their own."""
        seed = self._seed()
        for group in ("data", "method"):
            if self.config.get(f"{group}.seed", seed) is None:
                self.config[f"{group}.seed"] = seed or 0

    def _seed(self) -> int | None:
        seed = self.config["seed_everything"]
        return None if isinstance(seed, bool) else int(seed)

    def _options(self, group: str) -> dict[str, Any]:
        options = self.config[group].as_dict()
        del options["name"]
        return options

    def instantiate_classes(self) -> None:
        """Build the data, the net to fit them, the method and the trainer."""
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = datasets.load(str(self.choice.data), **self._options("data"))
        self.model = self._trained() if self.choice.stage == "test" else self._fresh()
        try:
            with quiet():
                self.trainer = self.instantiate_trainer()
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise InputError(f"the trainer does not take these options: {error}") from error

    def _fresh(self) -> Method:
        shape = {"input_shape": self.datamodule.input_shape, "num_classes": self.datamodule.num_classes}
        net = models.build(str(self.choice.net), **shape, **self._options("net"), seed=self._seed())
        method: Method = CATALOG.load(str(self.choice.method))(net, **self._options("method"))
        if self.choice.robust is not None:
            method.robust = {"name": self.choice.robust} | self._options("robust")
        return method

    def _trained(self) -> Method:
        path = self.config["ckpt_path"]
        if path is None:
            raise InputError("test needs a checkpoint: qlab test --ckpt_path FILE")
        method = checkpoints.load(path)
        spec = method.hparams.get("net") or {}
        for key in SHAPE & set(spec):
            found = getattr(self.datamodule, key)
            if spec[key] != (list(found) if key == "input_shape" else found):
                raise InputError(
                    f"{path} was trained for {key} {spec[key]}, but {self.choice.data} has {found}: choose the data set it was "
                    "trained on with --data"
                )
        return method

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Return the trainer; a fit gets a CSV log, flip ratios and checkpoints, unless the options say otherwise."""
        trainer: Namespace = self.config_init["trainer"]
        if self.choice.stage == "fit":
            if trainer["logger"] is None:
                trainer["logger"] = CSVLogger(trainer["default_root_dir"], name="")
            folder = trainer["logger"].log_dir if isinstance(trainer["logger"], CSVLogger) else None
            keeps = trainer["enable_checkpointing"] is not False and not trainer["fast_dev_run"]
            self.trainer_defaults["callbacks"] = [FlipRatio(), *(self._checkpoints(folder) if keeps else ())]
        return super().instantiate_trainer(**kwargs)

    def _checkpoints(self, folder: str | None) -> list[Callback]:
        """Return what keeps the last epoch and, where there is a validation part, the best one."""
        common: dict[str, Any] = {"dirpath": folder, "auto_insert_metric_name": False, "enable_version_counter": False}
        last = ModelCheckpoint(filename=LAST, save_on_train_epoch_end=True, **common)
        best = ModelCheckpoint(filename=BEST, monitor="val/acc", mode="max", **common)
        return [last, best] if len(self.datamodule.split("val").y) else [last]

    def checkpoint(self, name: str) -> str | None:
        """Return the path of the checkpoint LAST or BEST of this run, if it was written."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.filename == name and callback.best_model_path:
                return _shown(callback.best_model_path)
        return None


def _shown(path: str) -> str:
    """Return a path as a user would type it: relative where it lies below the working folder."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _saved_arguments(choice: Choice) -> list[str]:
    """Return a config's content as typed options, so that it is checked as they are.

    A test takes from it what the data are, not how the training was run.
    """
    groups = ("seed_everything", "trainer", "data", "net", "method", "robust") if choice.stage == "fit" else ("data",)
    arguments = []
    for group in groups:
        saved = choice.config.get(group)
        if saved is None:
            continue
        options = (
            {f"{group}.{key}": value for key, value in saved.items()} if isinstance(saved, dict) else {group: saved}
        )
        for key, value in options.items():
            arguments.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    return arguments


def _completed(choice: Choice) -> Choice:
    """Return the choice with what was not named: the embedded data set, and the data set's usual net."""
    if choice.data is None and choice.stage == "test":
        raise InputError("test needs data, for there is no config.yaml beside the checkpoint: say --data NAME")
    data = choice.data or DEFAULT_DATA
    return replace(choice, data=data, net=choice.net or DATA[data].net)


def _cli(choice: Choice, wants_help: bool) -> LabCLI:
    help_word = ["--help"] if wants_help else []
    return LabCLI(choice, [*_saved_arguments(choice), *choice.arguments, *help_word])


def _percent(metrics: Mapping[str, Any], name: str) -> str:
    return f"{100 * float(metrics[name]):.2f} %" if name in metrics else "-"


def _language(data: str | None, tested: Mapping[str, Any]) -> dict[str, str]:
    """Return what a test of a language model is usually told by: its loss as bits and as perplexity."""
    if DATA[str(data)].kind != "text" or "test/loss" not in tested:
        return {}
    from qlab.data.text import bits_per_symbol, perplexity

    loss = float(tested["test/loss"])
    return {
        "test bits per symbol, deployed net": f"{bits_per_symbol(loss):.3f}",
        "test perplexity, deployed net": f"{perplexity(loss):.2f}",
    }


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"


def _print_table(title: str, rows: Mapping[str, str | None]) -> None:
    print(title)
    width = max(map(len, rows))
    for name, value in rows.items():
        if value is not None:
            print(f"  {name:<{width}}  {value}")


@contextmanager
def _running() -> Iterator[None]:
    """Run a trainer without its notices; what Lightning calls a misconfiguration is an error that the user can act on."""
    with quiet():
        for expected in EXPECTED:
            warnings.filterwarnings("ignore", message=expected)
        try:
            yield
        except MisconfigurationException as error:
            raise InputError(str(error)) from error


def fit(choice: Choice, wants_help: bool) -> int:
    """Run `qlab fit`: train, then test the deployed net, and print what came out."""
    choice = _completed(choice)
    cli = _cli(choice, wants_help)
    method, data, trainer = cli.model, cli.datamodule, cli.trainer
    resumed = cli.config["ckpt_path"]
    if resumed is not None:
        checkpoints.expect(checkpoints.read(resumed), str(choice.method))
    start = time.perf_counter()
    try:
        with _running():
            trainer.fit(method, datamodule=data, ckpt_path=resumed, weights_only=True)
    except (SystemExit, KeyboardInterrupt) as interruption:  # Lightning turns Ctrl-C into SystemExit
        if isinstance(interruption, SystemExit) and trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        last = cli.checkpoint(LAST)
        kept = f"go on with: qlab fit --ckpt_path {last}" if last else "nothing is kept, for no epoch was finished"
        print(f"\nepoch {trainer.current_epoch + 1} of {trainer.max_epochs} was cut short; {kept}", file=sys.stderr)
        raise KeyboardInterrupt from None
    seconds = time.perf_counter() - start
    validated = dict(trainer.callback_metrics)
    with _running():
        (tested,) = trainer.test(method, datamodule=data, verbose=False)
    _print_table(
        f"{choice.method} on {choice.data} with {choice.net}: {_epochs(trainer.current_epoch)} in {seconds:.1f} s",
        {
            "test accuracy, deployed net": _percent(tested, "test/acc"),
            "test accuracy, latent net": _percent(tested, "test/acc_latent"),
            **_language(choice.data, tested),
            "validation accuracy": _percent(validated, "val/acc"),
            "checkpoint": cli.checkpoint(LAST),
            "best validated": cli.checkpoint(BEST),
        },
    )
    return 0


def test(choice: Choice, wants_help: bool) -> int:
    """Run `qlab test`: evaluate a checkpoint's deployed net on the test part of a data set."""
    choice = _completed(choice)
    cli = _cli(choice, wants_help)
    samples = len(cli.datamodule.split("test").y)
    with _running():
        (tested,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    _print_table(
        f"{cli.model.info.name} on {choice.data}: {samples} test samples",
        {
            "test accuracy, deployed net": _percent(tested, "test/acc"),
            "test accuracy, latent net": _percent(tested, "test/acc_latent"),
            **_language(choice.data, tested),
        },
    )
    return 0
