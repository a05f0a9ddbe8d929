"""Full precision: the float net, trained by plain back-propagation.

Everything a quantized method does around the step (schedules, evaluation, deployment with re-estimated batch norm, checkpoints) is
done here too, so that differences between a row of this and a row of another method are differences of quantization.

Shapes: any.
"""

from __future__ import annotations

from qlab.methods.base import Method
from qlab.methods.catalog import CATALOG

__all__ = ["FullPrecision"]


class FullPrecision(Method):
    """The float baseline; its hyperparameters are those every method has."""

    info = CATALOG["full_precision"]
