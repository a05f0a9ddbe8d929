r"""IR-Net: balanced, standardised signs forward, and a slope that goes from identity to sign backward.

    forward    w_q = s sign(z),  z = (w - mean) / std of each filter,  s = 2^round(log2 mean|z|)     Libra
               a_q = sign(a)
    backward   sign' <- k t (1 - tanh^2(t x)),  k = max(1 / t, 1),  x = z or a                       EDE
               t(p) = t_min (t_max / t_min)^p  at the share p of the run

It is DIR-Net (`dir_net`) without the cap on t and without a teacher.

Source: Qin, Gong, Liu, Shen, Wei, Yu, Song, CVPR 2020, arXiv 1909.10788; constants from the authors' code (htqin/IR-Net).
Deviation: t moves every step rather than every epoch.

Shapes: w (O, K, ...), z as w, s (O, 1, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from qlab.methods.binary_networks.dir_net import DIRNet
from qlab.methods.catalog import CATALOG
from qlab.methods.teacher import Teacher

__all__ = ["IRNet"]


class IRNet(DIRNet):
    """IR-Net.

    Args:
        net: a plain net or the spec of one.
        estimator: slope of the weights' sign: "ede", or those of DIR-Net.
        teacher: as of DIR-Net; IR-Net has none.
    """

    info = CATALOG["ir_net"]

    def __init__(
        self,
        net: nn.Module | Mapping[str, Any],
        *,
        estimator: Literal["dte", "ede", "clip"] = "ede",
        teacher: str | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        given = teacher
        teacher = Teacher.name_of(teacher)  # Lightning reads the hyperparameters off this frame: no net may stand in it
        super().__init__(net, estimator=estimator, teacher=given, **kwargs)
