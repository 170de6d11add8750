"""Networks as practitioners train them, Equinox modules with batch norm; finite width only."""

from ntkadv.vision.base import Pass, Statistics, VisionModel, combined
from ntkadv.vision.patch_cnn import PatchCNN
from ntkadv.vision.plain import LeNet, SmallCNN
from ntkadv.vision.preact_resnet import PreActResNet, preact_resnet18, wide_resnet
from ntkadv.vision.resnet9 import ResNet9

__all__ = [
    "LeNet",
    "Pass",
    "PatchCNN",
    "PreActResNet",
    "ResNet9",
    "SmallCNN",
    "Statistics",
    "VisionModel",
    "combined",
    "preact_resnet18",
    "wide_resnet",
]
