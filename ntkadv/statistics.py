"""How sure one can be of accuracies: intervals of a proportion, and of the difference of two on the same samples."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Real
from scipy.optimize import root_scalar
from scipy.special import ndtri
from scipy.stats import binomtest, linregress, t

from ntkadv._checks import require_int, require_nonnegative, require_same_length


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Give the Wilson score interval of a proportion.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    with :math:`\hat p` = successes/n and z the normal quantile at (1 + confidence)/2.

    Raises:
        ValueError: there are no trials, more successes than trials, or `confidence` is not between 0 and 1.

    Source: Wilson, Journal of the American Statistical Association 22 (1927).
    """
    require_int("n", n, minimum=1)
    require_int("successes", successes, minimum=0)
    if successes > n:
        raise ValueError(f"successes must be at most n, got {successes} of {n}.")
    require_confidence(confidence)
    p, z = successes / n, _quantile(confidence)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def wilson_intervals(
    successes: Int[np.ndarray, "*shape"], n: int | Int[np.ndarray, "*shape"], confidence: float = 0.95
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """Lower and upper ends of the Wilson intervals of many proportions; NaN where there are no trials."""
    trials = np.broadcast_to(n, successes.shape)
    ends = [
        wilson_interval(int(k), int(m), confidence) if m else (np.nan, np.nan)
        for k, m in zip(successes.ravel(), trials.ravel(), strict=True)
    ]
    low, high = np.array(ends, float).reshape(-1, 2).T
    return low.reshape(successes.shape), high.reshape(successes.shape)


@dataclasses.dataclass(frozen=True)
class McNemar:
    """Two accuracies on the same samples, compared.

    Attributes:
        only_first: Number of samples that only the first has right.
        only_second: Number of samples that only the second has right.
        n: Number of samples.
        p_value: Of the hypothesis that both are equally accurate; exact, two-sided.
        low, high: Interval of the difference of the accuracies, first minus second.
        confidence: Its level.
    """

    only_first: int
    only_second: int
    n: int
    p_value: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.only_first - self.only_second) / self.n

    def __str__(self) -> str:
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p = {self.p_value:.2g}"


def mcnemar(
    first_correct: Bool[np.ndarray, " n"], second_correct: Bool[np.ndarray, " n"], confidence: float = 0.95
) -> McNemar:
    r"""Compare two accuracies on the same samples: much sharper than to compare their intervals.

    Only the samples count that one has right and the other wrong, b and c of them: were both equally accurate, b would
    be binomial with b + c trials of probability 1/2, which gives the exact p-value. The interval of the difference is
    that of Tango's score test, all :math:`\Delta` with

    .. math:: |b - c - n \Delta| \le z \sqrt{n\,(2 \hat q + \Delta (1 - \Delta))}

    where :math:`\hat q` is the maximum likelihood estimate of the probability that only the second is right, given
    :math:`\Delta`.

    Raises:
        ValueError: there are no samples, not the same number of both, or `confidence` is not between 0 and 1.

    Source: McNemar, Psychometrika 12 (1947); Tango, Statistics in Medicine 17 (1998), 891-908.
    """
    require_same_length(first_correct=first_correct, second_correct=second_correct)
    require_int("the number of samples", len(first_correct), minimum=1)
    require_confidence(confidence)
    first, second = np.asarray(first_correct, bool), np.asarray(second_correct, bool)
    b, c, n = int(np.sum(first & ~second)), int(np.sum(second & ~first)), len(first)
    p_value = float(binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0
    z = _quantile(confidence)
    return McNemar(b, c, n, p_value, _tango_low(b, c, n, z), -_tango_low(c, b, n, z), confidence)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A power law through positive points, y = prefactor * x ** exponent, by least squares of the logarithms.

    Attributes:
        exponent: Slope of log y against log x.
        low, high: Its interval, by Student's t.
        prefactor: y at x = 1.
        confidence: Level of the interval.
    """

    exponent: float
    low: float
    high: float
    prefactor: float
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.exponent:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def __call__(self, x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Evaluate the law."""
        return self.prefactor * np.asarray(x, float) ** self.exponent


def power_law(x: Real[np.ndarray, " n"], y: Real[np.ndarray, " n"], confidence: float = 0.95) -> PowerLaw:
    """Fit a power law, such as an error against the width; several points may share an x, as seeds do.

    Raises:
        ValueError: there are fewer than three points, all at one x, or one is not positive and finite.
    """
    require_confidence(confidence)
    first, second = np.asarray(x, float), np.asarray(y, float)
    require_same_length(x=first, y=second)
    if len(first) < 3 or len(np.unique(first)) < 2:
        raise ValueError(f"x must hold three points at least, at two places, got {first}.")
    for name, values in (("x", first), ("y", second)):
        if not np.all(np.isfinite(values) & (values > 0)):
            raise ValueError(f"{name} must be positive and finite, got {values}.")
    fit: Any = linregress(np.log(first), np.log(second))
    half = float(t.ppf((1 + confidence) / 2, len(first) - 2)) * fit.stderr
    return PowerLaw(
        float(fit.slope), float(fit.slope - half), float(fit.slope + half), float(np.exp(fit.intercept)), confidence
    )


def require_confidence(confidence: float) -> None:
    """Require a level strictly between 0 and 1."""
    require_nonnegative("confidence", confidence, strict=True)
    if confidence >= 1:
        raise ValueError(f"confidence must be below 1, got {confidence}; write 95% as 0.95.")


def _tango_low(b: int, c: int, n: int, z: float) -> float:
    """Smallest difference that the score test does not reject."""
    if c == n:
        return -1.0

    def excess(difference: float) -> float:
        half = (b + c - (2 * n - b + c) * difference) / 2
        q = (half + max(half**2 + 2 * n * c * difference * (1 - difference), 0) ** 0.5) / (2 * n)
        variance = max(n * (2 * q + difference * (1 - difference)), 0)
        return b - c - n * difference - z * variance**0.5

    # At the estimate itself the variance may vanish, and `excess` with it, which is no end of the interval.
    bracket = (-1.0, max((b - c) / n - 1e-9, -1.0))
    return float(root_scalar(excess, bracket=bracket, method="brentq", xtol=1e-12).root)


def _quantile(confidence: float) -> float:
    return float(ndtri((1 + confidence) / 2))
