r"""What a doctor looks for: one small function per symptom, from an `Exam` to findings.

| symptom             | alarm when                                                                                   |
|---------------------|----------------------------------------------------------------------------------------------|
| NaN weights         | any parameter or buffer is not finite                                                        |
| training mode       | batch norm or dropout is in training mode                                                    |
| batch-norm statistics | with statistics of the batch at hand, accuracy rises by 10 points or more                  |
| exploding scale     | the rms of a layer's output exceeds 10^5 times that of the net's input, or logits overflow    |
| dead layer          | 99 % of a layer's outputs are constant over the batch though its inputs are not              |
| saturated signs     | the declared derivative is zero at 99 % of a quantizer's inputs                              |
| zero gradients      | a layer's weight gradient is exactly zero, or none arrives                                   |
| softmax underflow   | p_y == 1 in the working dtype for 99 % of the examples: their gradient is exactly zero        |
| constant logits     | the logits do not depend on the input                                                        |
| labels out of step  | the loss is far above log d, and right answers are no more frequent than by chance            |
| gradient mismatch   | cosine of back-propagation with exact differences below -0.4 (low finding: below 0.1)         |

d classes. Thresholds are wide on purpose: a healthy net must raise no alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qlab.diagnose.exam import Exam, Finding
from qlab.diagnose.symptoms_gradients import gradient_mismatch, saturated_signs, softmax_underflow, zero_gradients
from qlab.diagnose.symptoms_values import (
    constant_logits,
    dead_layers,
    exploding_scale,
    labels_out_of_step,
    nan_weights,
    norm_scales,
    norm_statistics,
    training_mode,
)

__all__ = ["CHECKS", "Check"]

Check = Callable[[Exam], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    nan_weights,
    training_mode,
    norm_statistics,
    exploding_scale,
    dead_layers,
    saturated_signs,
    constant_logits,
    zero_gradients,
    softmax_underflow,
    labels_out_of_step,
    gradient_mismatch,
    norm_scales,
)
"""In the order of cause before effect: of two findings of one severity, the earlier is named first."""
