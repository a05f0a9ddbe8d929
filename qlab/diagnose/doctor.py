"""A doctor for nets: what is wrong, how one knows, and what to try, the likeliest cause first.

    print(doctor(net, x, y).summary())

Runs the checks of `symptoms` on one batch. Nothing is raised for a sick net; only a batch that fits no net is an error. An alarm
is a finding of high or medium severity; low ones and remarks may stand in a healthy net.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from qlab.diagnose.base import Result
from qlab.diagnose.exam import Exam, Finding, Severity
from qlab.diagnose.symptoms import CHECKS
from qlab.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from qlab.plots import Figure

__all__ = ["SEVERITIES", "Diagnosis", "Finding", "doctor"]

SEVERITIES: tuple[Severity, ...] = ("high", "medium", "low", "info")
COLUMNS = ["severity", "name", "layer", "evidence", "function", "fix", "lesson", "score"]


@dataclass(frozen=True, eq=False)
class Diagnosis(Result):
    """What a doctor found.

    Args:
        findings: the most severe first, causes before effects.
        examples: N, how many were looked at.
        accuracy, loss: of the batch; NaN for a net whose logits are not finite.
        classes: d.
        function: which function the values are of.
        checks: how many symptoms were looked for.
    """

    findings: tuple[Finding, ...]
    examples: int
    accuracy: float
    loss: float
    classes: int
    function: str
    checks: int

    @property
    def alarms(self) -> tuple[Finding, ...]:
        """The findings of high or medium severity."""
        return tuple(f for f in self.findings if f.severity in ("high", "medium"))

    @property
    def healthy(self) -> bool:
        """Whether there is no alarm."""
        return not self.alarms

    def frame(self) -> pd.DataFrame:
        """Return one row per finding."""
        import pandas as pd

        rows = [{column: getattr(f, column) for column in COLUMNS} for f in self.findings]
        return pd.DataFrame(rows, columns=COLUMNS)

    def figure(self) -> Figure:
        """Draw the findings as a list of bars, a length per severity."""
        from qlab.plots.doctor import doctor_figure

        return doctor_figure(self)

    def summary(self) -> str:
        """Name the first finding with its evidence and what to try, and how many more there are."""
        looked = (
            f"Looked at the {self.function} function on {self.examples} examples (accuracy {self.accuracy:.1%}, loss "
            f"{self.loss:.3g}) for {self.checks} symptoms"
        )
        if self.healthy:
            rest = f"; {len(self.findings)} remark{'s' if len(self.findings) != 1 else ''}" if self.findings else ""
            return f"{looked}: no alarm{rest}."
        first = self.alarms[0]
        more = len(self.alarms) - 1
        where = f" in {first.layer}" if first.layer else ""
        also = f" {more} more alarm{'s' if more > 1 else ''}, perhaps its effects." if more else ""
        return (
            f"{looked}. First: {first.name}{where} ({first.function} function). {first.evidence} Try: {first.fix}{also}"
        )


def doctor(net: nn.Module, x: Tensor | tuple[Tensor, Tensor], y: Tensor | None = None, seed: int = 0) -> Diagnosis:
    """Return what is wrong with a net, as one batch shows it.

    Args:
        net: a method of the lab (its training-time net is looked at; for the other give method.deployed()), or any torch
            module that returns logits, in any state. It is not changed.
        x: (N, ...) inputs, or the batch (x, y). At most 256 examples are looked at; 64 or more tell most.
        y: (N,) labels.
        seed: of the weights that are sampled for the gradient mismatch.

    Raises:
        InputError: for inputs or labels that do not fit the net, or a module that returns no logits.
    """
    if isinstance(x, tuple | list):
        if len(x) != 2 or y is not None:
            raise InputError("doctor takes a net and a batch: doctor(net, x, y) or doctor(net, (x, y))")
        x, y = x
    if y is None:
        raise InputError("doctor looks at the loss, which needs labels: give y of shape (N,), int64")
    exam = Exam.of(net, x, y, seed)
    findings = [finding for check in CHECKS for finding in check(exam)]
    order = {name: i for i, name in enumerate(dict.fromkeys(f.name for f in findings))}
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), order[f.name], -f.score))
    return Diagnosis(
        findings=tuple(findings),
        examples=len(exam.x),
        accuracy=exam.accuracy if exam.finite else float("nan"),
        loss=exam.loss,
        classes=exam.classes,
        function=exam.function,
        checks=len(CHECKS),
    )
