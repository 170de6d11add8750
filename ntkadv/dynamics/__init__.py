"""Closed-form training dynamics of infinitely wide networks, with and without attacks."""

from ntkadv.dynamics.closed_form import GaussianProcess, RidgeRegression, TrainingDynamics
from ntkadv.dynamics.phi import PhiSolution, phi, solve, training_coefficients
from ntkadv.dynamics.regularization import amplification, regularization

__all__ = [
    "GaussianProcess",
    "PhiSolution",
    "RidgeRegression",
    "TrainingDynamics",
    "amplification",
    "phi",
    "regularization",
    "solve",
    "training_coefficients",
]
