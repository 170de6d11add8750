"""The built network against the formula, the layers written down, and brute force; parameters counted; its judge."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv import attacks
from ntkadv.cgro import (
    build_cgro_classifier,
    class_distance,
    judge_cgro_classifier,
    parameter_bound,
    parameter_counts,
    small_margin,
)
from ntkadv.cgro.representation import forward

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

SHAPES = [((2, 3, 2), 7, 3), ((1, 1, 1), 3, 2), ((1, 5, 1), 4, 2), ((2, 2, 2), 6, 2), ((1, 7, 3), 5, 4)]


def linear(shape, classes, seed=1):
    weights = jnp.asarray(np.random.default_rng(seed).normal(size=(int(np.prod(shape)), classes)))
    return eqx.Partial(lambda w, x: (x.reshape(len(x), -1) - 0.5) @ w.astype(x.dtype), weights)


def problem(shape, n, classes, dtype=np.float64):
    """Images, labels, and points: anywhere, in balls, and on their rims."""
    rng = np.random.default_rng(0)
    x, y = rng.random((n, *shape)).astype(dtype), np.arange(n) % classes
    delta = class_distance(x, y) / 3
    near = x[rng.integers(n, size=600)] + rng.uniform(-1, 1, (600, *shape)) * delta * rng.uniform(
        0.2, 1.6, (600, 1, 1, 1)
    )
    points = np.concatenate([rng.random((200, *shape)), np.clip(near, 0, 1), x]).astype(dtype)
    return x, y, delta, points


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("shape", "n", "classes"), SHAPES)
def test_the_network_is_the_formula(shape, n, classes, fused, x64):
    x, y, delta, points = problem(shape, n, classes)
    clean = linear(shape, classes)
    network = build_cgro_classifier(clean, x, y, delta=delta, fused=fused)
    values = np.asarray(network(jnp.asarray(points)))
    distances = np.abs(points[:, None] - x[None]).reshape(len(points), n, -1).max(axis=2)
    np.testing.assert_allclose(network.distances(jnp.asarray(points)), distances, atol=1e-14)

    off_rims = ((distances <= delta) | (distances >= delta + network.tau)).all(axis=1)
    in_ball = distances <= delta
    assert off_rims.sum() > 300
    if np.prod(shape) > 1:
        assert (off_rims & in_ball.any(axis=1)).sum() > 30
        assert (off_rims & ~in_ball.any(axis=1)).sum() > 100
    signs = 2.0 * (y[:, None] == np.arange(classes)) - 1
    formula = np.where(in_ball.any(axis=1)[:, None], in_ball @ signs, np.asarray(clean(jnp.asarray(points))))
    np.testing.assert_allclose(values[off_rims], formula[off_rims], atol=1e-6)
    # A margin, not its size, is what the formula has where balls of one class overlap.
    assert (np.argmax(values, axis=1) == np.argmax(formula, axis=1))[off_rims].all()


def test_the_binary_network_is_that_of_the_theorem(x64):
    x, y, delta, points = problem((2, 3, 2), 8, 2)
    signs = 2.0 * y - 1
    weights = np.random.default_rng(2).normal(size=12)

    def clean(z):
        score = (z.reshape(len(z), -1) - 0.5) @ weights
        return jnp.stack([jnp.zeros_like(score), score], axis=1)

    values = np.stack([0 * signs, signs], axis=1)
    network = build_cgro_classifier(clean, x, y, delta=delta, values=values, tau=1e-4)
    score = np.asarray(network(jnp.asarray(points)))
    distances = np.abs(points[:, None] - x[None]).reshape(len(points), 8, -1).max(axis=2)
    inside = distances <= delta
    clear = ((distances <= delta) | (distances >= delta + 1e-4)).all(axis=1)
    f_clean = (points.reshape(len(points), -1) - 0.5) @ weights
    formula = f_clean * (1 - inside.any(axis=1)) + inside @ signs
    np.testing.assert_allclose(score[clear, 1], formula[clear], atol=1e-6)
    np.testing.assert_array_equal(score[:, 0], 0)


@pytest.mark.parametrize(("shape", "n", "classes"), SHAPES)
def test_it_is_a_relu_network_of_the_stated_size(shape, n, classes, x64):
    x, y, delta, points = problem(shape, n, classes)
    clean = linear(shape, classes)
    network = build_cgro_classifier(clean, x, y, delta=delta, tau=delta / 7, bound=3.0, fused=False)
    layers = network.layers()
    flat, logits = points.reshape(len(points), -1), np.asarray(clean(jnp.asarray(points)))
    np.testing.assert_allclose(network(jnp.asarray(points)), forward(layers, flat, logits), atol=1e-10)
    counted = {layer.name: layer.matrix.nnz + (0 if layer.bias is None else layer.bias.size) for layer in layers}
    assert counted == network.parameter_counts()
    assert sum(counted.values()) <= parameter_bound(n, flat.shape[1], classes)


def test_parameters_grow_linearly_in_images_and_pixels():
    for n, size in itertools.product((1, 10, 1000), (1, 2, 3, 64, 100, 784, 3072)):
        counts = parameter_counts(n, size, 10)
        assert sum(counts.values()) <= parameter_bound(n, size, 10)
    tree = sum(count for name, count in parameter_counts(1, 1024, 1).items() if name.startswith("maximum"))
    assert tree == 6 * (1024 - 1) + 2 * 10  # a power of two, and what carries the clean value over ten levels


def test_training_images_are_robust_and_far_images_are_those_of_the_clean_classifier():
    x, y, delta, _ = problem((2, 3, 2), 7, 3, np.float32)
    clean = linear((2, 3, 2), 3)
    network = build_cgro_classifier(clean, x, y, delta=delta)
    rng = np.random.default_rng(5)
    corners = np.clip(x + np.float32(0.999 * delta) * rng.choice([-1, 1], (50, *x.shape)).astype(np.float32), 0, 1)
    values = np.asarray(network(jnp.asarray(corners.reshape(-1, 2, 3, 2))))
    np.testing.assert_array_equal(np.argmax(values, axis=1), np.tile(y, 50))
    far = rng.random((2000, 2, 3, 2)).astype(np.float32)
    far = far[np.asarray(network.distances(jnp.asarray(far))).min(axis=1) > delta + network.tau]
    assert len(far) > 500
    np.testing.assert_allclose(network(jnp.asarray(far)), clean(jnp.asarray(far)), atol=1e-5)


def test_tiles_change_nothing(x64):
    x, y, delta, points = problem((2, 3, 2), 7, 3)
    clean = linear((2, 3, 2), 3)
    whole, tiled = (
        build_cgro_classifier(clean, x, y, delta=delta, max_bytes=limit) for limit in (2**28, 2 * 4 * 810 * 12 * 8)
    )
    z = jnp.asarray(points[:810])
    np.testing.assert_allclose(whole(z), tiled(z), atol=1e-14)
    gradients = [jax.grad(lambda z, f=f: jnp.sum(f(z)[:, 0]))(z) for f in (whole, tiled)]
    np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-12)


@pytest.mark.slow
def test_the_judge_knows_what_the_balls_imply(key):
    rng = np.random.default_rng(6)
    x, y = rng.random((12, 2, 2, 1)).astype(np.float32), np.arange(12) % 2
    delta = 0.45 * class_distance(x, y)
    clean = linear((2, 2, 1), 2)
    network = build_cgro_classifier(clean, x, y, delta=delta)
    near = x[rng.integers(12, size=150)] + rng.uniform(-1.8, 1.8, (150, 2, 2, 1)) * delta * rng.random((150, 1, 1, 1))
    test, labels = np.clip(near, 0, 1).astype(np.float32), rng.integers(2, size=150)
    eps = 0.6 * delta
    pgd = attacks.PGD(attacks.Linf(0.1), steps=3, loss="margin")
    found = judge_cgro_classifier(network, test, labels, eps=eps, attacks=[pgd], key=key)

    distances = np.abs(test[:, None] - x[None]).reshape(150, 12, -1).max(axis=2)
    other = np.where(y != labels[:, None], distances, np.inf).min(axis=1)
    np.testing.assert_array_equal(found.inside, distances.min(axis=1) <= delta)
    np.testing.assert_array_equal(found.near_wrong, other <= eps + delta - 1e-6)
    assert found.near_wrong.sum() > 10
    assert found.certified.sum() > 3
    assert not found.worst[found.near_wrong].any()
    assert found.worst[found.certified].all()
    assert (found.worst <= found.clean & found.direct & found.transferred & found.balls).all()
    # Brute force: 5,000 points of each ball, none of which breaks what is certified.
    draws = rng.uniform(-1, 1, (5000, 2, 2, 1)).astype(np.float32)
    values = eqx.filter_jit(network)
    for image, label, certified in zip(test, labels, found.certified, strict=True):
        if certified:
            points = np.clip(image + np.float32(eps) * draws, 0, 1)
            assert (np.argmax(np.asarray(values(jnp.asarray(points))), axis=1) == label).all()
    assert found.shares()["inside"] == pytest.approx(np.mean(found.inside))

    own = judge_cgro_classifier(network, x, y, eps=0.99 * delta, attacks=[pgd], key=key)
    assert own.worst.all()
    assert own.certified.all()


@pytest.mark.slow
def test_only_points_of_small_margin_are_memorised(key):
    rng = np.random.default_rng(7)
    x = rng.random((40, 2, 2, 1)).astype(np.float32)
    clean = linear((2, 2, 1), 2)
    y = np.argmax(np.asarray(clean(jnp.asarray(x))), axis=1)
    eps = 0.4 * class_distance(x, y)
    attack = attacks.PGD(attacks.Linf(eps), steps=10, loss="margin")
    keep = small_margin(clean, x, y, attack=attack, key=key)
    # The worst lead of a linear classifier is known: each pixel goes by eps, up to the edge of the box.
    w = np.asarray(clean.args[0])
    difference = (w[:, 1] - w[:, 0])[None] * (2 * y[:, None] - 1)
    flat = x.reshape(40, -1)
    worst = np.clip(flat - eps * np.sign(difference), 0, 1)
    lead = np.sum((worst - 0.5) * difference, axis=1)
    np.testing.assert_array_equal(keep, lead <= 0)
    assert 0 < keep.sum() < 40
    network = build_cgro_classifier(clean, x, y, delta=eps, keep=keep)
    assert len(network.centres) == keep.sum()
    full = build_cgro_classifier(clean, x, y, delta=eps)
    assert sum(network.parameter_counts().values()) < sum(full.parameter_counts().values())
    found = judge_cgro_classifier(network, x, y, eps=0.99 * eps, attacks=[attack], key=key)
    assert found.worst[keep].all()


def test_bad_input_is_refused(unchecked, key):
    x, y, delta, _ = problem((2, 3, 2), 7, 3, np.float32)
    clean = linear((2, 3, 2), 3)
    gap = class_distance(x, y)
    with pytest.raises(ValueError, match=r"classes must be more than 2 delta = .* apart"):
        build_cgro_classifier(clean, x, y, delta=gap / 2)
    with pytest.raises(ValueError, match="apart, but two images of different classes are at distance 0"):
        build_cgro_classifier(clean, np.concatenate([x, x[:1]]), np.append(y, 2), delta=1e-3)
    with pytest.raises(ValueError, match="tau must be at most"):
        build_cgro_classifier(clean, x, y, delta=delta, tau=gap)
    with pytest.raises(ValueError, match="delta must be finite and positive"):
        build_cgro_classifier(clean, x, y, delta=0.0)
    with pytest.raises(ValueError, match="bound must be finite and positive"):
        build_cgro_classifier(clean, x, y, delta=delta, bound=-1.0)
    with pytest.raises(ValueError, match=r"values must have shape \(7, 3\)"):
        build_cgro_classifier(clean, x, y, delta=delta, values=np.ones((7, 2)))
    with pytest.raises(ValueError, match="keep must say True or False for each of 7 images"):
        build_cgro_classifier(clean, x, y, delta=delta, keep=np.ones(7))
    with pytest.raises(TypeError, match="model must be a function"):
        build_cgro_classifier(0, x, y, delta=delta)
    network = build_cgro_classifier(clean, x, y, delta=delta)
    with pytest.raises(ValueError, match="attacks must be in l_inf"):
        judge_cgro_classifier(network, x, y, eps=0.1, attacks=[attacks.PGD(attacks.L2(0.1))], key=key)
    with pytest.raises(ValueError, match="n must be at least 0"):
        parameter_counts(-1, 2, 2)
