"""The algebra of layers: each is a piece of a finite network and a map of covariances.

Weights are N(0, 1), scaled by `w_std / sqrt(fan_in)`; biases N(0, 1), scaled by `b_std` (NTK parametrisation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ntkadv.architectures.covariance import Covariance, Layout

__all__ = ["Conv", "Dense", "Flatten", "GlobalAvgPool", "Layer", "Residual", "Serial"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A piece of a network. A new kind of layer is a subclass with these four methods."""

    def init(self, key: Array, shape: tuple[int, ...]) -> Any:
        """Draw the parameters for inputs of this shape (without the batch)."""
        raise NotImplementedError

    def apply(self, params: Any, x: Array) -> Array:
        """Evaluate the layer on a batch."""
        raise NotImplementedError

    def propagate(self, covariance: Covariance) -> Covariance:
        """Map the covariances of the layer's input to those of its output, at infinite width."""
        raise NotImplementedError

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape (without the batch) of the output for an input of this shape."""
        return shape

    def leaves(self) -> Iterator[Layer]:
        """Walk through the layers that this one is made of."""
        yield self

    def leaves_at(self, shape: tuple[int, ...]) -> Iterator[tuple[Layer, tuple[int, ...]]]:
        """Walk through them with the shape of the input of each, for an input of this shape to the whole."""
        yield self, shape


@dataclasses.dataclass(frozen=True)
class Dense(Layer):
    """An affine map of the features: `y = w_std / sqrt(fan_in) x W + b_std b` (on images: of each pixel's channels)."""

    width: int
    w_std: float = 1.0
    b_std: float = 0.0

    def __post_init__(self) -> None:
        _check_widths(self.width, self.w_std, self.b_std)

    def init(self, key: Array, shape: tuple[int, ...]) -> Any:
        """Draw `w` (fan_in, width) and `b` (width,)."""
        return _normal_parameters(key, (shape[-1], self.width))

    def apply(self, params: Any, x: Array) -> Array:
        """Evaluate the affine map."""
        y = jnp.matmul(x, params["w"], precision="highest")
        scale = jnp.asarray(self.w_std / np.sqrt(x.shape[-1]), y.dtype)
        return y * scale + jnp.asarray(self.b_std, y.dtype) * params["b"]

    def propagate(self, covariance: Covariance) -> Covariance:
        """K -> w_std^2 K + b_std^2."""
        return covariance.affine(lambda array: array, self.w_std**2, self.b_std**2)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Replace the number of features."""
        return (*shape[:-1], self.width)


@dataclasses.dataclass(frozen=True)
class Conv(Layer):
    """A square 'SAME' convolution with zero padding, of odd size and any stride; images are NHWC."""

    channels: int
    kernel_size: int = 3
    stride: int = 1
    w_std: float = 1.0
    b_std: float = 0.0

    def __post_init__(self) -> None:
        _check_widths(self.channels, self.w_std, self.b_std)
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {self.kernel_size}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")

    def init(self, key: Array, shape: tuple[int, ...]) -> Any:
        """Draw `w` (size, size, channels_in, channels) and `b` (channels,)."""
        return _normal_parameters(key, (self.kernel_size, self.kernel_size, shape[-1], self.channels))

    def apply(self, params: Any, x: Array) -> Array:
        """Evaluate the convolution."""
        # The weights are scaled, not the images: there are fewer of them, in both directions.
        scale = self.w_std / np.sqrt(self.kernel_size**2 * x.shape[-1])
        y = lax.conv_general_dilated(
            x,
            jnp.asarray(scale, x.dtype) * params["w"],
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        return y + jnp.asarray(self.b_std, y.dtype) * params["b"]

    def propagate(self, covariance: Covariance) -> Covariance:
        """Average the covariances over the window, which at the border holds zeros, then w_std^2 K + b_std^2."""
        mean = self._mean_pixels if covariance.layout == "pixels" else self._mean_all_pixels
        return covariance.affine(mean, self.w_std**2, self.b_std**2)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Divide height and width by the stride, rounded up."""
        _check_image(self, shape)
        height, width, _ = shape
        return (-(-height // self.stride), -(-width // self.stride), self.channels)

    def _mean_pixels(self, array: Array) -> Array:
        # One axis after the other, by reduce_window: XLA:CPU recomputes whatever feeds a sum of shifted slices.
        for axis in (0, 1):
            window, strides = [1] * array.ndim, [1] * array.ndim
            window[axis], strides[axis] = self.kernel_size, self.stride
            zero = np.zeros((), array.dtype)
            array = lax.reduce_window(array, zero, lax.add, tuple(window), tuple(strides), "SAME")
        return array * jnp.asarray(1 / self.kernel_size**2, array.dtype)

    def _mean_all_pixels(self, array: Array) -> Array:
        """Shift both pixels of a pair together: the window runs along the diagonal of (h, h'), then of (w, w')."""
        for axis in (0, 2):
            size = array.shape[axis]
            out = -(-size // self.stride)
            pad = max((out - 1) * self.stride + self.kernel_size - size, 0)
            padding = [(0, 0)] * array.ndim
            padding[axis] = padding[axis + 1] = (pad // 2, pad - pad // 2)
            padded = lax.optimization_barrier(jnp.pad(array, padding))
            array = _diagonal_slice(padded, axis, 0, out, self.stride)
            for offset in range(1, self.kernel_size):
                array = array + _diagonal_slice(padded, axis, offset, out, self.stride)
        return array * jnp.asarray(1 / self.kernel_size**2, array.dtype)


def _diagonal_slice(array: Array, axis: int, start: int, length: int, stride: int) -> Array:
    stop = start + (length - 1) * stride + 1
    array = lax.slice_in_dim(array, start, stop, stride, axis)
    return lax.slice_in_dim(array, start, stop, stride, axis + 1)


@dataclasses.dataclass(frozen=True)
class Flatten(Layer):
    """Lay all pixels and channels out as one vector."""

    def init(self, key: Array, shape: tuple[int, ...]) -> Any:
        """Flatten has no parameters."""
        return ()

    def apply(self, params: Any, x: Array) -> Array:
        """Reshape to (batch, features)."""
        return x.reshape(x.shape[0], -1)

    def propagate(self, covariance: Covariance) -> Covariance:
        """Average over the pixels, each with itself."""
        if covariance.layout == "vector":
            return covariance
        if covariance.layout == "pixels":
            return covariance.reduce(lambda array: jnp.mean(array, axis=(0, 1)))
        return covariance.reduce(_mean_same_pixel)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """One axis of all features."""
        return (int(np.prod(shape)),)


def _mean_same_pixel(array: Array) -> Array:
    h, w = jnp.arange(array.shape[0])[:, None], jnp.arange(array.shape[2])[None, :]
    return jnp.mean(array[h, h, w, w], axis=(0, 1))


@dataclasses.dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """Average each channel over all pixels."""

    def init(self, key: Array, shape: tuple[int, ...]) -> Any:
        """Pooling has no parameters."""
        return ()

    def apply(self, params: Any, x: Array) -> Array:
        """Average over height and width."""
        return jnp.mean(x, axis=(1, 2))

    def propagate(self, covariance: Covariance) -> Covariance:
        """Average over all pairs of pixels."""
        return covariance.reduce(lambda array: jnp.mean(array, axis=(0, 1, 2, 3)))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Only the channels remain."""
        _check_image(self, shape)
        return shape[-1:]


@dataclasses.dataclass(frozen=True, init=False)
class Serial(Layer):
    """Layers one after the other."""

    layers: tuple[Layer, ...]

    def __init__(self, *layers: Layer) -> None:
        if not layers or not all(isinstance(layer, Layer) for layer in layers):
            raise TypeError(f"Serial takes one layer or more, got {layers!r}")
        object.__setattr__(self, "layers", layers)

    def init(self, key: Array, shape: tuple[int, ...]) -> Any:
        """Draw the parameters of all layers, as a tuple."""
        params = []
        for layer, layer_key in zip(self.layers, jax.random.split(key, len(self.layers)), strict=True):
            params.append(layer.init(layer_key, shape))
            shape = layer.output_shape(shape)
        return tuple(params)

    def apply(self, params: Any, x: Array) -> Array:
        """Apply all layers in turn."""
        for layer, layer_params in zip(self.layers, params, strict=True):
            x = layer.apply(layer_params, x)
        return x

    def propagate(self, covariance: Covariance) -> Covariance:
        """Propagate through all layers in turn."""
        for layer in self.layers:
            covariance = layer.propagate(covariance)
        return covariance

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Follow the shape through all layers."""
        for layer in self.layers:
            shape = layer.output_shape(shape)
        return shape

    def leaves(self) -> Iterator[Layer]:
        """Walk through all layers in order."""
        for layer in self.layers:
            yield from layer.leaves()

    def leaves_at(self, shape: tuple[int, ...]) -> Iterator[tuple[Layer, tuple[int, ...]]]:
        """Walk through all layers in order, with the shapes of their inputs."""
        for layer in self.layers:
            yield from layer.leaves_at(shape)
            shape = layer.output_shape(shape)


@dataclasses.dataclass(frozen=True)
class Residual(Layer):
    """A branch around which the input is added: `y = shortcut(x) + branch(x)`; without a shortcut, `x + branch(x)`.

    Raises:
        ValueError: the branch does not end in weights of its own. At infinite width the sum of two paths has the sum
            of their covariances only when they are uncorrelated, which the branch's last, independent weights provide.
    """

    branch: Layer
    shortcut: Layer | None = None

    def __post_init__(self) -> None:
        last = list(self.branch.leaves())[-1]
        if not isinstance(last, Dense | Conv):
            raise ValueError(f"the branch of Residual must end in Dense or Conv, but it ends in {last!r}")

    def init(self, key: Array, shape: tuple[int, ...]) -> Any:
        """Draw the parameters of the branch and of the shortcut."""
        branch_key, shortcut_key = jax.random.split(key)
        shortcut = () if self.shortcut is None else self.shortcut.init(shortcut_key, shape)
        return {"branch": self.branch.init(branch_key, shape), "shortcut": shortcut}

    def apply(self, params: Any, x: Array) -> Array:
        """Add both paths."""
        straight = x if self.shortcut is None else self.shortcut.apply(params["shortcut"], x)
        return straight + self.branch.apply(params["branch"], x)

    def propagate(self, covariance: Covariance) -> Covariance:
        """Add the covariances of both paths."""
        straight = covariance if self.shortcut is None else self.shortcut.propagate(covariance)
        return straight + self.branch.propagate(covariance)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Follow the shape through both paths, which must come to the same."""
        target = self.branch.output_shape(shape)
        source = shape if self.shortcut is None else self.shortcut.output_shape(shape)
        if target != source:
            raise ValueError(
                f"the branch of Residual gives {target} and the shortcut {source}: give the branch as many channels "
                "and the same stride, or the shortcut a convolution of its own"
            )
        return source

    def leaves(self) -> Iterator[Layer]:
        """Walk through the shortcut, then the branch."""
        if self.shortcut is not None:
            yield from self.shortcut.leaves()
        yield from self.branch.leaves()

    def leaves_at(self, shape: tuple[int, ...]) -> Iterator[tuple[Layer, tuple[int, ...]]]:
        """Walk through the shortcut, then the branch, with the shapes of their inputs."""
        if self.shortcut is not None:
            yield from self.shortcut.leaves_at(shape)
        yield from self.branch.leaves_at(shape)


def required_layout(layer: Layer, input_shape: tuple[int, ...]) -> Layout:
    """Tell which covariances between pixels must be kept from the input on."""
    leaves = list(layer.leaves())
    if len(input_shape) == 1 or isinstance(leaves[0], Flatten):
        return "vector"
    return "all pixels" if any(isinstance(leaf, GlobalAvgPool) for leaf in leaves) else "pixels"


def _check_widths(width: int, w_std: float, b_std: float) -> None:
    if width < 1:
        raise ValueError(f"a layer needs at least one feature, got {width}")
    if not (np.isfinite(w_std) and w_std > 0):
        raise ValueError(f"w_std must be positive and finite, got {w_std}")
    if not (np.isfinite(b_std) and b_std >= 0):
        raise ValueError(f"b_std must be zero or more and finite, got {b_std}")


def _check_image(layer: Layer, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise ValueError(f"{layer!r} needs images of shape (height, width, channels), but its input has {shape}")


def _normal_parameters(key: Array, shape: tuple[int, ...]) -> dict[str, Array]:
    w_key, b_key = jax.random.split(key)
    return {
        "w": jax.random.normal(w_key, shape, jnp.float32),
        "b": jax.random.normal(b_key, shape[-1:], jnp.float32),
    }
