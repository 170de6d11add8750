"""What holds for every attack: one table drives the tests."""

import dataclasses

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_models import CLASSES, IMAGE, images, labels_of, linear, smooth, zero
from hypothesis import given, settings

from ntkadv.attacks import (
    APGD,
    FAB,
    FGSM,
    L1,
    L2,
    PGD,
    AutoAttack,
    Linf,
    SquareAttack,
    TargetedAPGD,
    linear_worst_case,
)

ATTACKS = [
    FGSM(Linf(0.1)),
    FGSM(L2(0.4), loss="cross_entropy"),
    PGD(Linf(0.1), steps=3, loss="cross_entropy", restarts=3),
    PGD(Linf(0.1), steps=5, loss="margin", random_start=False),
    PGD(L2(0.4), steps=5),
    PGD(L2(0.4), steps=3, loss="margin", keep_best=False),
    PGD(L1(1.5), steps=4, loss="margin"),
    APGD(Linf(0.1), steps=6, restarts=2),
    APGD(L2(0.4), steps=6, loss="margin"),
    APGD(L1(1.5), steps=8, loss="squared"),
    TargetedAPGD(Linf(0.1), steps=5, loss="margin"),
    TargetedAPGD(L1(1.5), steps=5, loss="cross_entropy"),
    FAB(Linf(0.1), steps=5),
    FAB(L2(0.4), steps=5, restarts=2, untargeted=True),
    SquareAttack(Linf(0.1), queries=20),
    SquareAttack(L2(0.4), queries=20, restarts=2),
    AutoAttack(Linf(0.1), steps=4, queries=10),
    AutoAttack(L2(0.4), version="custom", attacks_to_run=["square", "apgd-squared"], steps=4, queries=10),
]


def with_attacks(attacks):
    return pytest.mark.parametrize("attack", attacks, ids=lambda attack: f"{attack.threat.norm} {attack.name}")


every_attack = with_attacks(ATTACKS)
every_single_attack = with_attacks([attack for attack in ATTACKS if not isinstance(attack, AutoAttack)])
some_attacks = pytest.mark.parametrize(
    "attack",
    [*ATTACKS[2:6:2], ATTACKS[7], ATTACKS[13], ATTACKS[16]],
    ids=lambda attack: f"{attack.threat.norm} {attack.name}",
)
every_threat = pytest.mark.parametrize("threat", [Linf(0.1), L2(0.4)], ids=["Linf", "L2"])
MODEL = smooth()


def norms(threat, offset):
    flat = np.asarray(offset, np.float64).reshape(len(offset), -1)
    return np.linalg.norm(flat, ord={"Linf": np.inf, "L2": 2, "L1": 1}[threat.norm], axis=1)


def require_allowed(threat, attacked, x):
    attacked = np.asarray(attacked)
    assert np.isfinite(attacked).all()
    assert (norms(threat, attacked.astype(np.float64) - x) <= threat.eps + 1e-6).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


@every_attack
@given(x=hnp.arrays(np.float32, (5, *IMAGE), elements=st.floats(0, 1, width=32)), seed=st.integers(0, 9))
@settings(max_examples=10)
def test_result_is_allowed(attack, x, seed):
    attacked = attack(MODEL, x, np.array([0, 1, 2, 0, 1]), key=jax.random.key(seed))
    assert attacked.dtype == x.dtype
    require_allowed(attack.threat, attacked, x)


HALF = [jnp.float16, jnp.bfloat16]


@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
@every_attack
def test_result_is_allowed_in_half_precision(attack, dtype, key):
    x = jnp.asarray(images(5), dtype).at[0].set(0).at[1].set(1)
    seen = []

    def model(z):
        seen.append(z.dtype)
        return MODEL(z.astype(jnp.float32)).astype(dtype)

    attacked = attack(model, x, np.array([0, 1, 2, 0, 1]), key=key)
    assert attacked.dtype == dtype
    assert set(seen) == {jnp.dtype(dtype)}
    wide = np.asarray(attacked.astype(jnp.float32))
    require_allowed(attack.threat, wide, np.asarray(x.astype(jnp.float32), np.float64))


