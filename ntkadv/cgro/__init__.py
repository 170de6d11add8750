"""Clean generalization and robust overfitting, from the two views of Li & Li (ICML 2025, arXiv 2306.01271).

Training dynamics: `patches` (data with one signal patch), `network` (two-layer CNN), `adversaries`, `dynamics`
(gradient descent and what is tracked), `phases` (transition times), `sweeps` (phase diagrams), `line_attack` (the
theory's attack on any model).
"""

from ntkadv.cgro.adversaries import Adversary, FixedLinear, PatchPGD, SignalLine
from ntkadv.cgro.dynamics import Trajectory, train
from ntkadv.cgro.line_attack import LineAttack
from ntkadv.cgro.network import ACTIVATIONS, PatchNetwork
from ntkadv.cgro.patches import PatchData, PatchDistribution, PatchImages, PatchScales, linear_attack, to_images
from ntkadv.cgro.phases import PhaseTimes, phase_times
from ntkadv.cgro.sweeps import PhaseDiagram, is_cgro, phase_diagram

__all__ = [
    "ACTIVATIONS",
    "Adversary",
    "FixedLinear",
    "LineAttack",
    "PatchData",
    "PatchDistribution",
    "PatchImages",
    "PatchNetwork",
    "PatchPGD",
    "PatchScales",
    "PhaseDiagram",
    "PhaseTimes",
    "SignalLine",
    "Trajectory",
    "is_cgro",
    "linear_attack",
    "phase_diagram",
    "phase_times",
    "to_images",
    "train",
]
