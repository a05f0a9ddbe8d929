"""Binary weights and activations."""

from __future__ import annotations

from qlab.methods.info import MethodInfo

__all__ = ["ENTRIES"]

ENTRIES = (
    MethodInfo(
        name="ste",
        title="Straight-through estimator: sign with any surrogate derivative, weights and activations",
        target="qlab.methods.binary_networks.ste:STE",
        paper="Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Binarized Neural Networks, NeurIPS 2016; surrogates of "
        "Liu et al. 2018 and Darabi et al. 2018",
        arxiv="1602.02830",
        family="binary_networks",
        weight_bits=1,
        properties=("the gradient is the surrogate's declared derivative times the incoming gradient",),
    ),
)
