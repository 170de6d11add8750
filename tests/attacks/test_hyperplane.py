"""Projections onto a hyperplane in the box against scipy: linear programs, and a root in float64."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import brentq, linprog, minimize

from ntkadv.attacks._hyperplane import NORMS, dual_norm, step_to_hyperplane

ORDER = {"Linf": np.inf, "L2": 2, "L1": 1}
SIZE = 6
every_norm = pytest.mark.parametrize("norm", NORMS)


def project(norm, point, normal, gap):
    """One point, in the dtype of `point`."""
    image = (1, 1, 1, -1)
    change = step_to_hyperplane(
        norm, jnp.asarray(point.reshape(image)), jnp.asarray(normal.reshape(image)), jnp.asarray(np.array([gap]))
    )
    return np.asarray(change).reshape(-1)


def reachable(point, normal, sign):
    """What <normal, change> is where the change goes as far up, or down, as the box allows."""
    ends = np.stack([-normal * point, normal * (1 - point)])
    return ends.max(0).sum() if sign > 0 else ends.min(0).sum()


def by_linear_program(norm, point, normal, gap):
    """Smallest norm of a change that reaches the gap."""
    d = len(point)
    if norm == "Linf":
        objective, equality = np.eye(d + 1)[d], np.append(normal, 0)
        within = np.vstack([np.c_[np.eye(d), -np.ones(d)], np.c_[-np.eye(d), -np.ones(d)]])
        bounds = [(-z, 1 - z) for z in point] + [(0, None)]
        solved = linprog(objective, within, np.zeros(2 * d), equality[None], [gap], bounds)
    else:
        bounds = [(0, 1 - z) for z in point] + [(0, z) for z in point]
        solved = linprog(np.ones(2 * d), A_eq=np.append(normal, -normal)[None], b_eq=[gap], bounds=bounds)
    assert solved.success, solved.message
    return solved.fun


def by_root(point, normal, gap):
    """The Euclidean projection: the box's clip(z + t w), for the t at which it reaches the gap."""

    def change(t):
        return np.clip(point + t * normal, 0, 1) - point

    largest = 2 / np.abs(normal[normal != 0]).min()
    return change(brentq(lambda t: normal @ change(t) - gap, -largest, largest, xtol=1e-15))


@st.composite
def cases(draw):
    pixels = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1, width=32))
    weights = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2.0]), st.floats(-4, 4, width=32))
    point = draw(hnp.arrays(np.float64, SIZE, elements=pixels))
    normal = draw(hnp.arrays(np.float64, SIZE, elements=weights.map(lambda w: 0.0 if abs(w) < 1e-3 else w)))
    share = draw(st.floats(0.01, 0.99))
    return point, normal, draw(st.sampled_from([-1, 1])) * share


@pytest.mark.usefixtures("x64")
@every_norm
@given(case=cases())
@settings(max_examples=40)
def test_change_reaches_the_hyperplane_and_none_is_smaller(norm, case):
    point, normal, share = case
    gap = abs(share) * reachable(point, normal, share)
    change = project(norm, point, normal, gap)
    assert (point + change >= -1e-12).all()
    assert (point + change <= 1 + 1e-12).all()
    np.testing.assert_allclose(normal @ change, gap, atol=1e-12)
    if gap == 0:
        np.testing.assert_allclose(change, 0, atol=1e-12)
    elif norm == "L2":
        np.testing.assert_allclose(change, by_root(point, normal, gap), atol=1e-9)
    else:
        smallest = by_linear_program(norm, point, normal, gap)
        # The solver takes an equality as met within 1e-7.
        np.testing.assert_allclose(np.linalg.norm(change, ORDER[norm]), smallest, atol=2e-7)


@pytest.mark.usefixtures("x64")
def test_euclidean_projection_solves_the_quadratic_program():
    rng = np.random.default_rng(0)
    for _ in range(5):
        point, normal = rng.random(SIZE), rng.normal(size=SIZE)
        gap = 0.6 * reachable(point, normal, 1)
        solved = minimize(
            lambda d: d @ d,
            np.zeros(SIZE),
            jac=lambda d: 2 * d,
            bounds=list(zip(-point, 1 - point, strict=True)),
            constraints={"type": "eq", "fun": lambda d, w=normal, g=gap: w @ d - g, "jac": lambda d, w=normal: w},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(project("L2", point, normal, gap), solved.x, atol=1e-6)


@pytest.mark.usefixtures("x64")
@every_norm
@given(case=cases())
@settings(max_examples=20)
def test_out_of_reach_the_change_goes_as_far_as_the_box_allows(norm, case):
    point, normal, share = case
    gap = 1.5 * reachable(point, normal, share) + np.sign(share)
    corner = np.where(normal == 0, point, (normal * np.sign(share) > 0).astype(float))
    np.testing.assert_allclose(point + project(norm, point, normal, gap), corner, atol=1e-12)


@every_norm
def test_without_walls_the_change_has_the_length_of_the_gap_over_the_dual_norm(norm, key):
    normal = jax.random.normal(key, (4, 3, 4, 2))
    gap = jnp.array([0.1, -0.2, 0.05, 0.0])
    change = np.asarray(step_to_hyperplane(norm, jnp.full(normal.shape, 0.5), normal, gap)).reshape(4, -1)
    expected = np.abs(gap) / np.linalg.norm(
        np.asarray(normal).reshape(4, -1), {1: np.inf, 2: 2, np.inf: 1}[ORDER[norm]], axis=1
    )
    np.testing.assert_allclose(np.linalg.norm(change, ORDER[norm], axis=1), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.abs(gap) / dual_norm(norm, normal), expected, rtol=1e-5)


@every_norm
def test_weights_of_any_scale_give_finite_changes_in_the_box(norm):
    point = np.array([0.0, 1.0, 0.3, 0.7, 0.5, 0.0], np.float32)
    for normal in ([0] * 6, [1e-30, -1e-38, 0, 1, 2, 3], [1e30, -1e20, 1e-30, 0, 1, -1], [1e-25] * 6):
        for gap in (0.0, 1e-30, 1e-3, -1.0, 1e30):
            change = project(norm, point, np.array(normal, np.float32), np.float32(gap))
            assert np.isfinite(change).all()
            assert (point + change >= 0).all()
            assert (point + change <= 1).all()
            assert not change[np.array(normal) == 0].any()


@every_norm
def test_large_images_are_projected_exactly_in_float32(norm):
    rng = np.random.default_rng(1)
    point, normal = rng.random(3072), rng.normal(size=3072) * np.exp(rng.normal(size=3072))
    gap = 0.3 * reachable(point, normal, 1)
    change = project(norm, point.astype(np.float32), normal.astype(np.float32), np.float32(gap)).astype(np.float64)
    np.testing.assert_allclose(normal @ change, gap, rtol=1e-5)
    if norm == "L2":
        np.testing.assert_allclose(change, by_root(point, normal, gap), atol=1e-5)
    else:
        smallest = by_linear_program(norm, point, normal, gap)
        np.testing.assert_allclose(np.linalg.norm(change, ORDER[norm]), smallest, rtol=1e-5)
