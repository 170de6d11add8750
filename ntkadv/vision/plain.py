"""Plain convolutional networks for small grey images: the LeNet family, and the small network of fast training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Key

from ntkadv.vision.base import Pass, VisionModel
from ntkadv.vision.layers import BatchNorm, Convolution, Linear, max_pool

__all__ = ["LeNet", "SmallCNN"]


class LeNet(VisionModel):
    """Convolutions 5 x 5, each followed by ReLU and pooling, then dense layers.

    `width` k gives the family of Madry et al. (ICLR 2018, arXiv 1706.06083): 2k and 4k filters, 64k hidden units; 16 is
    the network of their MNIST challenge. `filters=(6, 16), hidden=(120, 84)` are the sizes of LeNet-5. Hidden states to
    be perturbed: the inputs of all convolutions but the first, and of the dense layers.

    Args:
        num_classes: Number of outputs.
        width: Factor k.
        filters: Channels of each convolution instead of those.
        hidden: Sizes of the hidden dense layers instead of those.
        image: Shape of an image.
        key: A random key, for the weights.
        **options: See `VisionModel`.

    Raises:
        ValueError: a size is out of range, or an image too small to be pooled so often.
    """

    convolutions: tuple[Convolution, ...]
    dense: tuple[Linear, ...]

    def __init__(
        self,
        *,
        num_classes: int = 10,
        width: int = 16,
        filters: Sequence[int] | None = None,
        hidden: Sequence[int] | None = None,
        image: tuple[int, int, int] = (28, 28, 1),
        key: Key[Array, ""],
        **options: Any,
    ):
        super().__init__(num_classes=num_classes, **options)
        filters = (2 * width, 4 * width) if filters is None else tuple(filters)
        hidden = (64 * width,) if hidden is None else tuple(hidden)
        height, breadth, channels = image
        if min(filters + hidden) < 1:
            raise ValueError(f"width, filters and hidden must be at least 1, got {filters} and {hidden}.")
        left = (height >> len(filters)) * (breadth >> len(filters))
        if left < 1:
            raise ValueError(f"image must be at least {2 ** len(filters)} pixels high and wide, got {image}.")
        keys = jax.random.split(key, len(filters) + len(hidden) + 1)
        sizes = (channels, *filters)
        self.convolutions = tuple(
            Convolution(i, o, 5, bias=True, key=k) for i, o, k in zip(sizes, filters, keys, strict=False)
        )
        sizes = (left * filters[-1], *hidden, num_classes)
        self.dense = tuple(Linear(i, o, key=k) for i, o, k in zip(sizes, sizes[1:], keys[len(filters) :], strict=False))

    def logits(self, x: Array, through: Pass) -> Array:
        """Compute logits of normalised images."""
        for number, convolution in enumerate(self.convolutions):
            x = max_pool(jax.nn.relu(convolution(through.perturb(x) if number else x)))
        x = x.reshape(len(x), -1)
        for number, dense in enumerate(self.dense):
            x = dense(through.perturb(jax.nn.relu(x) if number else x))
        return x


class SmallCNN(VisionModel):
    """Two convolutions 4 x 4 of stride 2 and one hidden dense layer, as Wong et al. train it fast on MNIST (2020).

    Hidden states to be perturbed: the input of the second convolution, and those of the dense layers.

    Args:
        num_classes: Number of outputs.
        filters: Channels of the convolutions.
        hidden: Units of the dense layer.
        image: Shape of an image.
        batch_norm: Normalise after each convolution; the published network does not.
        key: A random key, for the weights.
        **options: See `VisionModel`.

    Raises:
        ValueError: a size is out of range, or an image too small.
    """

    convolutions: tuple[Convolution, Convolution]
    norms: tuple[BatchNorm, BatchNorm] | None
    dense: tuple[Linear, Linear]

    def __init__(
        self,
        *,
        num_classes: int = 10,
        filters: tuple[int, int] = (16, 32),
        hidden: int = 100,
        image: tuple[int, int, int] = (28, 28, 1),
        batch_norm: bool = False,
        key: Key[Array, ""],
        **options: Any,
    ):
        super().__init__(num_classes=num_classes, **options)
        height, breadth, channels = image
        if min(*filters, hidden) < 1:
            raise ValueError(f"filters and hidden must be at least 1, got {filters} and {hidden}.")
        left = (height // 4) * (breadth // 4)
        if left < 1:
            raise ValueError(f"image must be at least 4 pixels high and wide, got {image}.")
        keys, (first, second) = jax.random.split(key, 4), filters
        self.convolutions = (
            Convolution(channels, first, 4, stride=2, padding=1, bias=True, key=keys[0]),
            Convolution(first, second, 4, stride=2, padding=1, bias=True, key=keys[1]),
        )
        self.norms = (BatchNorm(first), BatchNorm(second)) if batch_norm else None
        self.dense = (Linear(left * second, hidden, key=keys[2]), Linear(hidden, num_classes, key=keys[3]))

    def logits(self, x: Array, through: Pass) -> Array:
        """Compute logits of normalised images."""
        for number, convolution in enumerate(self.convolutions):
            x = convolution(through.perturb(x) if number else x)
            x = jax.nn.relu(x if self.norms is None else self.norms[number](x, through))
        first, second = self.dense
        x = jax.nn.relu(first(through.perturb(x.reshape(len(x), -1))))
        return second(through.perturb(x))
