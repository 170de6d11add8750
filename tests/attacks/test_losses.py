import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ntkadv.attacks.losses import LOSSES, TARGETED_LOSSES, cross_entropy, get_loss, margin, squared
from ntkadv.data import targets

LOGITS = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * 3
LABELS = np.random.default_rng(1).integers(0, 4, 50).astype(np.int32)


def test_squared_is_half_the_squared_distance_to_the_regression_targets():
    expected = 0.5 * np.linalg.norm(LOGITS.astype(np.float64) - targets(LABELS, 4), axis=1) ** 2
    np.testing.assert_allclose(squared(jnp.asarray(LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-5)


def test_cross_entropy_is_the_negative_log_softmax_at_the_label():
    expected = -scipy.special.log_softmax(LOGITS.astype(np.float64), axis=1)[np.arange(50), LABELS]
    np.testing.assert_allclose(cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-5, atol=1e-6)


def test_margin_is_the_lead_of_the_best_wrong_class():
    rows = zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
    expected = [max(f for k, f in enumerate(row) if k != label) - row[label] for row, label in rows]
    np.testing.assert_allclose(margin(jnp.asarray(LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-5, atol=1e-6)


def test_dlr_is_the_margin_in_units_of_the_spread():
    rows = zip(LOGITS.astype(np.float64), LABELS.tolist(), strict=True)
    expected = []
    for row, label in rows:
        falling = np.sort(row)[::-1]
        expected.append(-(row[label] - np.delete(row, label).max()) / (falling[0] - falling[2]))
    np.testing.assert_allclose(LOSSES["dlr"](jnp.asarray(LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-4)
    np.testing.assert_allclose(LOSSES["dlr"](jnp.asarray(100 * LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-4)


def test_targeted_dlr_is_that_of_the_paper():
    wanted = (LABELS + 1) % 4
    expected = []
    for row, label, target in zip(LOGITS.astype(np.float64), LABELS.tolist(), wanted.tolist(), strict=True):
        falling = np.sort(row)[::-1]
        expected.append(-(row[label] - row[target]) / (falling[0] - (falling[2] + falling[3]) / 2))
    found = TARGETED_LOSSES["dlr"](jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.asarray(wanted))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_finite_and_matches_finite_differences(name, x64):
    logits, labels = jnp.asarray(LOGITS, jnp.float64), jnp.asarray(LABELS)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=LOGITS.shape))

    def total(t):
        return jnp.sum(LOSSES[name](logits + t * direction, labels))

    difference = (total(1e-6) - total(-1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(total)(0.0), difference, rtol=1e-6)


def test_a_function_is_its_own_loss():
    def negative(logits, labels):
        return -logits[:, 0]

    assert get_loss(negative) is negative


def test_unknown_losses_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"loss must be one of squared, cross_entropy, margin, dlr .* got 'hinge'"):
        get_loss("hinge")
    with pytest.raises(TypeError, match="loss must be a name or a function"):
        get_loss(3)
