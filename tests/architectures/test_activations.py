"""Gaussian moments of the nonlinearities, against two-dimensional quadrature and at the edges of their domain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.architectures import Erf, Gelu, Relu

ACTIVATIONS = [Relu(), Erf(), Gelu()]
COVARIANCES = [(0.3, 1.0, 0.5), (-0.9, 1.5, 0.8), (0.0, 0.2, 3.0), (1.9, 2.0, 2.0), (0.7, 0.7, 0.7)]


def by_quadrature(activation, k, v1, v2):
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)] in polar coordinates, where a ReLU's kinks are four known angles."""
    a, b = k / np.sqrt(v1), np.sqrt(max(v2 - k * k / v1, 0.0))  # u = sqrt(v1) s, v = a s + b t
    kinks = np.array([np.pi / 2, -np.pi / 2, np.arctan2(-a, b), np.arctan2(-a, b) + np.pi])
    edges = np.unique(np.concatenate([np.mod(kinks, 2 * np.pi), [0, 2 * np.pi]]))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    angle = (middle[:, None] + half[:, None] * nodes).ravel()
    angle_weight = (half[:, None] * weights).ravel() / (2 * np.pi)
    radius, radius_weight = 4.5 * (nodes + 1), 4.5 * weights  # the density of the radius beyond 9 is below 1e-17
    radius_weight = radius_weight * radius * np.exp(-(radius**2) / 2)
    s, t = radius[:, None] * np.cos(angle), radius[:, None] * np.sin(angle)
    u, v = jnp.asarray(np.sqrt(v1) * s), jnp.asarray(a * s + b * t)
    weight = radius_weight[:, None] * angle_weight
    slope = jnp.vectorize(jax.grad(activation.function))
    value = np.sum(weight * np.asarray(activation.function(u) * activation.function(v)))
    return value, np.sum(weight * np.asarray(slope(u) * slope(v)))


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moments_are_the_gaussian_expectations(activation, covariance, x64):
    value, derivative = activation.moments(*(jnp.asarray(c) for c in covariance))
    expected = by_quadrature(activation, *covariance)
    np.testing.assert_allclose([value, derivative], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_second_moment_is_the_moment_of_a_feature_with_itself(activation, x64):
    v = jnp.asarray([0.0, 1e-3, 0.4, 7.0])
    np.testing.assert_allclose(activation.second_moment(v), activation.moments(v, v, v)[0], rtol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_second_expectation_is_the_derivative_of_the_first(activation, x64):
    k, v1, v2 = (jnp.asarray(c) for c in (0.3, 0.9, 0.6))
    slope = jax.grad(lambda k: activation.moments(k, v1, v2)[0])(k)
    np.testing.assert_allclose(slope, activation.moments(k, v1, v2)[1], rtol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_moments_are_exact_to_rounding(activation):
    angles = np.linspace(0, np.pi, 401)
    k = np.cos(angles).astype(np.float32)
    ones = np.ones_like(k)
    got = activation.moments(jnp.asarray(k), jnp.asarray(ones), jnp.asarray(ones))
    with jax.enable_x64(True):
        exact = activation.moments(*(jnp.asarray(c.astype(np.float64)) for c in (k, ones, ones)))
        exact = [np.asarray(part) for part in exact]
    np.testing.assert_allclose(got[0], exact[0], rtol=0, atol=3e-7)
    np.testing.assert_allclose(got[1], exact[1], rtol=0, atol=2e-6 if activation == Gelu() else 5e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k", [1.0, -1.0, 0.0])
def test_relu_is_exact_for_parallel_opposite_and_vanishing_features(k, dtype):
    with jax.enable_x64(dtype == "float64"):
        v = jnp.asarray(abs(k), dtype)
        for scale in (1.0, 0.37, 1234.5, 1e-25):
            value, derivative = Relu().moments(jnp.asarray(k * scale, dtype), v * scale, v * scale)
            np.testing.assert_allclose(value, scale * max(k, 0) / 2, rtol=2e-7 if dtype == "float32" else 4e-16)
            if k:
                np.testing.assert_allclose(derivative, 0.5 if k > 0 else 0.0, atol=1e-7)


EDGES = [(0.8, 0.8, 0.8), (-0.8, 0.8, 0.8), (0.0, 0.0, 0.0), (0.0, 0.5, 0.0)]
"""Coincident and opposite features, both without variance, one without."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives_are_finite_at_the_edges(activation, dtype):
    def moments(arguments):
        return jnp.stack(activation.moments(*arguments))

    with jax.enable_x64(dtype == "float64"):
        edges = jnp.asarray(EDGES, dtype)
        for derivative in (jax.jacrev(moments), jax.jacfwd(jax.jacfwd(moments))):
            assert jnp.isfinite(jax.jit(jax.vmap(derivative))(edges)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_agree_with_finite_differences(activation, x64):
    def moments(arguments):
        return jnp.stack(activation.moments(*arguments))

    arguments, step = jnp.asarray([0.3, 0.9, 0.6]), 1e-6
    differences = [(moments(arguments + e) - moments(arguments - e)) / (2 * step) for e in step * jnp.eye(3)]
    for derivative in (jax.jacrev(moments), jax.jacfwd(moments)):
        np.testing.assert_allclose(jax.jit(derivative)(arguments), jnp.stack(differences, axis=1), atol=1e-9)


def test_derivatives_survive_checkpointing_and_batching(x64):
    def summed(k, v1, v2):
        value, derivative = Relu().moments(k, v1, v2)
        return value + derivative

    arguments = (jnp.asarray([0.3, -0.2]), jnp.asarray([0.9, 1.0]), jnp.asarray([0.6, 0.7]))
    one_by_one = [jax.jit(jax.grad(summed))(*(c[i] for c in arguments)) for i in range(2)]
    batched = jax.jit(jax.vmap(jax.grad(jax.checkpoint(summed))))(*arguments)
    np.testing.assert_allclose(batched, one_by_one, rtol=1e-13)
