"""Xi(t) against integrals known by hand."""

import numpy as np
import pytest

from ntkadv.dynamics import Regularization

ARK = np.array([0.0, 0.5, 2.0])


def test_no_attack_is_standard_training():
    np.testing.assert_array_equal(Regularization(ark=ARK).xi(3.0), [3.0, 3.0, 3.0])


@pytest.mark.parametrize("strength", [1.5, np.array([1.0, 2.0, 0.0])])
def test_constant_strength_grows_xi_at_the_rate_of_the_linearised_attack(strength):
    regularization = Regularization(ark=ARK, strength=strength)
    assert regularization.constant
    np.testing.assert_allclose(regularization.xi(2.0), 2 * np.exp(ARK * strength))
    assert np.isinf(regularization.xi(np.inf)).all()


def test_growing_strength_integrates_to_an_exponential():
    """strength(t) = t: Xi = (e^{ark t} - 1) / ark."""
    regularization = Regularization(ark=ARK, strength=lambda t: t)
    assert not regularization.constant
    np.testing.assert_allclose(regularization.xi(2.0), [2.0, np.expm1(1.0) / 0.5, np.expm1(4.0) / 2], rtol=1e-11)
    np.testing.assert_array_equal(regularization.xi(0.0), 0)


def test_strength_may_vary_by_sample_and_time():
    strength = lambda t: np.array([1.0, np.log1p(t), np.log1p(t)])  # noqa: E731
    value = Regularization(ark=ARK, strength=strength).xi(3.0)
    np.testing.assert_allclose(value, [3.0, (4**1.5 - 1) / 1.5, (4**3 - 1) / 3], rtol=1e-11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ark": np.ones((2, 2))}, r"ark must have shape \(n,\)"),
        ({"ark": np.array([1.0, np.inf])}, "ark must be finite"),
        ({"ark": np.array([1.0, -1.0])}, "ark must not be negative"),
        ({"ark": ARK, "strength": -1.0}, "attack_strength must not be negative"),
        ({"ark": ARK, "strength": np.inf}, "attack_strength must be finite"),
        ({"ark": ARK, "strength": np.ones(2)}, "attack_strength must be a number or have shape"),
        ({"ark": ARK, "strength": 400.0}, "overflows: the exponent of sample 2 is 800"),
        ({"ark": ARK, "strength": lambda t: -1.0}, "attack_strength must not be negative"),
    ],
)
def test_bad_settings_are_refused_when_built(unchecked, settings, message):
    with pytest.raises(ValueError, match=message):
        Regularization(**settings)


@pytest.mark.parametrize("time", [-1.0, np.nan])
def test_bad_times_are_refused(time):
    with pytest.raises(ValueError, match="time must not be negative or NaN"):
        Regularization(ark=ARK).xi(time)


def test_what_happens_on_the_way_is_checked_too():
    with pytest.raises(ValueError, match="overflows"):
        Regularization(ark=ARK, strength=lambda t: 100 * t).xi(10.0)
    with pytest.raises(ValueError, match="time must be finite"):
        Regularization(ark=ARK, strength=lambda t: t).xi(np.inf)
    with pytest.raises(ValueError, match="could not be integrated"):
        Regularization(ark=ARK, strength=lambda t: (1e4 * t) % 1).xi(2.0)
