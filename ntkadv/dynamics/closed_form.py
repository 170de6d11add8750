r"""Training for any time, in closed form, with or without attacks, and ridge regression beside it.

With the regularization matrix `Xi(t) = t D` of a constant attack strength (Fu & Wang, ICLR 2024, arXiv 2310.06112) and
centred targets Y, the mean of the infinitely wide network at time t is

`f_t(x) = Theta(x, X) Theta^-1 (I - exp(-t Theta D)) Y = Theta(x, X) D^1/2 V diag(h_lambda(t)) V^T D^1/2 Y`,

`D^1/2 Theta D^1/2 = V diag(lambda) V^T`,    `h_lambda(t) = (1 - e^{-t lambda}) / lambda`.

One decomposition gives all times. As t grows, `h` tends to `1 / lambda`, whatever the attack: adversarial training
degenerates to the interpolant of standard training.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from ntkadv._checks import require_finite, require_same_length
from ntkadv._typing import AnyArray
from ntkadv.architectures.base import Architecture
from ntkadv.dynamics._spectral import SpectralModel, Spectrum, checked_gram, spectrum, with_equal_copies
from ntkadv.dynamics.regularization import Regularization
from ntkadv.kernels.gram import gram as compute_gram
from ntkadv.predictors import KernelPredictor

_ARK_BATCH = 128
_CHUNK_BYTES = 2**29


class GaussianProcess(NamedTuple):
    """The distribution of the network's outputs at some images: each output has its own mean, all share `cov`."""

    mean: Float[np.ndarray, "m c"]
    cov: Float[np.ndarray, "m m"]


