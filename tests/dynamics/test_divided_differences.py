"""The scalar functions against mpmath, over spectra from nothing to 1e12."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkadv.dynamics.phi import exp_pair, growth_mean, growth_overlap, phi

rates = st.one_of(st.just(0.0), st.floats(-16, 12).map(lambda exponent: 10.0**exponent))


def exact_divided_difference(*points):
    """Divided difference of exp at the points, by the recursion, in digits enough to survive its cancellations."""
    points = sorted(mpmath.mpf(point) for point in points)
    if points[0] == points[-1]:
        return mpmath.exp(points[0]) / mpmath.factorial(len(points) - 1)
    upper, lower = exact_divided_difference(*points[1:]), exact_divided_difference(*points[:-1])
    return (upper - lower) / (points[-1] - points[0])


@pytest.fixture(autouse=True)
def many_digits():
    with mpmath.workdps(120):
        yield


def agrees(value, exact):
    exact = float(exact)
    return abs(float(value) - exact) <= 1e-14 * exact + 1e-300


@given(rates)
def test_phi_is_exact_over_all_spectra(s):
    with jax.enable_x64(True):
        assert agrees(phi(jnp.asarray(s)), exact_divided_difference(0, -s))


@given(rates)
def test_growth_mean_is_exact_over_all_spectra(a):
    with jax.enable_x64(True):
        assert agrees(growth_mean(jnp.asarray(a)), exact_divided_difference(0, 0, -a))


@given(rates, rates)
def test_exp_pair_is_exact_over_all_spectra(a, b):
    with jax.enable_x64(True):
        value, exact = float(exp_pair(jnp.asarray(a), jnp.asarray(b))), float(exact_divided_difference(-a, -b))
    assert value == pytest.approx(exact, rel=1e-14 * max(1.0, min(a, b)), abs=1e-300)


@given(rates, rates)
def test_growth_overlap_is_exact_over_all_spectra(a, b):
    with jax.enable_x64(True):
        value = growth_overlap(jnp.asarray([a]), jnp.asarray([b]))
    assert agrees(value[0, 0], exact_divided_difference(0, 0, -a, -b))


@given(rates, st.floats(-1e-9, 1e-9))
def test_nearly_equal_rates_do_not_cancel(a, shift):
    b = a * (1 + shift)
    with jax.enable_x64(True):
        value = growth_overlap(jnp.asarray([a]), jnp.asarray([b]))
    assert agrees(value[0, 0], exact_divided_difference(0, 0, -a, -b))


def test_growth_overlap_takes_every_pair_and_is_symmetric(x64):
    a, b = jnp.asarray([0.0, 0.3, 5.0, 70.0]), jnp.asarray([0.0, 2.0, 70.0])
    table = growth_overlap(a, b)
    assert table.shape == (4, 3)
    np.testing.assert_allclose(table, growth_overlap(b, a).T, rtol=1e-15)


def test_float32_stays_float32_and_is_as_exact_as_it_can_be():
    a = jnp.asarray([0.0, 1e-6, 0.5, 1.0, 30.0, 1e6], jnp.float32)
    with jax.enable_x64(True):
        reference = growth_overlap(a.astype(jnp.float64), a.astype(jnp.float64))
    value = growth_overlap(a, a)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, reference, rtol=1e-6)
