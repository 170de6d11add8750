"""What is watched during training, on linear models, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.attacks import FGSM, L2, PGD, Linf
from ntkadv.training import accuracy, generator_strength, robust_accuracy

EPS = 0.1


def problem(n=60, seed=0):
    """Images, labels of a direction with some noise, and two directions."""
    rng = np.random.default_rng(seed)
    x = rng.random((n, 2, 3, 1)).astype(np.float32)
    first = rng.normal(size=6).astype(np.float32)
    second = (first + 0.7 * rng.normal(size=6)).astype(np.float32)
    labels = (scores(first, x) + 0.4 * rng.normal(size=n) > 0).astype(np.int32)
    return x, labels, first, second


def scores(direction, x):
    return (np.asarray(x, np.float64).reshape(len(x), -1) - 0.5) @ direction.astype(np.float64)


def model(direction):
    """Logits (0, s): the class is whether the score is positive."""

    def logits(x):
        score = (x.reshape(len(x), -1) - 0.5) @ jnp.asarray(direction, x.dtype)
        return jnp.stack([jnp.zeros_like(score), score], axis=1)

    return logits


def share(direction, x, labels):
    return np.mean((scores(direction, x) > 0) == labels)


def worst(direction, x, labels):
    """The worst images in ball and box for a linear score: every pixel goes as far as it can."""
    push = np.where(labels == 1, -1, 1)[:, None] * np.sign(direction)
    return np.clip(x + EPS * push.reshape(x.shape), 0, 1)


@pytest.mark.parametrize("batch_size", [7, 60, 256])
def test_accuracy_is_the_share_that_is_right_however_it_is_cut(batch_size):
    x, labels, first, _ = problem()
    assert accuracy(model(first), x, labels, batch_size=batch_size) == share(first, x, labels)
    assert accuracy(model(first), x, 1 - labels, batch_size=batch_size) == pytest.approx(1 - share(first, x, labels))


def test_robust_accuracy_of_a_linear_model_is_that_of_its_worst_images(key):
    x, labels, first, _ = problem()
    exact = share(first, worst(first, x, labels), labels)
    assert 0.1 < exact < share(first, x, labels) - 0.1
    attack = PGD(Linf(EPS), steps=5, loss="cross_entropy")
    assert robust_accuracy(model(first), x, labels, attack, key=key) == exact
    assert robust_accuracy(model(first), x, labels, attack, key=key, batch_size=7) == exact


def test_strength_is_what_perturbations_of_one_model_do_to_another_beside_noise(key):
    x, labels, first, second = problem(n=400)
    found = generator_strength(model(second), model(first), x, labels, FGSM(Linf(EPS), loss="cross_entropy"), key=key)
    assert found.transferred == share(first, worst(second, x, labels), labels)
    # Random signs, on average over many draws of NumPy's.
    rng = np.random.default_rng(1)
    noise = [share(first, np.clip(x + EPS * rng.choice([-1, 1], x.shape), 0, 1), labels) for _ in range(300)]
    assert abs(found.noise - np.mean(noise)) < 4.5 * np.std(noise)
    assert found.gap == found.noise - found.transferred > 0.1
    # Of a model's own perturbations none are stronger.
    own = generator_strength(model(first), model(first), x, labels, FGSM(Linf(EPS), loss="cross_entropy"), key=key)
    assert own.transferred == share(first, worst(first, x, labels), labels) < found.transferred
    assert own.noise == found.noise


def test_noise_is_as_large_as_the_ball_in_its_own_norm(key):
    x = np.full((3, 2, 3, 1), 0.5, np.float32)
    labels, seen = np.array([0, 1, 0], np.int32), []

    def spy(x):
        jax.debug.callback(lambda z: seen.append(np.asarray(z)), x)
        return model(np.ones(6))(x)

    generator_strength(model(np.ones(6)), spy, x, labels, FGSM(L2(0.2), loss="cross_entropy"), key=key)
    jax.effects_barrier()
    noisy = seen[-1] - 0.5
    np.testing.assert_allclose(np.sqrt(np.sum(noisy**2, axis=(1, 2, 3))), 0.2, rtol=1e-4)
    assert len(np.unique(np.abs(noisy).round(5))) == 1


def test_a_wrong_attack_or_images_of_the_wrong_shape_are_named(unchecked, key):
    x, labels, first, _ = problem()
    attack = PGD(Linf(EPS))
    with pytest.raises(ValueError, match="labels"):
        robust_accuracy(model(first), x, labels[:-1], attack, key=key)
    with pytest.raises(ValueError, match="x must"):
        robust_accuracy(model(first), x[..., 0], labels, attack, key=key)
    with pytest.raises(TypeError, match="key must be a random key"):
        robust_accuracy(model(first), x, labels, attack, key=0)
