"""Kernels of finite networks against a Jacobian by brute force, neural-tangents, and their infinite-width limits."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ntkadv.architectures import Erf, cnn, import_neural_tangents, mlp
from ntkadv.kernels import empirical_ark, empirical_nngp, empirical_ntk, empirical_ntk_diagonal, ntk_product

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

IMAGE = (4, 3, 2)
CLASSES = 3


def images(n, seed):
    return np.random.default_rng(seed).random((n, *IMAGE))


def network(name, width=8):
    arch = {
        "mlp": mlp(depth=2, width=width, num_classes=CLASSES, activation=Erf()),
        "cnn": cnn(depth=2, width=width, num_classes=CLASSES),
    }[name]
    params = arch.init(jax.random.key(1), IMAGE)
    return arch.apply, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def by_brute_force(f, params, x1, x2):
    """One row of the Jacobian at a time, of the flattened parameters."""
    flat, unravel = ravel_pytree(params)

    def jacobian(x):
        rows = [
            [jax.grad(lambda p, i=i, k=k: f(unravel(p), x)[i, k])(flat) for k in range(CLASSES)] for i in range(len(x))
        ]
        return np.array(rows)

    return np.einsum("njp,mkp->nmjk", jacobian(jnp.asarray(x1)), jacobian(jnp.asarray(x2)))


@pytest.mark.parametrize("method", ["jacobian", "products", None])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_kernel_is_that_of_the_jacobian(name, method, x64):
    f, params = network(name)
    x1, x2 = images(5, 0), images(4, 1)
    exact = by_brute_force(f, params, x1, x2)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Room for two images at a time: the tiles do not divide the sides.
    small = 3 * 2 * CLASSES * parameters * 8
    for settings in ({}, {"max_bytes": small}):
        full = empirical_ntk(f, params, x1, x2, method=method, **settings)
        np.testing.assert_allclose(full, exact, rtol=1e-10, atol=1e-12)
        traced = empirical_ntk(f, params, x1, x2, method=method, outputs="trace", **settings)
        np.testing.assert_allclose(traced, np.trace(exact, axis1=2, axis2=3) / CLASSES, rtol=1e-10, atol=1e-12)
        own = empirical_ntk(f, params, x1, method=method, **settings)
        np.testing.assert_allclose(own, by_brute_force(f, params, x1, x1), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(own, np.transpose(own, (1, 0, 3, 2)), rtol=1e-10, atol=1e-12)


def test_the_diagonal_is_that_of_the_kernel(x64):
    f, params = network("cnn")
    x = images(5, 2)
    kernel = empirical_ntk(f, params, x)
    expected = kernel[np.arange(5), np.arange(5)]
    np.testing.assert_allclose(empirical_ntk_diagonal(f, params, x), expected, rtol=1e-12)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    small = empirical_ntk_diagonal(f, params, x, max_bytes=3 * 2 * CLASSES * parameters * 8)
    np.testing.assert_allclose(small, expected, rtol=1e-12)


def test_a_product_needs_no_kernel(x64):
    f, params = network("mlp")
    x1, x2 = images(5, 0), images(4, 1)
    vector = np.random.default_rng(3).normal(size=(4, CLASSES))
    expected = np.einsum("nmjk,mk->nj", by_brute_force(f, params, x1, x2), vector)
    np.testing.assert_allclose(ntk_product(f, params, x1, vector, x2), expected, rtol=1e-10)
    square = ntk_product(f, params, x2, vector)
    np.testing.assert_allclose(square, np.einsum("nmjk,mk->nj", by_brute_force(f, params, x2, x2), vector), rtol=1e-10)


def test_the_ark_is_that_of_finite_differences(x64):
    f, params = network("mlp")
    x = images(3, 4)
    steps = np.eye(int(np.prod(IMAGE))).reshape(-1, *IMAGE) * 1e-6
    for image, ark in zip(x, empirical_ark(f, params, x), strict=True):
        up, down = (np.asarray(f(params, jnp.asarray(image + sign * steps))) for sign in (1, -1))
        gradient = (up - down) / 2e-6
        np.testing.assert_allclose(ark, gradient.T @ gradient, rtol=1e-7)


def test_an_equinox_module_has_a_kernel_too(x64):
    module = eqx.nn.MLP(6, 2, 5, 1, key=jax.random.key(0), dtype=jnp.float64)
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def f(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    x = np.random.default_rng(5).normal(size=(4, 6))
    kernel = empirical_ntk(f, params, x)
    rows = [[ravel_pytree(jax.grad(lambda p, i=i, k=k: f(p, jnp.asarray(x))[i, k])(params))[0] for k in range(2)]
            for i in range(4)]  # fmt: skip
    np.testing.assert_allclose(kernel, np.einsum("njp,mkp->nmjk", np.array(rows), np.array(rows)), rtol=1e-10)


@pytest.mark.loose_promotion
def test_the_kernel_is_that_of_neural_tangents():
    nt = import_neural_tangents()
    init, apply, _ = nt.stax.serial(
        nt.stax.Conv(6, (3, 3), padding="SAME"), nt.stax.Relu(), nt.stax.Flatten(), nt.stax.Dense(CLASSES)
    )
    _, params = init(jax.random.key(2), (-1, *IMAGE))
    x1, x2 = (images(n, n).astype(np.float32) for n in (5, 4))
    theirs = nt.empirical_ntk_fn(apply, trace_axes=(), implementation=1)(x1, x2, params)
    for method in ("jacobian", "products"):
        np.testing.assert_allclose(empirical_ntk(apply, params, x1, x2, method=method), theirs, rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_with_width_the_ntk_tends_to_its_limit_like_the_inverse_square_root():
    x = images(6, 6).astype(np.float32)
    widths, errors = [32, 128, 512], []
    for width in widths:
        arch = mlp(depth=2, width=width, num_classes=CLASSES, activation=Erf())
        limit = np.asarray(arch.ntk(x, x))
        init = jax.jit(lambda seed, arch=arch: arch.init(jax.random.key(seed), IMAGE))
        kernels = [empirical_ntk(arch.apply, init(seed), x, outputs="trace") for seed in range(8)]
        errors.append(np.sqrt(np.mean([np.linalg.norm(k - limit) ** 2 for k in kernels])) / np.linalg.norm(limit))
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.15), errors


@pytest.mark.slow
def test_the_ark_has_the_limit_for_its_mean_but_goes_on_to_vary_however_wide_the_network():
    x = images(1, 6).astype(np.float32)
    spreads = []
    for width in (64, 512):
        arch = mlp(depth=2, width=width, num_classes=CLASSES, activation=Erf())
        init = jax.jit(lambda seed, arch=arch: arch.init(jax.random.key(seed), IMAGE))
        arks = np.array([empirical_ark(arch.apply, init(seed), x)[0] for seed in range(60)])
        diagonal = np.diagonal(arks, axis1=1, axis2=2)
        error = diagonal.std() / np.sqrt(diagonal.size)
        assert diagonal.mean() == pytest.approx(float(arch.ark(x)[0]), abs=4 * error)
        assert np.abs(arks.mean(axis=0)[~np.eye(CLASSES, dtype=bool)]).max() < 4 * arks.std() / np.sqrt(len(arks))
        spreads.append(diagonal.std() / diagonal.mean())
    # In the limit the gradient is Gaussian in as many dimensions as there are pixels: 2 / pixels is its least variance.
    assert spreads[1] > 0.8 * np.sqrt(2 / np.prod(IMAGE))


def test_the_nngp_of_many_outputs_is_that_of_the_limit():
    arch = mlp(depth=1, width=1000, num_classes=1000)
    x = images(4, 7).astype(np.float32)
    init = jax.jit(lambda seed: arch.init(jax.random.key(seed), IMAGE))
    kernels = np.array([empirical_nngp(arch.apply, init(seed), x) for seed in range(12)])
    error = kernels.std(axis=0) / np.sqrt(len(kernels))
    assert (np.abs(kernels.mean(axis=0) - arch.nngp(x, x)) < 4.5 * error).all()
    assert (error < 0.08 * np.asarray(arch.nngp(x, x))).all()
    params = init(0)
    both = empirical_nngp(arch.apply, params, x[:2], x)
    np.testing.assert_allclose(both, empirical_nngp(arch.apply, params, x)[:2], rtol=1e-5)


def test_the_cheaper_way_depends_on_outputs_and_passes():
    from ntkadv.kernels.empirical import _cheaper, _size_of

    x = images(2, 8).astype(np.float32)
    wide = mlp(depth=2, width=64, num_classes=10)
    convolutional = cnn(depth=2, width=8, num_classes=2)
    chosen = []
    for arch in (wide, convolutional):
        params = arch.init(jax.random.key(0), IMAGE)
        chosen.append(_cheaper(arch.apply, params, x, _size_of(arch.apply, params, x, "x"), "full"))
    assert chosen == ["products", "jacobian"]


def test_what_users_do_wrong_is_named(unchecked):
    arch = mlp(depth=1, width=8, num_classes=CLASSES)
    f, params, x = arch.apply, arch.init(jax.random.key(0), IMAGE), images(3, 9).astype(np.float32)
    ntk = partial(empirical_ntk, f, params)
    cases = [
        (ValueError, "outputs must be 'full' or 'trace', got 'sum'", lambda: ntk(x, outputs="sum")),
        (ValueError, "method must be 'jacobian' or 'products'", lambda: ntk(x, method="dense")),
        (ValueError, "x1 must be a non-empty batch", lambda: ntk(x[:0])),
        (MemoryError, "max_bytes is 1000. Raise it, or use ntk_product", lambda: ntk(x, max_bytes=1000)),
        (TypeError, "params must be a pytree of float arrays", lambda: empirical_ntk(f, {"w": 3}, x)),
        (TypeError, "return the outputs only", lambda: empirical_ntk(lambda p, x: (f(p, x), {}), params, x)),
        (ValueError, r"f must return outputs \(3, c\)", lambda: empirical_ntk(lambda p, x: f(p, x)[0], params, x)),
        (ValueError, r"vector must have shape \(3, 3\), got \(3, 2\)", lambda: ntk_product(f, params, x, x[:, 0, 0])),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(ValueError, match="the kernel must be finite"):
        empirical_ntk(f, jax.tree.map(lambda leaf: leaf * jnp.nan, params), x)
