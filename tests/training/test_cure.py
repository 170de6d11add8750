"""CURE: one update of a residual network against one written out by hand; its ablations; its slow copy."""

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
    divergences,
    entropies,
    images,
    resnet,
    speeds,
    tiny_resnet,
    updater,
    with_averages,
)
from training_problems import data, linear, linear_params

from ntkadv.attacks import Linf
from ntkadv.attacks.threat_model import sample_keys
from ntkadv.training import (
    CURETraining,
    Problem,
    TRADESTraining,
    TrainState,
    robust_gradient_prominence,
)
from ntkadv.training.network import Forward, trainable

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

THREAT = Linf(0.06)
STEPS = 2


def attacked(method, network, state, batch):
    """TRADES' images, which have a test of their own."""
    return compiled(lambda: method.images(Forward(network, state.statistics), state.params, batch))()


def by_hand(method, state, batch, points):
    """Everything at once, without the method: loss, gradient, prominence, running averages."""
    old, running = state.method, state.statistics
    is_train = method.teacher_mode == "train"
    targets = [resnet(old.params, old.statistics, images, training=is_train)[0] for images in (batch.x, points)]

    def outputs(params):
        clean, _, moved = resnet(params, running, batch.x)
        under_attack, _, moved = resnet(params, with_averages(running, moved), points)
        return clean, under_attack, moved

    def objective(params):
        clean, under_attack, moved = outputs(params)
        losses = entropies(clean, batch.labels) + method.beta * divergences(clean, under_attack)
        losses += method.gamma * (divergences(targets[0], clean) + divergences(targets[1], under_attack))
        return jnp.mean(losses), moved

    (loss, moved), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    slopes = [
        jax.grad(lambda params, place=place: jnp.mean(entropies(outputs(params)[place], batch.labels)))(state.params)
        for place in (0, 1)
    ]
    return loss, moved, gradient, slopes


def prominence(slopes, share):
    pairs = zip(*map(jax.tree.leaves, slopes), strict=True)
    return [share * np.abs(clean) + (1 - share) * np.abs(under_attack) for clean, under_attack in pairs]


def masks(scores, percentile):
    """Weights that are updated: sorted by prominence, those from the percentile on."""
    for score in scores:
        if score.ndim < 2:
            yield np.ones(score.shape)
        else:
            ranked = np.sort(score.ravel())
            place = percentile / 100 * (score.size - 1)
            low = int(place)
            bound = ranked[low] + (place - low) * (ranked[min(low + 1, score.size - 1)] - ranked[low])
            yield (score >= bound).astype(float)


