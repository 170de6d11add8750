"""FAB against AutoAttack's, and against exact distances to the boundaries of linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_models import CLASSES, IMAGE, Linear, images, labels_of, linear, smooth, zero
from scipy.optimize import linprog

from ntkadv.attacks import L1, L2, Linf
from ntkadv.attacks.base import sample_keys
from ntkadv.attacks.fab import FAB

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

THREATS = [Linf(0.05), L2(0.2), L1(0.5)]
ORDER = {"Linf": np.inf, "L2": 2, "L1": 1}
every_threat = pytest.mark.parametrize("threat", THREATS, ids=["Linf", "L2", "L1"])
MODEL = smooth()


def distances(threat, attacked, x):
    offset = np.asarray(attacked, np.float64) - x
    return np.linalg.norm(offset.reshape(len(x), -1), ORDER[threat.norm], axis=1)


@pytest.mark.parametrize("untargeted", [False, True])
@every_threat
def test_distance_to_the_boundary_of_a_linear_model_is_found(threat, untargeted, key):
    model = linear(classes=3)
    x = 0.45 + 0.1 * images(8)
    labels = labels_of(model, x)
    weights, logits = np.asarray(model.weights, np.float64), np.asarray(model(jnp.asarray(x)), np.float64)
    dual = {1: np.inf, 2: 2, np.inf: 1}[ORDER[threat.norm]]
    exact = np.array(
        [
            min(
                (f[y] - f[k]) / np.linalg.norm(weights[:, k] - weights[:, y], dual)
                for k in range(3) if k != y
            )
            for f, y in zip(logits, labels, strict=True)
        ]
    )  # fmt: skip
    found = FAB(threat, steps=30, untargeted=untargeted).nearest(model, x, labels, key=key)
    assert (labels_of(model, found.points) != labels).all()
    np.testing.assert_allclose(distances(threat, found.points, x), found.distances, rtol=1e-4)
    assert (found.distances >= exact * (1 - 1e-4)).all()
    if threat.norm != "L1":  # where one pixel takes all of the change, until it is at a wall
        assert (found.distances <= exact * 1.01).all()


def test_walls_of_the_box_are_minded(key):
    model = linear()
    x = images(6)
    x[:, 0], x[:, 1, :2] = 0.0, 1.0
    labels = labels_of(model, x)
    found = FAB(Linf(0.1), steps=40).nearest(model, x, labels, key=key)
    weights = np.asarray(model.weights[:, 1] - model.weights[:, 0], np.float64)
    for i, image in enumerate(x.reshape(6, -1).astype(np.float64)):
        d, normal = len(image), weights * (1 if labels[i] == 0 else -1)
        rows = np.vstack([np.c_[np.eye(d), -np.ones(d)], np.c_[-np.eye(d), -np.ones(d)], np.append(-normal, 0)])
        limits = np.append(np.zeros(2 * d), normal @ image)
        solved = linprog(np.eye(d + 1)[d], rows, limits, bounds=[(-z, 1 - z) for z in image] + [(0, None)])
        np.testing.assert_allclose(found.distances[i], solved.fun, rtol=0.01)


def distances_of_autoattack(threat, x, labels, steps, rank):
    """Distances that the authors' code finds on a twin of `smooth()`: for the target of a rank, or for none."""
    torch = pytest.importorskip("torch")
    fab = pytest.importorskip("pyautoattack.fab_pt")
    layers = [torch.tensor(np.asarray(weights)) for weights in (MODEL.first, MODEL.second, MODEL.third)]

    def twin(x):
        hidden = x.permute(0, 2, 3, 1).reshape(len(x), -1) - 0.5
        for weights in layers[:2]:
            hidden = torch.tanh(hidden @ weights)
        return hidden @ layers[2]

    is_targeted = rank is not None
    attack = fab.FABAttack_PT(twin, threat.norm, eps=threat.eps, n_iter=steps, targeted=is_targeted, device="cpu")
    attack.target_class = rank + 2 if is_targeted else None
    there = torch.tensor(x).permute(0, 3, 1, 2).contiguous()
    attacked = attack.attack_single_run(there, torch.tensor(labels).long(), is_targeted=is_targeted)
    is_wrong = twin(attacked).argmax(1).numpy() != labels
    return np.where(is_wrong, distances(threat, attacked.permute(0, 2, 3, 1).numpy(), x), np.inf)


