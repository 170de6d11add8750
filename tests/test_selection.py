"""Accuracies along a family of predictors, and the choice among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.attacks import PGD, Linf
from ntkadv.selection import RobustnessPath, robustness_path


def brightness(threshold):
    """Classify by the mean pixel: class 1 above the threshold."""

    def model(x):
        mean = jnp.mean(x, axis=(1, 2, 3))
        return jnp.stack([threshold - mean, mean - threshold], axis=1)

    return model


def test_each_predictor_is_measured_clean_and_attacked_for_itself():
    x = jnp.asarray(np.linspace(0.05, 0.95, 10, dtype="float32"))[:, None, None, None] * jnp.ones(
        (1, 2, 2, 1), "float32"
    )
    labels = (np.arange(10) >= 5).astype("int32")
    path = robustness_path(
        brightness, [0.5, 0.2], x, labels, attack=PGD(Linf(0.1), steps=5), key=jax.random.key(0), progress=False
    )
    # The means are 0.05, 0.15, ...: at 0.5 the attack turns 0.45 and 0.55; at 0.2, three are wrong from the start.
    np.testing.assert_allclose(path.clean, [1.0, 0.7])
    np.testing.assert_allclose(path.robust, [0.8, 0.6])
    assert path.n == 10


def test_the_most_robust_value_is_best_and_of_equals_the_middle_one():
    path = RobustnessPath(np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4), np.array([0.1, 0.4, 0.4, 0.4]), 10)
    assert path.best == 3.0


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="values must hold at least one"):
        robustness_path(brightness, [], np.zeros((1, 2, 2, 1), "float32"), np.zeros(1, "int32"),
                        attack=PGD(Linf(0.1)), key=jax.random.key(0))  # fmt: skip
