"""Diagnosis: see why a quantized net trains, stalls or lies about its gradients.

    qlab.diagnose.doctor(net, x, y)                      # ranked findings, with evidence and a fix to try
    qlab.diagnose.mismatch(net, x, y).figure()           # the surrogate's gradient against the truth, per layer

Functions of a net (a method of the lab or any torch module) and a batch; results are frozen dataclasses with `.frame()`,
`.figure()` and `.summary()`. Every result says which function it is of: deployed, latent, surrogate or smoothed (`functions`).

gradients, flip_oracle, smoothing      the gradient that trains the net against three truths
honesty, population                    is it the gradient of anything; a net for which all is known in closed form
signal, wake, jacobian, meanfield      what vanishes on the way, and what theory predicts
landscape, exact_line, quadtree        the loss on lines and planes: sampled, exact, refined under a budget
directions, trajectory                 the axes of those
curvature, hessian, lanczos, discrete  Hessians where there is one, smoothed and discrete ones where there is none
history, flips, which_flip, course     the bits of a whole training, and which flip changed a prediction
attribution, attribution_*, guard      captum's maps, with what each of them explains
doctor, symptoms, foreign              findings by rank; piecewise constant modules of any origin
base, functions, objective             what they share
"""

# Not by name on first use, as other rooms have it: a function named as its module would be hidden by the module once another
# file has imported that.
from __future__ import annotations

from qlab.diagnose.attribution import attribute, attributing, patches
from qlab.diagnose.attribution_maps import AttributionMap, Attributions
from qlab.diagnose.attribution_twins import Twins, twinning, twins
from qlab.diagnose.base import Result
from qlab.diagnose.course import Course, course
from qlab.diagnose.curvature import Curvature, curvature, curving
from qlab.diagnose.directions import between, gradient_direction, principal_axes, random_direction
from qlab.diagnose.discrete import FlipPairs, Stein, flip_pairs, stein
from qlab.diagnose.doctor import Diagnosis, Finding, doctor
from qlab.diagnose.exact_line import ExactLine, exact_line
from qlab.diagnose.flip_oracle import FlipOracle, binary_layers, flip_oracle, flipping
from qlab.diagnose.flips import Flips, flips, scrub
from qlab.diagnose.foreign import Flat, piecewise_constant
from qlab.diagnose.functions import FUNCTIONS, variant
from qlab.diagnose.gradients import Mismatch, believing, mismatch, mismatching
from qlab.diagnose.history import History
from qlab.diagnose.honesty import Circulation, circulating, circulation
from qlab.diagnose.jacobian import Jacobian, jacobian
from qlab.diagnose.landscape import Landscape, landscape, load_landscape
from qlab.diagnose.meanfield import MeanField, meanfield
from qlab.diagnose.meanfield_chain import predicted_gradients
from qlab.diagnose.population import Population
from qlab.diagnose.quadtree import landscaping
from qlab.diagnose.signal import Signal, signal
from qlab.diagnose.smoothing import Smoothed, smoothed_gradient
from qlab.diagnose.trajectory import Trajectory, trajectory
from qlab.diagnose.wake import Wake, wake
from qlab.diagnose.which_flip import WhichFlip, which_flip

__all__ = [
    "FUNCTIONS",
    "AttributionMap",
    "Attributions",
    "Circulation",
    "Course",
    "Curvature",
    "Diagnosis",
    "ExactLine",
    "Finding",
    "Flat",
    "FlipOracle",
    "FlipPairs",
    "Flips",
    "History",
    "Jacobian",
    "Landscape",
    "MeanField",
    "Mismatch",
    "Population",
    "Result",
    "Signal",
    "Smoothed",
    "Stein",
    "Trajectory",
    "Twins",
    "Wake",
    "WhichFlip",
    "attribute",
    "attributing",
    "believing",
    "between",
    "binary_layers",
    "circulating",
    "circulation",
    "course",
    "curvature",
    "curving",
    "doctor",
    "exact_line",
    "flip_oracle",
    "flip_pairs",
    "flipping",
    "flips",
    "gradient_direction",
    "jacobian",
    "landscape",
    "landscaping",
    "load_landscape",
    "meanfield",
    "mismatch",
    "mismatching",
    "patches",
    "piecewise_constant",
    "predicted_gradients",
    "principal_axes",
    "random_direction",
    "scrub",
    "signal",
    "smoothed_gradient",
    "stein",
    "trajectory",
    "twinning",
    "twins",
    "variant",
    "wake",
    "which_flip",
]