CASES = {
    "gradient masked, not revised": {"revision_rate": 0.0},
    "update masked, revised": {"mask": "update", "revision_rate": 1.0, "clean_share": 0.4},
    "revision only": {"percentile": 0.0, "revision_rate": 1.0, "teacher_mode": "eval"},
    "prominence only": {"gamma": 0.0, "percentile": 50.0, "revision_rate": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_by_hand(case, x64):
    settings = {"gamma": 0.7, "steps": STEPS, "momentum": 0.95} | CASES[case]
    method = CURETraining(THREAT, **settings)
    held = images()
    batch = batch_of(held)
    network, state = begun(method, tiny_resnet(stages=1), held)
    # A slow copy that has come some way.
    other = tiny_resnet(seed=1, stages=1)
    state = state._replace(method=state.method._replace(params=other.split()[0], statistics=other.split()[1]))
    points = attacked(method, network, state, batch)
    assert np.abs(points - batch.x).max() > 0.01
    loss, moved, gradient, slopes = compiled(lambda: by_hand(method, state, batch, points))()
    if case == "gradient masked, not revised":
        found = compiled(
            lambda: robust_gradient_prominence(Forward(network, state.statistics), state.params, method, batch)
        )()
        assert_leaves(found, prominence(slopes, method.clean_share))
    keep = list(masks(prominence(slopes, method.clean_share), method.percentile))
    shares = [1 - mask.mean() for mask in keep if mask.ndim > 1]
    if method.percentile:
        assert np.abs(np.subtract(shares, method.percentile / 100)).max() < 0.1
    if method.mask == "gradient":
        leaves = [mask * g for mask, g in zip(keep, jax.tree.leaves(gradient), strict=True)]
        after, gathered = descended(state.params, leaves, speeds(state))
    else:
        after, gathered = descended(state.params, gradient, speeds(state), keep=keep)
    new, metrics = updater(method, network)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-8)
    assert_leaves(new.params, after)
    assert_leaves(speeds(new), gathered)
    assert_leaves(new.statistics, moved)
    # A masked update leaves a weight as it is; with a masked gradient momentum and decay move it.
    still = [
        np.mean(np.asarray(a) == b) for a, b in zip(*map(jax.tree.leaves, (new.params, state.params)), strict=True)
    ]
    if method.percentile:
        frozen = [1 - mask.mean() for mask in keep] if method.mask == "update" else [0] * len(keep)
        np.testing.assert_allclose(still, frozen, atol=1e-12)
    slow, fast = jax.tree.leaves(state.method[:2]), [*after, *moved]
    d = method.momentum if method.revision_rate else 1.0
    assert_leaves(new.method[:2], [d * a + (1 - d) * np.asarray(b) for a, b in zip(slow, fast, strict=True)])
    assert int(new.method.step) == 1


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
def test_without_both_parts_it_is_trades_bit_for_bit(attack_mode, x64):
    held = images()
    batch = batch_of(held)
    settings = {"steps": STEPS, "attack_mode": attack_mode}
    ours = CURETraining(THREAT, percentile=0.0, gamma=0.0, **settings)
    after = []
    for method in (ours, TRADESTraining(THREAT, beta=1.0, **settings)):
        network, state = begun(method, tiny_resnet(stages=1), held)
        new, metrics = updater(method, network)(state, batch)
        after.append((new.params, new.statistics, new.optimizer, metrics))
    assert_leaves(*after, rtol=1e-12, atol=1e-14)
    assert ours.name == "TRADES-1"


def test_the_slow_copy_moves_as_often_as_the_rate_says_and_ever_more_rarely_where_it_decays(x64):
    held, params = data(), linear_params()
    network = trainable(linear)[0]
    problem = Problem(Forward(network), params, held.x_train.shape, None, jax.random.key(0))
    batch = batch_of(held)

    def moves(method, steps=1500):
        state = TrainState(params, OPTIMIZER.init(params), method.start(problem))

        def step(state, number):
            own = sample_keys(jax.random.fold_in(jax.random.key(3), number), 6)
            new, _ = method.update(Forward(network), OPTIMIZER, state, batch._replace(keys=own))
            return new, jnp.any(new.method.params["w"] != state.method.params["w"])

        return np.asarray(compiled(lambda: jax.lax.scan(step, state, jnp.arange(steps)))()[1])

    plain = {"steps": 1, "percentile": 0.0, "gamma": 0.0}
    seen = moves(CURETraining(THREAT, revision_rate=0.2, **plain))
    # Binomial: a standard deviation of 0.0103.
    assert abs(seen.mean() - 0.2) < 0.042
    assert abs(np.mean(seen[1:] & seen[:-1]) - 0.04) < 0.025
    fading = moves(CURETraining(THREAT, revision_rate=1.0, revision_decay=0.99, **plain))
    # The sum of 0.99^k is 100, that of the variances 100 - 50.
    assert abs(fading.sum() - 100) < 30
    assert fading[:5].sum() >= 4
    assert fading[800:].sum() <= 2


def test_names_tell_ablations_apart():
    assert CURETraining(THREAT).name == "CURE"
    assert CURETraining(THREAT, gamma=0.0).name == "CURE, prominence only"
    assert CURETraining(THREAT, percentile=0.0).name == "CURE, revision only"
    whole, trades = CURETraining(THREAT, steps=10).passes, TRADESTraining(THREAT, steps=10).passes
    assert (whole.forward - trades.forward, whole.backward - trades.backward) == (2, 2)


def test_wrong_settings_are_named(unchecked):
    cases = [
        (ValueError, "threat must have a positive eps, got 0", lambda: CURETraining(Linf(0.0))),
        (ValueError, "percentile must be from 0 to below 100, got 100", lambda: CURETraining(THREAT, percentile=100)),
        (ValueError, "percentile must be from 0 to below 100, got -1", lambda: CURETraining(THREAT, percentile=-1)),
        (ValueError, "percentile must be", lambda: CURETraining(THREAT, percentile=float("nan"))),
        (ValueError, "clean_share must be between 0 and 1", lambda: CURETraining(THREAT, clean_share=1.1)),
        (ValueError, "revision_rate must be between 0 and 1", lambda: CURETraining(THREAT, revision_rate=-0.1)),
        (ValueError, "revision_decay must be between", lambda: CURETraining(THREAT, revision_decay=2)),
        (ValueError, "momentum must be between 0 and 1", lambda: CURETraining(THREAT, momentum=1.5)),
        (ValueError, "gamma must", lambda: CURETraining(THREAT, gamma=-1.0)),
        (ValueError, "mask must be 'gradient' or 'update'", lambda: CURETraining(THREAT, mask="weights")),
        (ValueError, "teacher_mode must be 'train' or 'eval'", lambda: CURETraining(THREAT, teacher_mode="slow")),
        (ValueError, "beta must", lambda: CURETraining(THREAT, beta=-1.0)),
    ]
    for error, message, make in cases:
        with pytest.raises(error, match=message):
            make()
