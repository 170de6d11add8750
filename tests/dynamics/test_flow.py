"""The true flow against the closed form where that is exact, and the gap where it is not."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from problems import matrix, targets

from ntkadv.dynamics import closed_form_gap, integrate_flow

N, C = 6, 2
THETA = matrix([6.0, 3.0, 1.5, 0.8, 0.3, 0.1])
Y = targets(N, C)
ARK = np.linspace(0.2, 1.5, N)
TIMES = [0.0, 0.3, 1.0, 2.0]


def test_flow_at_constant_rates_is_a_matrix_exponential():
    rates = np.exp(ARK)
    for time, residual in zip(TIMES, integrate_flow(THETA, Y, rates, TIMES), strict=True):
        np.testing.assert_allclose(residual, scipy.linalg.expm(-time * THETA * rates) @ Y, atol=1e-10)


def test_stiff_flow_is_integrated_too():
    theta = matrix([2e3, 50.0, 1.0, 0.5, 0.2, 0.1])
    value = integrate_flow(theta, Y, np.ones(N), [2.0], rtol=1e-8)[0]
    np.testing.assert_allclose(value, scipy.linalg.expm(-2 * theta) @ Y, atol=1e-6)


def test_flow_is_a_product_of_exponentials_where_rates_jump():
    """Piecewise constant rates, the jump smoothed by nothing: exp(-Theta E2) exp(-Theta E1) Y."""
    first, second = np.exp(ARK), np.exp(ARK[::-1])
    value = integrate_flow(THETA, Y, lambda t: jnp.where(t < 0.5, first, second), [1.0], rtol=1e-9)[0]
    exact = scipy.linalg.expm(-0.5 * THETA * second) @ scipy.linalg.expm(-0.5 * THETA * first) @ Y
    np.testing.assert_allclose(value, exact, atol=1e-6)


def test_times_may_come_in_any_order_and_more_than_once():
    value = integrate_flow(THETA, Y, np.ones(N), [1.0, 0.0, 2.0, 1.0])
    np.testing.assert_array_equal(value[1], Y)
    np.testing.assert_array_equal(value[0], value[3])
    np.testing.assert_allclose(value[2], integrate_flow(THETA, Y, np.ones(N), [2.0])[0], atol=1e-9)
    np.testing.assert_array_equal(integrate_flow(THETA, Y, np.ones(N), [0.0])[0], Y)


def test_closed_form_is_exact_at_constant_rates():
    assert np.all(closed_form_gap(THETA, Y, np.exp(ARK), TIMES) < 1e-8)


def test_closed_form_is_exact_where_all_rates_vary_alike():
    assert np.all(closed_form_gap(THETA, Y, lambda t: (1 + jnp.sin(3 * t) ** 2) * np.exp(ARK), TIMES) < 1e-8)


def test_closed_form_is_off_where_a_common_schedule_meets_different_arks():
    gap = closed_form_gap(THETA, Y, lambda t: jnp.exp(ARK * (1 - jnp.cos(3 * t))), TIMES)
    assert gap[0] == 0
    assert 1e-3 < np.max(gap) < 0.2


def test_closed_form_is_further_off_where_each_sample_has_a_schedule_of_its_own():
    phases = np.linspace(0, np.pi, N)
    common = closed_form_gap(THETA, Y, lambda t: jnp.exp(ARK * (1 - jnp.cos(3 * t))), TIMES)
    own = closed_form_gap(THETA, Y, lambda t: jnp.exp(ARK * (1 - jnp.cos(3 * t + phases))), TIMES)
    assert np.max(own) > np.max(common) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": np.eye(5)}, r"theta must have shape \(6, 6\)"),
        ({"theta": np.triu(np.ones((N, N)))}, "theta must be symmetric"),
        ({"targets": Y[:, 0]}, r"targets must have shape \(n, c\)"),
        ({"targets": Y * np.nan}, "targets must be finite"),
        ({"rates": np.ones(5)}, r"rates must have shape \(6,\)"),
        ({"rates": -np.ones(N)}, "rates must not be negative"),
        ({"rates": np.full(N, np.inf)}, "rates must be finite"),
        ({"times": []}, "times must be a non-empty list"),
        ({"times": [-1.0]}, "times must be finite and not negative"),
        ({"times": [np.inf]}, "times must be finite and not negative"),
    ],
)
def test_bad_input_is_refused_by_name(unchecked, change, message):
    good = {"theta": THETA, "targets": Y, "rates": np.ones(N), "times": [1.0]}
    with pytest.raises(ValueError, match=message):
        integrate_flow(**(good | change))


def test_a_flow_that_takes_too_long_says_so():
    with pytest.raises(RuntimeError, match="within 5 steps"):
        integrate_flow(THETA, Y, np.ones(N), [10.0], max_steps=5)
