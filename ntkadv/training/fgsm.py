"""Fast adversarial training: one gradient step, from a random start or from the clean image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkadv._checks import require_int, require_nonnegative
from ntkadv._typing import AnyArray
from ntkadv.attacks.losses import Loss, get_loss
from ntkadv.attacks.model import loss_and_gradient
from ntkadv.attacks.threat_model import ThreatModel, fold_in_each
from ntkadv.training.method import Method, Mode, Passes, grown, images_to_outputs, require_mode

__all__ = ["FGSMTraining", "catastrophic_overfitting"]


@dataclass(frozen=True)
class FGSMTraining(Method):
    """Training on images attacked by one step (Wong, Rice & Kolter, ICLR 2020, arXiv 2001.03994).

    At large eps it may collapse: robustness against PGD falls to nothing within an epoch while that against FGSM rises,
    see `catastrophic_overfitting`.

    Args:
        threat: What may be changed.
        step: Length of the step, in units of eps; 1.25 as published with a random start.
        random_start: Start uniformly in the ball; False starts at the clean image, as FGSM does.
        attack_mode, warmup: See `PGDTraining`.
        loss: See `Method`; it is what the attack maximises too.
        reduction: See `Method`.

    Raises:
        TypeError: `threat` is no threat model.
        ValueError: its radius is 0, or another setting is out of range.
    """

    threat: ThreatModel
    _: KW_ONLY
    step: float = 1.25
    random_start: bool = True
    attack_mode: Mode = "train"
    warmup: int = 0
    loss: str | Loss = "cross_entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_threat(self.threat)
        require_nonnegative("step", self.step, strict=True)
        require_mode("attack_mode", self.attack_mode)
        require_int("warmup", self.warmup, minimum=0)

    @property
    def name(self) -> str:
        """Label with the start."""
        return "FGSM training" if self.random_start else "FGSM training, no random start"

    @property
    def passes(self) -> Passes:
        """One for the attack, one for the update."""
        return Passes(2, 2)

    def images(self, f, params, batch) -> Float[Array, "b *image"]:
        """Give the attacked images."""
        threat = grown(self.threat, self.warmup, batch)
        model = images_to_outputs(f, params, self.attack_mode)
        start = batch.x
        if self.random_start:
            start = jnp.asarray(threat.random_point(fold_in_each(batch.keys, jnp.uint32(0)), start), start.dtype)
        gradient = loss_and_gradient(model, get_loss(self.loss), start, batch.labels)[1]
        points = threat.project(start + self.step * threat.eps * threat.step(gradient, start), batch.x)
        return jnp.asarray(points, batch.x.dtype)


def require_threat(threat: ThreatModel) -> None:
    """Require a threat model with a positive radius.

    Raises:
        TypeError, ValueError: it is none, or its radius is 0.
    """
    if not isinstance(threat, ThreatModel):
        raise TypeError(f"threat must be a threat model, such as Linf(8 / 255), got {threat!r}.")
    if threat.eps == 0:
        raise ValueError("threat must have a positive eps, got 0; train without attacks by StandardTraining().")


def catastrophic_overfitting(
    accuracies: Sequence[float] | Float[AnyArray, " epochs"], *, drop: float = 0.2
) -> int | None:
    """Find the first epoch at which robust accuracy is lower by more than `drop` than in the one before, if there is.

    Wong et al. watch the accuracy of a training batch under PGD with 5 steps, and stop there. As `stop` of `train`::

        stop=lambda history: catastrophic_overfitting(history["pgd"]) is not None

    Args:
        accuracies: Robust accuracy after each epoch.
        drop: How large a fall counts.

    Raises:
        ValueError: `drop` is not positive.
    """
    require_nonnegative("drop", drop, strict=True)
    falls = -np.diff(np.asarray(accuracies, np.float64)) > drop
    return int(np.argmax(falls)) + 1 if falls.any() else None