@pytest.mark.parametrize("rank", [0, 1, None])
@every_threat
def test_distances_are_those_of_autoattack(threat, rank, key):
    x = images(48)
    labels = labels_of(MODEL, x)
    theirs = distances_of_autoattack(threat, x, labels, 20, rank)
    attack = FAB(threat, steps=20, untargeted=rank is None)
    search = jax.jit(lambda x, labels, keys, number: attack._search(MODEL, x, labels, keys, number).distances)
    ours = search(jnp.asarray(x), jnp.asarray(labels), sample_keys(key, 48), jnp.uint32(rank or 0))
    assert np.isfinite(theirs).mean() > 0.8
    assert (np.isfinite(ours) == np.isfinite(theirs)).mean() > 0.95
    both = np.isfinite(ours) & np.isfinite(theirs)
    ratio = np.asarray(ours)[both] / theirs[both]
    # The searches are the same but for rounding, which a kink may blow up in a few samples.
    assert np.median(np.abs(ratio - 1)) < 1e-4
    assert (np.abs(ratio - 1) < 0.02).mean() > 0.9


@every_threat
def test_a_sample_falls_where_the_nearest_point_is_within_the_ball(threat, key):
    x = images(24)
    labels = labels_of(MODEL, x, flipped=2)
    attack = FAB(threat, steps=15)
    nearest = attack.nearest(MODEL, x, labels, key=key, batch_size=10)
    done = attack.run(MODEL, x, labels, key=key)
    within = np.asarray(nearest.distances) <= threat.eps
    assert 0.1 < within.mean() < 0.9
    # An attempt for each target: the nearest of all is within the ball where any is.
    assert (done.is_wrong >= within).all()
    assert (distances(threat, done.points, x) <= threat.eps + 1e-6).all()
    np.testing.assert_array_equal(nearest.distances[:2], 0)
    np.testing.assert_array_equal(nearest.points[:2], x[:2])
    assert (done.is_wrong == within).mean() > 0.9


def test_radius_plays_no_part_in_the_search_from_the_clean_image(key):
    x = images(8)
    labels = labels_of(MODEL, x)
    first, second = (FAB(Linf(eps), steps=10).nearest(MODEL, x, labels, key=key) for eps in (0.05, 0.01))
    np.testing.assert_array_equal(first.points, second.points)


@pytest.mark.slow
def test_restarts_and_steps_never_lose(key):
    x = images(12)
    labels = labels_of(MODEL, x)
    attacks = [FAB(L2(0.5), steps=2), FAB(L2(0.5), steps=2, restarts=4), FAB(L2(0.5), steps=12)]
    once, often, long = (np.asarray(attack.nearest(MODEL, x, labels, key=key).distances) for attack in attacks)
    # Attempts of other numbers draw other keys, but the first start of every target is the clean image.
    assert (often <= once + 1e-6).all()
    assert (often < once - 1e-4).any()
    assert (long <= once + 1e-6).all()
    assert (long < once - 1e-4).any()


@pytest.mark.slow
def test_targets_are_the_wrong_classes_of_largest_logits_and_at_most_all_of_them(key):
    x = 0.45 + 0.1 * images(4)
    weights = 0.1 * np.asarray(linear(classes=5).weights)
    model = Linear(jnp.asarray(weights))
    labels = labels_of(model, x)
    assert [FAB(Linf(0.1), targets=t, restarts=2).attempts(5) for t in (1, 4, 9)] == [2, 8, 8]
    assert FAB(Linf(0.1), untargeted=True, restarts=2).attempts(5) == 2
    attack = FAB(L2(100.0), steps=1, alpha_max=0.0)
    ranked = np.argsort(np.where(np.arange(5) == labels[:, None], np.inf, -np.asarray(model(jnp.asarray(x)))), axis=1)
    seen = []

    def spied(x):
        jax.debug.callback(lambda logits: seen.append(np.asarray(logits)), model(x))
        return model(x)

    for rank in range(4):
        seen.clear()
        attack.attempt(
            spied, jnp.asarray(x), jnp.asarray(labels), sample_keys(key, 4), jnp.uint32(rank)
        ).block_until_ready()
        jax.effects_barrier()
        rows = np.arange(4)
        # Past the boundary by the overshoot, unless the box is in the way: of all pairs this one is balanced.
        final = seen[-1]
        lead = final[rows, ranked[:, rank]] - final[rows, labels]
        before = seen[0][rows, ranked[:, rank]] - seen[0][rows, labels]
        np.testing.assert_allclose(lead, -0.05 * before, rtol=0.05, atol=1e-5)


