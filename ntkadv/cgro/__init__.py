"""Clean generalization and robust overfitting, from the two views of Li & Li (ICML 2025, arXiv 2306.01271).

Training dynamics: `patches` (data with one signal patch), `network` (two-layer CNN), `adversaries`, `dynamics`
(gradient descent and what is tracked), `phases` (transition times), `sweeps` (phase diagrams), `line_attack` (the
theory's attack on any model). Representation: `representation` (the classifier of the theorem as a ReLU network),
`judgement` (its robustness, by attacks and by construction). Real images: `flatness` (of the loss landscape, on any
predictor). Figures are in `figures`.
"""

from ntkadv.cgro.adversaries import Adversary, FixedLinear, PatchPGD, SignalLine
from ntkadv.cgro.dynamics import Trajectory, train
from ntkadv.cgro.flatness import Flatness, FlatnessCurves, RankCorrelation, flatness_curves, rank_correlation
from ntkadv.cgro.judgement import CGROJudgement, judge_cgro_classifier, small_margin
from ntkadv.cgro.line_attack import LineAttack
from ntkadv.cgro.network import ACTIVATIONS, PatchNetwork
from ntkadv.cgro.patches import PatchData, PatchDistribution, PatchImages, PatchScales, linear_attack, to_images
from ntkadv.cgro.phases import PhaseTimes, phase_times
from ntkadv.cgro.representation import (
    CGROClassifier,
    build_cgro_classifier,
    class_distance,
    parameter_bound,
    parameter_counts,
)
from ntkadv.cgro.sweeps import PhaseDiagram, is_cgro, phase_diagram

__all__ = [
    "ACTIVATIONS",
    "Adversary",
    "CGROClassifier",
    "CGROJudgement",
    "FixedLinear",
    "Flatness",
    "FlatnessCurves",
    "LineAttack",
    "PatchData",
    "PatchDistribution",
    "PatchImages",
    "PatchNetwork",
    "PatchPGD",
    "PatchScales",
    "PhaseDiagram",
    "PhaseTimes",
    "RankCorrelation",
    "SignalLine",
    "Trajectory",
    "build_cgro_classifier",
    "class_distance",
    "flatness_curves",
    "is_cgro",
    "judge_cgro_classifier",
    "linear_attack",
    "parameter_bound",
    "parameter_counts",
    "phase_diagram",
    "phase_times",
    "rank_correlation",
    "small_margin",
    "to_images",
    "train",
]
