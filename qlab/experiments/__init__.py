"""A paper's claim as a run with settings, a tidy table and a verdict.

`EXPERIMENTS` lists what there is without importing torch or pandas; `EXPERIMENTS.load(name)` gives the `Experiment`,
whose `run(scale, seeds, data)` returns a `Result`:

    from qlab.experiments import EXPERIMENTS

    result = EXPERIMENTS.load("adaste").run(scale="laptop", data="digits")
    result.verdict      # "holds", "fails" or "undecided"
    result.table()      # mean ± standard deviation per arm
"""

from __future__ import annotations

from qlab.registry import Entry, Registry

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: Registry[Entry] = Registry(
    "experiment",
    [
        Entry(
            name="adaste",
            title="AdaSTE is never stuck: saturated weights change sign where the exact derivative moves none",
            target="qlab.experiments.adaste:EXPERIMENT",
        ),
        Entry(
            name="bnn_repair",
            title="Feature normalization and double residuals repair a binary net",
            target="qlab.experiments.bnn_repair:EXPERIMENT",
        ),
        Entry(
            name="qnn_rnn",
            title="Four bits are enough for an LSTM: as good as float; 2 and 3 bits cost, 1 bit fails",
            target="qlab.experiments.qnn_rnn:EXPERIMENT",
        ),
        Entry(
            name="askewsgd",
            title="ASkewSGD ends at rest: a lower loss at the end than BinaryConnect's, and far fewer flips",
            target="qlab.experiments.askewsgd:EXPERIMENT",
        ),
        Entry(
            name="binary_transform",
            title="Binary weights with the recipe of a float net: group transform, power family (a reconstruction)",
            target="qlab.experiments.binary_transform:EXPERIMENT",
        ),
        Entry(
            name="binary_weights",
            title="Methods for binary weights side by side: each is far ahead of the signs of a float net",
            target="qlab.experiments.binary_weights:EXPERIMENT",
        ),
        Entry(
            name="qnn",
            title="One bit, trained with shifts and six-bit gradients: what the devices of QNN and BNN cost",
            target="qlab.experiments.qnn:EXPERIMENT",
        ),
        Entry(
            name="dir_net",
            title="DIR-Net keeps information: a bit in every balanced weight, a slope for a share of clustered ones",
            target="qlab.experiments.dir_net:EXPERIMENT",
        ),
        Entry(
            name="optimum_gap",
            title="The gap to the best signs there are: tiny nets whose optimum is found by trying every sign",
            target="qlab.experiments.optimum_gap:EXPERIMENT",
        ),
        Entry(
            name="attacks",
            title="Temperature-scaled attacks break binary nets that plain ones leave, and change little on float nets",
            target="qlab.experiments.attacks:EXPERIMENT",
        ),
    ],
)
