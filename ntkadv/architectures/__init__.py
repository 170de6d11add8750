"""Architectures: one definition gives a finite network and its infinite-width kernels.

A network is a `Serial` of layers, wrapped in `Network`; `mlp`, `cnn` and `resnet` build the usual ones, `from_stax`
takes one from neural-tangents. A new layer is a subclass of `Layer`, a new nonlinearity of `Activation`.
"""

from ntkadv.architectures.activations import Activation, Erf, Gelu, Relu
from ntkadv.architectures.base import Architecture, Kernels
from ntkadv.architectures.cnn import cnn
from ntkadv.architectures.layers import Conv, Dense, Flatten, GlobalAvgPool, Layer, Residual, Serial
from ntkadv.architectures.mlp import mlp
from ntkadv.architectures.network import Network
from ntkadv.architectures.resnet import resnet
from ntkadv.architectures.stax import StaxNetwork, from_stax, import_neural_tangents

__all__ = [
    "Activation",
    "Architecture",
    "Conv",
    "Dense",
    "Erf",
    "Flatten",
    "Gelu",
    "GlobalAvgPool",
    "Kernels",
    "Layer",
    "Network",
    "Relu",
    "Residual",
    "Serial",
    "StaxNetwork",
    "cnn",
    "from_stax",
    "import_neural_tangents",
    "mlp",
    "resnet",
]
