"""The two-layer network of Li & Li's theory, for images of many classes."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ntkadv.vision.base import Pass, VisionModel
from ntkadv.vision.layers import Convolution

__all__ = ["PatchCNN"]


class PatchCNN(VisionModel):
    r"""One layer of filters on patches that do not overlap, a power of ReLU, a sum with fixed signs.

    .. math:: f_c(x) = \sum_{r} a_r \sum_j \mathrm{ReLU}(\langle w_{c, r}, x_j \rangle)^q, \qquad a_r = \pm 1

    only filters are trained; each class has filters of its own, half of them of each sign. With one score, filters in
    pairs and patch data it is `ntkadv.cgro.PatchNetwork` (Li & Li, arXiv 2306.01271).

    Args:
        num_classes: Number of outputs.
        filters: Filters of each class, an even number.
        patch: Side of a patch; pixels that are left over at the edges are left out.
        power: q, 3 as published.
        start: Standard deviation of the filters to begin with, before the factor 1/sqrt(inputs).
        channels_in: Channels of an image.
        key: A random key, for the filters.
        **options: See `VisionModel`.

    Raises:
        ValueError: a size is out of range.
    """

    convolution: Convolution
    power: int = eqx.field(static=True)

    def __init__(
        self,
        *,
        num_classes: int = 10,
        filters: int = 32,
        patch: int = 4,
        power: int = 3,
        start: float = 1.0,
        channels_in: int = 1,
        key: Key[Array, ""],
        **options: Any,
    ):
        super().__init__(num_classes=num_classes, **options)
        if filters < 2 or filters % 2 or min(patch, power, channels_in) < 1 or start <= 0:
            raise ValueError(
                f"filters must be even and at least 2, patch, power and channels_in at least 1, start positive; got "
                f"filters {filters}, patch {patch}, power {power}, channels_in {channels_in}, start {start}."
            )
        drawn = Convolution(channels_in, num_classes * filters, patch, stride=patch, padding=0, key=key)
        factor = start / 2**0.5
        self.convolution = eqx.tree_at(lambda layer: layer.weights, drawn, factor * drawn.weights)
        self.power = power

    def logits(self, x: Array, through: Pass) -> Array:
        """Compute logits of normalised images."""
        responses = jax.nn.relu(self.convolution(x)) ** self.power
        sums = jnp.sum(responses, axis=(1, 2)).reshape(len(x), self.num_classes, -1, 2)
        return jnp.sum(sums[..., 0] - sums[..., 1], axis=2)
