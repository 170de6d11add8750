"""Intervals and tests against scipy, textbook values, the definition by enumeration, and simulated coverage."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from ntkadv import evaluation, report
from ntkadv.statistics import McNemar, mcnemar, power_law, wilson_interval, wilson_intervals


def paired(both, only_first, only_second, neither):
    """Answers of two models with these counts, in mixed order."""
    counts = (both, only_first, only_second, neither)
    pairs = np.repeat([[True, True], [True, False], [False, True], [False, False]], counts, axis=0)
    return np.random.default_rng(0).permutation(pairs).T


def score_statistic(b, c, n, difference):
    """Tango's statistic with the likelihood maximised by a search, not by the formula."""

    def minus_log_likelihood(q):
        probabilities = np.array([q + difference, q, 1 - 2 * q - difference])
        counts = np.array([b, c, n - b - c])
        return -np.sum(scipy.special.xlogy(counts, np.maximum(probabilities, 1e-300)))

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = scipy.optimize.minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x
    return (b - c - n * difference) / math.sqrt(n * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 1), (543, 1000), (7, 31)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_interval_is_that_of_scipy(successes, n, confidence):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_many_intervals_are_those_of_each_and_nan_without_trials():
    low, high = wilson_intervals(np.array([[0, 3], [5, 0]]), np.array([[4, 4], [9, 0]]), 0.9)
    for i, j, k, n in ((0, 0, 0, 4), (0, 1, 3, 4), (1, 0, 5, 9)):
        assert (low[i, j], high[i, j]) == wilson_interval(k, n, 0.9)
    assert np.isnan([low[1, 1], high[1, 1]]).all()


def test_impossible_proportions_are_refused(unchecked):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="successes must be at most n, got 4 of 3"):
        wilson_interval(4, 3)
    with pytest.raises(TypeError, match="successes must be an integer, got 0"):
        wilson_interval(0.5, 3)
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match="confidence must be"):
            wilson_interval(1, 3, confidence)


def test_names_stay_where_they_were():
    assert evaluation.wilson_interval is report.wilson_interval is wilson_interval


def test_only_samples_with_one_right_answer_count():
    found = mcnemar(*paired(30, 12, 5, 3))
    assert (found.only_first, found.only_second, found.n) == (12, 5, 50)
    assert found.difference == pytest.approx(42 / 50 - 35 / 50)
    more = mcnemar(*paired(60, 12, 5, 30))
    assert more.p_value == found.p_value


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 1), (3, 3), (0, 9), (6, 4)])
def test_p_value_is_the_share_of_coin_tosses_that_are_as_lopsided(b, c):
    tosses = list(itertools.product((0, 1), repeat=b + c))
    extreme = sum(abs(2 * sum(toss) - (b + c)) >= abs(b - c) for toss in tosses)
    assert mcnemar(*paired(4, b, c, 2)).p_value == pytest.approx(extreme / len(tosses))


def test_interval_is_that_of_the_textbook():
    """Airway hyper-responsiveness in 21 children (Fagerland, Lydersen, Laake 2014): -0.517 to -0.026."""
    found = mcnemar(*paired(1, 1, 7, 12))
    assert (found.low, found.high) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize("counts", [(20, 6, 3, 4), (1, 1, 7, 12), (40, 2, 9, 0), (500, 40, 20, 300), (3, 4, 1, 0)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_ends_of_the_interval_are_where_the_score_test_rejects(counts, confidence):
    found = mcnemar(*paired(*counts), confidence)
    z = scipy.stats.norm.ppf((1 + confidence) / 2)
    statistics = [score_statistic(found.only_first, found.only_second, found.n, end) for end in (found.low, found.high)]
    assert statistics == pytest.approx([z, -z], rel=1e-4)


@pytest.mark.parametrize("n", [1, 20, 1000])
def test_extreme_answers_have_intervals_inside_the_possible(n):
    z = scipy.stats.norm.ppf(0.975)
    same, better, worse = (mcnemar(*paired(*counts)) for counts in ((n, 0, 0, 0), (0, n, 0, 0), (0, 0, n, 0)))
    assert (same.low, same.high) == pytest.approx((-(z**2) / (n + z**2), z**2 / (n + z**2)))
    assert same.p_value == 1
    assert (better.low, better.high) == pytest.approx(((n - z**2) / (n + z**2), 1))
    assert (worse.low, worse.high) == pytest.approx((-1, -(n - z**2) / (n + z**2)))


def test_exchanging_the_models_turns_the_result_around():
    first, second = paired(11, 7, 2, 5)
    one, other = mcnemar(first, second), mcnemar(second, first)
    assert (other.low, other.high, other.difference) == pytest.approx((-one.high, -one.low, -one.difference))
    assert other.p_value == one.p_value


@pytest.mark.parametrize("probabilities", [(0.4, 0.2, 0.1, 0.3), (0.05, 0.05, 0.3, 0.6), (0.8, 0.1, 0.05, 0.05)])
def test_intervals_cover_the_true_difference_as_often_as_they_say(probabilities):
    n, trials = 60, 2000
    tables = np.random.default_rng(1).multinomial(n, probabilities, size=trials)
    discordant = [(b, c) for _, b, c, _ in tables.tolist()]
    found = {(b, c): mcnemar(*paired(n - b - c, b, c, 0)) for b, c in set(discordant)}
    truth = probabilities[1] - probabilities[2]
    covered = np.mean([found[pair].low <= truth <= found[pair].high for pair in discordant])
    assert 0.935 <= covered <= 0.975


def test_result_is_printed_in_one_line():
    assert str(McNemar(12, 5, 50, 0.14346, -0.0231, 0.2987)) == "+0.140 [-0.023, +0.299], p = 0.14"


def test_wrong_comparisons_are_refused(unchecked):
    with pytest.raises(ValueError, match="first_correct has 3, second_correct has 2"):
        mcnemar(np.ones(3, bool), np.ones(2, bool))
    with pytest.raises(ValueError, match="number of samples must be at least 1, got 0"):
        mcnemar(np.ones(0, bool), np.ones(0, bool))
    with pytest.raises(ValueError, match="confidence must be below 1, got 95"):
        mcnemar(np.ones(3, bool), np.ones(3, bool), 95.0)


def test_a_power_law_is_found_with_an_interval_that_holds_it_as_often_as_it_says():
    x = np.array([64.0, 64, 128, 128, 256, 256, 512, 512])
    exact = power_law(x, 3 * x**-0.5)
    np.testing.assert_allclose(
        [exact.exponent, exact.low, exact.high, exact.prefactor], [-0.5, -0.5, -0.5, 3], rtol=1e-6
    )
    np.testing.assert_allclose(exact(x), 3 * x**-0.5)
    rng = np.random.default_rng(0)
    laws = [power_law(x, 3 * x**-0.5 * np.exp(rng.normal(scale=0.2, size=len(x)))) for _ in range(500)]
    covered = sum(law.low <= -0.5 <= law.high for law in laws)
    assert 0.92 < covered / 500 < 0.98


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, 0.0, 3.0])]
)
def test_a_power_law_needs_enough_positive_points(x, y):
    with pytest.raises(ValueError, match="must"):
        power_law(np.array(x), np.array(y))
