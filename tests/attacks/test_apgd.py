"""Auto-PGD against the authors' own implementation, from the same start, and where the optimum is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_models import CLASSES, IMAGE, images, labels_of, linear, smooth

from ntkadv.attacks import APGD, L1, L2, PGD, Linf, TargetedAPGD
from ntkadv.attacks._step_sizes import Halving
from ntkadv.attacks.apgd import _ascend
from ntkadv.attacks.losses import LOSSES, TARGETED_LOSSES
from ntkadv.attacks.targets import target_classes

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

THREATS = [Linf(0.1), L2(0.4), L1(1.5)]
every_threat = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
N = 48


def torch_twin(model):
    """The network of `smooth` in PyTorch, images (b, c, h, w)."""
    torch = pytest.importorskip("torch")
    weights = [torch.tensor(np.asarray(w)) for w in (model.first, model.second, model.third)]

    def predict(x):
        hidden = torch.tanh((x.permute(0, 2, 3, 1).reshape(len(x), -1) - 0.5) @ weights[0])
        return torch.tanh(hidden @ weights[1]) @ weights[2]

    return predict


def nchw(x):
    return np.ascontiguousarray(np.transpose(np.asarray(x), (0, 3, 1, 2)))


def nhwc(x):
    return np.transpose(np.asarray(x), (0, 2, 3, 1))


@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
@every_threat
def test_the_ascent_is_that_of_the_authors_from_the_same_start(threat, loss, key):
    torch = pytest.importorskip("torch")
    original = pytest.importorskip("pyautoattack.autopgd_base")
    # Away from the box, where their l_2 projection is the exact one too.
    model, x = smooth(), 0.35 + 0.3 * images(N)
    labels = labels_of(model, x)
    start = threat.project(x + jax.random.normal(key, x.shape), jnp.asarray(x))
    steps = 40
    ours = _ascend(model, LOSSES[loss], threat, start, jnp.asarray(x), jnp.asarray(labels), steps, 0.75)

    name = {"cross_entropy": "ce", "dlr": "dlr"}[loss]
    theirs = original.APGDAttack(
        torch_twin(model), n_iter=steps, norm=threat.norm, eps=threat.eps, loss=name, device="cpu", seed=0
    )
    clean = torch.tensor(nchw(x))
    theirs.init_hyperparam(clean)
    best, _, best_loss, _ = theirs.attack_single_run(
        clean, torch.tensor(labels).long(), x_init=torch.tensor(nchw(start))
    )
    gap = np.abs(nhwc(best.numpy()) - np.asarray(ours.best.point)).max(axis=(1, 2, 3))
    # Rounding decides about pixels of no weight, and about paths that part and lead to the same place.
    loss_gap = np.abs(best_loss.numpy() - np.asarray(ours.best_loss))
    assert np.mean(loss_gap < 1e-4) > 0.85, np.sort(loss_gap)
    assert np.mean(gap < 1e-4) > 0.5, np.sort(gap)
    np.testing.assert_allclose(ours.best_loss.mean(), best_loss.numpy().mean(), rtol=2e-3)


def test_checkpoints_are_those_of_the_paper():
    is_checkpoint, windows = Halving(Linf(0.1), 100, 0.75).plan()
    after = np.flatnonzero(is_checkpoint) + 1
    # p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), in hundredths of the steps
    shares = [0, 22]
    while shares[-1] < 100:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 3, 6))
    assert after.tolist() == [share for share in shares[1:] if share <= 100]
    assert windows[is_checkpoint].tolist() == np.diff([0, *after]).tolist()


def test_steps_are_halved_where_too_few_raise_the_loss_or_nothing_changes(key):
    rule = Halving(Linf(0.1), 100, 0.75)
    x = jnp.asarray(images(4))
    state = rule.start(x, x, jnp.zeros(4))
    np.testing.assert_allclose(state.size, 0.2, rtol=1e-6)
    # Of a window of 8: six rises, seven; then seven without a new best loss, and seven with one.
    state, back = rule.look_back(state, x, x, jnp.ones(4), jnp.array([6, 7, 7, 7]), jnp.asarray(8))
    assert back.tolist() == [True, False, False, False]
    state, back = rule.look_back(state, x, x, jnp.array([1.0, 1.0, 1.0, 2.0]), jnp.full(4, 7), jnp.asarray(8))
    assert back.tolist() == [False, True, True, False]
    np.testing.assert_allclose(state.size, [0.1, 0.1, 0.1, 0.2], rtol=1e-6)


@every_threat
def test_auto_pgd_reaches_more_than_pgd_of_the_same_length(threat, key):
    model, x = smooth(seed=1), images(N)
    labels = labels_of(model, x)

    def reached(attack):
        return LOSSES["margin"](model(attack(model, x, labels, key=key)), jnp.asarray(labels)).mean()

    assert reached(APGD(threat, steps=40, loss="margin")) > reached(PGD(threat, steps=40, loss="margin")) - 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("loss", TARGETED_LOSSES)
def test_a_targeted_ascent_raises_the_logit_of_its_target(loss, key):
    weights = jax.random.normal(key, (int(np.prod(IMAGE)), 5))
    model = type(linear())(weights)
    x = images(6)
    labels = labels_of(model, x)
    for target in range(5):
        attack = TargetedAPGD(Linf(0.02), targets=(target,), loss=loss, steps=20)
        attacked = attack(model, x, labels, key=key)
        others = labels != target
        before, after = (np.asarray(model(jnp.asarray(z))) for z in (x, attacked))
        rows = np.arange(6)
        lead = [f[rows, np.full(6, target)] - f[rows, labels] for f in (before, after)]
        value = [
            TARGETED_LOSSES[loss](jnp.asarray(f), jnp.asarray(labels), jnp.full(6, target)) for f in (before, after)
        ]
        assert (value[1] >= value[0] - 1e-5)[others].all()
        if loss == "margin":
            assert (lead[1] > lead[0])[others].all()


def test_targets_are_the_likeliest_wrong_classes_in_order():
    logits = jnp.array([[0.0, 3.0, 2.0, 1.0], [5.0, 3.0, 2.0, 1.0]])
    labels = jnp.array([1, 2], jnp.int32)
    ranks = target_classes(9, 4)
    assert len(ranks) == 3, "there are only three wrong classes"
    chosen = [np.asarray(ranks.of(logits, labels, jnp.uint32(i))).tolist() for i in range(3)]
    assert np.transpose(chosen).tolist() == [[2, 3, 0], [0, 1, 3]]


def test_a_target_that_is_the_label_gives_way_to_the_likeliest_wrong_class():
    logits = jnp.array([[0.0, 3.0, 2.0, 1.0], [5.0, 3.0, 2.0, 1.0]])
    labels = jnp.array([1, 2], jnp.int32)
    assert target_classes((1, 3), 4).of(logits, labels, jnp.uint32(0)).tolist() == [2, 1]


def test_restarts_run_only_on_what_is_unbroken_and_cost_only_that(key):
    model, x = smooth(), images(N)
    labels = labels_of(model, x)
    attack = APGD(Linf(0.03), steps=8, restarts=4)
    done = attack.run(model, x, labels, key=key, batch_size=16)
    left = [N, *(line["attacked"] - line["broken"] for line in done.log[:-1])]
    assert [line["attacked"] for line in done.log] == left
    assert done.cost.gradients == 9 * sum(left)
    assert 0 < done.log[-1]["attacked"] < N
    assert done.is_wrong.mean() == pytest.approx(1 - done.log[-1]["robust_accuracy"])
    inside = jax.jit(lambda m: attack.perturb(m, jnp.asarray(x), jnp.asarray(labels), keys_of(key)))(model)
    np.testing.assert_allclose(inside, done.points, atol=1e-5)


def keys_of(key):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(N, dtype=jnp.uint32))


def test_memory_does_not_grow_with_the_number_of_steps(key):
    x, labels = jnp.asarray(images(N)), jnp.zeros(N, jnp.int32)

    def temporary_bytes(steps):
        compiled = jax.jit(APGD(Linf(0.1), steps=steps).perturb).lower(
            jax.tree_util.Partial(smooth()), x, labels, keys_of(key)
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(100) <= temporary_bytes(4) + 4096


def test_settings_are_checked_when_built(unchecked):
    with pytest.raises(ValueError, match=r"rho is a share of the steps and must be at most 1, got 1\.5"):
        APGD(Linf(0.1), rho=1.5)
    with pytest.raises(ValueError, match="loss must be one of squared, cross_entropy, margin, dlr"):
        APGD(Linf(0.1), loss="hinge")
    with pytest.raises(ValueError, match=r"targets must be distinct classes, got \(1, 1\)"):
        TargetedAPGD(Linf(0.1), targets=(1, 1))
    with pytest.raises(ValueError, match="targets must name at least one class"):
        TargetedAPGD(Linf(0.1), targets=())
    with pytest.raises(ValueError, match="targets must be at least 1, got 0"):
        TargetedAPGD(Linf(0.1), targets=0)


def test_what_a_model_with_few_classes_cannot_do_is_named(key):
    x = images(3)
    labels = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match=r"targets must lie in 0 .. 2, the classes of the model, got 3"):
        TargetedAPGD(Linf(0.1), targets=(3,), loss="margin")(smooth(), x, labels, key=key)
    with pytest.raises(
        ValueError, match="targeted dlr loss needs at least 4 classes, but the model has 3; use 'margin'"
    ):
        TargetedAPGD(Linf(0.1))(smooth(), x, labels, key=key)
    with pytest.raises(ValueError, match="dlr loss needs at least 3 classes, but the model has 2"):
        APGD(Linf(0.1), loss="dlr")(linear(), x, labels, key=key)
    assert CLASSES == 3


def test_names_tell_settings_apart():
    threat = Linf(0.1)
    attacks = [
        APGD(threat), APGD(threat, loss="dlr", restarts=5), APGD(threat, loss="margin", steps=20),
        TargetedAPGD(threat), TargetedAPGD(threat, loss="margin", targets=3),
    ]  # fmt: skip
    expected = ["APGD-CE", "APGD-DLR x5", "APGD-margin 20 steps", "APGD-T", "APGD-T-margin 3 targets"]
    assert [attack.name for attack in attacks] == expected
