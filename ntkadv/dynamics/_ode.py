"""Ordinary differential equations of training, integrated in float64 by diffrax."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

_STIFF = 2e4
"""From here on implicit steps, each of which solves a system of the size of y, are cheaper than more explicit ones."""


def integrate(
    slope: Callable[[Any, Any, Any], Any],
    start: Float[np.ndarray, "n c"],
    times: Float[np.ndarray, " t"],
    theta: Float[np.ndarray, "n n"],
    stiffness: float,
    rtol: float,
    max_steps: int,
) -> Float[np.ndarray, "t n c"]:
    """Solve `y' = slope(t, y, theta)` from `start` at time 0: y at the given times, in any order.

    Dopri8 where `stiffness`, the fastest rate times the longest time, is below 20,000, the implicit Kvaerno5 beyond;
    the latter solves dense systems of the size of y.

    Raises:
        RuntimeError: the solver takes more than `max_steps` steps.
    """
    order, back = np.unique(times, return_inverse=True)
    if order[-1] == 0:
        return np.broadcast_to(start, (len(times), *start.shape)).copy()
    is_stiff = stiffness > _STIFF
    with jax.enable_x64(True):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(slope),
            diffrax.Kvaerno5() if is_stiff else diffrax.Dopri8(),
            t0=0.0,
            t1=float(order[-1]),
            dt0=None,
            y0=jnp.asarray(start),
            args=jnp.asarray(theta),
            saveat=diffrax.SaveAt(ts=jnp.asarray(order)),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol * 1e-2),
            max_steps=max_steps,
            throw=False,
        )
        if solution.result != diffrax.RESULTS.successful:
            raise RuntimeError(
                f"the flow could not be integrated to time {order[-1]:g} within {max_steps} steps "
                f"({'Kvaerno5' if is_stiff else 'Dopri8'}); allow more with max_steps, or loosen rtol."
            )
        assert solution.ys is not None
        return np.asarray(solution.ys)[back]
