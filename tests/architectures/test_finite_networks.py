"""Wide finite networks, drawn many times, have the kernels, the input gradients and the ARK that their limits say.

Every mean is compared within 4.5 of its own standard errors, which a normal variable exceeds once in 150,000 times, and
an allowance for the finite width, a few parts in the width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.architectures import Conv, Dense, Erf, Flatten, Gelu, Network, Relu, Residual, Serial, cnn, mlp

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

IMAGE = (5, 4, 2)
W, B = 1.3, 0.3


def shortcut(classes):
    conv = Conv(128, 3, 2, W, B)
    block = Residual(Serial(Relu(), Conv(128, 3, 2, W, B)), shortcut=conv)
    return Network(classes, Serial(Conv(128, w_std=W, b_std=B), block, Relu(), Flatten(), Dense(classes, W, B)))


NETWORKS = {
    "mlp relu": lambda c: mlp(depth=2, num_classes=c, width=256, w_std=W, b_std=B),
    "mlp gelu": lambda c: mlp(depth=2, num_classes=c, width=256, w_std=W, b_std=B, activation=Gelu()),
    "cnn strided": lambda c: cnn(depth=2, num_classes=c, width=128, stride=2, w_std=W, b_std=B),
    "cnn pooled erf": lambda c: cnn(
        depth=2, num_classes=c, width=128, pooling="average", w_std=W, b_std=B, activation=Erf()
    ),
    "cnn pooled relu": lambda c: cnn(depth=2, num_classes=c, width=128, pooling="average", w_std=W, b_std=B),
    "shortcut": shortcut,
}


def images(n, seed):
    return jnp.asarray(np.random.default_rng(seed).random((n, *IMAGE)), jnp.float32)


def over_draws(statistic, arch, key, draws):
    """The statistic of the parameters in every draw of them: a pytree of arrays (draws, ...)."""
    return jax.jit(lambda keys: jax.lax.map(lambda k: statistic(arch.init(k, IMAGE)), keys))(
        jax.random.split(key, draws)
    )


def assert_mean_is(samples, expected, allowance):
    samples, expected = np.asarray(samples, np.float64), np.asarray(expected, np.float64)
    error = np.abs(samples.mean(0) - expected)
    standard_error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    size = np.abs(expected).max()
    assert np.median(standard_error) < 0.06 * size  # or else the test would say little
    assert (error < 4.5 * standard_error + allowance * size).all(), (error / standard_error).max()


def weighted(kernel, weights):
    return lambda x1, x2: jnp.sum(weights * kernel(x1, x2))


X1 = images(3, 0)
X2 = jnp.concatenate([X1[:1], images(1, 1)])  # with a coincident pair
WEIGHTS = jnp.asarray([[1.0, -0.4], [0.3, 0.8], [-0.5, 1.2]])


KERNELS = ["mlp relu", "mlp gelu", "cnn strided", "cnn pooled erf", "shortcut"]


@pytest.mark.parametrize("name", KERNELS)
def test_the_nngp_kernel_is_the_covariance_of_the_outputs(name, key):
    classes = 64
    arch = NETWORKS[name](classes)

    def statistic(params):
        def covariance(x1, x2):
            return jnp.matmul(arch.apply(params, x1), arch.apply(params, x2).T) / jnp.float32(classes)

        return covariance(X1, X2), jax.grad(weighted(covariance, WEIGHTS))(X1, X2)

    values, gradients = over_draws(statistic, arch, key, draws=250)
    assert_mean_is(values, arch.nngp(X1, X2), 0.01)
    assert_mean_is(gradients, jax.grad(weighted(arch.nngp, WEIGHTS))(X1, X2), 0.01)


@pytest.mark.parametrize("name", KERNELS)
def test_the_ntk_is_the_mean_of_the_empirical_ntk(name, key):
    arch = NETWORKS[name](1)

    def statistic(params):
        def tangents(x):
            gradients = jax.vmap(jax.grad(lambda p, image: arch.apply(p, image[None])[0, 0]), (None, 0))(params, x)
            return jnp.concatenate([leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(gradients)], axis=1)

        return jnp.matmul(tangents(X1), tangents(X2).T, precision="highest")

    assert_mean_is(over_draws(statistic, arch, key, draws=100), arch.ntk(X1, X2), 0.02)


@pytest.mark.parametrize("name", ["mlp gelu", "cnn pooled erf"])
def test_the_gradient_of_the_ntk_is_the_mean_gradient_of_the_empirical_ntk(name, key):
    """For smooth nonlinearities: a ReLU's empirical NTK jumps, and its mean changes where its gradient is zero."""
    arch = NETWORKS[name](1)

    def statistic(params):
        def tangent(x):
            return jax.vmap(jax.grad(lambda p, image: arch.apply(p, image[None])[0, 0]), (None, 0))(params, x)

        def summed(x1):
            left, right = tangent(x1), tangent(X2)
            products = jax.tree.map(lambda a, b: a.reshape(len(a), -1) @ b.reshape(len(b), -1).T, left, right)
            return jnp.sum(WEIGHTS * sum(jax.tree.leaves(products)))

        return jax.grad(summed)(X1)

    samples = over_draws(statistic, arch, key, draws=400)
    assert_mean_is(samples, jax.grad(weighted(arch.ntk, WEIGHTS))(X1, X2), 0.02)


@pytest.mark.parametrize("name", ["mlp relu", "mlp gelu", "cnn pooled erf", "cnn pooled relu"])
def test_the_ark_is_the_mean_squared_input_gradient(name, key):
    arch = NETWORKS[name](1)

    def statistic(params):
        return jnp.sum(jax.grad(lambda x: jnp.sum(arch.apply(params, x)))(X1) ** 2, axis=(1, 2, 3))

    assert_mean_is(over_draws(statistic, arch, key, draws=500), arch.ark(X1), 0.02)


def test_different_outputs_are_uncorrelated_and_have_orthogonal_input_gradients(key):
    """What makes the ARK a scalar times the identity."""
    arch = NETWORKS["mlp gelu"](2)

    def statistic(params):
        logits = arch.apply(params, X1)
        jacobian = jax.vmap(jax.jacrev(lambda image: arch.apply(params, image[None])[0]))(X1).reshape(len(X1), 2, -1)
        return logits[:, 0] * logits[:, 1], jnp.sum(jacobian[:, 0] * jacobian[:, 1], axis=1)

    for samples in over_draws(statistic, arch, key, draws=800):
        standard_error = np.std(samples, axis=0) / np.sqrt(800)
        assert (np.abs(np.mean(samples, axis=0)) < 4.5 * standard_error).all()
