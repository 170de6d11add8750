"""Square against AutoAttack's, known optima, and models that have no gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_models import CLASSES, images, labels_of, smooth

from ntkadv.attacks import L1, L2, PGD, Linf
from ntkadv.attacks.losses import LOSSES, margin
from ntkadv.attacks.square import SquareAttack, _patch, _recolour, _redistribute

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

IMAGE = (10, 10, 3)
THREATS = [Linf(0.03), L2(0.45)]
every_threat = pytest.mark.parametrize("threat", THREATS, ids=["Linf", "L2"])
LAYERS = [
    (np.random.default_rng(0).normal(size=shape) * 2 / shape[0] ** 0.5).astype(np.float32)
    for shape in [(300, 32), (32, 32), (32, CLASSES)]
]


def network(x):
    hidden = x.reshape(len(x), -1) - 0.5
    for weights in LAYERS[:2]:
        hidden = jnp.tanh(jnp.matmul(hidden, weights, precision="highest"))
    return jnp.matmul(hidden, LAYERS[2], precision="highest")


def success_of_autoattack(threat, x, labels, queries, seeds):
    """Success rate of the authors' code on a twin of `network`; its squares may touch the last row and column, too."""
    torch = pytest.importorskip("torch")
    square = pytest.importorskip("pyautoattack.square")
    torch.set_num_threads(1)
    layers = [torch.tensor(weights) for weights in LAYERS]

    def twin(x):
        hidden = x.permute(0, 2, 3, 1).reshape(len(x), -1) - 0.5
        for weights in layers[:2]:
            hidden = torch.tanh(hidden @ weights)
        return hidden @ layers[2]

    class UpToTheEdge(square.SquareAttack):
        def random_int(self, low=0, high=1, shape=(1,)):
            return super().random_int(low, high + 1, list(shape))

    x, labels = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels).long()
    rates = []
    for seed in range(seeds):
        settings = {"eps": threat.eps, "n_queries": queries, "resc_schedule": False, "seed": seed}
        attacked = UpToTheEdge(twin, norm=threat.norm, **settings).perturb(x, labels)
        rates.append(float((twin(attacked).argmax(1) != labels).float().mean()))
    return np.mean(rates)


@every_threat
def test_as_many_samples_fall_as_to_autoattack(threat, key):
    x = images(128, image=IMAGE)
    labels = labels_of(network, x)
    attack = SquareAttack(threat, queries=200)
    ours = np.mean([attack.run(network, x, labels, key=jax.random.fold_in(key, i)).is_wrong.mean() for i in range(2)])
    theirs = success_of_autoattack(threat, x, labels, queries=200, seeds=4)
    assert 0.3 < theirs < 0.8
    # The standard deviation of each over seeds, 0.02 for one, is about 0.01.
    assert abs(ours - theirs) < 0.05


def brighter(x):
    """Class 1 where an image is brighter than half; all pixels and channels weigh the same."""
    score = jnp.mean(x, axis=(1, 2, 3)) - 0.5
    return jnp.stack([-score, score], axis=1)


def test_optimum_for_linf_is_reached_where_all_pixels_pull_one_way(key):
    labels = np.array([0, 1, 1, 0], np.int32)
    towards = np.array([1, -1, -1, 1], np.float32)[:, None, None, None]
    x = 0.45 - 0.1 * towards + 0.1 * images(4)
    x[:, 0, 0] = 0.5 + 0.495 * towards[:, 0, 0]
    assert (labels_of(brighter, x) == labels).all()
    attacked = SquareAttack(Linf(0.01), queries=900)(brighter, x, labels, key=key)
    np.testing.assert_allclose(attacked, np.clip(x + 0.01 * towards, 0, 1), atol=1e-6)


def test_whole_radius_is_used_for_l2(key):
    x = (0.4 + 0.1 * images(4, image=IMAGE)).astype(np.float32)
    attacked = SquareAttack(L2(0.5), queries=100)(brighter, x, np.zeros(4, np.int32), key=key)
    np.testing.assert_allclose(np.linalg.norm((attacked - x).reshape(4, -1), axis=1), 0.5, atol=1e-4)


@every_threat
def test_no_gradients_are_used(threat, key):
    def quantised(x):
        return jnp.round(64 * network(jnp.round(255 * x) / 255)) / 64

    x = images(32, image=IMAGE)
    labels = labels_of(quantised, x)
    assert not jax.grad(lambda x: jnp.sum(quantised(x) ** 2))(jnp.asarray(x)).any()
    by_gradients = PGD(threat, random_start=False).run(quantised, x, labels, key=key)
    by_squares = SquareAttack(threat, queries=200).run(quantised, x, labels, key=key)
    assert by_gradients.is_wrong.mean() == 0
    assert by_squares.is_wrong.mean() > 0.3
    assert SquareAttack.black_box


def test_search_ends_when_all_samples_are_misclassified(key):
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(len(x)))
        return smooth()(x)

    x = images(4)
    wrong = labels_of(smooth(), x, flipped=4)
    attacked = SquareAttack(Linf(0.03), queries=10**7)(counted, x, wrong, key=key)
    jax.effects_barrier()
    np.testing.assert_array_equal(attacked, x)
    assert len(calls) <= 4, "the clean images, the start, and the checks around the attack"

    calls.clear()
    attack = SquareAttack(Linf(1e-4), queries=10)
    attack(counted, x, labels_of(smooth(), x, flipped=3), key=key)
    jax.effects_barrier()
    assert 11 <= len(calls) <= 13


