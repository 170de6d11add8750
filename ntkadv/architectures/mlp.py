"""Fully connected networks."""

from __future__ import annotations

from ntkadv.architectures.activations import Activation, Relu
from ntkadv.architectures.layers import Dense, Flatten, Layer, Serial
from ntkadv.architectures.network import Network

__all__ = ["mlp"]


def mlp(
    *,
    depth: int,
    num_classes: int,
    width: int = 512,
    w_std: float = 1.76,
    b_std: float = 0.18,
    activation: Activation | None = None,
    center: float = 0.5,
) -> Network:
    """Build an MLP: flatten, `depth` times (dense, activation), then a dense readout.

    Args:
        depth: number of hidden layers; 5 gives the MLP-5 of Fu & Wang (2024).
        num_classes: number of outputs.
        width: units of each hidden layer of the finite network; the kernels do not depend on it.
        w_std: standard deviation of the weights, before the factor 1/sqrt(fan_in). The defaults for this and `b_std`
            are the published ones.
        b_std: standard deviation of the biases.
        activation: nonlinearity, `Relu()` where none is given.
        center: pixel value subtracted from the input.

    Raises:
        ValueError: `depth` is below 1, or a width or standard deviation is out of range.
    """
    check_depth(depth)
    phi = Relu() if activation is None else activation
    hidden: list[Layer] = [layer for _ in range(depth) for layer in (Dense(width, w_std, b_std), phi)]
    layer = Serial(Flatten(), *hidden, Dense(num_classes, w_std, b_std))
    return Network(num_classes, layer, center=center)


def check_depth(depth: int) -> None:
    """Refuse a depth that is no positive whole number."""
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
