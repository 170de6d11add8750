r"""Adversarial training as the theory has it: the attack is a gradient flow in the image.

.. math:: \frac{dx_i}{ds} = \partial_x f(x_i)^\top \eta_i(t)\,(f(x_i) - y_i), \qquad 0 \le s \le S

from the clean image, without any projection: how far it goes depends on the gradient (Fu & Wang, ICLR 2024, arXiv
2310.06112). Only the product :math:`\eta_i S`, the strength, matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkadv._checks import require_finite, require_int
from ntkadv._convolutions import canonical_convolutions
from ntkadv._typing import AnyArray
from ntkadv.kernels.empirical import Network, Params
from ntkadv.training.method import Batch, Method, Problem

__all__ = ["AttackFlowTraining", "attack_flow"]

Strength: TypeAlias = float | int | tuple[float | int, ...] | Callable[[Any], Any]


def attack_flow(
    f: Callable[[Array], Array],
    x: Float[Array, "b *image"],
    targets: Float[Array, "b c"],
    strength: float | Float[AnyArray, ""] | Float[AnyArray, " b"] | Float[AnyArray, "b c c"],
    *,
    steps: int = 2,
) -> Float[Array, "b *image"]:
    r"""Follow the attack flow from the clean images, by Runge-Kutta of fourth order with equal steps.

    Args:
        f: A function from images to outputs.
        x: Clean images.
        targets: Regression targets.
        strength: :math:`\eta_i S`: a number, one for each image, or a c x c matrix for each. May be traced.
        steps: Number of steps; each takes four gradients. The error falls with its fourth power where f is smooth.
    """
    strength = jnp.asarray(strength, x.dtype)

    @canonical_convolutions
    def velocity(point: Array) -> Array:
        outputs, pull = jax.vjp(f, point)
        residual = outputs - targets
        if strength.ndim == 3:
            push = jnp.einsum("bij,bj->bi", strength, residual, precision="highest")
        else:
            push = (strength if strength.ndim == 0 else strength[:, None]) * residual
        return pull(push)[0]

    def step(point: Array, _: None) -> tuple[Array, None]:
        h = jnp.asarray(1 / steps, x.dtype)
        k1 = velocity(point)
        k2 = velocity(point + h / 2 * k1)
        k3 = velocity(point + h / 2 * k2)
        k4 = velocity(point + h * k3)
        return point + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    return jax.lax.scan(step, x, length=steps)[0]


@dataclass(frozen=True)
class AttackFlowTraining(Method):
    r"""Training on the ends of attack flows, see `attack_flow`: nothing keeps them in a ball, or pixels in [0, 1].

    Args:
        strength: :math:`\eta_i S`: a number; a tuple with one for each training image; or a function of the time, in
            JAX, that returns a number, an array (n,), or matrices (n, c, c).
        steps: Steps of Runge-Kutta.
        loss: See `Method`; the attack goes for the squared loss whatever this is.
        reduction: See `Method`.

    Raises:
        TypeError: the strength is none of these.
        ValueError: a strength is negative, NaN or infinite; when training begins, they are not as many as the images.
    """

    strength: Strength
    _: KW_ONLY
    steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("steps", self.steps, minimum=1)
        if callable(self.strength):
            return
        if not isinstance(self.strength, (int, float, tuple)):
            raise TypeError(
                f"strength must be a number, a tuple of one for each image, or a function of time, got a "
                f"{type(self.strength).__name__}; write an array as tuple(array.tolist())."
            )
        require_finite("strength", np.asarray(self.strength))
        if np.any(np.asarray(self.strength) < 0):
            raise ValueError(f"strength must not be negative, got {np.min(self.strength)}.")

    @property
    def name(self) -> str:
        """Label with the strength, where it is a number."""
        return f"attack flow {self.strength:g}" if isinstance(self.strength, (int, float)) else "attack flow"

    def start(self, problem: Problem) -> Any:
        """Give no state; but see whether there is a strength for each image.

        Raises:
            ValueError: there is not.
        """
        n, dtype = problem.shape[0], jax.tree.leaves(problem.params)[0].dtype
        given = jax.eval_shape(self.at, jax.ShapeDtypeStruct((), dtype)).shape
        if given and given[0] != n:
            raise ValueError(f"strength must be a number, or hold one for each of {n} training images, got {given}.")
        return super().start(problem)

    def at(self, time: Any) -> Array:
        """Give the strength at a time."""
        strength = jnp.asarray(self.strength(time) if callable(self.strength) else self.strength)
        return strength if jnp.issubdtype(strength.dtype, jnp.floating) else strength.astype(jnp.float32)

    def images(self, f: Network, params: Params, batch: Batch) -> Array:
        """Give the ends of the flows."""
        strength = self.at(batch.time)
        if strength.ndim:
            strength = strength[batch.places]
        return attack_flow(lambda x: f(params, x), batch.x, batch.targets, strength, steps=self.steps)
