"""Warnings fire on models that mislead attacks, and on those only."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_models import images, labels_of, smooth

from ntkadv.attacks import APGD, PGD, AutoAttack, EvaluationWarning, Linf, SquareAttack, check_model, check_outcome

MODEL = smooth()
X = images(40, seed=1)
LABELS = labels_of(MODEL, X)


def kinds(model, x=X, labels=LABELS):
    return [flag.kind for flag in check_model(model, x, labels)]


def test_an_honest_model_raises_no_flag():
    assert kinds(MODEL) == []
    assert kinds(jax.jit(MODEL.__call__)) == []


def test_random_outputs_are_seen_even_inside_jit():
    rng = np.random.default_rng(0)

    def noisy(x):
        return MODEL(x) + rng.normal(size=(len(x), 3)).astype(np.float32)

    assert kinds(noisy) == ["random outputs"]


def test_probabilities_are_seen():
    assert "softmax outputs" in kinds(lambda x: jax.nn.softmax(MODEL(x)))
    assert "softmax outputs" not in kinds(lambda x: jax.nn.log_softmax(MODEL(x)))


def quantised(x):
    return MODEL(jnp.round(4 * x) / 4)


def test_gradients_that_are_hidden_are_seen():
    labels = labels_of(quantised, X)
    flags = check_model(quantised, X, labels)
    assert [flag.kind for flag in flags] == ["zero gradients"]
    assert "40 of 40 correctly classified images" in flags[0].message


def test_a_cross_entropy_that_rounds_to_zero_is_seen():
    flags = check_model(lambda x: 1e4 * MODEL(x), X, LABELS)
    assert [flag.kind for flag in flags] == ["saturated cross-entropy"]


def test_half_precision_is_not_taken_for_randomness():
    assert kinds(eqx.filter_jit(lambda x: MODEL(x).astype(jnp.bfloat16))) == []


SQUARE, CE = SquareAttack(Linf(0.1)), APGD(Linf(0.1))


def outcome(correct, attacks, fell_to=None):
    return [flag.kind for flag in check_outcome(correct, attacks, fell_to)]


def test_a_black_box_attack_that_wins_is_flagged():
    attacks = {"ce": CE, "square": SQUARE}
    robust = np.ones(100, bool)
    lost = robust.copy()
    lost[:3] = False
    assert outcome({"ce": robust, "square": lost}, attacks) == ["black box wins"]
    assert outcome({"ce": lost, "square": robust}, attacks) == []
    assert outcome({"ce": lost, "square": lost}, attacks) == [], "it breaks only what the others break too"
    assert outcome({"square": lost}, {"square": SQUARE}) == []


def test_a_black_box_member_of_an_ensemble_is_flagged_too():
    ensemble = AutoAttack(Linf(0.1))
    fell_to = np.array(["Square"] * 2 + ["APGD-CE"] * 30 + [""] * 68, dtype=object)
    assert outcome({"AA": fell_to == ""}, {"AA": ensemble}, {"AA": fell_to}) == ["black box wins"]
    fell_to[:2] = "APGD-T"
    assert outcome({"AA": fell_to == ""}, {"AA": ensemble}, {"AA": fell_to}) == []


@pytest.mark.parametrize("weak", ["squared", "margin"])
def test_losses_that_disagree_are_flagged_and_the_weak_one_named(weak):
    attacks = {loss: PGD(Linf(0.1), loss=loss) for loss in ("squared", "margin")}
    correct = {loss: np.arange(100) < (60 if loss == weak else 50) for loss in attacks}
    (flag,) = check_outcome(correct, attacks)
    assert flag.kind == "losses disagree"
    said = "squared loss flatters" if weak == "squared" else "other losses flatter"
    assert said in flag.message
    correct[weak] = np.arange(100) < 51
    assert check_outcome(correct, attacks) == []


@pytest.mark.slow
def test_on_hidden_gradients_square_wins_and_autoattack_says_so(key):
    x = images(24, seed=3)
    labels = labels_of(quantised, x)
    attack = AutoAttack(Linf(0.2), steps=10, queries=300)
    with pytest.warns(EvaluationWarning) as caught:
        done = attack.run(quantised, x, labels, key=key)
    said = [str(warning.message) for warning in caught]
    assert any(message.startswith("zero gradients") for message in said)
    assert any(message.startswith("black box wins: AutoAttack 10 steps, 300 queries: Square-300") for message in said)
    by_member = {line["attack"]: line["broken"] for line in done.log}
    # Gradient members are left with where they start: at random points.
    assert (done.fell_to == "Square-300").sum() == by_member["Square-300"] > 0