@pytest.mark.slow
@every_single_attack
def test_result_is_allowed_in_double_precision(attack, key, x64):
    x = images(5).astype(np.float64)
    model = smooth(1)
    model = type(model)(*(w.astype(jnp.float64) for w in (model.first, model.second, model.third)))
    attacked = attack(model, x, np.array([0, 1, 2, 0, 1]), key=key)
    assert attacked.dtype == np.float64
    require_allowed(attack.threat, attacked, x)


@pytest.mark.parametrize("loss", ["squared", "margin"])
@every_threat
def test_optimum_is_reached_on_a_linear_classifier(threat, loss, key):
    model = linear()
    x = 0.45 + 0.1 * images(6)
    labels = labels_of(model, x)
    x[0, 0, 0, 0], x[1, 0, 0, 1] = (0.02, 0.97) if threat.norm == "Linf" else (0.5, 0.5)
    difference = np.asarray(model.weights[:, 1] - model.weights[:, 0], np.float64).reshape(IMAGE)
    direction = difference * np.where(labels == 0, 1, -1)[:, None, None, None]
    if threat.norm == "Linf":
        optimum = np.clip(x + threat.eps * np.sign(direction), 0, 1)
    else:
        optimum = x + threat.eps * direction / norms(threat, direction)[:, None, None, None]

    if loss == "squared":
        model = Centred(model)
    for attack in (FGSM(threat, loss=loss), PGD(threat, steps=40, step_size=threat.eps, loss=loss)):
        attacked = attack(model, x, labels, key=key)
        # Near the optimum a point may be off where its loss, in float32, is not.
        np.testing.assert_allclose(attacked, optimum, atol=2e-4)
        gain = (np.asarray(attacked, np.float64) - x) * direction
        best = ((optimum - x) * direction).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(gain.sum(axis=(1, 2, 3)), best, rtol=1e-5)


THREATS = [Linf(0.2), L2(0.6), L1(2.5)]
with_every_norm = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)


@pytest.mark.slow
@with_every_norm
def test_gradient_attacks_reach_the_exact_worst_case_of_a_binary_linear_classifier_at_the_edge_of_the_box(threat, key):
    model, x = linear(seed=4), np.clip(1.6 * images(12) - 0.3, 0, 1)
    labels = labels_of(model, x, flipped=2)
    exact = linear_worst_case(np.asarray(model.weights), np.zeros(2), x, labels, threat)
    attacks = [APGD(threat, loss=loss) for loss in ("margin", "cross_entropy", "squared")]
    attacks.append(TargetedAPGD(threat, loss="margin"))
    if threat.norm != "L1":
        attacks.append(PGD(threat, steps=100, step_size=threat.eps / 4, loss="margin"))
    if threat.norm == "Linf":
        attacks.append(FGSM(threat, loss="margin"))
    clean = margins(model, x, labels)
    for attack in attacks:
        attacked = attack(Scaled(model) if attack.name == "APGD-squared" else model, x, labels, key=key)
        reached = margins(model, attacked, labels)
        short = (exact.upper - reached) / (exact.upper - clean)
        assert short.max() < 1e-3, (attack, short)
        assert short.min() > -1e-5, (attack, short)


