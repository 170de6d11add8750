"""The ensemble: members, order and budgets as published, and its judgement against the original's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_models import images, labels_of, linear, smooth
from test_apgd import nchw

from ntkadv.attacks import APGD, FAB, L1, L2, PGD, AutoAttack, Linf, SquareAttack, TargetedAPGD

MODEL = smooth()


def test_versions_are_the_published_ones():
    for threat in (Linf(0.1), L2(0.5)):
        assert AutoAttack(threat).members(10) == (
            APGD(threat), TargetedAPGD(threat), FAB(threat), SquareAttack(threat)
        )  # fmt: skip
        assert AutoAttack(threat, version="plus").members(10) == (
            APGD(threat, restarts=5), APGD(threat, loss="dlr", restarts=5), FAB(threat, restarts=5, untargeted=True),
            SquareAttack(threat), TargetedAPGD(threat), FAB(threat),
        )  # fmt: skip


def test_budgets_are_those_of_the_original():
    original = pytest.importorskip("pyautoattack")
    theirs = original.AutoAttack(lambda x: x, norm="Linf", eps=0.1, version="standard", device="cpu")
    ce, targeted, fab, square = AutoAttack(Linf(0.1)).members(10)
    assert theirs.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (ce.steps, ce.restarts, ce.rho) == (theirs.apgd.n_iter, theirs.apgd.n_restarts, theirs.apgd.thr_decr)
    assert (targeted.steps, targeted.targets) == (theirs.apgd_targeted.n_iter, theirs.apgd_targeted.n_target_classes)
    assert (fab.steps, fab.targets, fab.restarts) == (theirs.fab.n_iter, theirs.fab.n_target_classes, 1)
    assert (fab.alpha_max, fab.eta, fab.beta) == (theirs.fab.alpha_max, theirs.fab.eta, theirs.fab.beta)
    assert (square.queries, square.p_init) == (theirs.square.n_queries, theirs.square.p_init)
    assert square.rescale_schedule == theirs.square.rescale_schedule


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_robust_accuracy_is_that_of_the_original(norm, key):
    torch = pytest.importorskip("torch")
    original = pytest.importorskip("pyautoattack")
    weights = [jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate([(75, 24), (24, 5)])]

    def model(x):
        return jnp.tanh(jnp.matmul(x.reshape(len(x), -1) - 0.5, weights[0]) / 4) @ weights[1]

    x = images(150, seed=4, image=(5, 5, 3))
    labels = labels_of(model, x, flipped=10)
    threat = {"Linf": Linf(0.02), "L2": L2(0.12)}[norm]
    done = AutoAttack(threat, steps=20, queries=200, targets=4).run(model, x, labels, key=key)

    first, second = (torch.tensor(np.asarray(w)) for w in weights)

    def twin(x):
        return torch.tanh((x.permute(0, 2, 3, 1).reshape(len(x), -1) - 0.5) @ first / 4) @ second

    theirs = original.AutoAttack(twin, norm=norm, eps=threat.eps, version="standard", device="cpu", seed=0)
    for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
        part.n_iter = 20
    for part in (theirs.apgd, theirs.apgd_targeted):
        part.n_iter_2, part.n_iter_min, part.size_decr = 4, 1, 1
    theirs.fab.n_target_classes = theirs.apgd_targeted.n_target_classes = 4
    theirs.square.n_queries = 200
    points, _ = theirs.run_standard_evaluation(torch.tensor(nchw(x)), torch.tensor(labels).long(), batch_size=150)
    wrong = np.asarray(model(jnp.asarray(np.transpose(points.numpy(), (0, 2, 3, 1))))).argmax(axis=1) != labels
    assert 0.2 < done.is_wrong.mean() < 0.8
    assert abs(done.is_wrong.mean() - wrong.mean()) <= 0.01


@pytest.mark.slow
def test_inside_one_program_the_ensemble_breaks_the_same(key):
    x = images(12, seed=5)
    labels = labels_of(MODEL, x, flipped=2)
    attack = AutoAttack(Linf(0.04), steps=8, queries=40)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(12, dtype=jnp.uint32))
    inside = jax.jit(lambda x, y, k: attack.perturb(MODEL, x, y, k))(x, labels, keys)
    done = attack.run(MODEL, x, labels, key=key)
    wrong = np.asarray(MODEL(inside)).argmax(axis=1) != labels
    np.testing.assert_array_equal(wrong, done.is_wrong)
    np.testing.assert_array_equal(inside[:2], x[:2])


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_with_few_classes_the_margin_stands_in_for_losses_that_are_not_defined(classes, key):
    model, x = linear(classes), images(10)
    labels = labels_of(model, x)
    for version in ("standard", "plus"):
        attack = AutoAttack(Linf(0.05), version=version, steps=3, queries=4)
        losses = {member.name: member.loss for member in attack.members(classes) if isinstance(member, TargetedAPGD)}
        assert set(losses.values()) == {"margin"}
        assert attack.run(model, x, labels, key=key).points.shape == x.shape


def test_custom_members_run_in_their_order_with_their_own_settings(key):
    threat = Linf(0.05)
    attack = AutoAttack(threat, version="custom", attacks_to_run=["square", PGD(threat, steps=3)], queries=7)
    x = images(6)
    names = [line["attack"] for line in attack.run(MODEL, x, labels_of(MODEL, x), key=key).log]
    assert names == ["Square-7", "PGD-3"]
    assert attack.name == "AutoAttack (square, PGD-3) 7 queries"
    weaker = attack.with_eps(0.01)
    assert all(member.threat == Linf(0.01) for member in weaker.members(10))


def test_what_users_do_wrong_is_named(unchecked):
    threat = Linf(0.1)

    def custom(members):
        return AutoAttack(threat, version="custom", attacks_to_run=members)

    cases = [
        (TypeError, "threat must be Linf or L2, which FAB and Square know", lambda: AutoAttack(L1(12.0))),
        (ValueError, "version must be 'standard', .* got 'rand'", lambda: AutoAttack(threat, version="rand")),
        (ValueError, "members of version='custom' and", lambda: AutoAttack(threat, attacks_to_run=["square"])),
        (ValueError, "with 0 members", lambda: AutoAttack(threat, version="custom")),
        (TypeError, r"got one; write \['square'\]", lambda: custom("square")),
        (ValueError, "among apgd-ce, .* got 'pgd'", lambda: custom(["pgd"])),
        (TypeError, "must hold names or attacks, got int", lambda: custom([3])),
        (
            ValueError, r"must share the threat model Linf\(eps=0\.1\)",
            lambda: custom([PGD(Linf(0.2))]),
        ),
        (ValueError, "queries must be at least 1, got 0", lambda: AutoAttack(threat, queries=0)),
    ]  # fmt: skip
    for error, message, build in cases:
        with pytest.raises(error, match=message):
            build()
