"""Adversarial training with an attack of this package: PGD, FGSM, or any other."""

from dataclasses import KW_ONLY, dataclass

import jax.numpy as jnp

from ntkadv._checks import require_int
from ntkadv.attacks.base import Attack
from ntkadv.training.method import Method, Mode, Passes, grown, images_to_outputs, require_mode


@dataclass(frozen=True)
class PGDTraining(Method):
    """Training on images attacked anew in every step, projected on the ball of the attack's threat model.

    Args:
        attack: The attack, usually `PGD(threat, steps=10, keep_best=False)`.
        attack_mode: Whether batch norm takes the batch's statistics while attacking, as most codes have it, or its
            running averages.
        warmup: Steps over which the radius of the attack grows from nothing; a step size that was given stays as it is.
            At full strength from the start, a small network may stay at a constant answer.
        loss: See `Method`.
        reduction: See `Method`.

    Raises:
        TypeError: `attack` is no attack.

    Source: Madry et al., ICLR 2018, arXiv 1706.06083.
    """

    attack: Attack
    _: KW_ONLY
    attack_mode: Mode = "train"
    warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_mode("attack_mode", self.attack_mode)
        require_int("warmup", self.warmup, minimum=0)
        if not isinstance(self.attack, Attack):
            raise TypeError(f"attack must be an attack, such as PGD(threat, steps=10), got {self.attack!r}.")

    @property
    def name(self) -> str:
        """Label with the attack's own."""
        return f"{self.attack.name} training"

    @property
    def passes(self) -> Passes:
        """Passes of the attack, and one for the update."""
        cost = self.attack.cost(2)
        return Passes(cost.gradients + cost.forwards + 1, cost.gradients + 1)

    def images(self, f, params, batch):
        """Give the attacked images."""
        model = images_to_outputs(f, params, self.attack_mode)
        attack = self.attack
        if self.warmup:
            attack = attack.with_eps(grown(attack.threat, self.warmup, batch).eps)
        return jnp.asarray(attack.perturb(model, batch.x, batch.labels, batch.keys), batch.x.dtype)
