"""TRADES: one update of a residual network against one written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from residual_problems import (
    assert_leaves,
    batch_of,
    begun,
    compiled,
    descended,
    divergences,
    entropies,
    images,
    resnet,
    speeds,
    tiny_resnet,
    updater,
    with_averages,
)

from ntkadv.attacks import Linf
from ntkadv.training import TRADESTraining
from ntkadv.training.trades import kl_divergence

EPS = 0.06


def moved_furthest(state, batch, *, steps, length, training):
    """Ascent on the divergence from a Gaussian start."""

    def probabilities(x):
        return resnet(state.params, state.statistics, x, training=training)[0]

    @compiled
    def slope(x, clean):
        return jax.grad(lambda x: jnp.sum(divergences(clean, probabilities(x))))(x)

    clean, x = compiled(probabilities)(batch.x), np.asarray(batch.x)
    noise = compiled(jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], float)))(batch.keys)
    point = x + 1e-3 * np.asarray(noise)
    for _ in range(steps):
        point = point + length * np.sign(slope(jnp.asarray(point), clean))
        point = np.clip(np.clip(point, x - EPS, x + EPS), 0, 1)
    return jnp.asarray(point)


@pytest.mark.parametrize(("mode", "length"), [("eval", None), ("train", 0.04)])
def test_an_update_is_by_hand(mode, length, x64):
    held = images()
    batch = batch_of(held)
    method = TRADESTraining(Linf(EPS), steps=3, step_size=length, attack_mode=mode)
    network, state = begun(method, tiny_resnet(stages=1), held)
    points = moved_furthest(state, batch, steps=3, length=length or EPS / 4, training=mode == "train")

    def objective(params):
        clean, _, moved = resnet(params, state.statistics, batch.x)
        attacked, _, moved = resnet(params, with_averages(state.statistics, moved), points)
        return jnp.mean(entropies(clean, batch.labels) + 6 * divergences(clean, attacked)), moved

    (loss, moved), gradient = compiled(jax.value_and_grad(objective, has_aux=True))(state.params)
    after, gathered = descended(state.params, gradient, speeds(state))
    new, metrics = updater(method, network)(state, batch)
    assert_leaves(new.params, after)
    assert_leaves(speeds(new), gathered)
    assert_leaves(new.statistics, moved)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)


def test_the_divergence_is_that_of_scipy_and_finite_where_a_probability_vanishes(x64):
    rng = np.random.default_rng(0)
    a, b = 3 * rng.normal(size=(2, 5, 4))
    p, q = (scipy.special.softmax(logits, axis=1) for logits in (a, b))
    np.testing.assert_allclose(
        kl_divergence(jnp.asarray(a), jnp.asarray(b)), scipy.stats.entropy(p, q, axis=1), rtol=1e-9
    )
    far = jnp.asarray([[0.0, -2000.0], [3.0, 1.0]]), jnp.asarray([[0.0, -1500.0], [3.0, 1.0]])
    np.testing.assert_allclose(kl_divergence(*far), 0, atol=1e-12)
    slope = jax.grad(lambda z: jnp.sum(kl_divergence(far[0], z)))(far[1])
    np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_wrong_settings_are_named(unchecked):
    threat = Linf(EPS)
    cases = [
        (ValueError, "threat must have a positive eps, got 0", lambda: TRADESTraining(Linf(0.0))),
        (TypeError, "threat must be a threat model", lambda: TRADESTraining(None)),
        (ValueError, "beta must", lambda: TRADESTraining(threat, beta=-1.0)),
        (ValueError, "steps must be at least 1", lambda: TRADESTraining(threat, steps=0)),
        (ValueError, "step_size must", lambda: TRADESTraining(threat, step_size=0.0)),
        (ValueError, "noise must", lambda: TRADESTraining(threat, noise=-1e-3)),
        (ValueError, "attack_mode must be", lambda: TRADESTraining(threat, attack_mode="both")),
    ]
    for error, message, make in cases:
        with pytest.raises(error, match=message):
            make()
    assert TRADESTraining(threat).name == "TRADES-6"
    # The attack's clean outputs and its steps; then clean and attacked.
    assert TRADESTraining(threat, steps=10).passes == (13, 12)
