"""An LSTM with 4-bit weights and activations predicts text as well as in float; 2 and 3 bits cost, 1 bit fails.

The recurrent experiment of the QNN paper at laptop size: a language model of one LSTM layer, every matrix and both inputs of
every product quantized, on characters of the text that comes with Python. The paper reports, for an LSTM of 300 units on the
words of the Penn Treebank, perplexities of 97 in float, 100 with 4-bit weights and activations, and 220 with 2-bit weights and
3-bit activations (as quoted by Xu et al., ICLR 2018). Both nets have the same optimizer and the same number of steps.

Arms: float, W4/A4, W3/A3, W2/A3, W1/A1. All start from the same weights and see the same batches for a seed.

Reported per run, of the deployed net on the test part: bits per symbol L / ln 2 and perplexity exp(L) of the mean cross-entropy
L, the share of symbols that are predicted right, and the flips of the last epoch. A perplexity that is p times as large is
log2(p) more bits, so the rule is put in bits: 5 % are 0.070 bits.

Source: Hubara et al., Quantized Neural Networks, JMLR 2018, arXiv 1609.07061. Scale "paper" has the paper's net and data; how it
was trained is not published, so steps and learning rate are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlab.data.text import bits_per_symbol, perplexity
from qlab.experiments.base import Experiment, Plan, Scale
from qlab.experiments.training import CODE, FLIPS, prepared, trained
from qlab.experiments.verdict import Difference, Metric, Rule

__all__ = ["EXPERIMENT", "plan", "train"]

BITS = Metric("test/bits", "bits per symbol", digits=3)
METRICS = (
    BITS,
    Metric("test/perplexity", "perplexity", digits=2),
    Metric("test/acc", "symbols predicted", "%", 100),
    Metric(FLIPS, "flips, last epoch", "%", 100, digits=2),
)

FLOAT, W4A4, W3A3, W2A3, W1A1 = "float", "W4/A4", "W3/A3", "W2/A3", "W1/A1"
ARMS: dict[str, dict[str, int | None]] = {
    FLOAT: {"weight_bits": None, "activation_bits": None},
    W4A4: {"weight_bits": 4, "activation_bits": 4},
    W3A3: {"weight_bits": 3, "activation_bits": 3},
    W2A3: {"weight_bits": 2, "activation_bits": 3},
    W1A1: {"weight_bits": 1, "activation_bits": 1},
}


def train(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Train one arm with one seed and report the metrics above.

    Args:
        settings: `data`, `data_options`, `net`, `net_options`, `method`, `options` (its hyperparameters), `epochs`.
        seed: of the starting net and of the order of the batches.
    """
    method, data = prepared(settings, seed)
    run = trained(method, data, settings["epochs"], seed)
    loss = run.metrics["test/loss"]
    kept = {name: run.metrics[name] for name in ("test/acc", FLIPS) if name in run.metrics}
    return {"test/bits": bits_per_symbol(loss), "test/perplexity": perplexity(loss), **kept}


# --------------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Args:
        hidden: H of the LSTM.
        embedding: E of the LSTM.
        length: T, symbols of a window.
        epochs: over the training part.
        batch_size: windows of a batch.
        lr: at the start; it follows a cosine to zero.
        seeds: how many by default.
        parallel: runs side by side.
        data_options: besides batch size, length and validation part.
    """

    hidden: int
    embedding: int
    length: int
    epochs: int
    batch_size: int = 32
    lr: float = 4e-3
    seeds: int = 3
    parallel: bool = True
    data_options: Mapping[str, Any] = field(default_factory=dict)


PAPER = Size(300, 300, 35, 40, batch_size=20, lr=1e-3, seeds=5, parallel=False)

SIZES: dict[tuple[str, Scale], Size] = {
    ("text", "laptop"): Size(96, 32, 40, 4, lr=1e-2, seeds=5),
    ("text", "workstation"): Size(256, 64, 80, 30, seeds=10),
    ("text", "paper"): PAPER,
    # Characters, and as many as the other text has: words take too long here.
    ("penn_treebank", "laptop"): Size(
        96, 32, 40, 4, lr=1e-2, seeds=5, data_options={"unit": "character", "subset": 9300}
    ),
    ("penn_treebank", "workstation"): Size(200, 200, 35, 10, seeds=3, parallel=False),
    ("penn_treebank", "paper"): PAPER,
}


def plan(scale: Scale, data: str) -> Plan:
    """Return the arms at a scale on a data set; the module's docstring says what they are."""
    size = SIZES[data, scale]
    common = {
        "data": data,
        # Nothing is validated, so all that is not tested on is trained on.
        "data_options": {
            "batch_size": size.batch_size,
            "length": size.length,
            "val_fraction": 0.0,
            **size.data_options,
        },
        "net": "lstm",
        "net_options": {"hidden": size.hidden, "embedding": size.embedding},
        "method": "qnn_rnn",
        "epochs": size.epochs,
    }
    arms = {arm: {**common, "options": {"lr": size.lr, **bits}} for arm, bits in ARMS.items()}
    return Plan(arms, seeds=size.seeds, parallel=size.parallel)


def percent(p: float) -> float:
    """Return the bits by which a perplexity is p % larger: log2(1 + p / 100)."""
    return math.log2(1 + p / 100)


EXPERIMENT = Experiment(
    name="qnn_rnn",
    title="Four bits are enough for an LSTM",
    claim=(
        "an LSTM language model with 4-bit weights and activations has a perplexity within 5 % of that in float; with 2-bit "
        "weights and 3-bit activations it is more than 5 % worse than with 4, and with one bit it fails: more than 25 % worse "
        "than float"
    ),
    rule=Rule(
        (
            Difference(BITS, FLOAT, W4A4, -percent(5)),
            Difference(BITS, W2A3, W4A4, percent(5)),
            Difference(BITS, W1A1, FLOAT, percent(25)),
        )
    ),
    metrics=METRICS,
    function=train,
    plan=plan,
    data=("text", "penn_treebank"),
    code=CODE,
)
