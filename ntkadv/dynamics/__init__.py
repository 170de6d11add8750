"""Closed-form training dynamics of infinitely wide networks, with and without attacks."""

from ntkadv.dynamics.closed_form import GaussianProcess, RidgeRegression, TrainingDynamics
from ntkadv.dynamics.flow import closed_form_gap, integrate_flow
from ntkadv.dynamics.linear import LinearDynamics, attack_rates
from ntkadv.dynamics.phi import PhiSolution, phi, solve, training_coefficients
from ntkadv.dynamics.regularization import Regularization

__all__ = [
    "GaussianProcess",
    "LinearDynamics",
    "PhiSolution",
    "Regularization",
    "RidgeRegression",
    "TrainingDynamics",
    "attack_rates",
    "closed_form_gap",
    "integrate_flow",
    "phi",
    "solve",
    "training_coefficients",
]
