"""Residual networks with pre-activation: PreActResNet-18 and the wide ones, WRN-34-10 among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Key

from ntkadv.vision.base import Pass, VisionModel
from ntkadv.vision.layers import BatchNorm, Convolution, Linear, mean_pool

__all__ = ["PreActResNet", "preact_resnet18", "wide_resnet"]


class _Block(eqx.Module):
    """Two convolutions with pre-activation, and a shortcut.

    The hidden state offered to be perturbed is relu(norm(x)), on the branch of the convolutions only.
    """

    norms: tuple[BatchNorm, BatchNorm]
    convolutions: tuple[Convolution, Convolution]
    shortcut: Convolution | None

    def __init__(self, channels_in: int, channels: int, stride: int, *, key: Key[Array, ""]):
        keys = jax.random.split(key, 3)
        self.norms = (BatchNorm(channels_in), BatchNorm(channels))
        self.convolutions = (
            Convolution(channels_in, channels, stride=stride, key=keys[0]),
            Convolution(channels, channels, key=keys[1]),
        )
        is_same = stride == 1 and channels_in == channels
        self.shortcut = None if is_same else Convolution(channels_in, channels, 1, stride=stride, key=keys[2])

    def __call__(self, x: Array, through: Pass) -> Array:
        hidden = jax.nn.relu(self.norms[0](x, through))
        skip = x if self.shortcut is None else self.shortcut(hidden)
        y = self.convolutions[0](through.perturb(hidden))
        return self.convolutions[1](jax.nn.relu(self.norms[1](y, through))) + skip


class PreActResNet(VisionModel):
    """A convolution, stages of residual blocks, batch norm, ReLU, average, dense (He et al., ECCV 2016).

    Hidden states to be perturbed: relu(norm(input)) of every block, before its first convolution; the shortcut takes
    what is not perturbed.

    Args:
        num_classes: Number of outputs.
        stem: Channels of the first convolution.
        widths: Channels of each stage; from the second stage on, the first block halves the image.
        blocks: Blocks of each stage.
        channels_in: Channels of an image.
        key: A random key, for the weights.
        **options: See `VisionModel`.

    Raises:
        ValueError: a size is out of range.
    """

    stem: Convolution
    blocks: tuple[_Block, ...]
    norm: BatchNorm
    head: Linear

    def __init__(
        self,
        *,
        num_classes: int = 10,
        stem: int = 64,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 2, 2),
        channels_in: int = 3,
        key: Key[Array, ""],
        **options: Any,
    ):
        super().__init__(num_classes=num_classes, **options)
        if len(widths) != len(blocks) or not widths or min(stem, channels_in, *widths, *blocks) < 1:
            raise ValueError(
                f"widths and blocks must be as many as stages, and they, stem and channels_in at least 1; got widths "
                f"{tuple(widths)}, blocks {tuple(blocks)}, stem {stem}, channels_in {channels_in}."
            )
        keys = iter(jax.random.split(key, sum(blocks) + 2))
        self.stem = Convolution(channels_in, stem, key=next(keys))
        made, before = [], stem
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for number in range(count):
                made.append(_Block(before, width, 2 if stage and not number else 1, key=next(keys)))
                before = width
        self.blocks, self.norm = tuple(made), BatchNorm(before)
        self.head = Linear(before, num_classes, key=next(keys))

    def logits(self, x: Array, through: Pass) -> Array:
        """Compute logits of normalised images."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, through)
        return self.head(mean_pool(jax.nn.relu(self.norm(x, through))))


def preact_resnet18(*, num_classes: int = 10, width: int = 64, key: Key[Array, ""], **options: Any) -> PreActResNet:
    """Build PreActResNet-18, as the literature on fast adversarial training uses it; other widths shrink all stages."""
    widths = tuple(width * 2**stage for stage in range(4))
    return PreActResNet(num_classes=num_classes, stem=width, widths=widths, blocks=(2,) * 4, key=key, **options)


def wide_resnet(
    depth: int = 34, factor: int = 10, *, num_classes: int = 10, key: Key[Array, ""], **options: Any
) -> PreActResNet:
    """Build a wide residual network, WRN-34-10 by default (Zagoruyko & Komodakis, BMVC 2016).

    Raises:
        ValueError: `depth` is not 6 n + 4, or `factor` is out of range.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth must be 6 n + 4, such as 16, 28 or 34, got {depth}.")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}.")
    widths = tuple(16 * factor * 2**stage for stage in range(3))
    blocks = ((depth - 4) // 6,) * 3
    return PreActResNet(num_classes=num_classes, stem=16, widths=widths, blocks=blocks, key=key, **options)
