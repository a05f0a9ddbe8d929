"""Cell functions for the tests of the experiment frame. They stand in a module of their own so that a spawned process can
import them, and import nothing heavy so that it starts quickly."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np


def accuracy(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """A run whose accuracy is settings["mean"] plus noise of its seed; leaves a mark when it is computed."""
    if "marks" in settings:
        (Path(settings["marks"]) / f"{settings['mean']}-{seed}-{os.getpid()}").touch()
    noise = np.random.default_rng(seed).normal(0, settings.get("sd", 0.01))
    return {"test/acc": settings["mean"] + noise, "flips": float(settings["mean"] > 0.5), "pid": os.getpid()}


def fails_on_seed_1(settings: dict[str, Any], seed: int) -> dict[str, float]:
    if settings.get("fails") and seed == 1:
        raise ValueError("the loss is NaN")
    return accuracy(settings, seed)


def dies_on_seed_1(settings: dict[str, Any], seed: int) -> dict[str, float]:
    if settings.get("dies") and seed == 1:
        os._exit(17)
    return accuracy(settings, seed)


def never_ends(settings: dict[str, Any], seed: int) -> dict[str, float]:
    if settings.get("endless"):
        threading.Event().wait()
    return accuracy(settings, seed)


def interrupts(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Ctrl-C during seed 1, once: while the file "interrupt" is there."""
    flag = Path(settings["marks"]) / "interrupt"
    if seed == 1 and flag.exists():
        flag.unlink()
        raise KeyboardInterrupt
    return accuracy(settings, seed)


def threads(settings: dict[str, Any], seed: int) -> dict[str, float]:
    return {"threads": float(os.environ.get("OMP_NUM_THREADS", "0")), "torch": float("torch" in sys.modules)}


def not_a_number(settings: dict[str, Any], seed: int) -> dict[str, float]:
    return {"test/acc": float("nan") if seed == 1 else settings["mean"], "flips": 1.0}
