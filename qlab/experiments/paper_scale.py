r"""The papers' own runs on CIFAR-10, cut into pieces of a few minutes: a run of days on a machine that is lent by the quarter hour.

    python -m qlab.experiments.paper_scale askewsgd-resnet18 --root runs --seconds 540

trains for that long, writes a checkpoint and a record, and ends; the same command goes on from there, until the run is complete.
A run in pieces gives the bits of one that was not interrupted, on one device. No verdict is passed here: `qlab reproduce` does
that, at sizes that a laptop can repeat.

Arms are METHOD-NET with NET `resnet18` or `vgg16`. As in the papers on AdaSTE and mirror descent, nets with binary weights have
batch norm without scale and shift after every layer, the logits included, and no layer is left in float; DIR-Net, whose
activations are binary too, has affine batch norm, a float first and last layer and float 1x1 shortcuts.

    full_precision   SGD 0.1 (vgg16 0.05), momentum 0.9, decay 5e-4, cosine, 200 epochs, batch 128: the teacher of DIR-Net
    binary_connect   Adam 3e-3 exponentially to 2e-6, updates scaled, squared hinge, 500 epochs, batch 50
    adaste           the rule and optimizer of the authors' code: lr 3e-4, cosine, mu times 1.05 an epoch, 700 epochs, batch 128
    askewsgd         Adam 0.06, halved after 20 % and 40 %, alpha 0.5, eps times 0.88 an epoch from the middle on, 100 epochs,
                     batch 100
    mirror_descent   MD-tanh-S, Adam 1e-3, beta times 1.02 at 500 (vgg16: 1.2 at 50) equal distances, 100000 steps of batch 128
    dir_net          SGD 0.1 (vgg16 0.007), momentum 0.9, decay 1e-4, cosine, t from 0.1 to 10, 400 (300) epochs, batch 128

Source: the papers of the methods' files and their authors' code, as named there. The constants of BinaryConnect are recalled.
Deviations: every arm sees random crops and mirrored pictures, also BinaryConnect, whose paper trains without. A tenth of the
training part is held out for validation, and the run's last weights are judged, not those that were best on it. Mirror descent
lowers its rate exponentially to where the authors' three steps, by 0.3 (0.2) every 30000, end. The papers' nets for ASkewSGD and
BinaryConnect on CIFAR-10 are others. DIR-Net's settings for ResNet-18 are those for ResNet-20, for VGG-16 those for VGG-small.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl

import qlab
from qlab.data import DataModule
from qlab.errors import InputError, QlabError, UnknownNameError
from qlab.experiments.cells import write_atomic
from qlab.experiments.inputs import load_data
from qlab.methods.base import Method
from qlab.provenance import device_name, versions

__all__ = ["ARMS", "StopAfter", "main", "piece"]

NETS = ("resnet18", "vgg16")
STEPS_PER_EPOCH = 45_000 // 128 + 1
SHORTCUTS = {"resnet18": [f"stages.{stage}.0.shortcut.0" for stage in (1, 2, 3)], "vgg16": []}


def _arms() -> dict[str, dict[str, Any]]:
    arms: dict[str, dict[str, Any]] = {}
    for net in NETS:
        small = net == "vgg16"

        def add(method: str, epochs: int, batch: int, options: Mapping[str, Any], plain: bool, net: str = net) -> None:
            arms[f"{method}-{net}"] = {
                "method": method,
                "options": dict(options),
                "net": net,
                "net_options": {"affine": False, "final_norm": True} if plain else {},
                "epochs": epochs,
                "data_options": {"batch_size": batch, "val_fraction": 0.1, "augment": True},
            }

        sgd = {"optimizer": "sgd", "momentum": 0.9, "lr_schedule": "cosine"}
        add(
            "full_precision",
            200,
            128,
            {**sgd, "lr": 0.05 if small else 0.1, "weight_decay": 5e-4, "reestimate_bn": False},
            plain=False,
        )
        connect = {"lr": 3e-3, "lr_schedule": "exponential", "lr_end": 2e-6 / 3e-3, "loss": "squared_hinge"}
        add("binary_connect", 500, 50, connect, plain=True)
        add("adaste", 700, 128, {"mode": "reference"}, plain=True)
        askew = {"lr": 0.06, "lr_schedule": "constant", "halvings": [0.2, 0.4], "alpha": 0.5}
        add("askewsgd", 100, 100, askew, plain=True)
        mirror = {
            "lr": 1e-3,
            "lr_schedule": "exponential",
            "lr_end": (0.2 if small else 0.3) ** 3,
            "beta_rate": 1.2 if small else 1.02,
            "beta_updates": 50 if small else 500,
        }
        add("mirror_descent", -(-100_000 // STEPS_PER_EPOCH), 128, mirror, plain=True)
        dir_net = {
            **sgd,
            "lr": 0.007 if small else 0.1,
            "weight_decay": 1e-4,
            "keep": ["first", "last", *SHORTCUTS[net]],
        }
        add("dir_net", 300 if small else 400, 128, dir_net, plain=False)
    return arms


ARMS: dict[str, dict[str, Any]] = _arms()
"""Settings of each arm, primitives only."""


class StopAfter(pl.Callback):
    """Stop a fit after so many seconds or steps, but not at its very end, where it is complete.

    Args:
        seconds: counted from `start`.
        steps: optimizer steps of this piece; None for no limit.
        start: value of the clock at the start of the piece; None for now.
        clock: of seconds.
    """

    def __init__(
        self,
        seconds: float,
        steps: int | None = None,
        start: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock, self.steps = clock, steps
        self.end = (clock() if start is None else start) + seconds
        self.first, self.total = 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where the piece begins, and how long the whole run is."""
        self.first, self.total = trainer.global_step, int(trainer.estimated_stepping_batches)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop where the time or the steps are used up."""
        spent = self.clock() >= self.end or (self.steps is not None and trainer.global_step - self.first >= self.steps)
        if spent and trainer.global_step < self.total:
            trainer.should_stop = True


def piece(
    arm: str,
    root: str | Path,
    seconds: float = 540.0,
    *,
    data: str = "cifar10",
    data_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    steps: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train one arm for a while, from its start or from where the last piece ended; return the record.

    The folder `root/ARM-seedSEED` gets checkpoint.ckpt, history.csv (of all pieces), run.json (of the last one) and result.json,
    the record: settings, metrics, steps, and for every piece its device, versions and seconds. The checkpoint is also written
    after each epoch: what a killed piece has done since is lost and done again. Ctrl-C ends a piece as the time limit does.

    Args:
        arm: a name in `ARMS`.
        root: folder of all runs; `dir_net` finds its teacher, the arm `full_precision` with the same net, there.
        seconds: after which the piece stops training, loading included; the final test is not.
        data: a data set with pictures.
        data_options: of the data set, besides the arm's own, such as `root` or `subset`.
        seed: of the net, the latents and the order.
        steps: stop after so many steps, if that is earlier.
        progress: show a progress bar, and a line at the end.

    Returns:
        The record, as in result.json; `record["completed"]` says whether there is more to do.

    Raises:
        UnknownNameError: for an arm that there is none of.
        InputError: for a folder that holds a run with other settings, a time that is not positive, or a teacher that is not
            trained yet.
    """
    start = time.monotonic()
    if arm not in ARMS:
        raise UnknownNameError("arm", arm, ARMS)
    if not seconds > 0 or (steps is not None and steps < 1):
        raise InputError(f"a piece takes some time: seconds={seconds!r}, steps={steps!r}; give positive numbers")
    settings = {**ARMS[arm], "data": data, "seed": seed}
    settings["data_options"] = {**settings["data_options"], **(data_options or {})}
    folder = Path(root) / f"{arm}-seed{seed}"
    record = _record(folder, arm, settings)
    if record["completed"]:
        return record

    method, module = _prepared(settings, Path(root))
    checkpoint = folder / "checkpoint.ckpt"
    before = pd.read_csv(folder / "history.csv") if record["pieces"] else None
    stop = StopAfter(seconds, steps, start)
    run = qlab.fit(
        method,
        module,
        epochs=settings["epochs"],
        seed=seed,
        root=folder,
        callbacks=[stop],
        progress=progress,
        resume=checkpoint if checkpoint.exists() else None,
        # of the last epoch too, so that the checkpoint holds the batch-norm statistics of the deployed net
        validate_every=max(n for n in range(1, 11) if settings["epochs"] % n == 0),
        log_every_n_steps=100,
    )
    if before is not None:  # `fit` writes the history of what it did itself
        pd.concat([before, run.history], ignore_index=True).to_csv(folder / "history.csv", index=False)
    here = {
        "device": device_name(),
        "versions": versions(),
        "seconds": round(time.monotonic() - start, 1),
        "from_step": stop.first,
        "to_step": method.steps,
    }
    pieces = [*record["pieces"], here]
    record |= {
        "completed": run.completed,
        "steps": method.steps,
        "total_steps": stop.total,
        "metrics": {**record["metrics"], **run.metrics},
        "devices": list(dict.fromkeys(each["device"] for each in pieces)),
        "seconds": round(sum(each["seconds"] for each in pieces), 1),
        "pieces": pieces,
    }
    write_atomic(folder / "result.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if progress:
        print(_line(record), file=sys.stderr)
    return record


def _record(folder: Path, arm: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record in a folder, or an empty one."""
    path = folder / "result.json"
    if not path.exists():
        return {"arm": arm, "settings": dict(settings), "completed": False, "metrics": {}, "pieces": []}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = record["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no record of a run in pieces; move it away, or give another root") from error
    if known != json.loads(json.dumps(settings)):
        changed = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        raise InputError(
            f"{folder} holds a run of {arm} with other settings ({', '.join(changed)}): go on with those, or give another root"
        )
    return record


def _prepared(settings: Mapping[str, Any], root: Path) -> tuple[Method, DataModule]:
    """Return the method around a fresh net and its data; DIR-Net with its teacher."""
    options, seed = dict(settings["options"]), settings["seed"]
    if settings["method"] == "dir_net":
        teacher = f"full_precision-{settings['net']}"
        folder = root / f"{teacher}-seed{seed}"
        record = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
        if not record.get("completed"):
            raise InputError(f"dir_net learns from a float net: complete the arm {teacher} in {root} first")
        options["teacher"] = str((folder / "checkpoint.ckpt").resolve())
    load = qlab.data.load if settings["data_options"].get("root") else load_data
    data = load(settings["data"], seed=seed, **settings["data_options"])
    net = qlab.build(settings["net"], data.input_shape, data.num_classes, seed=seed, **settings["net_options"])
    return qlab.methods.create(settings["method"], net, seed=seed, **options), data


def _line(record: Mapping[str, Any]) -> str:
    """Return what a piece did and what is left, in one line."""
    last = record["pieces"][-1]
    done = f"{record['arm']}: step {last['from_step']} to {last['to_step']} of {record['total_steps']} in {last['seconds']:.0f} s"
    if record["completed"]:
        return f"{done}; complete, test accuracy {100 * record['metrics']['test/acc']:.2f} %"
    moved = max(last["to_step"] - last["from_step"], 1)
    left = (record["total_steps"] - last["to_step"]) * last["seconds"] / moved
    return f"{done}; about {left / 60:.0f} minutes left: the same command goes on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one piece from the command line; see the module docstring.

    Returns:
        Exit status: 0 done (the run complete or not), 2 an error that the user can act on.
    """
    parser = argparse.ArgumentParser(
        prog="python -m qlab.experiments.paper_scale", description="Train one arm at paper scale for a few minutes."
    )
    parser.add_argument("arm", metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--root", required=True, help="folder of all runs")
    parser.add_argument("--seconds", type=float, default=540.0, help="length of the piece")
    parser.add_argument("--data", default="cifar10", help="data set")
    parser.add_argument("--data-root", help="folder that holds its files, or the tree of an image_folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    options = {} if given.data_root is None else {"root": given.data_root}
    try:
        piece(
            given.arm,
            given.root,
            given.seconds,
            data=given.data,
            data_options=options,
            seed=given.seed,
            progress=not given.quiet,
        )
    except QlabError as error:
        print(f"qlab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
