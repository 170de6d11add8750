r"""Nonlinearities: the function itself, and its two Gaussian expectations.

For (u, v) ~ N(0, [[v1, k], [k, v2]]) each gives E[phi(u) phi(v)] and E[phi'(u) phi'(v)], the second being the
derivative of the first in k. All of them are finite, and so are their first derivatives, for every
admissible (k, v1, v2), coincident inputs (k = v1 = v2) and vanishing variances included.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ntkadv.architectures.covariance import Covariance
from ntkadv.architectures.layers import Layer

__all__ = ["Activation", "Erf", "Gelu", "Relu"]


@dataclasses.dataclass(frozen=True)
class Activation(Layer):
    """A nonlinearity, applied to each feature.

    Attributes:
        residuals: arrays, of the size of the covariance, that the reverse mode keeps for `moments`; it may be too high.
    """

    residuals: ClassVar[int] = 20

    def function(self, x: Array) -> Array:
        """Evaluate phi(x)."""
        raise NotImplementedError

    def moments(self, k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
        """Give E[phi(u) phi(v)] and E[phi'(u) phi'(v)] for (u, v) ~ N(0, [[v1, k], [k, v2]])."""
        raise NotImplementedError

    def second_moment(self, v: Array) -> Array:
        """Give E[phi(u)^2] for u ~ N(0, v)."""
        return self.moments(v, v, v)[0]

    def init(self, key: Array, shape: tuple[int, ...]) -> Any:
        """Activations have no parameters."""
        return ()

    def apply(self, params: Any, x: Array) -> Array:
        """Evaluate phi(x)."""
        return self.function(x)

    def propagate(self, covariance: Covariance) -> Covariance:
        """Map the covariances through phi."""
        return covariance.activate(self.moments, self.second_moment)


@dataclasses.dataclass(frozen=True)
class Relu(Activation):
    """max(x, 0). The moments are the arc-cosine kernels of Cho & Saul (2009)."""

    residuals: ClassVar[int] = 7

    def function(self, x: Array) -> Array:
        """Evaluate max(x, 0)."""
        return jax.nn.relu(x)

    def moments(self, k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
        r"""Arc-cosine kernels of order 1 and 0.

        With cos(t) = k / sqrt(v1 v2): E[phi phi] = (sqrt(v1 v2) sin t + (pi - t) k) / (2 pi) and
        E[phi' phi'] = (pi - t) / (2 pi).
        """
        return _relu_moments(k, v1, v2)

    def second_moment(self, v: Array) -> Array:
        """Half of the variance."""
        return v * _constant(0.5, v)


@jax.custom_jvp
def _relu_moments(k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
    cosine, area = _angle(k, v1, v2)
    derivative = _constant(0.5, k) - _arccos(cosine) * _constant(0.5 / np.pi, k)  # exactly 1/2 for parallel inputs
    return area * _constant(0.5 / np.pi, k) + k * derivative, derivative


@_relu_moments.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    k, v1, v2 = primals
    dk, dv1, dv2 = tangents
    value, derivative = _relu_moments(k, v1, v2)
    _, area = _angle(k, v1, v2)
    d_log_norm = (dv1 * _reciprocal(v1) + dv2 * _reciprocal(v2)) * _constant(0.5, k)
    d_value = derivative * dk + area * _constant(0.5 / np.pi, k) * d_log_norm
    d_derivative = (_reciprocal(area) * _constant(0.5 / np.pi, k)) * (dk - k * d_log_norm)
    return (value, derivative), (d_value, d_derivative)


def _angle(k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
    """Cosine of the angle, and sqrt(v1 v2) times its sine; inputs parallel to within rounding count as parallel."""
    norm = _sqrt(v1) * _sqrt(v2)
    one = jnp.ones_like(norm)
    # A division, which XLA:CPU keeps where it would compute a product again for every sum over pairs in the gradient.
    cosine = k / jnp.where(norm > 0, norm, one)
    parallel = jnp.abs(cosine) > one - _constant(4 * float(jnp.finfo(k.dtype).eps), k)
    cosine = jnp.where(parallel, jnp.sign(cosine), cosine)
    squared_sine = jnp.where(parallel, one, (one - cosine) * (one + cosine))
    return cosine, norm * jnp.where(parallel, jnp.zeros_like(cosine), jnp.sqrt(squared_sine))


def _sqrt(x: Array) -> Array:
    """sqrt(x), and 0 (with derivative 0) at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, jnp.ones_like(x))), jnp.zeros_like(x))


