"""Adversarial training with an attack of this package: PGD, FGSM, or any other."""

from dataclasses import dataclass

import jax.numpy as jnp

from ntkadv.attacks.base import Attack
from ntkadv.training.method import Method


@dataclass(frozen=True)
class PGDTraining(Method):
    """Training on images attacked anew in every step, projected on the ball of the attack's threat model.

    Args:
        attack: The attack, usually `PGD(threat, steps=10, keep_best=False)`.
        loss: See `Method`.
        reduction: See `Method`.

    Raises:
        TypeError: `attack` is no attack.

    Source: Madry et al., ICLR 2018, arXiv 1706.06083.
    """

    attack: Attack

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.attack, Attack):
            raise TypeError(f"attack must be an attack, such as PGD(threat, steps=10), got {self.attack!r}.")

    @property
    def name(self) -> str:
        """Label with the attack's own."""
        return f"{self.attack.name} training"

    def images(self, f, params, batch):
        """Give the attacked images."""
        attacked = self.attack.perturb(lambda x: f(params, x), batch.x, batch.labels, batch.keys)
        return jnp.asarray(attacked, batch.x.dtype)
