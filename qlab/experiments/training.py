"""One training run of an experiment, described by primitives: what most cells are.

    settings = {
        "data": "digits", "data_options": {"batch_size": 64},
        "net": "mlp", "net_options": {"hidden": [64, 32]},
        "method": "adaste", "options": {"tol": 0.0}, "epochs": 60,
    }

The seed gives the starting net, the latents and the order of the batches: two arms with one seed differ in nothing but their
settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

import qlab
from qlab.callbacks import FlipRatio
from qlab.data import DataModule
from qlab.experiments.inputs import load_data
from qlab.methods.base import Method
from qlab.runs import Run

__all__ = ["CODE", "FLIPS", "accuracy", "prepared", "trained"]

FLIPS = "quant/flip_ratio"
CODE = ("qlab.callbacks", "qlab.data", "qlab.methods", "qlab.models", "qlab.quantizers", "qlab.runs")
"""The code that a training run depends on, for `Experiment.code`."""


def prepared(settings: Mapping[str, Any], seed: int) -> tuple[Method, DataModule]:
    """Return the method around a fresh net, and its data, untrained."""
    data = load_data(settings["data"], seed=seed, **settings.get("data_options", {}))
    net = qlab.build(settings["net"], data.input_shape, data.num_classes, seed=seed, **settings.get("net_options", {}))
    return qlab.methods.create(settings["method"], net, seed=seed, **settings.get("options", {})), data


def trained(
    method: Method, data: DataModule, epochs: int, seed: int, callbacks: Sequence[pl.Callback] = (), **options: Any
) -> Run:
    """Train without a validation, for only the end of a run is compared, and return the whole run.

    Raises:
        KeyboardInterrupt: the run was interrupted; `fit` keeps what there is, an experiment compares whole runs only.
    """
    run = qlab.fit(
        method,
        data,
        epochs=epochs,
        seed=seed,
        progress=False,
        validate_every=0,
        limit_val_batches=0,
        callbacks=[FlipRatio(per_layer=False), *callbacks],
        **options,
    )
    if not run.completed:
        raise KeyboardInterrupt
    return run


def accuracy(settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Train one arm with one seed; return test/acc (deployed), test/acc_latent, train/loss and the flips of the last epoch."""
    method, data = prepared(settings, seed)
    run = trained(method, data, settings["epochs"], seed)
    names = ("test/acc", "test/acc_latent", "train/loss", FLIPS)
    return {name: run.metrics[name] for name in names if name in run.metrics}
