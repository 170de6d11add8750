"""The gradient of the training coefficients against quadrature and against finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_coefficients, dense_gradient, kernel_spectrum, matrix, rates, targets

from ntkadv.dynamics.phi import solve, training_coefficients

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

N, C = 60, 3
COTANGENT = np.random.default_rng(3).standard_normal((N, C))


@partial(jax.jit, static_argnames=("method", "max_blocks", "fallback"))
def pull_back(theta, xi, y, cotangent, **settings):
    _, back = jax.vjp(lambda xi, y: training_coefficients(theta, xi, y, **settings), xi, y)
    return back(cotangent)


def gradients(theta, xi, y, method="krylov", cotangent=COTANGENT, **settings):
    return pull_back(*(jnp.asarray(array) for array in (theta, xi, y, cotangent)), method=method, **settings)


def relative(value, reference):
    return np.linalg.norm(np.asarray(value) - reference) / np.linalg.norm(reference)


def with_zeros(xi):
    return np.where(np.arange(len(xi)) % 4 == 0, 0.0, xi)


SPECTRA = {
    "decaying": kernel_spectrum(N),
    "repeated": np.repeat([30.0, 4.0, 0.5], N // 3),
    "singular": np.concatenate([np.full(10, 20.0), np.zeros(N - 10)]),
    "zero": np.zeros(N),
}


@pytest.mark.parametrize("method", ["krylov", "eigh"])
@pytest.mark.parametrize("zeros", [False, True], ids=["trained", "partly untrained"])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
def test_gradient_in_xi_is_the_integral_of_the_two_residuals(x64, method, zeros, spectrum):
    theta, y = matrix(spectrum), targets(N, C)
    xi = with_zeros(rates(N)) if zeros else rates(N)
    value, _ = gradients(theta, xi, y, method)
    assert relative(value, dense_gradient(theta, xi, y, COTANGENT)) < 1e-9


@pytest.mark.parametrize("method", ["krylov", "eigh"])
def test_gradient_in_xi_is_that_of_finite_differences(x64, method):
    theta, xi, y = matrix(kernel_spectrum(N)), with_zeros(rates(N)), targets(N, C)
    value, _ = gradients(theta, xi, y, method)
    step = 1e-4
    for i in (1, 2, 3):
        move = step * np.eye(N)[i]
        ahead, behind = (np.vdot(COTANGENT, dense_coefficients(theta, xi + s * move, y)) for s in (1, -1))
        assert value[i] == pytest.approx((ahead - behind) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("method", ["krylov", "eigh"])
def test_gradient_where_nothing_is_trained_is_targets_times_cotangent(x64, method):
    theta, y = matrix(kernel_spectrum(N)), targets(N, C)
    value, in_targets = gradients(theta, np.zeros(N), y, method)
    np.testing.assert_allclose(value, np.sum(y * COTANGENT, axis=1), rtol=1e-14)
    assert not np.any(in_targets)


@pytest.mark.parametrize("method", ["krylov", "eigh"])
def test_gradient_in_targets_is_the_same_symmetric_operator(x64, method):
    theta, xi, y = matrix(kernel_spectrum(N)), with_zeros(rates(N)), targets(N, C)
    _, value = gradients(theta, xi, y, method)
    assert relative(value, dense_coefficients(theta, xi, COTANGENT)) < 1e-9


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
def test_krylov_and_eigendecomposition_give_one_gradient_where_spaces_differ_in_size(x64, scale):
    n, c = 300, 10
    theta, y, xi = matrix(kernel_spectrum(n)), targets(n, c), scale * with_zeros(rates(n))
    cotangent = np.random.default_rng(4).standard_normal((n, c))
    krylov, eigh = (gradients(theta, xi, y, method, cotangent) for method in ("krylov", "eigh"))
    assert relative(krylov[0], eigh[0]) < 1e-9
    assert relative(krylov[1], eigh[1]) < 1e-9


def test_gradient_survives_the_fallback(x64):
    theta, y = matrix(kernel_spectrum(N)), targets(N, C)
    xi = 1e3 * rates(N)
    value = gradients(theta, xi, y, max_blocks=4)
    reference = gradients(theta, xi, y, "eigh")
    assert relative(value[0], reference[0]) < 1e-12
    assert relative(value[1], reference[1]) < 1e-12


def test_without_fallback_an_unfinished_gradient_is_nan_not_wrong(x64):
    theta, xi, y = matrix(kernel_spectrum(N)), 1e3 * rates(N), targets(N, C)
    for value in gradients(theta, xi, y, max_blocks=4, fallback=False):
        assert np.isnan(value).all()


def test_float32_gradient_is_float32():
    theta, xi, y = matrix(kernel_spectrum(N)), with_zeros(rates(N)), targets(N, C)
    single = [np.asarray(array, np.float32) for array in (theta, xi, y)]
    value, _ = gradients(*single, cotangent=COTANGENT.astype(np.float32))
    assert value.dtype == jnp.float32
    assert relative(value, dense_gradient(theta, xi, y, COTANGENT)) < 1e-4


def test_gradients_of_many_xi_at_once_are_those_of_each(x64):
    theta, y = jnp.asarray(matrix(kernel_spectrum(N))), jnp.asarray(targets(N, C))
    many = jnp.stack([jnp.asarray(rates(N, seed)) for seed in range(2)])
    slope = jax.grad(lambda xi: jnp.vdot(jnp.asarray(COTANGENT), training_coefficients(theta, xi, y)))
    together = jax.jit(jax.vmap(slope))(many)
    for xi, value in zip(np.asarray(many), together, strict=True):
        assert relative(value, dense_gradient(np.asarray(theta), xi, np.asarray(y), COTANGENT)) < 1e-9


def test_gradient_in_theta_is_refused_not_zero(x64):
    xi, y = jnp.asarray(rates(N)), jnp.asarray(targets(N, C))
    with pytest.raises(NotImplementedError, match="not in theta"):
        jax.grad(lambda theta: training_coefficients(theta, xi, y).sum())(jnp.asarray(matrix(kernel_spectrum(N))))


def test_diagnostics_carry_no_gradient(x64):
    theta, y = jnp.asarray(matrix(kernel_spectrum(N))), jnp.asarray(targets(N, C))
    slope = jax.grad(lambda xi: solve(theta, xi, y).error_bound)(jnp.asarray(rates(N)))
    assert not np.any(slope)
