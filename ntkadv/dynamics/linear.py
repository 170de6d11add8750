r"""Training of a linear model under attack, outputs coupled: the theory of one finite network, or of any kernel.

A model that is linear in its parameters, as a linearised network is, has

.. math:: f_t(x) = f_0(x) + \Theta(x, X)\, u_t, \qquad u_t \in \mathbb{R}^{n \times c}

with its NTK :math:`\Theta`, whose blocks are c x c matrices. Adversarial training with the attack flow of Fu & Wang
(ICLR 2024, arXiv 2310.06112), linearised, moves it by

.. math:: \dot u = E(t)\,(Y - f_0(X) - \Theta u), \qquad E_i(t) = \exp(\Theta_x(x_i, x_i)\, \eta_i(t) S)

and the closed form is :math:`u_t = \Xi\, \varphi(\Theta\, \Xi)\,(Y - f_0(X))` with :math:`\Xi = \int_0^t E` and
:math:`\varphi(M) = \int_0^1 e^{-sM} ds`. It is exact where E does not vary with time.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from ntkadv._checks import require_finite
from ntkadv._typing import AnyArray
from ntkadv.dynamics._ode import integrate
from ntkadv.dynamics._spectral import Spectrum, checked_gram, decompose
from ntkadv.dynamics.closed_form import checked_times
from ntkadv.dynamics.regularization import effective_time

__all__ = ["AttackRates", "LinearDynamics", "Strength", "attack_rates", "is_attack", "rates_under"]

AttackRates: TypeAlias = float | Float[AnyArray, " n"] | Float[AnyArray, "n c c"] | Callable[[Any], Any]
Strength: TypeAlias = (
    float | int | Float[AnyArray, ""] | Float[AnyArray, " n"] | Float[AnyArray, "n c c"] | Callable[[Any], Any]
)
"""Strength of an attack flow: a number, one for each image, a matrix for each, or a function of time."""
Times: TypeAlias = Sequence[float] | Float[np.ndarray, " t"]

_SYMMETRIC = 1e-6
"""Relative asymmetry up to which rates count as symmetric: what rounding in float32 leaves."""


def attack_rates(
    ark: Float[AnyArray, " n"] | Float[AnyArray, "n c c"],
    strength: float | Float[AnyArray, ""] | Float[AnyArray, " n"] | Float[AnyArray, "n c c"],
) -> Array:
    r"""Compute the factors of residuals under a linearised attack, :math:`E_i = \exp(\Theta_x(x_i, x_i)\, \eta_i S)`.

    Args:
        ark: The adversarial regularization kernel: a number for each sample, as at infinite width, or a symmetric c x c
            matrix.
        strength: :math:`\eta_i S`: a number, one for each sample, or a c x c matrix for each.

    Returns:
        Factors (n,), or matrices (n, c, c) where either argument has them. In JAX: `strength` may be traced.

    Raises:
        ValueError: shapes do not match.
    """
    kernel, factor = jnp.asarray(ark), jnp.asarray(strength)
    dtype = jnp.promote_types(kernel.dtype, factor.dtype) if factor.ndim else kernel.dtype
    kernel, factor = kernel.astype(dtype), factor.astype(dtype)
    if kernel.ndim not in (1, 3) or factor.ndim not in (0, 1, 3) or (factor.ndim and len(factor) != len(kernel)):
        raise ValueError(
            f"ark must be (n,) or (n, c, c) and strength a number, (n,) or (n, c, c), got {kernel.shape} and "
            f"{factor.shape}."
        )
    if kernel.ndim == 1 and factor.ndim < 2:
        return jnp.exp(kernel * factor)
    if factor.ndim < 2:
        # On the host where the kernel is known, so that a function of time decomposes it once.
        values, vectors = (np if isinstance(ark, np.ndarray) else jnp).linalg.eigh(ark)
        values, vectors = jnp.asarray(values, dtype), jnp.asarray(vectors, dtype)
        grown = jnp.exp(values * (factor if factor.ndim == 0 else factor[:, None]))
        return jnp.einsum("nij,nj,nkj->nik", vectors, grown, vectors, precision="highest")
    if kernel.ndim == 1:
        exponent = kernel[:, None, None] * factor
    else:
        exponent = jnp.einsum("nij,njk->nik", kernel, factor, precision="highest")
    return jax.vmap(jax.scipy.linalg.expm)(exponent)


def is_attack(strength: Strength) -> bool:
    """Whether there is any attack."""
    return callable(strength) or bool(np.any(np.asarray(strength) != 0))


def rates_under(ark: Float[AnyArray, " n"] | Float[AnyArray, "n c c"], strength: Strength) -> AttackRates:
    """Give rates for `LinearDynamics` under an attack flow, see `attack_rates`; a function where the strength is one.

    Raises:
        ValueError: as `attack_rates`.
    """
    if not is_attack(strength):
        return 1.0
    kernel = np.asarray(ark, np.float64)
    if callable(strength):
        return partial(_rates_at, kernel, strength)
    with jax.enable_x64(True):
        return np.asarray(attack_rates(kernel, np.asarray(strength, np.float64)))


def _rates_at(ark: np.ndarray, strength: Callable[[Any], Any], time: Any) -> Array:
    return attack_rates(ark, jnp.asarray(strength(time), jnp.float64))


class LinearDynamics:
    """A linear model in training, with or without attacks: closed form and true flow, at any times.

    Time is that of `f' = -Theta E (f - y)`, without a factor 1/n. Everything is computed in float64.

    Args:
        theta: The NTK of the training images: (n, n, c, c), or (n, n) where outputs do not mix.
        targets: Regression targets (n, c).
        start: Outputs of the untrained model (n, c); 0 by default.
        rates: E: one number, one for each sample (n,), matrices (n, c, c), or a function of time that JAX can trace and
            that returns one of these. See `attack_rates`. 1, the default, is training without attacks.

    Raises:
        ValueError: shapes do not match; entries are not finite; theta is not symmetric or, found at first use, not
            positive semi-definite beyond rounding; rates have eigenvalues that are not positive.
    """

    def __init__(
        self,
        theta: Float[AnyArray, "n n"] | Float[AnyArray, "n n c c"],
        targets: Float[AnyArray, "n c"],
        *,
        start: Float[AnyArray, "n c"] | None = None,
        rates: AttackRates = 1.0,
    ):
        if np.ndim(targets) != 2 or 0 in np.shape(targets):
            raise ValueError(f"targets must have shape (n, c), got {np.shape(targets)}.")
        self.targets = np.asarray(targets, np.float64)
        self.start = np.zeros_like(self.targets) if start is None else np.asarray(start, np.float64)
        if self.start.shape != self.targets.shape:
            raise ValueError(f"start must have the shape of targets, {self.targets.shape}, got {self.start.shape}.")
        require_finite("targets", self.targets)
        require_finite("start", self.start)
        kernel, (n, c) = np.asarray(theta), self.targets.shape
        if kernel.shape not in ((n, n), (n, n, c, c)):
            raise ValueError(f"theta must have shape {(n, n)} or {(n, n, c, c)}, got {kernel.shape}.")
        self._given = rates
        self._coupled = kernel.ndim == 4 or np.ndim(_in_float64(rates, 0.0)) == 3
        self.rates(0.0)
        self._dtype = kernel.dtype
        flat = _flat(kernel, c) if self._coupled else kernel
        checked = checked_gram("theta", flat, len(flat)).astype(np.float64)
        self._theta = (checked + checked.T) / 2
        self._residual = self._flatten(self.targets - self.start)

    @property
    def constant(self) -> bool:
        """Whether rates do not vary with time, and the closed form is exact."""
        return not callable(self._given)

    def rates(self, time: float) -> np.ndarray:
        """E at a time: (n,), or (n, c, c) where outputs mix.

        Raises:
            ValueError: they have another shape, or eigenvalues that are not positive.
        """
        n, c = self.targets.shape
        given = np.asarray(_in_float64(self._given, time))
        if given.shape not in ((), (n,), (n, c, c)):
            raise ValueError(f"rates must be a number, or have shape {(n,)} or {(n, c, c)}, got {given.shape}.")
        require_finite("rates", given)
        values = np.linalg.eigvals(given).real if given.ndim == 3 else given
        if np.any(values <= 0):
            raise ValueError(f"rates must be positive, got a smallest (eigenvalue) of {values.min():g}.")
        return np.asarray(self._expanded(given))

    @cached_property
    def max_learning_rate(self) -> float:
        r"""Rate above which full-batch gradient descent diverges, :math:`2 / \lambda_{\max}(\Theta E)`, E at time 0."""
        modes = self._modes if self.constant else self._modes_of(self.rates(0.0))
        if modes is not None:
            return float(2 / modes.spectrum.values[-1])
        return float(2 / np.max(np.abs(scipy.linalg.eigvals(self._theta @ self._matrix(self.rates(0.0))))))

    def coefficients(self, times: Times, *, learning_rate: float | None = None) -> Float[np.ndarray, "t n c"]:
        r"""Give u at each time, by the closed form.

        Modes below the noise floor of theta stay untrained, as in `TrainingDynamics`. A time may be infinite where
        rates are constant.

        Args:
            times: Times.
            learning_rate: Give gradient descent with this rate instead of gradient flow; a time is then a number of
                steps times the rate, and :math:`e^{-t \lambda}` becomes :math:`(1 - \alpha \lambda)^{t / \alpha}`. Only
                for constant rates that are symmetric matrices.

        Raises:
            ValueError: times are negative or NaN, or infinite where rates vary; a learning rate is given where it
                cannot be, or is not below `max_learning_rate`.
        """
        grid = checked_times(times)
        if not self.constant and np.any(np.isinf(grid)):
            raise ValueError("times must be finite where rates vary, got inf.")
        if learning_rate is None:
            if self.constant:
                return self._unflatten(self._closed(self._modes, self.rates(0.0), grid))
            return np.concatenate([self._until(float(time)) for time in grid])
        if not self.constant or self._modes is None:
            raise ValueError("learning_rate is for rates that are symmetric and do not vary with time.")
        if not 0 < learning_rate < self.max_learning_rate:
            raise ValueError(
                f"learning_rate must be below 2 / lambda_max = {self.max_learning_rate:.4g}, from where on gradient "
                f"descent diverges, got {learning_rate}."
            )
        return self._unflatten(self._modes.coefficients(self._residual, partial(_descended, grid, learning_rate)))

    def flow(self, times: Times, *, rtol: float = 1e-9, max_steps: int = 100_000) -> Float[np.ndarray, "t n c"]:
        """Give u at each time, by integrating the true flow; what the closed form approximates where rates vary.

        Raises:
            ValueError: times are negative, infinite or NaN.
            RuntimeError: the solver takes more than `max_steps` steps.
        """
        grid = checked_times(times)
        if np.any(np.isinf(grid)):
            raise ValueError("times must be finite for the integrated flow, got inf.")

        def slope(time: Any, u: Array, theta: Array) -> Array:
            rates = self._expanded(_in_float64(self._given, time))
            force = self._residual - theta @ u
            if not self._coupled:
                return rates[:, None] * force
            blocks = force.reshape(len(rates), -1)
            return jnp.einsum("nij,nj->ni", rates, blocks, precision="highest").reshape(-1, 1)

        fastest = max(np.linalg.norm(self._matrix(self.rates(time)), 2) for time in np.linspace(0, grid.max(), 9))
        stiffness = float(np.linalg.norm(self._theta, 2) * fastest * grid.max())
        found = integrate(slope, np.zeros_like(self._residual), grid, self._theta, stiffness, rtol, max_steps)
        return self._unflatten(found)

    def predict(
        self,
        coefficients: Float[AnyArray, "t n c"],
        cross: Float[AnyArray, "m n"] | Float[AnyArray, "m n c c"],
        start: Float[AnyArray, "m c"] | None = None,
    ) -> Float[np.ndarray, "t m c"]:
        """Give the outputs at other images, from their NTK with the training images and the untrained outputs."""
        kernel = np.asarray(cross, np.float64)
        equation = "mn,tnc->tmc" if kernel.ndim == 2 else "mncd,tnd->tmc"
        moved = np.einsum(equation, kernel, np.asarray(coefficients), optimize=True)
        return moved if start is None else moved + np.asarray(start, np.float64)

    def fitted(self, coefficients: Float[AnyArray, "t n c"]) -> Float[np.ndarray, "t n c"]:
        """Give the outputs at the training images."""
        flat = np.stack([self._theta @ self._flatten(u) for u in np.asarray(coefficients)])
        return self._unflatten(flat) + self.start

    @cached_property
    def _modes(self) -> "_Modes | None":
        """Modes of the constant rates; None where they are not symmetric."""
        return self._modes_of(self.rates(0.0))

    def _modes_of(self, rates: np.ndarray) -> "_Modes | None":
        matrix = self._matrix(rates)
        if np.max(np.abs(matrix - matrix.T)) > _SYMMETRIC * np.max(np.abs(matrix)):
            return None
        root = np.sqrt(matrix) if rates.ndim == 1 else self._matrix(np.stack([_root(block) for block in rates]))
        scaled = root @ self._theta @ root
        return _Modes(root, decompose((scaled + scaled.T) / 2, self._dtype))

    def _until(self, time: float) -> np.ndarray:
        """Give u at one time, where rates vary."""
        if time == 0:
            return np.zeros((1, *self.targets.shape))
        xi = effective_time(self.rates, time)
        return self._unflatten(self._closed(self._modes_of(xi), xi, np.ones(1)))

    def _closed(self, modes: "_Modes | None", rates: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Give u at each time for constant rates, by their modes where there are any."""
        if modes is not None:
            return modes.coefficients(self._residual, partial(_flowed, times))
        matrix = self._matrix(rates)
        return np.stack([self._by_exponential(matrix, time) for time in times])

    def _by_exponential(self, rates: np.ndarray, time: float) -> np.ndarray:
        """`Xi phi(Theta Xi) r` where E is not symmetric: a corner of a larger exponential; `Theta^+ r` in the end."""
        if np.isinf(time):
            everything = _Modes(np.eye(len(rates)), decompose(self._theta.copy(), self._dtype))
            return everything.coefficients(self._residual, partial(_flowed, np.array([np.inf])))[0]
        size, columns = self._residual.shape
        larger = np.zeros((size + columns, size + columns))
        larger[:size, :size] = -time * self._theta @ rates
        larger[:size, size:] = self._residual
        return time * rates @ scipy.linalg.expm(larger)[:size, size:]

    def _expanded(self, rates: Any) -> Any:
        """Rates in the shape that is computed with: a number for each sample, or a matrix where outputs mix."""
        n, c = self.targets.shape
        each = jnp.broadcast_to(rates, (n,)) if rates.ndim == 0 else rates
        return each[:, None, None] * jnp.eye(c, dtype=each.dtype) if self._coupled and each.ndim == 1 else each

    def _matrix(self, rates: np.ndarray) -> np.ndarray:
        """Rates as one matrix over all rows."""
        return np.asarray(scipy.linalg.block_diag(*rates)) if self._coupled else np.diag(rates)

    def _flatten(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, 1) if self._coupled else values

    def _unflatten(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(len(values), *self.targets.shape)


class _Modes(NamedTuple):
    """A root of symmetric rates E, and the spectrum of `E^1/2 Theta E^1/2`."""

    root: np.ndarray
    spectrum: Spectrum

    def coefficients(self, residual: np.ndarray, filters: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """`E^1/2 V diag(filter(lambda)) V^T E^1/2 r` at each time; filters of modes below the noise floor are 0."""
        values, vectors, floor = self.spectrum
        is_trained = values > floor
        factors = np.where(is_trained, filters(np.where(is_trained, values, 1.0)), 0.0)
        left, weights = self.root @ vectors, vectors.T @ (self.root @ residual)
        return np.stack([left @ (row[:, None] * weights) for row in factors])


def _flowed(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`(1 - e^{-t lambda}) / lambda`."""
    return -np.expm1(-np.multiply.outer(times, values)) / values


def _descended(times: np.ndarray, learning_rate: float, values: np.ndarray) -> np.ndarray:
    """`(1 - (1 - a lambda)^{t / a}) / lambda`."""
    steps = np.round(times / learning_rate)[:, None]
    return (1 - (1 - learning_rate * values) ** steps) / values


def _root(block: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((block + block.T) / 2)
    return (vectors * np.sqrt(values)) @ vectors.T


def _flat(kernel: np.ndarray, c: int) -> np.ndarray:
    """Rows ordered by sample, then output."""
    if kernel.ndim == 2:
        return np.kron(kernel, np.eye(c, dtype=kernel.dtype))
    return kernel.transpose(0, 2, 1, 3).reshape(len(kernel) * c, -1)


def _in_float64(rates: AttackRates, time: Any) -> Any:
    with jax.enable_x64(True):
        return jnp.asarray(rates(time) if callable(rates) else rates, jnp.float64)
