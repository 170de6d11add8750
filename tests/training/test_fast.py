"""Standard training, PGD, FGSM and GradAlign: one update of a residual network against one written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from residual_problems import (
    OPTIMIZER,
    assert_leaves,
    batch_of,
    begun,
    compiled,
    descended,
    entropies,
    images,
    resnet,
    speeds,
    tiny_resnet,
    updater,
)
from training_problems import data, linear, linear_params

from ntkadv.attacks import L2, PGD, Linf
from ntkadv.training import (
    Batch,
    FGSMTraining,
    GradAlignTraining,
    PGDTraining,
    StandardTraining,
    TRADESTraining,
    TrainState,
    catastrophic_overfitting,
)
from ntkadv.training.network import Forward, trainable

EPS = 0.06


def input_slope(state, labels, training=True):
    """Gradient of the summed loss in the images."""

    @compiled
    def slope(x):
        def total(x):
            return jnp.sum(entropies(resnet(state.params, state.statistics, x, training=training)[0], labels))

        return jax.grad(total)(x)

    return slope


def ascended(slope, start, clean, length, steps=1):
    """Steps along signs, cut to ball and box, in NumPy."""
    point = np.asarray(start)
    for _ in range(steps):
        point = point + length * np.sign(slope(jnp.asarray(point)))
        point = np.clip(point, clean - EPS, clean + EPS)
        point = np.clip(point, 0, 1)
    return jnp.asarray(point)


def random_point(threat, batch, number):
    return threat.random_point(jax.vmap(lambda key: jax.random.fold_in(key, number))(batch.keys), batch.x)


def check(method, expected_points, training=True, stages=1):
    """An update of a method that descends the loss at some points."""
    held = images()
    batch = batch_of(held)
    network, state = begun(method, tiny_resnet(stages=stages), held)
    points = expected_points(input_slope(state, batch.labels, training), batch)

    @compiled
    def gradients(params):
        def mean(params):
            logits, _, moved = resnet(params, state.statistics, points)
            return jnp.mean(entropies(logits, batch.labels)), moved

        return jax.value_and_grad(mean, has_aux=True)(params)

    (loss, moved), gradient = gradients(state.params)
    after, gathered = descended(state.params, gradient, speeds(state))
    new, metrics = updater(method, network)(state, batch)
    assert_leaves(new.params, after)
    assert_leaves(speeds(new), gathered)
    assert_leaves(new.statistics, moved)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
    return points, batch


def test_standard_training_is_by_hand(x64):
    check(StandardTraining(loss="cross_entropy"), lambda slope, batch: batch.x, stages=2)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_by_pgd_is_by_hand(mode, x64):
    threat = Linf(EPS)
    attack = PGD(threat, steps=3, step_size=0.03, loss="cross_entropy", keep_best=False)

    def points(slope, batch):
        return ascended(slope, random_point(threat, batch, 0), batch.x, 0.03, steps=3)

    moved, batch = check(PGDTraining(attack, loss="cross_entropy", attack_mode=mode), points, training=mode == "train")
    assert np.abs(moved - batch.x).max() == pytest.approx(EPS)


@pytest.mark.parametrize("random_start", [True, False])
def test_training_by_fgsm_is_by_hand(random_start, x64):
    threat = Linf(EPS)

    def points(slope, batch):
        start = random_point(threat, batch, 0) if random_start else batch.x
        return ascended(slope, start, batch.x, 1.25 * EPS)

    moved, batch = check(FGSMTraining(threat, random_start=random_start), points)
    size = np.abs(moved - batch.x)
    assert size.max() == pytest.approx(EPS)
    if random_start:
        # From a random start a step of 1.25 eps does not always reach the edge.
        assert 0.05 < np.mean(size < 0.99 * EPS) < 0.6


@pytest.mark.parametrize("through", ["both", "random"])
def test_grad_align_is_by_hand(through, x64):
    threat, weight = Linf(EPS), 0.7
    method = GradAlignTraining(threat, weight=weight, through=through)
    held = images()
    batch = batch_of(held)
    network, state = begun(method, tiny_resnet(stages=1), held)
    points = ascended(input_slope(state, batch.labels), batch.x, batch.x, 1.25 * EPS)
    random = random_point(threat, batch, 1)

    def slope(params, x):
        return jax.grad(lambda x: jnp.sum(entropies(resnet(params, state.statistics, x)[0], batch.labels)))(x)

    def objective(params):
        logits, _, moved = resnet(params, state.statistics, points)
        here = slope(params if through == "both" else state.params, batch.x)
        there = slope(params, random)
        cosines = [jnp.vdot(a, b) / jnp.sqrt(jnp.vdot(a, a) * jnp.vdot(b, b)) for a, b in zip(here, there, strict=True)]
        penalty = 1 - sum(cosines) / len(cosines)
        return jnp.mean(entropies(logits, batch.labels)) + weight * penalty, (moved, penalty)

    (loss, (moved, penalty)), gradient = compiled(jax.value_and_grad(objective, has_aux=True))(state.params)
    assert penalty > 0.005
    after, _ = descended(state.params, gradient, speeds(state))
    new, metrics = updater(method, network)(state, batch)
    assert_leaves(new.params, after, rtol=1e-6, atol=1e-8)
    assert_leaves(new.statistics, moved)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)


def test_grad_align_leaves_out_images_whose_gradient_vanishes(x64):
    """A linear model, but for an image on which it is flat: the others are perfectly aligned."""
    held = data()
    x = jnp.asarray(held.x_train, float).at[2].set(0.0)

    def flat(params, x):
        return jnp.where(jnp.sum(x**2, (1, 2, 3), keepdims=True)[:, 0, 0] > 0.01, linear(params, x), 0)

    params = linear_params()
    batch = Batch(x, jnp.asarray(held.y_train), jnp.asarray(held.targets_train, float), jnp.arange(6),
                  jax.random.split(jax.random.key(0), 6), jnp.asarray(0.0), 1.0)  # fmt: skip
    f = Forward(trainable(flat)[0])
    state = TrainState(params, OPTIMIZER.init(params), ())
    method, fgsm = GradAlignTraining(Linf(1e-3), weight=10.0), FGSMTraining(Linf(1e-3), random_start=False)
    new, metrics = compiled(lambda s: method.update(f, OPTIMIZER, s, batch))(state)
    alone, plain = compiled(lambda s: fgsm.update(f, OPTIMIZER, s, batch))(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params))
    # Cross-entropy bends a little within the ball.
    assert 0 <= float(metrics["loss"] - plain["loss"]) < 1e-3
    assert_leaves(new.params, alone.params, rtol=1e-2, atol=1e-2)


def test_without_weight_grad_align_is_fgsm_without_random_start(x64):
    held = images()
    batch = batch_of(held)
    ours, theirs = GradAlignTraining(Linf(EPS), weight=0.0), FGSMTraining(Linf(EPS), random_start=False)
    after = []
    for method in (ours, theirs):
        network, state = begun(method, tiny_resnet(stages=1), held)
        after.append(updater(method, network)(state, batch)[0])
    assert_leaves(after[0], after[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "trades"])
def test_with_a_warmup_the_ball_grows_linearly_to_its_own_size(kind, x64):
    """Images of each step against those of a method whose ball has that size."""

    def method(eps, **settings):
        if kind == "pgd":
            return PGDTraining(PGD(Linf(eps), steps=2, keep_best=False), **settings)
        return {"fgsm": FGSMTraining, "trades": TRADESTraining}[kind](Linf(eps), **settings)

    held, params = data(), linear_params()
    x = jnp.asarray(held.x_train, float)
    keys = jax.random.split(jax.random.key(0), 6)
    f = Forward(trainable(linear)[0])

    def images_of(method, step):
        batch = Batch(x, jnp.asarray(held.y_train), jnp.asarray(held.targets_train, float), jnp.arange(6), keys,
                      jnp.asarray(0.0), 1.0, step=step)  # fmt: skip
        return method.images(f, params, batch)

    grown = compiled(lambda step: images_of(method(EPS, warmup=4), step))
    for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        expected = compiled(lambda share=share: images_of(method(share * EPS), 0))()
        # The radius is a float32.
        np.testing.assert_allclose(grown(jnp.int32(step)), expected, rtol=1e-6, atol=1e-8)
        assert np.abs(expected - x).max() == pytest.approx(share * EPS)


def test_grad_align_s_random_points_grow_with_its_warmup(x64):
    held = images()
    after = []
    for method, step in ((GradAlignTraining(Linf(EPS), warmup=4), 1), (GradAlignTraining(Linf(EPS / 2)), 0)):
        network, state = begun(method, tiny_resnet(stages=1), held)
        after.append(updater(method, network)(state, batch_of(held, step=step))[0])
    assert_leaves(after[0], after[1], rtol=1e-9, atol=1e-12)


def test_catastrophic_overfitting_is_the_first_fall_by_more_than_the_drop():
    assert catastrophic_overfitting([0.1, 0.3, 0.42, 0.01, 0.0]) == 3
    assert catastrophic_overfitting([0.1, 0.3, 0.42, 0.3, 0.2, 0.1]) is None
    assert catastrophic_overfitting([0.1, 0.3, 0.42, 0.3, 0.2, 0.1], drop=0.11) == 3
    assert catastrophic_overfitting(np.array([0.9, 0.5, 0.9, 0.0])) == 1
    assert catastrophic_overfitting([0.5]) is None
    assert catastrophic_overfitting([]) is None
    # A fall of just the drop is none yet.
    assert catastrophic_overfitting([0.5, 0.25], drop=0.25) is None


def test_the_cost_of_a_step_is_what_it_says():
    assert StandardTraining().passes == (1, 1)
    assert FGSMTraining(Linf(EPS)).passes == (2, 2)
    assert PGDTraining(PGD(Linf(EPS), steps=10, keep_best=False)).passes == (11, 11)


def test_wrong_settings_are_named(unchecked):
    cases = [
        (ValueError, "threat must have a positive eps, got 0", lambda: FGSMTraining(Linf(0.0))),
        (TypeError, "threat must be a threat model, such as Linf", lambda: FGSMTraining(0.1)),
        (ValueError, "step must be finite and positive", lambda: FGSMTraining(Linf(EPS), step=0.0)),
        (ValueError, "attack_mode must be 'train' or 'eval'", lambda: FGSMTraining(Linf(EPS), attack_mode="test")),
        (ValueError, "reduction must be", lambda: FGSMTraining(Linf(EPS), reduction="max")),
        (ValueError, "loss must be one of", lambda: FGSMTraining(Linf(EPS), loss="hinge")),
        (ValueError, "attack_mode must be", lambda: PGDTraining(PGD(L2(0.5)), attack_mode=True)),
        (ValueError, "threat must have a positive eps, got 0", lambda: GradAlignTraining(L2(0.0))),
        (TypeError, "threat must be a threat model", lambda: GradAlignTraining("Linf")),
        (ValueError, "weight must", lambda: GradAlignTraining(Linf(EPS), weight=-1.0)),
        (ValueError, "through must be 'both' or 'random'", lambda: GradAlignTraining(Linf(EPS), through="clean")),
        (ValueError, "warmup must be at least 0", lambda: FGSMTraining(Linf(EPS), warmup=-1)),
        (TypeError, "warmup must be", lambda: PGDTraining(PGD(Linf(EPS)), warmup=0.5)),
        (ValueError, "drop must be", lambda: catastrophic_overfitting([0.5], drop=0.0)),
    ]
    for error, message, make in cases:
        with pytest.raises(error, match=message):
            make()