class _Fit:
    """What gradient flow and ridge regression share: images, targets, a Gram matrix, and one decomposition of it."""

    def __init__(
        self,
        arch: Architecture,
        x_train: Float[AnyArray, "n *input"],
        targets: Float[AnyArray, "n c"],
        *,
        gram: Float[AnyArray, "n n"] | None,
        progress: bool,
    ):
        if np.ndim(targets) != 2 or 0 in np.shape(targets):
            raise ValueError(f"targets must have shape (n, c), one row for each image, got {np.shape(targets)}.")
        require_same_length(x_train=x_train, targets=targets)
        require_finite("targets", targets)
        self.arch = arch
        self.x_train = x_train
        self.targets = np.asarray(targets, np.float64)
        self.progress = progress
        self._given = None if gram is None else checked_gram("gram", gram, len(targets))

    @cached_property
    def gram(self) -> Float[np.ndarray, "n n"]:
        """The NTK of the training images; computed at first use where it was not given."""
        if self._given is not None:
            return self._given
        return checked_gram("gram", self._kernel(self.x_train), len(self.targets))

    @property
    def _scale(self) -> Float[np.ndarray, " n"]:
        """D, the rate of each sample."""
        return np.ones(len(self.targets))

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenvalues and eigenvectors of `D^1/2 Theta D^1/2` in float64; computed at first use."""
        return spectrum(with_equal_copies(self.gram, self.x_train), self._scale)

    @property
    def eigenvalues(self) -> Float[np.ndarray, " n"]:
        """Eigenvalues of `D^1/2 Theta D^1/2`, ascending: the rates at which modes are learnt."""
        return self.spectrum.values

    @cached_property
    def _model(self) -> SpectralModel:
        return SpectralModel(self.targets, self.spectrum, self._scale)

    @property
    def _dtype(self) -> Literal["float32", "float64"]:
        """The precision of kernels: that of the Gram matrix given."""
        return "float64" if self._given is not None and self._given.dtype == np.float64 else "float32"

    def _kernel(
        self, x1: AnyArray, x2: AnyArray | None = None, kernel: Literal["ntk", "nngp"] = "ntk"
    ) -> Float[np.ndarray, "m n"]:
        return compute_gram(self.arch, x1, x2, kernel=kernel, dtype=self._dtype, progress=self.progress)

    def _predict(self, x: Float[AnyArray, "m *input"], filters: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k m c"]:
        """`f(x)` for k filters; images are taken in chunks whose kernels fit into memory."""
        rows = max(1, _CHUNK_BYTES // (8 * len(self.targets)))
        if len(x) == 0:
            raise ValueError(f"x must hold at least one image, got shape {np.shape(x)}.")
        starts = tqdm(range(0, len(x), rows), desc="predictions", disable=not self.progress or len(x) <= rows)
        parts = [self._model.apply(self._kernel(x[start : start + rows], self.x_train), filters) for start in starts]
        return np.concatenate(parts, axis=1)

    def _kernel_predictor(self, coefficients: Float[np.ndarray, "n c"]) -> KernelPredictor:
        return KernelPredictor(self.arch, self.x_train, coefficients, kernel="ntk")


class TrainingDynamics(_Fit):
    """An infinitely wide network under gradient flow on the squared loss, at every time from one decomposition.

    The network's mean starts at 0. Time is that of `f' = -Theta E (f - y)`, without a factor 1/n.

    Args:
        arch: The architecture whose NTK drives the training.
        x_train: Images (n, h, w, channels), or vectors (n, features).
        targets: Centred targets (n, c).
        gram: Their NTK (n, n), if it is at hand; computed at first use otherwise.
        attack_strength: Strength `eta S` of the attack flow, one number or one per sample; 0 is standard training.
        ark: The adversarial regularization kernel (n,); by default that of the architecture.
        progress: Whether to show progress bars.

    Raises:
        ValueError: Shapes do not match; an argument has NaN, infinite or (strength, ark) negative entries; `gram` is
            not symmetric or, found at first use, not positive semi-definite beyond rounding.
    """

    def __init__(
        self,
        arch: Architecture,
        x_train: Float[AnyArray, "n *input"],
        targets: Float[AnyArray, "n c"],
        *,
        gram: Float[AnyArray, "n n"] | None = None,
        attack_strength: float | Float[AnyArray, " n"] = 0.0,
        ark: Float[AnyArray, " n"] | None = None,
        progress: bool = True,
    ):
        super().__init__(arch, x_train, targets, gram=gram, progress=progress)
        n = len(self.targets)
        if ark is None:
            ark = _ark(arch, x_train) if np.any(np.asarray(attack_strength) != 0) else np.zeros(n)
        if np.shape(ark) != (n,):
            raise ValueError(f"ark must have shape ({n},), one number for each image, got {np.shape(ark)}.")
        if callable(attack_strength):
            raise ValueError(
                "attack_strength must be a number or an array: the closed form is exact for constant strengths only; "
                "integrate_flow takes strengths that vary in time."
            )
        self.regularization = Regularization(ark=ark, strength=attack_strength)

    @property
    def _scale(self) -> Float[np.ndarray, " n"]:
        return self.regularization.rates(0.0)

    def coefficients(self, time: float) -> Float[np.ndarray, "n c"]:
        """`u` with `f_t(x) = Theta(x, X) u`, in float64.

        At an infinite time these are the coefficients of the interpolant, `Theta^+ Y` for standard training. Modes
        below the noise floor of the Gram matrix stay untrained at all times: they would not reach predictions, and
        late times would amplify their noise.
        """
        return self._model.coefficients(self._growth([time]))[0]

    def predict(
        self, x: Float[AnyArray, "m *input"], times: float | Sequence[float] | Float[np.ndarray, " t"]
    ) -> Float[np.ndarray, "t m c"]:
        """Mean outputs `f_t(x)` at every time: (number of times, number of images, c). A time may be infinite."""
        return self._predict(x, self._growth(times))

    def predictor(self, time: float) -> KernelPredictor:
        """`f_t` as a function of images that JAX can differentiate: what attacks take."""
        return self._kernel_predictor(self.coefficients(time))

    def train_residual(self, times: float | Sequence[float] | Float[np.ndarray, " t"]) -> Float[np.ndarray, "t n c"]:
        """`Y - f_t(X) = exp(-t Theta D) Y` at the training images, without a loss of digits as it goes to 0."""
        times = checked_times(times)
        values, vectors, floor = self.spectrum
        trained = np.where(values > floor, values, 0.0)
        exponent = np.where(trained > 0, np.multiply.outer(times, np.where(trained > 0, trained, 1.0)), 0.0)
        decayed = np.exp(-exponent)[:, :, None] * self._model.weights
        return np.stack([(vectors @ modes) / self._model.root for modes in decayed])

    def train_predict(self, times: float | Sequence[float] | Float[np.ndarray, " t"]) -> Float[np.ndarray, "t n c"]:
        """Mean outputs `f_t(X)` at the training images."""
        return self.targets - self.train_residual(times)

    def gp(
        self, x: Float[AnyArray, "m *input"], time: float, *, nngp_gram: Float[AnyArray, "n n"] | None = None
    ) -> GaussianProcess:
        """Mean and covariance at `x` over random initialisations, which are a Gaussian process with NNGP kernel K.

        With `A = Theta(x, X) Theta^-1 (I - exp(-t Theta D))`: mean `A Y`, covariance
        `K(x, x) - A K(X, x) - K(x, X) A^T + A K(X, X) A^T`. `nngp_gram` is `K(X, X)` if it is at hand.

        Raises `ValueError` for a negative or NaN time and a `nngp_gram` that is not a symmetric matrix (n, n).
        """
        growth = self._growth([time])[0]
        if nngp_gram is None:
            nngp_gram = self._kernel(self.x_train, kernel="nngp")
        prior = checked_gram("nngp_gram", nngp_gram, len(self.targets)).astype(np.float64)
        cross = self._kernel(x, self.x_train)
        operator = self._model.operator(cross, growth)
        between = self._kernel(x, self.x_train, "nngp").astype(np.float64)
        own = self._kernel(x, kernel="nngp").astype(np.float64)
        removed = operator @ between.T
        cov = own - removed - removed.T + operator @ prior @ operator.T
        return GaussianProcess(operator @ self.targets, (cov + cov.T) / 2)

    def ridge(self) -> "RidgeRegression":
        """Ridge regression with the same kernel; without attacks it shares the decomposition."""
        regression = RidgeRegression(self.arch, self.x_train, self.targets, gram=self.gram, progress=self.progress)
        if np.all(self._scale == 1):
            regression.spectrum = self.spectrum
        return regression

    def _growth(self, times: float | Sequence[float] | Float[np.ndarray, " t"]) -> Float[np.ndarray, "t n"]:
        """`h_lambda(t)`, the filter of gradient flow; `1 / lambda` at an infinite time, 0 below the noise floor."""
        times = checked_times(times)
        values, _, floor = self.spectrum
        trained = values > floor
        safe = np.where(trained, values, 1.0)
        return np.where(trained, -np.expm1(-np.multiply.outer(times, safe)) / safe, 0.0)


class RidgeRegression(_Fit):
    """Kernel ridge regression with the NTK, `(Theta + ridge I)^-1 Y`, at every ridge from one decomposition.

    Args:
        arch: The architecture.
        x_train: Images (n, h, w, channels), or vectors (n, features).
        targets: Centred targets (n, c).
        gram: Their NTK (n, n), if it is at hand; computed at first use otherwise.
        progress: Whether to show progress bars.

    Raises:
        ValueError: As `TrainingDynamics`.
    """

    def __init__(
        self,
        arch: Architecture,
        x_train: Float[AnyArray, "n *input"],
        targets: Float[AnyArray, "n c"],
        *,
        gram: Float[AnyArray, "n n"] | None = None,
        progress: bool = True,
    ):
        super().__init__(arch, x_train, targets, gram=gram, progress=progress)

    def coefficients(self, ridge: float) -> Float[np.ndarray, "n c"]:
        """`(Theta + ridge I)^-1 Y` without the modes below the noise floor; ridge 0 is the interpolant."""
        return self._model.coefficients(self._shrinkage([ridge]))[0]

    def predict(
        self, x: Float[AnyArray, "m *input"], ridges: float | Sequence[float] | Float[np.ndarray, " k"]
    ) -> Float[np.ndarray, "k m c"]:
        """Return the outputs at `x` for every ridge: (number of ridges, number of images, c)."""
        return self._predict(x, self._shrinkage(ridges))

    def predictor(self, ridge: float) -> KernelPredictor:
        """Return the solution as a function of images that JAX can differentiate."""
        return self._kernel_predictor(self.coefficients(ridge))

    def _shrinkage(self, ridges: float | Sequence[float] | Float[np.ndarray, " k"]) -> Float[np.ndarray, "k n"]:
        ridges = _checked_numbers("ridges", ridges)
        if np.any(np.isinf(ridges)):
            raise ValueError("ridges must be finite, got inf.")
        values, _, floor = self.spectrum
        return 1 / (ridges[:, None] + np.where(values > floor, values, 1.0))


def _ark(arch: Architecture, x: AnyArray) -> Float[np.ndarray, " n"]:
    starts = range(0, len(x), _ARK_BATCH)
    return np.concatenate([np.asarray(arch.ark(x[start : start + _ARK_BATCH])) for start in starts])


def checked_times(times: float | Sequence[float] | Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Give times as an array (t,); `ValueError` unless all are non-negative numbers."""
    return _checked_numbers("times", times)


def _checked_numbers(name: str, values: float | Sequence[float] | Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    array = np.atleast_1d(np.asarray(values, np.float64))
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a number or a non-empty list of numbers, got shape {np.shape(values)}.")
    if not np.all(array >= 0):
        raise ValueError(f"{name} must not be negative or NaN, got {array[~(array >= 0)][0]}.")
    return array
