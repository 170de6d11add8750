"""What is watched while networks are trained: robust accuracy, and what is left of a generator's strength."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ntkadv._typing import AnyArray
from ntkadv.attacks.base import Attack
from ntkadv.attacks.model import Model
from ntkadv.evaluation import all_logits

__all__ = ["GeneratorStrength", "accuracy", "generator_strength", "robust_accuracy"]


def accuracy(
    model: Model, x: Float[AnyArray, "n h w c"], labels: Int[AnyArray, " n"], *, batch_size: int = 256
) -> float:
    """Give the share of images that a model classifies correctly."""
    guesses = all_logits(model, x, min(batch_size, len(x))).argmax(axis=1)
    return float(np.mean(guesses == np.asarray(labels)))


def robust_accuracy(
    model: Model,
    x: Float[AnyArray, "n h w c"],
    labels: Int[AnyArray, " n"],
    attack: Attack,
    *,
    key: Key[Array, ""],
    batch_size: int = 256,
) -> float:
    """Give the share of images that a model classifies correctly under an attack.

    For `record` of `train`, say on the part that is kept for validation::

        record=lambda model: {"robust": robust_accuracy(model, data.x_val, data.y_val, attack, key=key)}

    Raises:
        TypeError, ValueError: as `Attack.__call__`.
    """
    points = attack(model, x, labels, key=key, batch_size=batch_size)
    return accuracy(model, points, labels, batch_size=batch_size)


class GeneratorStrength(NamedTuple):
    """Accuracies of a fixed model.

    Attributes:
        transferred: On images attacked against another model.
        noise: On images with random signs of the same size.
    """

    transferred: float
    noise: float

    @property
    def gap(self) -> float:
        """How much lower the first is: 0 says that the other model's perturbations are no better than noise."""
        return self.noise - self.transferred


def generator_strength(
    model: Model,
    fixed: Model,
    x: Float[AnyArray, "n h w c"],
    labels: Int[AnyArray, " n"],
    attack: Attack,
    *,
    key: Key[Array, ""],
    batch_size: int = 256,
) -> GeneratorStrength:
    """Measure what perturbations made against a model do to a fixed, robust one, beside random noise.

    The generator of Li et al. (arXiv 2010.08034) is the FGSM of a network in training, the fixed model one trained by
    PGD: when a run collapses, its perturbations become as harmless as noise.

    Args:
        model: The network that perturbations are made against.
        fixed: The one they are tried on.
        x: Images.
        labels: Their classes.
        attack: The generator, such as `FGSM(threat)`.
        key: A random key.
        batch_size: Number of images at a time.

    Raises:
        TypeError, ValueError: as `Attack.__call__`.
    """
    attack_key, noise_key = jax.random.split(key)
    points = attack(model, x, labels, key=attack_key, batch_size=batch_size)
    clean = jnp.asarray(x)
    signs = jax.random.rademacher(noise_key, clean.shape, clean.dtype)
    noisy = attack.threat.project(clean + attack.threat.eps * attack.threat.step(signs, clean), clean)
    return GeneratorStrength(
        accuracy(fixed, points, labels, batch_size=batch_size), accuracy(fixed, noisy, labels, batch_size=batch_size)
    )
