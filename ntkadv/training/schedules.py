"""Learning rates over a run, and the optimiser of the literature, from parts of optax."""

from __future__ import annotations

from collections.abc import Sequence

import optax

from ntkadv._checks import require_int, require_nonnegative

__all__ = ["piecewise", "sgd", "triangular"]


def triangular(peak: float, steps: int, *, rise: float = 0.5) -> optax.Schedule:
    """Rise linearly from 0 to `peak` over a share `rise` of the steps, and fall back to 0: "cyclic" fast training.

    Raises:
        ValueError: a value is out of range.
    """
    require_nonnegative("peak", peak, strict=True)
    require_int("steps", steps, minimum=2)
    if not 0 < rise < 1:
        raise ValueError(f"rise must be between 0 and 1, got {rise}.")
    top = max(1, round(rise * steps))
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, top), optax.linear_schedule(peak, 0.0, max(1, steps - top))], [top]
    )


def piecewise(rate: float, steps: int, *, drops: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> optax.Schedule:
    """Hold `rate`, and multiply it by `factor` after each share `drops` of the steps: at 100 and 150 of 200 epochs.

    Raises:
        ValueError: a value is out of range.
    """
    require_nonnegative("rate", rate, strict=True)
    require_int("steps", steps, minimum=1)
    require_nonnegative("factor", factor, strict=True)
    if any(not 0 < drop < 1 for drop in drops):
        raise ValueError(f"drops must be shares of the run between 0 and 1, got {tuple(drops)}.")
    return optax.piecewise_constant_schedule(rate, {round(drop * steps): factor for drop in drops})


def sgd(
    rate: float | optax.Schedule, *, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False
) -> optax.GradientTransformation:
    """Gradient descent with momentum and weight decay in the gradient, as PyTorch's: the decay gathers momentum too.

    Raises:
        ValueError: a value is out of range.
    """
    require_nonnegative("weight_decay", weight_decay)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}.")
    descent = optax.sgd(rate, momentum=momentum or None, nesterov=nesterov)
    return optax.chain(optax.add_decayed_weights(weight_decay), descent) if weight_decay else descent
