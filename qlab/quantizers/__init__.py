"""Quantizers: a forward map together with its backward rule, one object, for weights or activations of any torch net."""

from qlab.quantizers.apply import (
    NONLINEARITIES,
    QuantizedTensor,
    harden,
    layers,
    quantize,
    quantized_tensors,
    quantizers,
    reestimate_batch_norm,
)
from qlab.quantizers.base import PseudoDerivative, Quantizer
from qlab.quantizers.sign import Sign, hard_sign
from qlab.quantizers.surrogates import SURROGATES, Surrogate, surrogate
from qlab.quantizers.uniform import Uniform

__all__ = [
    "NONLINEARITIES",
    "SURROGATES",
    "PseudoDerivative",
    "QuantizedTensor",
    "Quantizer",
    "Sign",
    "Surrogate",
    "Uniform",
    "hard_sign",
    "harden",
    "layers",
    "quantize",
    "quantized_tensors",
    "quantizers",
    "reestimate_batch_norm",
    "surrogate",
]
