"""Layers on batches of images with channels last, the layout that XLA computes fast everywhere.

Equinox's own take one image with channels first and keep running averages in an object of their own; on a CPU that
layout costs several times as much, and averages that are plain leaves of the network go into a checkpoint as they are.
Weights are drawn as PyTorch's networks of the literature draw theirs.
"""

from __future__ import annotations

from functools import reduce

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from ntkadv.vision.base import Pass, Statistics

__all__ = ["BatchNorm", "Convolution", "Linear", "largest", "max_pool", "mean_pool"]


class Convolution(eqx.Module):
    """A convolution; weights N(0, 2 / fan) (He et al., ICCV 2015), no bias unless asked for.

    Args:
        channels_in, channels: Channels that come in and that go out.
        size: Side of the square window.
        stride: Step between windows.
        padding: Zeros at each side; those that keep the size of the image by default.
        bias: Whether a bias is added; zero at first.
        key: A random key.
    """

    weights: Float[Array, "size size i o"]
    bias: Float[Array, " o"] | None
    stride: int = eqx.field(static=True)
    padding: int = eqx.field(static=True)

    def __init__(
        self,
        channels_in: int,
        channels: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = False,
        key: Key[Array, ""],
    ):
        scale = (2 / (size * size * channels_in)) ** 0.5
        self.weights = scale * jax.random.normal(key, (size, size, channels_in, channels), jnp.float32)
        self.bias = jnp.zeros(channels, jnp.float32) if bias else None
        self.stride = stride
        self.padding = size // 2 if padding is None else padding

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Convolve."""
        pads = ((self.padding, self.padding),) * 2
        y = lax.conv_general_dilated(
            x, self.weights.astype(x.dtype), (self.stride,) * 2, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if self.bias is None else y + self.bias.astype(x.dtype)


class Linear(eqx.Module):
    """An affine map; weights and biases uniform within 1 / sqrt(fan-in), as PyTorch's."""

    weights: Float[Array, "i o"]
    bias: Float[Array, " o"]

    def __init__(self, features_in: int, features: int, *, key: Key[Array, ""]):
        weights, bias = jax.random.split(key)
        bound = features_in**-0.5
        self.weights = jax.random.uniform(weights, (features_in, features), jnp.float32, -bound, bound)
        self.bias = jax.random.uniform(bias, (features,), jnp.float32, -bound, bound)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        """Map."""
        return x @ self.weights.astype(x.dtype) + self.bias.astype(x.dtype)


class BatchNorm(eqx.Module):
    """Batch normalisation over images and pixels (Ioffe & Szegedy, 2015), with PyTorch's conventions.

    In training the batch's own mean and biased variance are taken; running averages move by `momentum` towards them,
    the variance unbiased.
    """

    scale: Float[Array, " c"]
    offset: Float[Array, " c"]
    running: Statistics
    momentum: float = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(self, channels: int, *, momentum: float = 0.1, epsilon: float = 1e-5):
        self.scale, self.offset = jnp.ones(channels, jnp.float32), jnp.zeros(channels, jnp.float32)
        self.running = Statistics(jnp.zeros(channels, jnp.float32), jnp.ones(channels, jnp.float32))
        self.momentum, self.epsilon = momentum, epsilon

    def __call__(self, x: Float[Array, "b h w c"], through: Pass) -> Float[Array, "b h w c"]:
        """Normalise."""
        dtype = x.dtype if jnp.finfo(x.dtype).bits > 32 else jnp.float32
        scale, offset = self.scale.astype(dtype), self.offset.astype(dtype)
        mean, variance = self.running.mean.astype(dtype), self.running.variance.astype(dtype)
        if through.training:
            y, count = x.astype(dtype), x.size // x.shape[-1]
            batch_mean = jnp.mean(y, axis=(0, 1, 2))
            batch_variance = jnp.mean(jnp.square(y - batch_mean), axis=(0, 1, 2))
            unbiased = batch_variance * (count / max(count - 1, 1))
            through.move(self.running, Statistics(self._towards(mean, batch_mean), self._towards(variance, unbiased)))
            mean, variance = batch_mean, batch_variance
        factor = scale * lax.rsqrt(variance + self.epsilon)
        return x * factor.astype(x.dtype) + (offset - mean * factor).astype(x.dtype)

    def _towards(self, old: Array, new: Array) -> Array:
        return (1 - self.momentum) * old + self.momentum * new


def max_pool(x: Float[Array, "b h w c"], size: int = 2) -> Float[Array, "b h2 w2 c"]:
    """Take the largest pixel of each square; what is left over at the edges is left out.

    Where several are largest, the first has the gradient. XLA's own pooling is several times as slow backwards on a
    CPU.
    """
    b, h, w, c = x.shape
    rows, columns = h // size, w // size
    cut = x[:, : rows * size, : columns * size]
    return largest(largest(cut.reshape(b, rows, size, columns, size, c), 4), 2)


def largest(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Take the largest number along a short axis; NaN if there is one.

    The gradient of `jnp.max` divides by the number of entries that equal the result. Where the compiler computes them
    twice, with other roundings, none does, and it is NaN.
    """

    def larger(a: Array, b: Array) -> Array:
        return jnp.where((a >= b) | jnp.isnan(a), a, b)

    return reduce(larger, (lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])))


def mean_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Average over pixels."""
    return jnp.mean(x, axis=(1, 2))
