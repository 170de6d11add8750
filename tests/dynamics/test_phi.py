"""The training coefficients against a dense matrix exponential, and their failures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_coefficients, kernel_spectrum, matrix, rates, targets

from ntkadv.dynamics.phi import solve, training_coefficients

N, C = 60, 3


def relative(value, reference):
    return np.linalg.norm(np.asarray(value) - reference) / np.linalg.norm(reference)


def weighted_error(value, reference, xi):
    """The norm that the error bound speaks of, over the samples where it is defined."""
    seen = xi > 0
    root = np.sqrt(xi[seen])[:, None]
    return relative(np.asarray(value)[seen] / root, reference[seen] / root)


SPECTRA = {
    "decaying": kernel_spectrum(N),
    "repeated": np.repeat([30.0, 4.0, 0.5], N // 3),
    "singular": np.concatenate([kernel_spectrum(15), np.zeros(N - 15)]),
    "zero": np.zeros(N),
}


@pytest.mark.parametrize("method", ["krylov", "eigh"])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
def test_coefficients_are_those_of_the_matrix_exponential(x64, method, spectrum):
    theta, xi, y = matrix(spectrum), rates(N), targets(N, C)
    value = training_coefficients(theta, xi, y, method=method)
    assert relative(value, dense_coefficients(theta, xi, y)) < 1e-10


@pytest.mark.parametrize("method", ["krylov", "eigh"])
def test_untrained_samples_stay_at_zero_and_do_not_disturb_the_others(x64, method):
    theta, xi, y = matrix(kernel_spectrum(N)), rates(N), targets(N, C)
    xi[::4] = 0
    value = training_coefficients(theta, xi, y, method=method)
    assert not np.any(value[::4])
    assert relative(value, dense_coefficients(theta, xi, y)) < 1e-10


@pytest.mark.parametrize("method", ["krylov", "eigh"])
def test_no_training_gives_zero_coefficients_exactly(x64, method):
    solution = solve(matrix(kernel_spectrum(N)), np.zeros(N), targets(N, C), method=method)
    assert not np.any(solution.coefficients)
    assert solution.converged
    assert solution.error_bound == 0


@pytest.mark.parametrize("columns", [np.zeros((N, C)), np.ones((N, 1)) * np.ones((1, C)), np.eye(N)[:, :C]])
def test_targets_of_any_rank_are_solved(x64, columns):
    theta, xi = matrix(kernel_spectrum(N)), rates(N)
    value = training_coefficients(theta, xi, columns)
    np.testing.assert_allclose(value, dense_coefficients(theta, xi, columns), atol=1e-10)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("blocks", [3, 6, 10])
def test_error_bound_bounds_the_true_error_and_is_sharp_once_it_is_small(x64, scale, blocks):
    theta, xi, y = matrix(kernel_spectrum(N)), rates(N) * scale, targets(N, C)
    solution = solve(theta, xi, y, max_blocks=blocks, tol=1e-15, fallback=False)
    error = weighted_error(solution.coefficients, dense_coefficients(theta, xi, y), xi)
    assert error <= 1.05 * solution.error_bound
    if error < 1e-2:
        assert solution.error_bound <= 10 * max(error, 1e-13)


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_result_meets_the_tolerance_asked_for_and_stops_when_it_does(x64, tol):
    theta, xi, y = matrix(kernel_spectrum(N)), rates(N), targets(N, C)
    loose, tight = solve(theta, xi, y, tol=tol), solve(theta, xi, y, tol=1e-12)
    assert weighted_error(loose.coefficients, dense_coefficients(theta, xi, y), xi) < tol
    assert loose.products < tight.products
    assert loose.converged
    assert not loose.fell_back


def test_eight_products_reach_twelve_digits_at_the_norm_adversarial_ntk_reaches(x64):
    n, c = 200, 10
    theta, y = matrix(np.concatenate([[69.0], kernel_spectrum(n - 1, 7.0)])), targets(n, c)
    solution = solve(theta, np.ones(n), y, tol=1e-12)
    assert solution.products == 8
    assert relative(solution.coefficients, dense_coefficients(theta, np.ones(n), y)) < 1e-12


def test_float32_is_solved_in_float32():
    theta, xi, y = matrix(kernel_spectrum(N)), rates(N), targets(N, C)
    single = [np.asarray(array, np.float32) for array in (theta, xi, y)]
    solution = solve(*single)
    assert solution.coefficients.dtype == jnp.float32
    assert solution.converged
    assert not solution.fell_back
    assert relative(solution.coefficients, dense_coefficients(theta, xi, y)) < 1e-5


@pytest.mark.parametrize("late", [1e4, 1e8])
def test_late_times_fall_back_to_the_eigendecomposition_and_say_so(x64, late):
    n, c = 120, 2
    theta, y = matrix(kernel_spectrum(n)), targets(n, c)
    xi = np.full(n, late)
    with pytest.warns(RuntimeWarning, match="8 Krylov blocks did not reach"):
        solution = solve(theta, xi, y, max_blocks=8)
    assert solution.fell_back
    assert solution.converged
    values, vectors = np.linalg.eigh(theta)
    exact = vectors @ ((-np.expm1(-late * values) / values)[:, None] * (vectors.T @ y))
    assert relative(solution.coefficients, exact) < 1e-9


def test_without_fallback_an_unfinished_result_says_it_is_one(x64):
    n, c = 120, 2
    solution = solve(matrix(kernel_spectrum(n)), np.full(n, 1e4), targets(n, c), max_blocks=8, fallback=False)
    assert not solution.converged
    assert not solution.fell_back
    assert solution.error_bound > 1e-3


def test_no_krylov_space_is_built_for_a_handful_of_samples(x64):
    theta, xi, y = matrix([3.0, 1.0, 0.2]), rates(3), targets(3, 2)
    solution = solve(theta, xi, y)
    assert solution.products == 0
    assert relative(solution.coefficients, dense_coefficients(theta, xi, y)) < 1e-13


def test_nan_in_any_argument_stays_visible(x64):
    clean = [jnp.asarray(array) for array in (matrix(kernel_spectrum(N)), rates(N), targets(N, C))]
    for position, spoilt in enumerate(clean):
        arrays = [*clean[:position], spoilt.at[(0,) * spoilt.ndim].set(jnp.nan), *clean[position + 1 :]]
        solution = solve(*arrays, fallback=False)
        assert not solution.converged
        assert jnp.isnan(solution.coefficients).any()


def test_jit_and_vmap_agree_with_one_call_at_a_time(x64):
    theta, y = jnp.asarray(matrix(kernel_spectrum(N))), jnp.asarray(targets(N, C))
    many = jnp.stack([jnp.asarray(rates(N, seed)) * scale for seed, scale in ((0, 0.1), (1, 1.0), (2, 20.0))])
    one = jax.jit(lambda xi: training_coefficients(theta, xi, y))
    together = jax.vmap(one)(many)
    for xi, value in zip(many, together, strict=True):
        np.testing.assert_allclose(value, one(xi), rtol=1e-9, atol=1e-12)
        assert relative(value, dense_coefficients(np.asarray(theta), np.asarray(xi), np.asarray(y))) < 1e-9


def good():
    return {"theta": np.eye(4), "xi": np.ones(4), "targets": np.ones((4, 2))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"theta": np.ones((4, 3))}, ValueError, "theta must be a square matrix"),
        ({"theta": np.zeros((0, 0))}, ValueError, "theta must be a square matrix"),
        ({"xi": np.ones(3)}, ValueError, r"xi must have shape \(4,\)"),
        ({"xi": np.array([1.0, -0.5, 1, 1])}, ValueError, "xi must be non-negative, got a smallest entry of -0.5"),
        ({"targets": np.ones(4)}, ValueError, r"targets must have shape \(4, c\)"),
        ({"targets": np.ones((5, 2))}, ValueError, r"targets must have shape \(4, c\)"),
        ({"targets": np.ones((4, 2), np.float32)}, TypeError, "share one floating dtype"),
        ({"theta": np.eye(4, dtype=int)}, TypeError, "share one floating dtype"),
        ({"method": "expm"}, ValueError, "method must be 'krylov' or 'eigh', got 'expm'"),
        ({"max_blocks": 1}, ValueError, "max_blocks must be at least 2, got 1"),
        ({"tol": 0.0}, ValueError, "tol must be positive, got 0"),
        ({"tol": float("nan")}, ValueError, "tol must be positive, got nan"),
    ],
)
def test_bad_input_is_refused_by_name(x64, unchecked, change, error, message):
    with pytest.raises(error, match=message):
        solve(**(good() | change))