def test_a_model_without_gradients_or_boundaries_is_left_alone(key):
    x = images(3)
    found = FAB(Linf(0.1), steps=3).nearest(zero, x, np.zeros(3, np.int32), key=key)
    np.testing.assert_array_equal(found.points, x)
    assert np.isinf(found.distances).all()


def test_a_search_that_runs_into_nan_comes_back(key):
    def cliff(x):
        score = 4 * (jnp.mean(x, axis=(1, 2, 3)) - 0.6)
        steep = jnp.where(score > 0.05, jnp.nan, score)
        return jnp.stack([-steep, steep / (1 + 2 * jnp.abs(steep))], axis=1)

    x = np.full((2, *IMAGE), 0.5, np.float32)
    found = FAB(Linf(0.2), steps=30, eta=1.5).nearest(cliff, x, np.zeros(2, np.int32), key=key)
    np.testing.assert_allclose(found.distances, 0.1, rtol=0.15)
    assert np.isfinite(cliff(found.points)).all()


@pytest.mark.loose_promotion
def test_low_precision_images_are_judged_as_the_model_sees_them(key):
    x = images(6).astype(np.float16)
    labels = labels_of(MODEL, x.astype(np.float32))

    def model(x):
        return MODEL(x.astype(jnp.float32))

    found = FAB(L2(0.5), steps=10).nearest(model, x, labels, key=key)
    assert found.points.dtype == np.float16
    assert (labels_of(model, found.points) != labels).all()
    np.testing.assert_allclose(distances(L2(0.5), found.points, x.astype(np.float64)), found.distances, rtol=1e-4)


def test_cost_counts_a_gradient_and_a_forward_pass_for_each_step():
    assert FAB(Linf(0.1), steps=7).cost(10) == (7, 8)
    assert FAB(Linf(0.1), steps=7, untargeted=True).cost(10) == (70, 8)


class Other(Linf):
    norm = "elastic"


def test_settings_are_checked_and_named(unchecked):
    threat = Linf(0.1)
    for error, message, arguments in [
        (ValueError, "targets must be at least 1, got 0", {"targets": 0}),
        (ValueError, "steps must be at least 1, got 0", {"steps": 0}),
        (TypeError, r"restarts must be an integer, got 1\.5", {"restarts": 1.5}),
        (ValueError, "alpha_max is a share, got 2", {"alpha_max": 2}),
        (ValueError, r"eta must be at least 1, got 0\.9", {"eta": 0.9}),
        (ValueError, "beta must lie between 0 and 1, got 1", {"beta": 1}),
    ]:
        with pytest.raises(error, match=message):
            FAB(threat, **arguments)
    with pytest.raises(TypeError, match=r"threat must be Linf, L2 or L1 for FAB, got Other\(eps=0\.5\)"):
        FAB(Other(0.5))
    x = images(2)
    with pytest.raises(ValueError, match=f"labels must lie in 0 .. {CLASSES - 1}"):
        FAB(threat).nearest(MODEL, x, np.array([0, CLASSES]), key=jax.random.key(0))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        FAB(threat).nearest(MODEL, x, np.array([0, 0]), key=jax.random.key(0), batch_size=0)
    attacks = [{}, {"steps": 50}, {"restarts": 5}, {"untargeted": True, "restarts": 5}]
    assert [FAB(threat, **settings).name for settings in attacks] == ["FAB-T", "FAB-T-50", "FAB-T-100-5", "FAB-100-5"]
