"""Binary weights, activations in float."""

from __future__ import annotations

from qlab.methods.info import MethodInfo

__all__ = ["ENTRIES"]

ENTRIES = (
    MethodInfo(
        name="binary_connect",
        title="BinaryConnect: sign weights, gradients go to clamped latent weights",
        target="qlab.methods.binary_weights.binary_connect:BinaryConnect",
        paper="Courbariaux, Bengio, David, BinaryConnect: Training Deep Neural Networks with binary weights during "
        "propagations, NeurIPS 2015",
        arxiv="1511.00363",
        family="binary_weights",
        weight_bits=1,
        properties=(
            "the stochastic weight has the clamped latent weight as its mean",
            "equals the clipped straight-through estimator while latent weights stay within [-1, 1]",
        ),
    ),
    MethodInfo(
        name="adaste",
        title="AdaSTE: an adaptive straight-through estimator from a bilevel program",
        target="qlab.methods.binary_weights.adaste:AdaSTE",
        paper="Le, Høier, Lin, Zach, AdaSTE: An Adaptive Straight-Through Estimator to Train Binary Neural Networks, "
        "CVPR 2022",
        arxiv="2112.02880",
        family="binary_weights",
        weight_bits=1,
        claims=("never stuck: saturated weights still change sign where the exact derivative moves none",),
        properties=(
            "the forward weight minimises the double-well energy",
            "the backward rule is the largest finite difference over beta",
            "mu = 0 gives straight-through inside (-1, 1)",
            "mu alpha >= 1 gives exact signs",
        ),
        schedule=("mu",),
    ),
)
