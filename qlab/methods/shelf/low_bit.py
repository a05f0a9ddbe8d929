"""Weights or activations of a few bits."""

from __future__ import annotations

from qlab.methods.info import MethodInfo

__all__ = ["ENTRIES"]

ENTRIES = (
    MethodInfo(
        name="dorefa",
        title="DoReFa-Net: weights, activations and gradients of a few bits",
        target="qlab.methods.low_bit.dorefa:DoReFa",
        paper="Zhou, Wu, Ni, Zhou, Wen, Zou, DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low "
        "Bitwidth Gradients, 2016",
        arxiv="1606.06160",
        family="low_bit",
        weight_bits=2,
        activation_bits=2,
        properties=(
            "weights take at most 2^k values in [-1, 1], none of them zero, and the largest latent maps to its sign",
            "quantized gradients have the float gradient as their mean",
        ),
    ),
    MethodInfo(
        name="luq",
        title="LUQ: four-bit weights and activations, unbiased logarithmic four-bit gradients",
        target="qlab.methods.low_bit.luq:LUQ",
        paper="Chmiel, Banner, Hoffer, Ben Yaacov, Soudry, Accurate Neural Training with 4-bit Matrix Multiplications at "
        "Standard Formats, ICLR 2023",
        arxiv="2112.10769",
        family="low_bit",
        weight_bits=4,
        activation_bits=4,
        properties=(
            "quantized gradients have the float gradient as their mean and the declared variance",
            "the largest gradient, zero and powers of two times the smallest level stay as they are",
            "averaging n draws divides the variance by n",
        ),
    ),
    MethodInfo(
        name="qnn_rnn",
        title="QNN for recurrent nets: matrices and both inputs of every product on a few bits, the memory in float",
        target="qlab.methods.low_bit.qnn_rnn:QNNRNN",
        paper="Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, Quantized Neural Networks: Training Neural Networks with Low "
        "Precision Weights and Activations, JMLR 2018",
        arxiv="1609.07061",
        family="low_bit",
        weight_bits=4,
        activation_bits=4,
        claims=("an LSTM on 4-bit weights and activations is as good as in float; 2 and 3 bits cost, 1 bit fails",),
        properties=(
            "levels are odd-symmetric and the nearest to their value; one bit is the sign",
            "the float LSTM is torch's, states and gradients",
            "latent weights stay within [-1, 1]",
        ),
        reconstruction=True,
    ),
    MethodInfo(
        name="askewsgd_low_bit",
        title="ASkewSGD of a few bits: float weights in ever smaller intervals around the levels of a SAWB grid",
        target="qlab.methods.low_bit.askewsgd_low_bit:ASkewSGDLowBit",
        paper="Leconte, Schechtman, Moulines, ASkewSGD: An Annealed interval-constrained Optimisation method to train "
        "Quantized Neural Networks, AISTATS 2023",
        arxiv="2211.03741",
        family="low_bit",
        weight_bits=4,
        activation_bits=4,
        differentiable=False,
        properties=(
            "before the clip is frozen it is plain training in float",
            "the constrained velocity is -alpha psi / psi' times the grid's step",
            "the intervals meet at eps = gap^4 / 16",
        ),
        schedule=("frozen",),
    ),
)
