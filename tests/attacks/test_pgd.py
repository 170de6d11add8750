"""PGD against Foolbox, and its best point against a plain loop."""

from functools import cache

import foolbox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from attack_models import CLASSES, IMAGE, images, labels_of, smooth

from ntkadv.architectures import mlp
from ntkadv.attacks import FGSM, L2, PGD, Linf
from ntkadv.attacks.losses import LOSSES
from ntkadv.predictors import KernelPredictor

STEPS = 7
THREATS = [Linf(0.05), L2(0.3)]
every_threat = pytest.mark.parametrize("threat", THREATS, ids=["Linf", "L2"])


every_model = pytest.mark.parametrize("name", ["network", "kernel"])


@cache
def model_called(name):
    if name == "network":
        return smooth()
    x_train = images(30, seed=5)
    coefficients = np.random.default_rng(6).normal(size=(30, CLASSES)).astype(np.float32)
    return KernelPredictor(mlp(depth=2, num_classes=CLASSES), x_train, coefficients)


@cache
def foolbox_model(name):
    return foolbox.JAXModel(jax.jit(model_called(name).__call__), bounds=(0, 1))


def foolbox_pgd(threat, name, x, labels, steps):
    kind = {
        "Linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
        "L2": foolbox.attacks.L2ProjectedGradientDescentAttack,
    }[threat.norm]
    attack = kind(abs_stepsize=threat.eps / 3, steps=steps, random_start=False)
    return foolbox_run(attack, name, x, labels, threat.eps)


def foolbox_run(attack, name, x, labels, eps):
    _, clipped, _ = attack(foolbox_model(name), jnp.asarray(x), jnp.asarray(labels), epsilons=eps)
    return np.asarray(clipped)


def case(model):
    x = images(6)
    return x, labels_of(model, x, flipped=1)


def inner_case(model):
    """Images away from the box, where Foolbox's l_2 projection, the ball's followed by clipping, is the exact one."""
    x = 0.35 + 0.3 * images(6)
    return x, labels_of(model, x, flipped=1)


@pytest.mark.loose_promotion
@every_model
@every_threat
def test_iterates_are_those_of_foolbox(name, threat, key):
    model = model_called(name)
    x, labels = inner_case(model)
    attack = PGD(
        threat,
        steps=STEPS,
        step_size=threat.eps / 3,
        loss="cross_entropy",
        random_start=False,
        keep_best=False,
    )
    expected = foolbox_pgd(threat, name, x, labels, STEPS)
    np.testing.assert_allclose(attack(model, x, labels, key=key), expected, atol=1e-5)


@pytest.mark.loose_promotion
@every_model
@every_threat
def test_best_point_is_the_best_of_the_iterates_of_foolbox(name, threat, key):
    model = model_called(name)
    x, labels = inner_case(model)
    iterates = [x] + [foolbox_pgd(threat, name, x, labels, steps) for steps in range(1, STEPS + 1)]
    attack = PGD(threat, steps=STEPS, step_size=threat.eps / 3, loss="cross_entropy", random_start=False)
    attacked = attack(model, x, labels, key=key)
    expected = strongest(model, LOSSES["cross_entropy"], iterates, labels)
    np.testing.assert_allclose(attacked, expected, atol=1e-5)


@pytest.mark.loose_promotion
@every_model
@every_threat
def test_fgsm_is_that_of_foolbox(name, threat, key):
    model = model_called(name)
    x, labels = case(model)
    kind = {"Linf": foolbox.attacks.LinfFastGradientAttack, "L2": foolbox.attacks.L2FastGradientAttack}[threat.norm]
    expected = foolbox_run(kind(), name, x, labels, threat.eps)
    attacked = FGSM(threat, loss="cross_entropy")(model, x, labels, key=key)
    np.testing.assert_allclose(attacked, expected, atol=1e-5)


def strongest(model, loss, points, labels):
    """The strongest of the points of each sample, by comparing them one at a time."""
    logits = [np.asarray(model(jnp.asarray(point))) for point in points]
    losses = [np.asarray(loss(jnp.asarray(f), jnp.asarray(labels))) for f in logits]
    best = []
    for i, label in enumerate(labels):
        ranks = [(f[i].argmax() != label, losses[place][i], place) for place, f in enumerate(logits)]
        best.append(points[max(ranks)[2]][i])
    return np.stack(best)


