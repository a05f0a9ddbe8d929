"""Lightning callbacks that any run can carry: cheap enough to leave on."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

__all__ = ["FlipRatio"]


class FlipRatio(pl.Callback):
    """Log the share of quantized weights whose hard level changed since the last epoch.

    Logs `quant/flip_ratio` over all quantized weights and `quant/flip_ratio/<layer>` for each tensor. Silent for
    float nets.

    Args:
        per_layer: log each layer too.
    """

    def __init__(self, per_layer: bool = True) -> None:
        self.per_layer = per_layer
        self._before: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where the weights stand; after a resume the checkpoint's own memory stays."""
        if not self._before:
            self._before = _copy(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the flips of this epoch."""
        now = _copy(pl_module)
        if not now:
            return
        flips = {name: (w != self._before[name].to(w.device)).sum() for name, w in now.items()}
        total = sum(w.numel() for w in now.values())
        pl_module.log("quant/flip_ratio", torch.stack(list(flips.values())).sum() / total)
        if self.per_layer:
            for name, n in flips.items():
                pl_module.log(f"quant/flip_ratio/{name}", n / now[name].numel())
        self._before = now

    def state_dict(self) -> dict[str, Any]:
        """Return the levels at the end of the last epoch."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._before = dict(state_dict["before"])


def _copy(method: Any) -> dict[str, Tensor]:
    return {name: w.clone() for name, w in method.hard_weights().items()}
