"""An architecture built from the layers of this package."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ntkadv.architectures.activations import Activation, Relu
from ntkadv.architectures.base import Architecture, Kernels
from ntkadv.architectures.covariance import Covariance, input_covariance
from ntkadv.architectures.layers import Conv, Layer, required_layout

__all__ = ["Network"]


@dataclasses.dataclass(frozen=True)
class Network(Architecture):
    """One definition, `layer`, of a finite network and of its infinite-width limit.

    Attributes:
        layer: the whole network, usually a `Serial`, ending in `num_classes` outputs.
    """

    layer: Layer

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape of the outputs for one input of this shape, `(num_classes,)`.

        Raises:
            ValueError: some layer cannot take what it is given, or the outputs are others.
        """
        outputs = self.layer.output_shape(tuple(input_shape))
        if outputs != (self.num_classes,):
            raise ValueError(
                f"the network's output has the shape {outputs} for inputs of shape {input_shape}, but num_classes is "
                f"{self.num_classes}: end it in Flatten or GlobalAvgPool and Dense({self.num_classes})"
            )
        return outputs

    def _init(self, key: Array, input_shape: tuple[int, ...]) -> Any:
        self.output_shape(input_shape)
        return self.layer.init(key, input_shape)

    def _apply(self, params: Any, x: Array) -> Array:
        return self.layer.apply(params, x)

    def _kernels(self, x1: Array, x2: Array) -> Kernels:
        self.output_shape(x1.shape[1:])
        layout = required_layout(self.layer, x1.shape[1:])
        return _read(self.layer.propagate(input_covariance(x1, x2, layout)))

    def _diagonal(self, x: Array) -> Kernels:
        self.output_shape(x.shape[1:])
        layout = required_layout(self.layer, x.shape[1:])
        return _read(self.layer.propagate(input_covariance(x, None, layout)))

    def ark_is_constant(self, input_shape: tuple[int, ...]) -> bool:
        """Tell whether every nonlinearity is a ReLU and no two different pixels are mixed by pooling.

        Each ReLU then halves the sum over coordinates of the derivatives' variances, whatever the input, and affine
        layers scale and average them.
        """
        nonlinear = [leaf for leaf in self.layer.leaves() if isinstance(leaf, Activation)]
        mixes_pixels = required_layout(self.layer, tuple(input_shape)) == "all pixels"
        return all(isinstance(leaf, Relu) for leaf in nonlinear) and not mixes_pixels

    def pair_bytes(self, input_shape: tuple[int, ...]) -> int:
        """Bound the float32 arrays alive at once, per pair, when the kernel and its input gradient are computed.

        Each has one entry per pixel (or pair of pixels, where pooling needs them): what the reverse mode keeps for a
        nonlinearity, the shifted copies of a window over pairs of pixels, and three for the layer under work. The
        images themselves are not counted. The coefficients are measured, on programs that JAX 0.10 and 0.12 compile for
        CPUs.
        """
        layout = required_layout(self.layer, tuple(input_shape))

        def entries(shape: tuple[int, ...]) -> int:
            return 1 if layout == "vector" else int(np.prod(shape[:-1])) ** (2 if layout == "all pixels" else 1)

        def arrays(leaf: Layer) -> int:
            if isinstance(leaf, Activation):
                return leaf.residuals
            return 9 if layout == "all pixels" and isinstance(leaf, Conv) and leaf.kernel_size > 1 else 0

        leaves = list(self.layer.leaves_at(tuple(input_shape)))
        kept = sum(arrays(leaf) * entries(shape) for leaf, shape in leaves)
        return 4 * (kept + 3 * max(entries(shape) for _, shape in leaves))


def _read(covariance: Covariance) -> Kernels:
    return Kernels(covariance.nngp, jnp.zeros_like(covariance.nngp) if covariance.ntk is None else covariance.ntk)
