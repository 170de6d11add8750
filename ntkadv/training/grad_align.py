"""GradAlign: training by FGSM with input gradients that are kept aligned inside the ball."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ntkadv._checks import require_nonnegative
from ntkadv.attacks.losses import Loss, get_loss
from ntkadv.attacks.threat_model import ThreatModel, fold_in_each
from ntkadv.training.fgsm import FGSMTraining
from ntkadv.training.method import Method, Passes, gradient_of, grown

__all__ = ["GradAlignTraining"]


@dataclass(frozen=True)
class GradAlignTraining(Method):
    r"""FGSM from the clean image, and a penalty on input gradients that turn within the ball.

    .. math:: \ell(x + \delta_{FGSM}) + \lambda \bigl(1 - \cos(\nabla_x \ell(x), \nabla_x \ell(x + \eta))\bigr),
        \qquad \eta \sim U(-\epsilon, \epsilon)

    averaged over the batch (Andriushchenko & Flammarion, NeurIPS 2020, arXiv 2007.02617). Images where either gradient
    vanishes are left out of the cosine.

    Args:
        threat: What may be changed.
        weight: :math:`\lambda`; 0.2 is published for eps = 8/255 on CIFAR-10.
        step: Length of FGSM's step in units of eps.
        through: Whether the penalty's own gradient passes through both input gradients, as the formula has it, or
            through the one at the random point only, which is cheaper.
        warmup: See `PGDTraining`; the random point's radius grows too.
        loss: See `Method`.
        reduction: See `Method`; the penalty is averaged in any case.

    Raises:
        TypeError, ValueError: as `FGSMTraining`; or `weight` or `through` is out of range.
    """

    threat: ThreatModel
    _: KW_ONLY
    weight: float = 0.2
    step: float = 1.25
    through: Literal["both", "random"] = "both"
    warmup: int = 0
    loss: str | Loss = "cross_entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative("weight", self.weight)
        if self.through not in ("both", "random"):
            raise ValueError(f"through must be 'both' or 'random', got {self.through!r}.")
        self._fgsm()

    @property
    def passes(self) -> Passes:
        """FGSM's, two input gradients that are differentiated again, which counts twice; and the update's."""
        twice = 2 if self.through == "both" else 1
        return Passes(4, 4 + 2 * twice)

    def images(self, f, params, batch) -> Array:
        """Give the attacked images."""
        return self._fgsm().images(f, params, batch)

    def update(self, f, optimizer, state, batch) -> tuple[Any, dict[str, Array]]:
        """Make one update."""
        images = jax.lax.stop_gradient(self.images(f, state.params, batch))
        threat = grown(self.threat, self.warmup, batch)
        random = threat.random_point(fold_in_each(batch.keys, jnp.uint32(1)), batch.x).astype(batch.x.dtype)
        factor = self.factor(batch)
        loss = get_loss(self.loss)

        def slope(params: Any, x: Array) -> Array:
            return jax.grad(lambda x: jnp.sum(loss(f(params, x), batch.labels)))(x).reshape(len(x), -1)

        def objective(params: Any) -> tuple[Array, Any]:
            outputs, statistics = f.forward(params, images)
            mean = jnp.mean(self.losses(outputs, batch))
            here = slope(params if self.through == "both" else jax.lax.stop_gradient(params), batch.x)
            penalty = 1 - _mean_cosine(here, slope(params, random))
            return factor * mean + self.weight * penalty, (mean, penalty, statistics)

        gradients, (mean, penalty, statistics) = gradient_of(objective, state.params)
        new = state.descended(optimizer, gradients, statistics=statistics)
        return new, {"loss": mean + self.weight * penalty}

    def _fgsm(self) -> FGSMTraining:
        return FGSMTraining(self.threat, step=self.step, random_start=False, warmup=self.warmup, loss=self.loss)


def _mean_cosine(a: Array, b: Array) -> Array:
    """Average the cosine over rows, those left out where one of the two vanishes."""
    squares = jnp.sum(a * a, axis=1) * jnp.sum(b * b, axis=1)
    counts = squares > 0
    # The square root has no derivative at zero.
    norms = jnp.sqrt(jnp.where(counts, squares, 1))
    cosines = jnp.where(counts, jnp.sum(a * b, axis=1) / norms, 0)
    return jnp.sum(cosines) / jnp.maximum(jnp.sum(counts.astype(a.dtype)), 1)
