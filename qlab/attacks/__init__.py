"""Attacks: honest robustness of quantized nets.

    found = qlab.attacks.evaluate(run.method, data, eps=[0.05, 0.1])     # worst case over a suite, with the honesty panel
    qlab.attacks.PGD(40, scaling=qlab.attacks.HNS())(net, x, y, eps=0.1) # one attack: frozen settings, called on a batch

Attacks take any torch net in eval mode (of a method, what it deploys), any input range, l_inf, l_2 and, where they have it, l_1.
Every result is per example. Where gradients come from (`estimators`) and at which temperature (`scaling`) is an argument.

fgsm, pgd, apgd                                    gradient steps in a ball
fab, deepfool, carlini_wagner, boundary            the nearest point
square, random_search, boundary                    without gradients; on packed bits where a packed net is given
transfer, adapters                                 from a twin; attacks of other packages, corrected
estimators, stand_in, scaling, temperature         gradients to choose; temperatures, and what they wake
suite, evaluation, report, records                 the worst case over an ensemble
honesty, checks*, indicators                       seventeen necessary conditions, and a verdict in words
exact*, weights                                    the true nearest point on tiny nets; attacks on the weights' own bits
replay                                             the paths of several attackers on one plane
base, ball, losses, victim, hyperplane             what they share
"""

# Not by name on first use: a function named as its module (`honesty`) would be hidden once another file has imported that.
from __future__ import annotations

from qlab.attacks.adapters import Foreign, from_captum, from_foolbox, from_torchattacks
from qlab.attacks.apgd import APGD, APGDT
from qlab.attacks.ball import Ball
from qlab.attacks.base import Attack, Attacked
from qlab.attacks.boundary import Boundary
from qlab.attacks.carlini_wagner import CarliniWagner
from qlab.attacks.deepfool import DeepFool
from qlab.attacks.estimators import BPDA, EOT, NES, SPSA, Backprop, FiniteDifference, Smoothed
from qlab.attacks.evaluation import Evaluation
from qlab.attacks.exact import Exact, exact_adversary, overestimation
from qlab.attacks.fab import FAB, FABT
from qlab.attacks.fgsm import BIM, FGSM
from qlab.attacks.honesty import Honesty, honesty
from qlab.attacks.indicators import Indicator, indicators
from qlab.attacks.pgd import PGD
from qlab.attacks.random_search import CoordinateSearch, RandomSearch
from qlab.attacks.replay import Replay, replay
from qlab.attacks.scaling import HNS, NJS, Fixed
from qlab.attacks.square import Square
from qlab.attacks.suite import SUITES, evaluate, evaluating, examples, suite
from qlab.attacks.temperature import Temperature, temperature
from qlab.attacks.transfer import Transfer
from qlab.attacks.victim import pixels
from qlab.attacks.weights import BitSearch, WeakestBits, bit_search, weakest_bits

__all__ = [
    "APGD",
    "APGDT",
    "BIM",
    "BPDA",
    "EOT",
    "FAB",
    "FABT",
    "FGSM",
    "HNS",
    "NES",
    "NJS",
    "PGD",
    "SPSA",
    "SUITES",
    "Attack",
    "Attacked",
    "Backprop",
    "Ball",
    "BitSearch",
    "Boundary",
    "CarliniWagner",
    "CoordinateSearch",
    "DeepFool",
    "Evaluation",
    "Exact",
    "FiniteDifference",
    "Fixed",
    "Foreign",
    "Honesty",
    "Indicator",
    "RandomSearch",
    "Replay",
    "Smoothed",
    "Square",
    "Temperature",
    "Transfer",
    "WeakestBits",
    "bit_search",
    "evaluate",
    "evaluating",
    "exact_adversary",
    "examples",
    "from_captum",
    "from_foolbox",
    "from_torchattacks",
    "honesty",
    "indicators",
    "overestimation",
    "pixels",
    "replay",
    "suite",
    "temperature",
    "weakest_bits",
]
