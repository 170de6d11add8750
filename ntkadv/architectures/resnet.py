"""Residual networks without normalisation."""

from __future__ import annotations

from ntkadv.architectures.activations import Activation, Relu
from ntkadv.architectures.cnn import Pooling, readout
from ntkadv.architectures.layers import Conv, Residual, Serial
from ntkadv.architectures.network import Network

__all__ = ["resnet"]


def resnet(
    *,
    depth: int = 18,
    num_classes: int,
    width: int = 64,
    pooling: Pooling = "flatten",
    w_std: float = 1.76,
    b_std: float = 0.18,
    activation: Activation | None = None,
    center: float = 0.5,
) -> Network:
    """Build a ResNet of basic blocks `x + conv(phi(conv(phi(x))))`, without normalisation, strides or bottlenecks.

    A stem convolution, (depth - 2) / 2 blocks, an activation, flatten or average, and a dense readout: the ResNets of
    Fu & Wang (2024), as far as they are known: from depth 18 to 34 the kernel's diagonal grows about as much as
    published, the constant factor differs. It grows about 3.4-fold with every block at the default weights, which
    `normalized` takes out of learning rates and times.

    Args:
        depth: layers with weights, even; 18 and 34 are the published ones.
        num_classes: number of outputs.
        width: channels of the finite network; the kernels do not depend on it.
        pooling: `"flatten"`, or `"average"` at a cost that is quadratic in the number of pixels.
        w_std: standard deviation of the weights, before the factor 1/sqrt(fan_in).
        b_std: standard deviation of the biases.
        activation: nonlinearity, `Relu()` where none is given.
        center: pixel value subtracted from the input.

    Raises:
        ValueError: `depth` is odd or below 4, or another argument is out of range.
    """
    if depth < 4 or depth % 2:
        raise ValueError(f"depth must be even and at least 4 (stem, two convolutions a block, readout), got {depth}")
    phi = Relu() if activation is None else activation
    conv = Conv(width, w_std=w_std, b_std=b_std)
    block = Residual(Serial(phi, conv, phi, conv))
    layer = Serial(conv, *[block] * (depth // 2 - 1), phi, *readout(pooling, num_classes, w_std, b_std))
    return Network(num_classes, layer, center=center)
