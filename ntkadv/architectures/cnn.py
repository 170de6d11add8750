"""Plain convolutional networks."""

from __future__ import annotations

from typing import Literal

from ntkadv.architectures.activations import Activation, Relu
from ntkadv.architectures.layers import Conv, Dense, Flatten, GlobalAvgPool, Layer, Serial
from ntkadv.architectures.mlp import check_depth
from ntkadv.architectures.network import Network

__all__ = ["Pooling", "cnn", "readout"]

Pooling = Literal["flatten", "average"]


def cnn(
    *,
    depth: int,
    num_classes: int,
    width: int = 256,
    kernel_size: int = 3,
    stride: int = 1,
    pooling: Pooling = "flatten",
    w_std: float = 1.76,
    b_std: float = 0.18,
    activation: Activation | None = None,
    center: float = 0.5,
) -> Network:
    """Build a CNN: `depth` times (convolution 'SAME', activation), flatten or average, then a dense readout.

    Args:
        depth: number of convolutions; 5 gives the CNN-5 of Fu & Wang (2024).
        num_classes: number of outputs.
        width: channels of each convolution of the finite network; the kernels do not depend on it.
        kernel_size: size of the square window, odd.
        stride: stride of every convolution.
        pooling: `"flatten"` (published) costs one covariance per pixel; `"average"`, global average pooling, costs one
            per pair of pixels, a thousand times as much on 32 x 32 images.
        w_std: standard deviation of the weights, before the factor 1/sqrt(fan_in).
        b_std: standard deviation of the biases.
        activation: nonlinearity, `Relu()` where none is given.
        center: pixel value subtracted from the input.

    Raises:
        ValueError: an argument is out of range.
    """
    check_depth(depth)
    phi = Relu() if activation is None else activation
    block = (Conv(width, kernel_size, stride, w_std, b_std), phi)
    layer = Serial(*(block * depth), *readout(pooling, num_classes, w_std, b_std))
    return Network(num_classes, layer, center=center)


def readout(pooling: Pooling, num_classes: int, w_std: float, b_std: float) -> tuple[Layer, Layer]:
    """End an image network: take the pixels away, then classify."""
    poolings: dict[str, Layer] = {"flatten": Flatten(), "average": GlobalAvgPool()}
    if pooling not in poolings:
        raise ValueError(f"pooling must be one of {sorted(poolings)}, got {pooling!r}")
    return poolings[pooling], Dense(num_classes, w_std, b_std)