def _reciprocal(x: Array) -> Array:
    """1 / x, and 0 (with derivative 0) at 0."""
    nonzero = x > 0
    return jnp.where(nonzero, jnp.ones_like(x) / jnp.where(nonzero, x, jnp.ones_like(x)), jnp.zeros_like(x))


_ARCCOS = (
    -0.0012624911,
    0.0066700901,
    -0.0170881256,
    0.0308918810,
    -0.0501743046,
    0.0889789874,
    -0.2145988016,
    1.5707963050,
)


def _arccos(cosine: Array) -> Array:
    if cosine.dtype != jnp.float32:
        return jnp.arccos(cosine)
    # Abramowitz & Stegun 4.4.46, absolute error 2e-8: several times faster than the library's function on CPUs.
    size = jnp.abs(cosine)
    polynomial = jnp.full_like(size, _ARCCOS[0])
    for coefficient in _ARCCOS[1:]:
        polynomial = polynomial * size + _constant(coefficient, size)
    angle = jnp.sqrt(jnp.ones_like(size) - size) * polynomial
    return jnp.where(cosine < 0, _constant(np.pi, angle) - angle, angle)


@dataclasses.dataclass(frozen=True)
class Erf(Activation):
    """erf(x). The moments are those of Williams (1997)."""

    residuals: ClassVar[int] = 8

    def function(self, x: Array) -> Array:
        """Evaluate erf(x)."""
        return jax.scipy.special.erf(x)

    def moments(self, k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
        r"""With p = (1 + 2 v1)(1 + 2 v2): 2/pi arcsin(2k / sqrt(p)) and 4/pi / sqrt(p - 4 k^2)."""
        one, two = _constant(1.0, k), _constant(2.0, k)
        product = (one + two * v1) * (one + two * v2)
        value = jnp.arcsin(two * k * jax.lax.rsqrt(product)) * _constant(2 / np.pi, k)
        return value, jax.lax.rsqrt(product - _constant(4.0, k) * k * k) * _constant(4 / np.pi, k)


@dataclasses.dataclass(frozen=True)
class Gelu(Activation):
    """x Phi(x), with Phi the normal distribution function: the exact GELU, not its tanh approximation."""

    residuals: ClassVar[int] = 15

    def function(self, x: Array) -> Array:
        """Evaluate x Phi(x)."""
        return jax.nn.gelu(x, approximate=False)

    def moments(self, k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
        r"""Both moments in closed form, from Stein's lemma applied twice.

        With a = 1 + v1, b = 1 + v2, g = E[Phi'(u) Phi'(v)] = 1 / (2 pi sqrt(ab - k^2)) and
        o = E[Phi(u) Phi(v)] = 1/4 + arcsin(k / sqrt(ab)) / (2 pi):

            E[phi phi] = k o + g (v1 v2 - k^2 v1 / a + k^2 / b)
        and E[phi' phi'] its derivative in k, in which do/dk = g and dg/dk = k g / (ab - k^2).
        """
        a, b = _constant(1.0, k) + v1, _constant(1.0, k) + v2
        rest = a * b - k * k
        density = jax.lax.rsqrt(rest) * _constant(0.5 / np.pi, k)
        orthant = _constant(0.25, k) + jnp.arcsin(k * jax.lax.rsqrt(a * b)) * _constant(0.5 / np.pi, k)
        curvature = _constant(1.0, k) / b - v1 / a
        bracket = v1 * v2 + k * k * curvature
        value = k * orthant + density * bracket
        slope = orthant + k * density + density * (k * bracket / rest + _constant(2.0, k) * k * curvature)
        return value, slope


def _constant(value: float, like: Array) -> Array:
    return jnp.asarray(value, like.dtype)
