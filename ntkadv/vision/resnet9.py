"""ResNet-9: the small residual network of fast training on CIFAR-10."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Key

from ntkadv.vision.base import Pass, VisionModel
from ntkadv.vision.layers import BatchNorm, Convolution, Linear, largest, max_pool

__all__ = ["ResNet9"]


class _Unit(eqx.Module):
    """Convolution 3 x 3, batch norm, ReLU, perhaps pooling."""

    convolution: Convolution
    norm: BatchNorm
    pool: bool = eqx.field(static=True)

    def __init__(self, channels_in: int, channels: int, *, pool: bool = False, key: Key[Array, ""]):
        self.convolution, self.norm, self.pool = Convolution(channels_in, channels, key=key), BatchNorm(channels), pool

    def __call__(self, x: Array, through: Pass) -> Array:
        y = jax.nn.relu(self.norm(self.convolution(x), through))
        return max_pool(y) if self.pool else y


class ResNet9(VisionModel):
    """Eight convolutions with batch norm, two pairs of them with a shortcut, then a dense layer (Page, 2018).

    Channels are k, 2k, 4k and 8k for a width k, 64 as published. Hidden states to be perturbed: the inputs of the two
    residual pairs, on the branch of the convolutions only.

    Args:
        num_classes: Number of outputs.
        width: Channels of the first convolution.
        channels_in: Channels of an image.
        key: A random key, for the weights.
        **options: See `VisionModel`.

    Raises:
        ValueError: a size is out of range; when called, an image is smaller than 8 x 8.
    """

    stem: tuple[_Unit, _Unit]
    first: tuple[_Unit, _Unit]
    middle: tuple[_Unit, _Unit]
    second: tuple[_Unit, _Unit]
    head: Linear

    def __init__(
        self, *, num_classes: int = 10, width: int = 64, channels_in: int = 3, key: Key[Array, ""], **options: Any
    ):
        super().__init__(num_classes=num_classes, **options)
        if min(width, channels_in) < 1:
            raise ValueError(f"width and channels_in must be at least 1, got {width} and {channels_in}.")
        k, keys = width, jax.random.split(key, 9)
        self.stem = (_Unit(channels_in, k, key=keys[0]), _Unit(k, 2 * k, pool=True, key=keys[1]))
        self.first = (_Unit(2 * k, 2 * k, key=keys[2]), _Unit(2 * k, 2 * k, key=keys[3]))
        self.middle = (_Unit(2 * k, 4 * k, pool=True, key=keys[4]), _Unit(4 * k, 8 * k, pool=True, key=keys[5]))
        self.second = (_Unit(8 * k, 8 * k, key=keys[6]), _Unit(8 * k, 8 * k, key=keys[7]))
        self.head = Linear(8 * k, num_classes, key=keys[8])

    def logits(self, x: Array, through: Pass) -> Array:
        """Compute logits of normalised images."""
        if min(x.shape[1:3]) < 8:
            raise ValueError(
                f"images must be at least 8 x 8 for ResNet9, which halves them three times, got {x.shape}."
            )
        for units, residual in ((self.stem, False), (self.first, True), (self.middle, False), (self.second, True)):
            y = through.perturb(x) if residual else x
            for unit in units:
                y = unit(y, through)
            x = x + y if residual else y
        return self.head(largest(largest(x, 2), 1)) / 8
