"""Training of finite networks: the loop, one method a file, linearised networks, gradient flow."""

from ntkadv.training.apart import APARTState, APARTTraining
from ntkadv.training.attack_flow import AttackFlowTraining, attack_flow
from ntkadv.training.augmentation import Augmentation, CropFlip
from ntkadv.training.cure import CUREState, CURETraining, robust_gradient_prominence
from ntkadv.training.fgsm import FGSMTraining, catastrophic_overfitting
from ntkadv.training.grad_align import GradAlignTraining
from ntkadv.training.gradient_flow import gradient_flow
from ntkadv.training.linearize import Linearized, linearize
from ntkadv.training.loop import DivergenceError, TrainedNetwork, train
from ntkadv.training.method import Batch, Method, Passes, Problem, TrainState
from ntkadv.training.monitor import GeneratorStrength, accuracy, generator_strength, robust_accuracy
from ntkadv.training.network import Forward, trainable
from ntkadv.training.pgd import PGDTraining
from ntkadv.training.schedules import piecewise, sgd, triangular
from ntkadv.training.standard import StandardTraining
from ntkadv.training.trades import TRADESTraining

__all__ = [
    "APARTState",
    "APARTTraining",
    "AttackFlowTraining",
    "Augmentation",
    "Batch",
    "CUREState",
    "CURETraining",
    "CropFlip",
    "DivergenceError",
    "FGSMTraining",
    "Forward",
    "GeneratorStrength",
    "GradAlignTraining",
    "Linearized",
    "Method",
    "PGDTraining",
    "Passes",
    "Problem",
    "StandardTraining",
    "TRADESTraining",
    "TrainState",
    "TrainedNetwork",
    "accuracy",
    "attack_flow",
    "catastrophic_overfitting",
    "generator_strength",
    "gradient_flow",
    "linearize",
    "piecewise",
    "robust_accuracy",
    "robust_gradient_prominence",
    "sgd",
    "train",
    "trainable",
    "triangular",
]