def share_of_the_paper(query, p):
    """What the share is at a query of 10,000, as the paper lists it."""
    last_queries = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    return next((p / 2**k for k, last in enumerate(last_queries) if query <= last), p / 512)


def test_sides_follow_the_schedule_of_the_paper():
    for threat in THREATS:
        attack = SquareAttack(threat, p_init=0.3)
        for query in (1, 10, 11, 50, 51, 200, 201, 500, 501, 1001, 2000, 2001, 4001, 6000, 6001, 8000, 8001, 10000):
            side = attack.sides(32, 32)[sum(query > after for after in attack.halved_after())]
            expected = max(round(np.sqrt(share_of_the_paper(query, 0.3)) * 32), 1)
            if threat.norm == "L2":
                expected = max(expected, 3)
                expected += expected % 2 == 0
            assert side == expected
    assert SquareAttack(Linf(0.1), queries=500, rescale_schedule=True).halved_after()[4:6] == (50, 100)
    assert SquareAttack(Linf(0.1), queries=500).halved_after()[4:6] == (1000, 2000)


@every_threat
def test_squares_of_every_side_reach_every_pixel_of_images_of_any_shape(threat, key):
    for shape in ((3, 4, 2), (9, 4, 1)):
        for side in set(SquareAttack(threat, p_init=1.0).sides(*shape[:2])):
            offset = jnp.full(shape, threat.eps / np.prod(shape) ** 0.5)
            keys = jax.random.split(key, 900)
            if threat.norm == "Linf":
                change = jax.vmap(lambda k, s=side, o=offset: _recolour(k, o, threat.eps, jnp.int32(s)))(keys)
            else:
                patch = jnp.pad(jnp.asarray(_patch(side), jnp.float32), (0, 2))
                change = jax.vmap(
                    lambda k, s=side, o=offset, p=patch: _redistribute(k, o, threat.eps, jnp.int32(s), p)
                )(keys)
                np.testing.assert_allclose(jnp.sqrt(jnp.sum(change**2, axis=(1, 2, 3))), threat.eps, rtol=1e-4)
            changed = np.abs(change - offset).max(axis=3) > 1e-6
            assert changed.any(axis=0).all()
            assert (changed.sum(axis=(1, 2)) <= side**2 * (1 if threat.norm == "Linf" else 2)).all()


def test_patches_are_the_two_bumps_of_the_paper():
    rows, columns = 2, 5
    n = columns // 2
    upper = np.zeros((rows, columns))
    for r in range(1, rows + 1):
        for s in range(1, columns + 1):
            furthest = n - max(abs(r - rows // 2 - 1), abs(s - columns // 2 - 1))
            upper[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(furthest + 1))
    patch = _patch(5)
    np.testing.assert_allclose(patch[:2] * 2**0.5, upper / np.linalg.norm(upper), rtol=1e-12)
    assert (patch[2:] < 0).all()
    np.testing.assert_allclose(np.linalg.norm(patch[2:]), 0.5**0.5)


@pytest.mark.parametrize(("threat", "loss"), [(Linf(0.01), "margin"), (L2(0.15), "cross_entropy")])
def test_more_queries_never_lose(threat, loss, key):
    model, x = smooth(), images(6)
    labels = labels_of(model, x)

    def strength(points):
        logits = model(jnp.asarray(points))
        return np.array([np.argmax(logits, 1) != labels, LOSSES[loss](logits, jnp.asarray(labels))])

    found = [strength(x)]
    for queries in (1, 5, 40):
        found.append(strength(SquareAttack(threat, loss=loss, queries=queries)(model, x, labels, key=key)))
    for (was_wrong, before), (is_wrong, after) in itertools.pairwise(found):
        assert ((is_wrong > was_wrong) | ((is_wrong == was_wrong) & (after >= before - 1e-6))).all()
    assert (found[3] > found[1]).any()


def test_restarts_start_elsewhere_and_never_lose(key):
    model, x = smooth(), images(6)
    labels = labels_of(model, x)
    once, often = (
        SquareAttack(Linf(0.01), queries=3, restarts=restarts)(model, x, labels, key=key) for restarts in (1, 4)
    )
    gained = margin(model(often), jnp.asarray(labels)) - margin(model(once), jnp.asarray(labels))
    assert (gained >= -1e-6).all()
    assert (gained > 1e-3).any()


def test_cost_counts_the_clean_image_and_the_queries():
    attack = SquareAttack(Linf(0.1), queries=30, restarts=2)
    assert attack.cost(10) == (0, 31)
    assert attack.attempts(10) == 2


def test_settings_are_checked_and_named(unchecked):
    threat = Linf(0.1)
    for error, message, arguments in [
        (ValueError, "queries must be at least 1, got 0", {"queries": 0}),
        (TypeError, r"restarts must be an integer, got 1\.5", {"restarts": 1.5}),
        (ValueError, "p_init must be finite and positive, got 0", {"p_init": 0}),
        (ValueError, "p_init is a share of the pixels, got 2", {"p_init": 2}),
        (ValueError, "got 'hinge'", {"loss": "hinge"}),
    ]:
        with pytest.raises(error, match=message):
            SquareAttack(threat, **arguments)
    with pytest.raises(TypeError, match=r"threat must be Linf or L2 for Square, got L1\(eps=2\.0\)"):
        SquareAttack(L1(2.0))
    attacks = [{}, {"queries": 1000}, {"restarts": 3}, {"loss": "squared"}, {"queries": 9, "loss": "cross_entropy"}]
    names = [SquareAttack(threat, **settings).name for settings in attacks]
    assert names == ["Square", "Square-1000", "Square-5000-3", "Square squared", "Square-9 cross_entropy"]
