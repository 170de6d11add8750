import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings

from ntkadv.attacks import L2, Linf

SHAPE = (3, 2, 2, 3)
THREATS = [Linf(0.1), L2(0.3)]


def pixels(low, high):
    return hnp.arrays(np.float32, SHAPE, elements=st.floats(low, high, width=32))


def norms(threat, offset):
    flat = np.asarray(offset, np.float64).reshape(len(offset), -1)
    return np.linalg.norm(flat, ord=np.inf if threat.norm == "Linf" else 2, axis=1)


@given(x=pixels(-8, 8), x_clean=pixels(0, 1), eps=st.floats(0, 1), threat=st.sampled_from([Linf, L2]))
@settings(max_examples=60)
def test_projected_points_are_in_the_ball_and_in_the_box(x, x_clean, eps, threat):
    threat = threat(eps)
    projected = np.asarray(threat.project(jnp.asarray(x), jnp.asarray(x_clean)))
    assert (norms(threat, projected.astype(np.float64) - x_clean) <= eps + 1e-6).all()
    assert projected.min() >= 0
    assert projected.max() <= 1


@given(x=pixels(-2, 2), x_clean=pixels(0, 1), other=pixels(0, 1), eps=st.floats(0.01, 1))
@settings(max_examples=60)
def test_linf_projection_is_the_nearest_allowed_point(x, x_clean, other, eps):
    nearest = np.asarray(Linf(eps).project(jnp.asarray(x), jnp.asarray(x_clean)), np.float64)
    allowed = np.clip(other.astype(np.float64), x_clean - eps, x_clean + eps)
    assert ((x - nearest) * (allowed - nearest)).sum() <= 1e-5


@given(offset=pixels(-2, 2), other=pixels(-1, 1), eps=st.floats(0.01, 0.5))
@settings(max_examples=60)
def test_l2_projection_is_the_nearest_point_of_a_ball_inside_the_box(offset, other, eps):
    centre = np.full(SHAPE, 0.5, np.float32)
    x = centre + offset
    nearest = np.asarray(L2(eps).project(jnp.asarray(x), jnp.asarray(centre)), np.float64)
    allowed = centre + other * np.minimum(1, eps / np.maximum(norms(L2(eps), other), 1e-9))[:, None, None, None]
    assert ((x - nearest) * (allowed - nearest)).sum() <= 1e-5


@pytest.mark.parametrize("threat", THREATS)
def test_allowed_points_are_left_where_they_are(threat, key):
    x_clean = jax.random.uniform(key, SHAPE)
    inside = threat.random_point(jax.random.fold_in(key, 1), x_clean)
    np.testing.assert_allclose(threat.project(inside, x_clean), inside, atol=1e-7)


@pytest.mark.parametrize("threat", THREATS)
def test_step_is_a_unit_vector_that_gains_the_dual_norm(threat, key):
    gradient = jax.random.normal(key, SHAPE) * 1e-3
    step = np.asarray(threat.step(gradient), np.float64)
    flat = np.asarray(gradient, np.float64).reshape(len(gradient), -1)
    dual = np.linalg.norm(flat, ord=1 if threat.norm == "Linf" else 2, axis=1)
    np.testing.assert_allclose(norms(threat, step), 1, rtol=1e-6)
    np.testing.assert_allclose((step.reshape(len(step), -1) * flat).sum(1), dual, rtol=1e-6)


@pytest.mark.parametrize("threat", THREATS)
def test_step_along_a_zero_gradient_is_zero(threat):
    np.testing.assert_array_equal(threat.step(jnp.zeros(SHAPE)), 0)


def test_l2_step_survives_gradients_whose_square_underflows(key):
    gradient = jax.random.normal(key, SHAPE)
    np.testing.assert_allclose(L2(1).step(gradient * 1e-30), L2(1).step(gradient), rtol=1e-5)


@pytest.mark.parametrize("threat", THREATS)
def test_distance_is_the_norm_of_each_sample(threat, key):
    x, x_clean = jax.random.uniform(key, (2, *SHAPE))
    np.testing.assert_allclose(threat.distance(x, x_clean), norms(threat, x - x_clean), rtol=1e-6)


def test_random_points_are_uniform_in_the_linf_ball(key):
    centre = jnp.full((200, 2, 2, 1), 0.5)
    offset = np.asarray(Linf(0.25).random_point(key, centre) - 0.5).ravel()
    assert scipy.stats.kstest(offset, "uniform", (-0.25, 0.5)).pvalue > 0.01


def test_random_points_are_uniform_in_the_l2_ball(key):
    centre = jnp.full((800, 1, 2, 1), 0.5)
    offset = np.asarray(L2(0.25).random_point(key, centre) - 0.5).reshape(-1, 2) / 0.25
    radius, angle = np.linalg.norm(offset, axis=1), np.arctan2(*offset.T)
    assert scipy.stats.kstest(radius**2, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(angle, "uniform", (-np.pi, 2 * np.pi)).pvalue > 0.01


@pytest.mark.parametrize("threat", [Linf, L2])
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_impossible_eps_is_refused(threat, eps):
    with pytest.raises(ValueError, match="eps must be finite and not negative"):
        threat(eps)


def test_eps_in_units_of_255_is_refused():
    with pytest.raises(ValueError, match=r"eps is in units of pixels in \[0, 1\], got 8"):
        Linf(8)


def test_eps_that_is_not_a_number_is_refused(unchecked):
    with pytest.raises(TypeError, match="eps must be a number, got '8/255'"):
        Linf("8/255")
