"""The state that the layers of an infinitely wide network hand on: covariances of features over pairs of inputs.

Axes over pairs of inputs come LAST, axes over pixels first. Then sums over pixel windows run over long contiguous
stretches of pairs, which on CPUs is about twice as fast as the other way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

__all__ = ["Covariance", "Layout", "input_covariance"]

Layout = Literal["vector", "pixels", "all pixels"]
"""Which covariances between pixels are kept.

- `"vector"`: there are no pixels (a vector, or an image that the first layer flattens).
- `"pixels"`: between the same pixel of both images, axes `(h, w)`: all that flattening needs.
- `"all pixels"`: between any two pixels of both images, axes `(h, h', w, w')`: what pooling needs.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Covariance:
    """Covariances of one layer's features, per feature, between two batches (or of a batch with itself, pairwise).

    Attributes:
        nngp: covariance at initialisation, `(*space, n1, n2)`, or `(*space, n)` when paired.
        ntk: the NTK up to this layer, of the same shape; None where it is zero, before the first weights. (An array of
            zeros would do, but XLA spends minutes folding window sums over constants.)
        first: covariance of each input of the first batch with itself, `(*space, n1)`; None when paired.
        second: the same for the second batch, `(*space, n2)`; None when paired.
        layout: the meaning of the axes `space`.
    """

    nngp: Array
    ntk: Array | None
    first: Array | None
    second: Array | None
    layout: Layout = dataclasses.field(metadata={"static": True})

    def affine(self, mean: Callable[[Array], Array], w_variance: float, b_variance: float) -> Covariance:
        """Pass through an affine layer with independent weights: K -> w mean(K) + b, NTK -> the new K + w mean(NTK)."""

        def weights(array: Array) -> Array:
            return jnp.asarray(w_variance, array.dtype) * mean(array)

        def affine(array: Array) -> Array:
            return weights(array) + jnp.asarray(b_variance, array.dtype)

        nngp = affine(self.nngp)
        return Covariance(
            nngp=nngp,
            ntk=nngp if self.ntk is None else nngp + weights(self.ntk),
            first=None if self.first is None else affine(self.first),
            second=None if self.second is None else affine(self.second),
            layout=self.layout,
        )

    def activate(
        self, moments: Callable[[Array, Array, Array], tuple[Array, Array]], second_moment: Callable[[Array], Array]
    ) -> Covariance:
        """Pass through a nonlinearity phi: K -> E[phi(u) phi(v)], NTK -> NTK * E[phi'(u) phi'(v)].

        `moments(k, v1, v2)` gives both expectations for (u, v) ~ N(0, [[v1, k], [k, v2]]); `second_moment(v)` gives
        E[phi(u)^2] for u ~ N(0, v).
        """
        nngp, derivative = moments(self.nngp, *self._variances())

        def own(array: Array | None) -> Array | None:
            if array is None or self.layout != "all pixels":
                return None if array is None else second_moment(array)
            return Covariance(array, None, None, None, self.layout).activate(moments, second_moment).nngp

        return Covariance(
            nngp=nngp,
            ntk=None if self.ntk is None else self.ntk * derivative,
            first=own(self.first),
            second=own(self.second),
            layout=self.layout,
        )

    def reduce(self, average: Callable[[Array], Array]) -> Covariance:
        """Average the pixels away: what remains is a covariance of vectors."""

        def maybe(array: Array | None) -> Array | None:
            return None if array is None else average(array)

        return Covariance(average(self.nngp), maybe(self.ntk), maybe(self.first), maybe(self.second), "vector")

    def __add__(self, other: Covariance) -> Covariance:
        """Add the features of two paths whose last weights are independent."""

        def add(one: Array | None, two: Array | None) -> Array | None:
            return two if one is None else one if two is None else one + two

        return Covariance(
            nngp=self.nngp + other.nngp,
            ntk=add(self.ntk, other.ntk),
            first=add(self.first, other.first),
            second=add(self.second, other.second),
            layout=self.layout,
        )

    def _variances(self) -> tuple[Array, Array]:
        if self.first is None or self.second is None:
            v1 = v2 = _same_pixel(self.nngp) if self.layout == "all pixels" else self.nngp
        else:
            v1, v2 = self.first, self.second
            if self.layout == "all pixels":
                v1, v2 = _same_pixel(v1), _same_pixel(v2)
            v1, v2 = v1[..., :, None], v2[..., None, :]
        if self.layout == "all pixels":
            v1, v2 = v1[:, None, :, None], v2[None, :, None, :]
        return v1, v2


def _same_pixel(array: Array) -> Array:
    """Take the entries (h, h, w, w, ...) of an array (h, h', w, w', ...)."""
    height, width = array.shape[0], array.shape[2]
    h, w = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return array[h, h, w, w]


def input_covariance(x1: Array, x2: Array | None, layout: Layout) -> Covariance:
    """Start from two batches of inputs (n1, ...), (n2, ...), or from one batch paired with itself (x2 is None)."""
    if layout == "vector":
        x1 = x1.reshape(len(x1), -1)
        x2 = None if x2 is None else x2.reshape(len(x2), -1)
    first = _self_covariance(x1, layout)
    if x2 is None:
        return Covariance(first, None, None, None, layout)
    subscripts = {"vector": "ac,bc->ab", "pixels": "ahwc,bhwc->hwab", "all pixels": "ahwc,bijc->hiwjab"}[layout]
    nngp = _mean_product(subscripts, x1, x2)
    return Covariance(nngp, None, first, _self_covariance(x2, layout), layout)


def _self_covariance(x: Array, layout: Layout) -> Array:
    subscripts = {"vector": "ac,ac->a", "pixels": "ahwc,ahwc->hwa", "all pixels": "ahwc,aijc->hiwja"}[layout]
    return _mean_product(subscripts, x, x)


def _mean_product(subscripts: str, x1: Array, x2: Array) -> Array:
    channels = jnp.asarray(x1.shape[-1], x1.dtype)
    return jnp.einsum(subscripts, x1, x2, precision="highest") / channels
