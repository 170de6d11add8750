r"""From the strength of an attack to the regularization matrix Xi(t).

The theory replaces the inner maximum of adversarial training by a gradient flow in the input with learning rate
`eta_i(t)` and length S. Linearised, it multiplies the residual of sample i by

`E_i(t) = exp(ark_i * strength_i(t)) >= 1`,    `strength_i(t) = eta_i(t) S`,

with `ark_i` the adversarial regularization kernel of the sample, and `Xi_i(t) = int_0^t E_i(s) ds` is the time the
sample has effectively been trained (Fu & Wang, ICLR 2024, arXiv 2310.06112).
Strength 0 is standard training, `Xi(t) = t`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.integrate
from jaxtyping import Float

from ntkadv._checks import require_finite
from ntkadv._typing import AnyArray

Strength: TypeAlias = float | Float[AnyArray, " n"] | Callable[[float], Any]


def effective_time(rates: Callable[[float], Any], time: float) -> Float[np.ndarray, "*shape"]:
    """`int_0^t E(s) ds` for rates that vary, by adaptive Gauss-Kronrod quadrature to 1e-11.

    Raises `ValueError` where the quadrature does not get there, as with rates that jump or oscillate often.
    """
    start = np.asarray(rates(0.0), np.float64)
    if time == 0:
        return np.zeros_like(start)
    result = scipy.integrate.quad_vec(
        lambda s: np.asarray(rates(s), np.float64),
        0.0,
        time,
        epsabs=0.0,
        epsrel=1e-11,
        norm="max",
        limit=1000,
        full_output=True,
    )
    value, error, information = result
    if not information.success:
        raise ValueError(
            f"the rates could not be integrated up to time {time:g} (error estimate {error:.1e}: "
            f"{information.message}); make the attack strength smoother in time, or ask for a shorter time."
        )
    return value


@dataclass(frozen=True, kw_only=True, eq=False)
class Regularization:
    """The regularization matrix of adversarial training, a number per sample.

    Args:
        ark: The adversarial regularization kernel (n,), from the architecture. Non-negative.
        strength: `eta S`: one non-negative number, one per sample (n,), or a function of time that returns either.

    Raises:
        ValueError: An entry is negative, NaN or infinite, shapes do not match, or `exp(ark * strength)` overflows.
    """

    ark: Float[AnyArray, " n"]
    strength: Strength = 0.0

    def __post_init__(self) -> None:
        ark = np.asarray(self.ark, np.float64)
        if ark.ndim != 1:
            raise ValueError(f"ark must have shape (n,), one number per sample, got {ark.shape}.")
        require_finite("ark", ark)
        if np.any(ark < 0):
            raise ValueError(f"ark must not be negative, got a smallest entry of {ark.min():g}.")
        object.__setattr__(self, "ark", ark)
        self.rates(0.0)

    @property
    def constant(self) -> bool:
        """Whether the strength does not depend on time: `Xi(t) = t E`, and the closed form is exact."""
        return not callable(self.strength)

    def rates(self, time: float) -> Float[np.ndarray, " n"]:
        """`E_i(t) = exp(ark_i strength_i(t))`, the speed at which sample i is trained."""
        strength = self.strength(time) if callable(self.strength) else self.strength
        strength = np.asarray(strength, np.float64)
        ark = np.asarray(self.ark)
        if strength.shape not in ((), ark.shape):
            raise ValueError(f"attack_strength must be a number or have shape {ark.shape}, got shape {strength.shape}.")
        require_finite("attack_strength", strength)
        if np.any(strength < 0):
            raise ValueError(f"attack_strength must not be negative, got a smallest entry of {strength.min():g}.")
        exponent = ark * strength
        if np.any(exponent > np.log(np.finfo(np.float64).max)):
            worst = int(np.argmax(exponent))
            raise ValueError(
                f"exp(ark * attack_strength) overflows: the exponent of sample {worst} is {exponent[worst]:g} (ark "
                f"{ark[worst]:g}). So long an attack flow leaves the linear regime; use a smaller attack_strength."
            )
        return np.exp(exponent)

    def xi(self, time: float) -> Float[np.ndarray, " n"]:
        """`Xi_i(t) = int_0^t E_i(s) ds`; infinite at an infinite time.

        Raises `ValueError` for a time that is negative or NaN, or infinite where the strength varies.
        """
        if not time >= 0:
            raise ValueError(f"time must not be negative or NaN, got {time}.")
        if self.constant:
            return time * self.rates(0.0)
        if np.isinf(time):
            raise ValueError("time must be finite where the attack strength varies, got inf.")
        return effective_time(self.rates, time)
