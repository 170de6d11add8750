"""Training of finite networks: the loop, one method a file, linearised networks, gradient flow."""

from ntkadv.training.attack_flow import AttackFlowTraining, attack_flow
from ntkadv.training.gradient_flow import gradient_flow
from ntkadv.training.linearize import Linearized, linearize
from ntkadv.training.loop import DivergenceError, TrainedNetwork, train
from ntkadv.training.method import Batch, Method, TrainState
from ntkadv.training.pgd import PGDTraining
from ntkadv.training.standard import StandardTraining

__all__ = [
    "AttackFlowTraining",
    "Batch",
    "DivergenceError",
    "Linearized",
    "Method",
    "PGDTraining",
    "StandardTraining",
    "TrainState",
    "TrainedNetwork",
    "attack_flow",
    "gradient_flow",
    "linearize",
    "train",
]
