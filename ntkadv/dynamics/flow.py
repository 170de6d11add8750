r"""The true training flows, integrated step by step: what the closed form is checked against.

Adversarial training with rates `E(t) = diag(E_i(t))` moves the residual `r = y - f` of the training set by

`r' = -Theta E(t) r`,    `r(0) = Y`.

The closed form `exp(-Theta Xi(t)) Y` with `Xi(t) = int_0^t E` (Fu & Wang, ICLR 2024, arXiv 2310.06112) solves this if
`Theta E(t)` commutes with its own integral: for constant rates, and for `E(t) = g(t) E(0)`. With rates that vary
differently from sample to sample it is an approximation, and `closed_form_gap` says how good.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ntkadv._checks import require_finite
from ntkadv._typing import AnyArray
from ntkadv.dynamics._ode import integrate
from ntkadv.dynamics._spectral import checked_gram
from ntkadv.dynamics.phi import training_coefficients
from ntkadv.dynamics.regularization import effective_time

Rates: TypeAlias = Float[AnyArray, " n"] | Callable[[Any], Any]


def integrate_flow(
    theta: Float[AnyArray, "n n"],
    targets: Float[AnyArray, "n c"],
    rates: Rates,
    times: Sequence[float] | Float[np.ndarray, " t"],
    *,
    rtol: float = 1e-11,
    max_steps: int = 100_000,
) -> Float[np.ndarray, "t n c"]:
    """Residuals `r(t)` of `r' = -Theta E(t) r`, `r(0) = Y`, at the given times, by an ODE solver in float64.

    `rates` is an array (n,), or a function of time that JAX can trace and that returns one. Dopri8 for a flow with
    `max(Theta E) * time` below 20,000, the implicit Kvaerno5 beyond; the latter solves dense systems of size n c, so
    this is for small problems.

    Raises `ValueError` for shapes that do not match, entries that are not finite, and times that are negative, infinite
    or NaN; `RuntimeError` where the solver takes more than `max_steps` steps.
    """
    theta, targets, times = _checked(theta, targets, times)
    rate = _rate_function(rates, len(targets))

    def slope(t: Any, residual: Any, kernel: Any) -> Any:
        return -kernel @ (rate(t)[:, None] * residual)

    fastest = max(float(np.max(np.asarray(rate(t)))) for t in np.linspace(0.0, times.max(), 9))
    stiffness = float(np.linalg.norm(theta, 2)) * fastest * float(times.max())
    return integrate(slope, targets, times, theta, stiffness, rtol, max_steps)


def closed_form_gap(
    theta: Float[AnyArray, "n n"],
    targets: Float[AnyArray, "n c"],
    rates: Rates,
    times: Sequence[float] | Float[np.ndarray, " t"],
) -> Float[np.ndarray, " t"]:
    """`|exp(-Theta Xi(t)) Y - r(t)| / |Y|` at each time: how far the closed form is from the true flow.

    Raises as `integrate_flow`.
    """
    true = integrate_flow(theta, targets, rates, times)
    theta, targets, times = _checked(theta, targets, times)
    rate = _rate_function(rates, len(targets))
    closed = []
    with jax.enable_x64(True):
        for time in times:
            xi = effective_time(rate, float(time)) if callable(rates) else time * np.asarray(rate(0.0), np.float64)
            coefficients = training_coefficients(theta, xi, targets, method="eigh")
            closed.append(targets - theta @ np.asarray(coefficients))
    return np.linalg.norm(np.stack(closed) - true, axis=(1, 2)) / np.linalg.norm(targets)


def _checked(
    theta: AnyArray, targets: AnyArray, times: Sequence[float] | np.ndarray
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n c"], Float[np.ndarray, " t"]]:
    if np.ndim(targets) != 2 or 0 in np.shape(targets):
        raise ValueError(f"targets must have shape (n, c), got {np.shape(targets)}.")
    require_finite("targets", targets)
    theta = checked_gram("theta", theta, len(targets)).astype(np.float64)
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or times.size == 0:
        raise ValueError(f"times must be a non-empty list of numbers, got shape {times.shape}.")
    if not np.all((times >= 0) & np.isfinite(times)):
        raise ValueError(f"times must be finite and not negative, got {times}.")
    return theta, np.asarray(targets, np.float64), times


def _rate_function(rates: Rates, n: int) -> Callable[[Any], Any]:
    """`rates` as a function of time that computes in float64; checked at time 0."""

    def function(time: Any) -> Any:
        with jax.enable_x64(True):
            return jnp.asarray(rates(time) if callable(rates) else rates, jnp.float64)

    first = np.asarray(function(0.0))
    if first.shape != (n,):
        raise ValueError(f"rates must have shape ({n},), one for each row of targets, got {first.shape}.")
    require_finite("rates", first)
    if np.any(first < 0):
        raise ValueError(f"rates must not be negative, got a smallest entry of {first.min():g}.")
    return function
