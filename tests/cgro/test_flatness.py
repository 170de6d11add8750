"""Largest gradients and losses where they are known: quadratics, linear classifiers; gaps and rank correlations."""

import itertools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkadv as na
from ntkadv.cgro import Flatness, FlatnessCurves, flatness_curves, rank_correlation
from ntkadv.cgro.flatness import largest_gradient

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them


def first_score(logits, labels):
    """A loss that is the model's second output: then gradients are those of the model."""
    del labels
    return logits[:, 1]


def quadratic(hessian, centre, x):
    """(0, 1/2 (x - c)' H (x - c))."""
    offset = x.reshape(len(x), -1) - centre
    value = jnp.einsum("ni,ij,nj->n", offset, hessian, offset) / 2
    return jnp.stack([jnp.zeros_like(value), value], axis=1)


def searched(model, x, eps, **settings):
    labels = jnp.zeros(len(x), jnp.int32)
    keys = jax.random.split(jax.random.key(1), len(x))
    search = jax.jit(partial(largest_gradient, model, settings=Flatness(**settings)))
    return search(x, labels, keys, eps)


@pytest.mark.parametrize("box", [False, True])
def test_on_a_diagonal_quadratic_the_largest_gradient_is_found_exactly(box, x64):
    rng = np.random.default_rng(0)
    h, centre, x = rng.normal(size=6), rng.random(6), rng.random((8, 2, 3, 1))
    eps = 0.3
    found = searched(partial(quadratic, np.diag(h), centre), jnp.asarray(x), eps, loss=first_score, box=box, restarts=2)
    flat = x.reshape(8, 6)
    ends = np.stack([flat - eps, flat + eps])
    ends = np.clip(ends, 0, 1) if box else ends
    known = np.sum(np.abs(h) * np.abs(ends - centre).max(axis=0), axis=1)
    if box:
        # From a pixel near an edge of the box ascent may run to the nearer end.
        assert (np.asarray(found.gradient) <= known + 1e-12).all()
        np.testing.assert_allclose(found.gradient, known, rtol=0.15)
    else:
        np.testing.assert_allclose(found.gradient, known, rtol=1e-12)
    np.testing.assert_allclose(found.clean_gradient, np.sum(np.abs(h * (flat - centre)), axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.clean_loss, np.sum(h * (flat - centre) ** 2, axis=1) / 2, rtol=1e-12)


def test_on_any_quadratic_the_largest_gradient_is_that_of_the_corners(x64):
    rng = np.random.default_rng(2)
    root = rng.normal(size=(6, 6))
    hessian, centre, x, eps = root + root.T, rng.random(6), rng.random((8, 2, 3, 1)), 0.4
    found = searched(
        partial(quadratic, hessian, centre), jnp.asarray(x), eps, loss=first_score, box=False, restarts=8, steps=20
    )
    # |H (x - c)|_1 is convex, so that its maximum over a box is at a corner.
    corners = eps * np.array(list(itertools.product([-1, 1], repeat=6)))
    offsets = x.reshape(8, 1, 6) + corners - centre
    known = np.abs(offsets @ hessian).sum(axis=2).max(axis=1)
    assert (np.asarray(found.gradient) <= known * (1 + 1e-12)).all()
    # Ascent ends in a local maximum now and then.
    np.testing.assert_allclose(found.gradient, known, rtol=0.2)
    assert np.mean(np.isclose(found.gradient, known, rtol=1e-10)) >= 0.75


def linear(w):
    return eqx.Partial(lambda w, x: jnp.stack([0 * (s := x.reshape(len(x), -1) @ w), s - 0.1], axis=1), jnp.asarray(w))


def test_of_a_linear_classifier_flatness_and_loss_change_are_known(key, x64):
    rng = np.random.default_rng(3)
    w, x = 3 * rng.normal(size=6), rng.uniform(0.4, 0.6, (30, 2, 3, 1))
    y = rng.integers(2, size=30)
    radii = [0.0, 0.05, 0.2]
    curves = flatness_curves(
        linear(w), (x[:20], y[:20]), (x[20:], y[20:]), radii, key=key, batch_size=7, progress=False
    )
    margins = (x.reshape(30, 6) @ w - 0.1) * (2 * y - 1)
    for i, radius in enumerate(radii):
        worst = margins - radius * np.abs(w).sum()
        losses, slopes = np.log1p(np.exp(-worst)), np.abs(w).sum() / (1 + np.exp(worst))
        change = losses - np.log1p(np.exp(-margins))
        for part, local, changed, loss, robust in (
            (slice(20), curves.local_flatness, curves.train_loss_change, curves.train_robust_loss, curves.train_robust),
            (slice(20, 30), curves.global_flatness, curves.test_loss_change, curves.test_robust_loss,
             curves.test_robust),
        ):  # fmt: skip
            assert local[i] == pytest.approx(slopes[part].mean(), rel=1e-9)
            assert changed[i] == pytest.approx(change[part].mean(), rel=1e-9, abs=1e-12)
            assert loss[i] == pytest.approx(losses[part].mean(), rel=1e-9)
            assert robust[i] == pytest.approx(np.mean(worst[part] > 0))
    np.testing.assert_allclose(curves.robust_gap, curves.train_robust - curves.test_robust)
    np.testing.assert_allclose(curves.robust_loss_gap, curves.test_robust_loss - curves.train_robust_loss)
    assert curves.train_clean[0] == pytest.approx(np.mean(margins[:20] > 0))
    # The loss is convex here: the robust loss exceeds the clean one by at least delta E|grad|_1.
    assert (curves.test_loss_change >= np.array(radii) * curves.global_flatness[0] - 1e-12).all()


@pytest.mark.parametrize("kind", [pytest.param("kernel", marks=pytest.mark.slow), "network"])
def test_predictors_and_networks_can_be_measured(kind, key):
    rng = np.random.default_rng(4)
    x, y = rng.random((24, 4, 4, 1)).astype(np.float32), np.arange(24) % 3
    arch = na.architectures.mlp(depth=1, width=16, num_classes=3, activation=na.architectures.Erf())
    if kind == "kernel":
        model = na.TrainingDynamics(arch, x[:16], na.targets(y[:16], 3), progress=False).predictor(1.0)
    else:
        model = eqx.Partial(arch.apply, arch.init(key, (4, 4, 1)))
    curves = flatness_curves(model, (x[:16], y[:16]), (x[16:], y[16:]), [0.0, 0.1, 0.2], key=key, progress=False)
    assert (np.diff(curves.local_flatness) > 0).all()
    assert (np.diff(curves.test_loss_change) > 0).all()
    assert (np.diff(curves.train_robust) <= 0).all()
    # A point of the ball, by hand, has no larger gradient than what was found.
    attack = na.attacks.FGSM(na.attacks.Linf(0.1), loss="cross_entropy")
    points = attack(model, x[:16], y[:16], key=key)

    def loss(z):
        return jnp.sum(na.attacks.LOSSES["cross_entropy"](model(z), jnp.asarray(y[:16])))

    norms = np.abs(np.asarray(jax.grad(loss)(points))).sum(axis=(1, 2, 3))
    assert norms.mean() <= curves.local_flatness[1] * (1 + 1e-3)


def curve(flat, gap):
    zeros = np.zeros(2)
    fields = dict.fromkeys(FlatnessCurves.__dataclass_fields__, zeros)
    return FlatnessCurves(**{**fields, "radii": np.array([0.1, 0.2]), "global_flatness": np.array([0, flat]),
                             "train_robust": np.array([0, gap]), "test_robust_loss": np.array([0, -gap])})  # fmt: skip


def test_ranks_are_correlated_over_epochs_and_models():
    models = {"a": [curve(1.0, 0.1), curve(2.0, 0.2)], "b": [curve(30.0, 0.21), curve(4.0, 0.205)]}
    found = rank_correlation(models, 0.2)
    assert (found.rho, found.n) == (pytest.approx(1), 4)
    assert rank_correlation(models, 0.2, gap="robust_loss_gap").rho == pytest.approx(-1)
    # By the formula for ranks without ties, 1 - 6 sum d^2 / (n (n^2 - 1)): one pair of neighbours is exchanged.
    swapped = [curve(1.0, 0.2), curve(2.0, 0.1), curve(3.0, 0.3), curve(4.0, 0.4)]
    assert rank_correlation(swapped, 0.2).rho == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_bad_input_is_refused(unchecked, key):
    x, y = np.full((4, 2, 3, 1), 0.5, np.float32), np.arange(4) % 2
    model = linear(np.ones(6, np.float32))

    def run(radii=(0.1,), train=(x, y), **changes):
        return flatness_curves(
            model, train, (x, y), list(radii), key=changes.pop("key", key), progress=False, **changes
        )

    with pytest.raises(ValueError, match=r"radii must be rising numbers from 0 on, got \[0\.2, 0\.1\]"):
        run(radii=(0.2, 0.1))
    with pytest.raises(ValueError, match="eps is in units of pixels"):
        run(radii=(8.0,))
    with pytest.raises(ValueError, match=r"train labels must lie in 0 \.\. 1"):
        run(train=(x, y + 1))
    with pytest.raises(TypeError, match="key must be a random key"):
        run(key=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Flatness(steps=0)
    with pytest.raises(ValueError, match="loss must be one of"):
        Flatness(loss="hinge")
    with pytest.raises(ValueError, match=r"largest gradients .* must be finite"):
        flatness_curves(lambda z: model(z) / 0.0, (x, y), (x, y), [0.1], key=key, progress=False)
    some = [curve(1.0, 0.1), curve(2.0, 0.2), curve(3.0, 0.3)]
    with pytest.raises(ValueError, match="curves must hold three or more, got 2"):
        rank_correlation(some[:2], 0.2)
    with pytest.raises(ValueError, match=r"radius must be one of the radii of every curve, got 0\.3"):
        rank_correlation(some, 0.3)
    with pytest.raises(ValueError, match="gap must be"):
        rank_correlation(some, 0.2, gap="clean")
    with pytest.raises(ValueError, match="must vary over the curves"):
        rank_correlation([some[0]] * 3, 0.2)
