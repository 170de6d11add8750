"""TRADES: a loss for clean images, and one for how far an attack moves the network's probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ntkadv._checks import require_int, require_nonnegative
from ntkadv.attacks.losses import Loss
from ntkadv.attacks.model import loss_and_gradient
from ntkadv.attacks.threat_model import ThreatModel
from ntkadv.training.fgsm import require_threat
from ntkadv.training.method import Method, Mode, Passes, gradient_of, grown, images_to_outputs, require_mode

__all__ = ["TRADESTraining", "kl_attack", "kl_divergence"]


@dataclass(frozen=True)
class TRADESTraining(Method):
    r"""Clean loss and stability of the probabilities (Zhang et al., ICML 2019, arXiv 1901.08573).

    .. math:: \ell(f(x), y) + \beta\, \mathrm{KL}\bigl(p(x) \,\|\, p(x')\bigr), \qquad
        x' = \arg\max \mathrm{KL}\bigl(p(x) \,\|\, p(x')\bigr)

    averaged over the batch; :math:`x'` by projected gradient ascent from a small Gaussian step off the clean image.

    Args:
        threat: What may be changed.
        beta: Weight of the divergence; 6 is the authors' choice on CIFAR-10.
        steps: Steps of the attack.
        step_size: Length of a step; eps / 4 if not given.
        noise: Standard deviation of the start around the clean image, in pixels.
        attack_mode: See `PGDTraining`; the authors attack in evaluation.
        warmup: See `PGDTraining`.
        loss: The loss of clean images, see `Method`.
        reduction: See `Method`.

    Raises:
        TypeError, ValueError: `threat` is no threat model or of radius 0, or another setting is out of range.
    """

    threat: ThreatModel
    _: KW_ONLY
    beta: float = 6.0
    steps: int = 10
    step_size: float | None = None
    noise: float = 1e-3
    attack_mode: Mode = "eval"
    warmup: int = 0
    loss: str | Loss = "cross_entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_threat(self.threat)
        require_nonnegative("beta", self.beta)
        require_int("steps", self.steps, minimum=1)
        require_nonnegative("noise", self.noise)
        if self.step_size is not None:
            require_nonnegative("step_size", self.step_size, strict=True)
        require_mode("attack_mode", self.attack_mode)
        require_int("warmup", self.warmup, minimum=0)

    @property
    def name(self) -> str:
        """Label with the weight."""
        return f"TRADES-{self.beta:g}"

    @property
    def passes(self) -> Passes:
        """The attack with its clean outputs, and two passes for the update."""
        return Passes(self.steps + 3, self.steps + 2)

    def images(self, f, params, batch) -> Array:
        """Give the attacked images."""
        model = images_to_outputs(f, params, self.attack_mode)
        threat = grown(self.threat, self.warmup, batch)
        return kl_attack(
            model, threat, batch.x, batch.keys, steps=self.steps, step_size=self.step_size, noise=self.noise
        )

    def update(self, f, optimizer, state, batch) -> tuple[Any, dict[str, Array]]:
        """Make one update."""
        images = jax.lax.stop_gradient(self.images(f, state.params, batch))
        factor = self.factor(batch)

        def objective(params: Any) -> tuple[Array, Any]:
            clean, statistics = f.forward(params, batch.x)
            outputs, statistics = f.after(statistics).forward(params, images)
            mean = jnp.mean(self.losses(clean, batch) + self.beta * kl_divergence(clean, outputs))
            return factor * mean, (mean, statistics)

        gradients, (mean, statistics) = gradient_of(objective, state.params)
        return state.descended(optimizer, gradients, statistics=statistics), {"loss": mean}


def kl_divergence(first: Float[Array, "b c"], second: Float[Array, "b c"]) -> Float[Array, " b"]:
    r"""Compute :math:`\mathrm{KL}(p \| q)` of the softmax of two rows of logits, `first` being p's."""
    p, q = jax.nn.log_softmax(first, axis=1), jax.nn.log_softmax(second, axis=1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=1)


def kl_attack(
    model: Callable[[Array], Array],
    threat: ThreatModel,
    x: Float[Array, "b *image"],
    keys: Key[Array, " b"],
    *,
    steps: int = 10,
    step_size: float | None = None,
    noise: float = 1e-3,
) -> Float[Array, "b *image"]:
    r"""Move images so that probabilities change most, by ascent on :math:`\mathrm{KL}(p(x) \| p(x'))`; for `jit`."""
    clean = jax.lax.stop_gradient(model(x))
    length = threat.eps / 4 if step_size is None else step_size

    def divergence(logits: Array, labels: Array) -> Array:
        del labels
        return kl_divergence(clean, logits)

    def step(point: Array, _: None) -> tuple[Array, None]:
        gradient = loss_and_gradient(model, divergence, point, jnp.zeros(len(x), jnp.int32))[1]
        return threat.project(point + length * threat.step(gradient, point), x).astype(x.dtype), None

    # At the clean image itself the divergence has its least value, and no gradient.
    start = x + noise * jax.vmap(lambda key, image: jax.random.normal(key, image.shape, image.dtype))(keys, x)
    return jax.lax.scan(step, start, length=steps)[0]
