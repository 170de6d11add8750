"""Patch data: its distribution against its definition, and the linear attack against a search over the ball."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ntkadv.cgro import PatchDistribution, PatchScales, linear_attack, to_images


@pytest.fixture
def data(x64, key):
    distribution = PatchDistribution(12, alpha=2.0, sigma=0.7, num_patches=4, signal_position="random")
    return distribution.sample(3000, key=key, w_star=distribution.direction(jax.random.key(1)))


def test_one_patch_is_the_label_times_the_signal_and_the_others_are_orthogonal_to_it(data):
    x, y, w = np.asarray(data.x), np.asarray(data.y), np.asarray(data.w_star)
    places = np.asarray(data.position)
    np.testing.assert_allclose(x[np.arange(len(x)), places], 2.0 * y[:, None] * w, atol=1e-12)
    others = np.stack([np.delete(sample, place, axis=0) for sample, place in zip(x, places, strict=True)])
    np.testing.assert_array_equal(np.asarray(data.noise), others)
    np.testing.assert_allclose(others @ w, 0, atol=1e-12)
    assert sorted(set(y.tolist())) == [-1.0, 1.0]
    assert np.sum(y) == 0
    assert scipy.stats.chisquare(np.bincount(places, minlength=4)).pvalue > 1e-3


def test_noise_is_gaussian_with_covariance_sigma_squared_times_the_projection(data):
    noise, w = np.asarray(data.noise).reshape(-1, 12), np.asarray(data.w_star)
    covariance = noise.T @ noise / len(noise)
    expected = 0.7**2 * (np.eye(12) - np.outer(w, w))
    # Entries of a sample covariance have a standard deviation of at most sigma^2 sqrt(2 / n).
    assert np.abs(covariance - expected).max() < 6 * 0.7**2 * math.sqrt(2 / len(noise))
    basis = np.linalg.svd(np.eye(12) - np.outer(w, w))[0][:, :11]
    squares = np.sum((noise @ basis) ** 2, axis=1) / 0.7**2
    assert scipy.stats.kstest(squares, scipy.stats.chi2(11).cdf).pvalue > 1e-3
    assert scipy.stats.kstest((noise @ basis).ravel() / 0.7, "norm").pvalue > 1e-3


def test_noise_does_not_know_the_label(data):
    noise, y = np.asarray(data.noise).reshape(len(data.y), -1), np.asarray(data.y)
    correlations = noise.T @ y / len(y) / 0.7
    assert np.abs(correlations).max() < 5 / math.sqrt(len(y))


def test_scales_are_powers_of_the_dimension():
    scales = PatchScales(signal_log_power=1.0, gap_log_power=2.0, gap_factor=0.5)
    for d in (10, 1000):
        assert scales.alpha(d) == pytest.approx(d**0.249 * math.log(d))
        assert scales.sigma(d) == pytest.approx(d**-0.509)
        assert 1 - scales.delta(d) / scales.alpha(d) == pytest.approx(0.5 / (math.sqrt(d) * math.log(d) ** 2))
        distribution = PatchDistribution.scaled(d, scales)
        assert (distribution.alpha, distribution.sigma) == (scales.alpha(d), scales.sigma(d))
        assert distribution.noise_norm == pytest.approx(scales.sigma(d) * math.sqrt(d - 1))


def test_the_linear_attack_gives_the_reported_signal(data):
    attacked = linear_attack(data, 1.9)
    moved = np.asarray(attacked)[np.arange(len(data.y)), np.asarray(data.position)]
    np.testing.assert_allclose(moved, (2.0 - 1.9) * np.asarray(data.y)[:, None] * np.asarray(data.w_star), atol=1e-12)
    assert np.sum(np.any(np.asarray(attacked != data.x), axis=2)) == len(data.y)


@pytest.mark.parametrize("where", ["signal", "all"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_point_of_the_ball_lowers_a_linear_score_more(data, norm, where, key):
    small = jax.tree.map(lambda leaf: leaf[:20] if leaf.ndim and len(leaf) == 3000 else leaf, data)
    w = jax.random.normal(jax.random.key(3), (12,))
    attacked = linear_attack(small, 0.8, w=w, where=where, norm=norm)
    change = np.asarray(attacked - small.x)
    size = np.abs(change).max(axis=(1, 2)) if norm == "linf" else np.sqrt((change**2).sum(axis=(1, 2)))
    np.testing.assert_allclose(size, 0.8, rtol=1e-12)
    lowered = np.asarray(small.y) * np.sum(change @ np.asarray(w), axis=1)
    # Hoelder's inequality is the bound; on all patches w is repeated four times.
    repeated = np.tile(np.asarray(w), 4 if where == "all" else 1)
    bound = 0.8 * (np.abs(repeated).sum() if norm == "linf" else np.linalg.norm(repeated))
    np.testing.assert_allclose(lowered, -bound, rtol=1e-12)
    draws = np.asarray(jax.random.normal(key, (200, *change.shape)))
    draws = np.sign(draws) if norm == "linf" else draws / np.sqrt((draws**2).sum(axis=(2, 3), keepdims=True))
    if where == "signal":
        draws = draws * np.asarray(jax.nn.one_hot(small.position, 4))[..., None]
    assert (0.8 * np.sum(draws @ np.asarray(w), axis=2) * np.asarray(small.y) > lowered).all()


def test_images_keep_distances_up_to_one_scale_and_leave_room(data):
    attacked = data._replace(x=linear_attack(data, 1.5))
    images = to_images(data, room=1.5)
    (pixels,) = images.images
    assert pixels.shape == (3000, 4, 12, 1)
    np.testing.assert_allclose(images.back(pixels), data.x, atol=1e-5)
    moved = 0.5 + images.scale * np.asarray(attacked.x)
    assert moved.min() >= 0
    assert moved.max() <= 1
    distance = np.linalg.norm(moved - pixels[..., 0], axis=(1, 2))
    np.testing.assert_allclose(distance, 1.5 * images.scale, rtol=1e-5)


def test_bad_input_is_refused(unchecked, key):
    with pytest.raises(ValueError, match=r"d = 2 is too small for these scales: delta = alpha \(1 - 1.02\)"):
        PatchDistribution.scaled(2)
    with pytest.raises(ValueError, match="d = 5 is too small"):
        PatchScales(gap_factor=10.0).delta(5)
    with pytest.raises(ValueError, match="d must be at least 2"):
        PatchDistribution(1, alpha=1.0, sigma=1.0)
    with pytest.raises(ValueError, match="signal_position must be below num_patches = 2, got 2"):
        PatchDistribution(4, alpha=1.0, sigma=1.0, signal_position=2)
    with pytest.raises(ValueError, match="sigma must be finite and positive"):
        PatchDistribution(4, alpha=1.0, sigma=0.0)
    with pytest.raises(ValueError, match="noise_factor must be finite and positive"):
        PatchScales(noise_factor=-1.0)
    distribution = PatchDistribution(4, alpha=1.0, sigma=1.0)
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        distribution.sample(1, key=key)
    with pytest.raises(ValueError, match="w_star must be a unit vector of 4 numbers"):
        distribution.sample(4, key=key, w_star=jnp.ones(4))
    with pytest.raises(TypeError, match="key must be a random key"):
        distribution.sample(4, key=0)
    data = distribution.sample(4, key=key)
    with pytest.raises(ValueError, match="w must not be zero"):
        linear_attack(data, 0.5, w=jnp.zeros(4))
    with pytest.raises(ValueError, match="delta must be finite and not negative"):
        linear_attack(data, -0.5)
    with pytest.raises(ValueError, match="at least one data set"):
        to_images()