def naive_iterates(threat, loss, step_size, model, start, x, labels, steps):
    """All points of projected gradient ascent, one sample at a time and in plain NumPy but for the gradient."""
    gradient_of = jax.jit(jax.grad(lambda z, y: loss(model(z[None]), y[None])[0]))
    iterates = [start]
    for _ in range(steps):
        following = []
        for z, clean, label in zip(iterates[-1], x, labels, strict=True):
            gradient = np.asarray(gradient_of(z, label), np.float64)
            if threat.norm == "Linf":
                z = np.clip(z + step_size * np.sign(gradient), clean - threat.eps, clean + threat.eps)
            else:
                z = z + step_size * gradient / np.linalg.norm(gradient)
                z = clean + l2_projection(z - clean, clean, threat.eps)
            following.append(np.clip(z, 0, 1))
        iterates.append(np.stack(following).astype(np.float32))
    return iterates


def l2_projection(offset, clean, eps):
    """Onto the ball and the box at once, by bisection for the factor."""

    def move(scale):
        return np.clip(clean + scale * offset, 0, 1) - clean

    if np.linalg.norm(move(1)) <= eps:
        return move(1)
    return move(scipy.optimize.brentq(lambda scale: np.linalg.norm(move(scale)) - eps, 0, 1))


@every_threat
@pytest.mark.parametrize("loss", ["squared", "margin"])
def test_best_point_is_the_strongest_of_all_restarts_and_iterates(threat, loss, key):
    model = smooth()
    x, labels = case(model)
    restarts, steps, step_size = 3, 6, threat.eps
    attack = PGD(threat, steps=steps, step_size=step_size, loss=loss, restarts=restarts)
    points = []
    for number in range(restarts):
        keys = [jax.random.fold_in(jax.random.fold_in(key, i), number) for i in range(len(x))]
        start = np.asarray(threat.random_point(jnp.stack(keys), jnp.asarray(x)))
        points += naive_iterates(threat, LOSSES[loss], step_size, model, start, x, labels, steps)

    attacked = attack(model, x, labels, key=key)
    np.testing.assert_allclose(attacked, strongest(model, LOSSES[loss], points, labels), atol=1e-5)
    last = points[-1]
    assert (np.abs(last - attacked).max(axis=(1, 2, 3)) > 1e-3).any(), "the last point is never the answer here"


@every_threat
def test_a_wrong_point_of_small_loss_beats_a_right_one_of_large_loss(threat, key):
    def logit_of_label(logits, labels):
        return logits[jnp.arange(len(labels)), labels]

    def model(x):
        score = jnp.mean(x, axis=(1, 2, 3)) - 0.5
        return jnp.stack([-score, score], axis=1)

    x = np.full((1, *IMAGE), 0.499, np.float32)
    label = np.array([1], np.int32)
    ascent = {"loss": logit_of_label, "random_start": False, "steps": 3}
    last = PGD(threat, keep_best=False, **ascent)(model, x, label, key=key)
    best = PGD(threat, **ascent)(model, x, label, key=key)
    assert np.argmax(model(last)) == 1
    assert logit_of_label(model(last), label) > logit_of_label(model(best), label)
    assert np.argmax(model(best)) == 0


def test_more_restarts_and_steps_never_lose(key):
    model = smooth()
    x, labels = case(model)
    threat = Linf(0.05)

    def reached(**settings):
        attacked = PGD(threat, loss="margin", step_size=0.03, **settings)(model, x, labels, key=key)
        return np.asarray(LOSSES["margin"](model(attacked), jnp.asarray(labels)))

    losses = [reached(steps=2), reached(steps=5), reached(steps=5, restarts=4)]
    assert (np.diff(losses, axis=0) >= -1e-6).all()
    assert (losses[2] > losses[0]).any()


def test_default_step_size_is_two_and_a_half_eps_over_steps(key):
    model = smooth()
    x, labels = case(model)
    default = PGD(Linf(0.1), steps=5)(model, x, labels, key=key)
    np.testing.assert_array_equal(default, PGD(Linf(0.1), steps=5, step_size=0.05)(model, x, labels, key=key))


def test_loss_of_ones_own_is_maximised(key):
    def first_logit(logits, labels):
        return logits[:, 0]

    model = smooth()
    x, labels = case(model)
    attacked = PGD(Linf(0.05), loss=first_logit, keep_best=False, random_start=False)(model, x, labels, key=key)
    assert (model(attacked)[:, 0] > model(jnp.asarray(x))[:, 0]).all()


def test_memory_does_not_grow_with_the_number_of_steps(key):
    x = jnp.asarray(images(64))
    labels, keys = jnp.zeros(64, jnp.int32), jax.random.split(key, 64)

    def temporary_bytes(steps):
        attack = PGD(Linf(0.1), steps=steps)
        compiled = jax.jit(attack.perturb).lower(jax.tree_util.Partial(smooth()), x, labels, keys).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(100) <= temporary_bytes(2) + 1024