class Scaled:
    """Scores too small to overshoot the regression targets, and centred, so that squared loss is margin."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        logits = self.model(x) / 1000
        return logits - jnp.mean(logits, axis=1, keepdims=True)


def margins(model, x, labels):
    logits = np.asarray(model(jnp.asarray(x)), np.float64)
    label = logits[np.arange(len(x)), labels]
    logits[np.arange(len(x)), labels] = -np.inf
    return logits.max(axis=1) - label


@pytest.mark.slow
@with_every_norm
def test_targeted_attacks_break_exactly_what_can_be_broken_of_a_linear_classifier(threat, key):
    model, x = linear(classes=5, seed=5), images(60)
    labels = labels_of(model, x)
    threat = threat.with_eps(threat.eps / 4)
    exact = linear_worst_case(np.asarray(model.weights), np.zeros(5), x, labels, threat)
    clear = np.abs(exact.upper) > 1e-3
    assert 5 < (exact.upper < 0).sum() < 55
    attacks = [TargetedAPGD(threat, loss="margin"), TargetedAPGD(threat)]
    if threat.norm != "L1":
        attacks += [FAB(threat, steps=30), AutoAttack(threat, steps=40, queries=5)]
    for attack in attacks:
        broken = attack.run(model, x, labels, key=key).is_wrong
        np.testing.assert_array_equal(broken[clear], (exact.upper > 0)[clear], err_msg=str(attack))


class Centred:
    """Scores that sum to zero and are too small to overshoot, for which more squared loss is less margin."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        score = self.model(x) @ jnp.array([-1.0, 1.0]) / 1000
        return jnp.stack([-score, score], axis=1)


@every_single_attack
def test_result_does_not_depend_on_the_batch_size(attack, key):
    x = images(5)
    labels = labels_of(MODEL, x, flipped=2)
    together = attack(MODEL, x, labels, key=key)
    for batch_size in (3, 50):
        np.testing.assert_allclose(attack(MODEL, x, labels, key=key, batch_size=batch_size), together, atol=1e-5)


@every_single_attack
def test_same_key_gives_the_same_bits(attack, key):
    x = images(5)
    labels = labels_of(MODEL, x)
    first, second = (attack(MODEL, x, labels, key=key) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_another_key_gives_another_start(key):
    x = images(5)
    attack = PGD(Linf(0.1), steps=1, step_size=0.01, keep_best=False)
    labels = labels_of(MODEL, x)
    first, second = (attack(MODEL, x, labels, key=jax.random.fold_in(key, i)) for i in range(2))
    assert (np.abs(first - second).max(axis=(1, 2, 3)) > 0.01).all()


@every_attack
def test_zero_eps_returns_the_clean_images(attack, key):
    x = images(5)
    attack = dataclasses.replace(attack, threat=type(attack.threat)(0.0))
    np.testing.assert_array_equal(attack(MODEL, x, labels_of(MODEL, x), key=key), x)


@every_single_attack
def test_a_predictor_without_gradients_still_gets_allowed_images(attack, key):
    x = images(5)
    require_allowed(attack.threat, attack(zero, x, np.zeros(5, np.int32), key=key), x)


@every_single_attack
def test_models_that_break_away_from_the_clean_images_do_no_harm(attack, key):
    x = 0.9 * images(5)

    def broken(images):
        return jnp.where(jnp.max(images) > 0.9, jnp.nan, 1.0) * MODEL(images)

    require_allowed(attack.threat, attack(broken, x, labels_of(MODEL, x), key=key), x)


@some_attacks
def test_attack_inside_jit_is_the_same(attack, key):
    x = images(5)
    labels = labels_of(MODEL, x)

    @jax.jit
    def program(model, x, labels, key):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(5))
        return attack.perturb(model, x, labels, keys)

    np.testing.assert_allclose(program(MODEL, x, labels, key), attack(MODEL, x, labels, key=key), atol=1e-6)


@some_attacks
def test_one_program_serves_all_batches_and_calls(attack, key):
    traces = []

    def model(x):
        traces.append(x.shape)
        return MODEL(x)

    x = images(8)
    labels = labels_of(MODEL, x)
    attack(model, x[:3], labels[:3], key=key)
    once = len(traces)
    traces.clear()
    attack(model, x, labels, key=key, batch_size=3)
    attack(model, 1 - x, labels, key=jax.random.key(5), batch_size=3)
    assert len(traces) < once
    assert set(traces) == {(8, *IMAGE)}, "the model is looked at once for its number of classes, and not compiled"


