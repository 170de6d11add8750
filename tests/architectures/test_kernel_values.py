"""Kernels of networks where they are known exactly, where they have kinks, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.architectures import Conv, Dense, Erf, Flatten, Gelu, Network, Relu, Residual, Serial, cnn, mlp, resnet

IMAGE = (4, 3, 2)
W, B = 1.3, 0.4


def strided_block():
    block = Residual(Serial(Relu(), Conv(4, 3, 2, W, B)), shortcut=Conv(4, 1, 2, W, B))
    return Network(3, Serial(Conv(4, w_std=W, b_std=B), block, Relu(), Flatten(), Dense(3, W, B)))


NETWORKS = {
    "mlp": mlp(depth=3, num_classes=3, w_std=W, b_std=B),
    "mlp erf": mlp(depth=2, num_classes=3, w_std=W, b_std=B, activation=Erf()),
    "mlp gelu": mlp(depth=2, num_classes=3, w_std=W, b_std=B, activation=Gelu()),
    "cnn without bias": cnn(depth=2, num_classes=3, stride=2, w_std=W, b_std=0.0),
    "cnn pooled": cnn(depth=2, num_classes=3, pooling="average", w_std=W, b_std=0.0),
    "resnet": resnet(depth=4, num_classes=3, w_std=W, b_std=B),
    "shortcut": strided_block(),
}


def images(n, seed=0, dtype="float64"):
    return np.random.default_rng(seed).random((n, *IMAGE)).astype(dtype)


def both(arch):
    """Both kernels as one array (2, n1, n2)."""
    return lambda x1, x2: jnp.stack(arch.kernels(x1, x2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_relu_mlp_is_exact_between_coincident_inputs(dtype):
    """There v -> w^2 v/2 + b^2 and theta -> nngp + w^2 theta/2."""
    tolerance = {"float32": 1e-6, "float64": 1e-14}[dtype]
    with jax.enable_x64(dtype == "float64"):
        x = images(5, dtype=dtype)
        v = theta = W**2 * np.mean((x.astype("float64") - 0.5) ** 2, axis=(1, 2, 3)) + B**2
        for _ in range(3):
            v = W**2 * v / 2 + B**2
            theta = v + W**2 * theta / 2
        pairs, diagonal = NETWORKS["mlp"].kernels(x, x), NETWORKS["mlp"].diagonal(x)
        np.testing.assert_allclose(diagonal.nngp, v, rtol=tolerance)
        np.testing.assert_allclose(diagonal.ntk, theta, rtol=tolerance)
        np.testing.assert_allclose(np.diagonal(pairs.nngp), v, rtol=tolerance)
        np.testing.assert_allclose(np.diagonal(pairs.ntk), theta, rtol=tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_are_symmetric_positive_and_have_the_diagonal_that_diagonal_gives(name, x64):
    x = images(6)
    for matrix, exact in zip(NETWORKS[name].kernels(x, x), NETWORKS[name].diagonal(x), strict=True):
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-12)
        np.testing.assert_allclose(np.diagonal(matrix), exact, rtol=1e-7)
        assert np.linalg.eigvalsh(matrix)[0] > -1e-7 * np.max(exact)


@pytest.mark.parametrize("name", NETWORKS)
def test_input_gradients_agree_with_finite_differences(name, x64):
    x1, x2 = images(1, seed=1), images(2, seed=2)
    weights = jnp.asarray([[[0.7, -0.3]], [[-0.5, 1.1]]])

    @jax.jit
    def weighted(x1):
        return jnp.sum(weights * both(NETWORKS[name])(x1, x2))

    step = 1e-5
    directions = np.random.default_rng(3).normal(size=(4, *x1.shape))
    gradient = np.asarray(jax.jit(jax.grad(weighted))(x1))
    for direction in directions:
        difference = (weighted(x1 + step * direction) - weighted(x1 - step * direction)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp erf", "mlp gelu"])
def test_smooth_networks_have_the_right_gradient_between_coincident_inputs_too(name, x64):
    x, step = images(1), 1e-5
    direction = np.random.default_rng(3).normal(size=x.shape)

    @jax.jit
    def summed(x1):
        return jnp.sum(both(NETWORKS[name])(x1, x))

    difference = (summed(x + step * direction) - summed(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(np.sum(jax.jit(jax.grad(summed))(x) * direction), difference, rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "cnn without bias", "cnn pooled"])
def test_between_coincident_inputs_the_gradient_is_half_that_of_the_diagonal(name, x64):
    """By symmetry, d/dx k(x, x) is the sum of two equal halves; for ReLU networks too, whose kernels have a kink."""
    x = images(2)
    half = jax.jit(jax.grad(lambda x1: sum(jnp.sum(jnp.diagonal(m)) for m in NETWORKS[name].kernels(x1, x))))(x)
    whole = jax.jit(jax.grad(lambda x: sum(jnp.sum(d) for d in NETWORKS[name].diagonal(x))))(x)
    np.testing.assert_allclose(2 * half, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_finite_everywhere(name):
    """At coincident and opposite inputs, without variance (pixels equal to `center`), at one pixel without."""
    x = images(1, dtype="float32")
    hole = x.copy()
    hole[0, 0, 0] = 0.5
    cases = np.concatenate([x, 1 - x, np.full_like(x, 0.5), hole, x + np.finfo("float32").eps])

    def summed(x1, x2):
        return jnp.sum(both(NETWORKS[name])(x1, x2))

    value, gradients = jax.jit(jax.value_and_grad(summed, argnums=(0, 1)))(cases, cases)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_the_kernels_between_opposite_inputs_are_exact_without_bias(x64):
    """cos(t) = -1: the ReLU leaves nothing in common."""
    x = images(2)
    for matrix in mlp(depth=1, num_classes=3, w_std=W, b_std=0.0).kernels(x, 1 - x):
        np.testing.assert_allclose(np.diagonal(matrix), 0.0, atol=1e-14)


def test_the_gradient_survives_checkpointing_and_batching(x64):
    x1, x2 = images(3, seed=1), images(2, seed=2)

    def summed(image):
        return jnp.sum(both(NETWORKS["cnn without bias"])(image[None], x2))

    batched = jax.jit(jax.vmap(jax.grad(jax.checkpoint(summed))))(x1)
    np.testing.assert_allclose(
        batched, jax.jit(jax.grad(lambda x: jnp.sum(both(NETWORKS["cnn without bias"])(x, x2))))(x1)
    )