def test_what_users_do_wrong_is_named(key, unchecked):
    attack, x = PGD(Linf(0.1), steps=1), images(4)
    labels = np.zeros(4, np.int32)
    out_of_range, with_nan = x.copy(), x.copy()
    out_of_range[2, 1, 0, 1], with_nan[1, 0, 0, 0] = 1.5, np.nan
    cases = [
        (ValueError, r"x must have pixels in \[0, 1\], but x\[2, 1, 0, 1\] is 1.5", (MODEL, out_of_range, labels)),
        (ValueError, r"x must be finite, but x\[1, 0, 0, 0\] is nan", (MODEL, with_nan, labels)),
        (TypeError, "x must be a float array .* got uint8", (MODEL, (x * 255).astype(np.uint8), labels)),
        (ValueError, r"x must be images .* got shape \(3, 4, 2\)", (MODEL, x[0], labels)),
        (ValueError, "x is empty", (MODEL, x[:0], labels[:0])),
        (ValueError, "x has 4, labels has 3", (MODEL, x, labels[:3])),
        (ValueError, r"labels must lie in 0 .. 2, but labels\[0\] is 3", (MODEL, x, labels + CLASSES)),
        (TypeError, "labels must be integer labels, got float32", (MODEL, x, labels.astype(np.float32))),
        (TypeError, "model must be a function", (None, x, labels)),
        (
            ValueError,
            r"model must return logits \(4, num_classes\) .* got \(4,\)",
            (lambda x: x[:, 0, 0, 0], x, labels),
        ),
        (TypeError, "model must return one array of floats", (lambda x: (MODEL(x), 1), x, labels)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            attack(*arguments, key=key)
    with pytest.raises(TypeError, match="key must be a random key, got int"):
        attack(MODEL, x, labels, key=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        attack(MODEL, x, labels, key=key, batch_size=0)
    with pytest.raises(TypeError, match="key"):
        attack(MODEL, x, labels)


def test_logits_that_are_not_finite_at_a_clean_image_stop_the_attack(key):
    x = 0.9 * images(5)
    x[3, 0, 0, 0] = 1

    def broken(x):
        return MODEL(x) + jnp.where(x[:, :1, 0, 0] == 1, jnp.inf, 0)

    with pytest.raises(ValueError, match=r"logits at x\[3\] are not \(1 such"):
        PGD(Linf(0.1), steps=1)(broken, x, np.zeros(5, np.int32), key=key, batch_size=2)


def test_settings_are_checked_when_built(unchecked):
    threat = Linf(0.1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        PGD(threat, steps=0)
    with pytest.raises(TypeError, match=r"steps must be an integer, got 2\.5"):
        PGD(threat, steps=2.5)
    with pytest.raises(ValueError, match="step_size must be finite and positive, got 0"):
        PGD(threat, step_size=0)
    with pytest.raises(ValueError, match="restarts must be 1 with random_start=False"):
        PGD(threat, restarts=2, random_start=False)
    with pytest.raises(ValueError, match="got 'hinge'"):
        FGSM(threat, loss="hinge")
    with pytest.raises(TypeError, match=r"threat must be a threat model, got 0\.1 \(float\)"):
        PGD(0.1)
    with pytest.raises(TypeError, match="positional"):
        PGD(threat, 20)


def test_names_tell_settings_apart_and_repr_shows_them():
    threat = Linf(0.1)
    attacks = [FGSM(threat), PGD(threat), PGD(threat, steps=50, restarts=10), PGD(threat, loss="margin")]
    assert [attack.name for attack in attacks] == ["FGSM", "PGD-20", "PGD-50-10", "PGD-20 margin"]
    assert repr(attacks[3]).startswith("PGD(threat=Linf(eps=0.1), steps=20, step_size=None, loss='margin'")
