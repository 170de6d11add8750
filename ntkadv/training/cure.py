"""CURE: conserve, update, revise. Only weights that matter are updated; a slow copy of the network holds it steady."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ntkadv._checks import require_nonnegative
from ntkadv._convolutions import canonical_convolutions
from ntkadv.kernels.empirical import Params
from ntkadv.training.method import Batch, Mode, Passes, Problem, images_to_outputs, require_mode
from ntkadv.training.network import Forward, moving_average
from ntkadv.training.trades import TRADESTraining, kl_divergence

__all__ = ["CUREState", "CURETraining", "robust_gradient_prominence"]


class CUREState(NamedTuple):
    """The revision network, its batch-norm statistics, and the number of steps made."""

    params: Params
    statistics: Any
    step: Int[Array, ""]


@dataclass(frozen=True)
class CURETraining(TRADESTraining):
    r"""Selective updates and self-consistency (Gowda, Zonooz & Arani, ICLR 2024, arXiv 2401.14948).

    Begin with a network that was trained without attacks. With :math:`x'` as in TRADES:

    - the loss is that of TRADES with :math:`\beta = 1`, and :math:`\gamma` times
      :math:`\mathrm{KL}(p(x; \theta_{rev}) \| p(x; \theta)) + \mathrm{KL}(p(x'; \theta_{rev}) \| p(x'; \theta))`;
    - *conserve*: in each weight tensor, those whose prominence :math:`a\,|\partial_w \ell(x)| +
      (1 - a)\,|\partial_w \ell(x')|` is below the tensor's p-th percentile are not updated in this step. Biases and
      batch norms always are;
    - *revise*: with probability r a step, :math:`\theta_{rev} \leftarrow d\,\theta_{rev} + (1 - d)\,\theta`.

    Without the first, `percentile=0`, and without the second, `gamma=0`, are the paper's ablations; without both it is
    TRADES with weight 1. The published code departs from the paper: weight 5, signed gradients in the prominence,
    masks on tensors named conv1 only; here the paper's form is the default.

    Args:
        threat: What may be changed.
        percentile: p, from 0 to 100; 30 for ResNet-18, 20 for PreActResNet-18, 50 for WRN-34-10 on CIFAR-10.
        clean_share: a; 0.1, 0.2 and 0.3 for these.
        gamma: :math:`\gamma`; 1, 1 and 0.5 for these.
        revision_rate: r.
        revision_decay: What r is multiplied by in each step; the paper says that r decays slowly, but not how.
        momentum: d.
        mask: What is set to zero for weights that are conserved: `"gradient"`, as the paper says, which leaves them to
            momentum and weight decay; or the whole `"update"`, which freezes them for the step.
        teacher_mode: Whether the revision network takes the batch's statistics or its own averages.
        beta, steps, step_size, noise, attack_mode, warmup, loss, reduction: See `TRADESTraining`.

    Raises:
        TypeError, ValueError: as `TRADESTraining`; or another setting is out of range.
    """

    _: KW_ONLY
    beta: float = 1.0
    percentile: float = 30.0
    clean_share: float = 0.1
    gamma: float = 1.0
    revision_rate: float = 0.2
    revision_decay: float = 1.0
    momentum: float = 0.999
    mask: Literal["gradient", "update"] = "gradient"
    teacher_mode: Mode = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.percentile < 100:
            raise ValueError(f"percentile must be from 0 to below 100, got {self.percentile}; 0.3 means 0.3%.")
        for name in ("clean_share", "revision_rate", "revision_decay", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        require_nonnegative("gamma", self.gamma)
        if self.mask not in ("gradient", "update"):
            raise ValueError(f"mask must be 'gradient' or 'update', got {self.mask!r}.")
        require_mode("teacher_mode", self.teacher_mode)

    @property
    def name(self) -> str:
        """Label; the ablations have their own."""
        if not self.percentile and not self.gamma:
            return super().name
        return "CURE" + ("" if self.gamma else ", prominence only") + ("" if self.percentile else ", revision only")

    @property
    def passes(self) -> Passes:
        """Those of TRADES, two gradients more for the prominence, two forward for the revision network."""
        whole = super().passes
        return Passes(whole.forward + 2 * bool(self.gamma), whole.backward + 2 * bool(self.percentile))

    def start(self, problem: Problem) -> CUREState:
        """Begin with a revision network equal to the network."""
        return CUREState(problem.params, problem.f.statistics, jnp.int32(0))

    def update(self, f, optimizer, state, batch) -> tuple[Any, dict[str, Array]]:
        """Make one update."""
        images = jax.lax.stop_gradient(self.images(f, state.params, batch))
        factor = self.factor(batch)
        clean_target, attacked_target = self._teachers(f, state.method, batch.x, images)

        def loss(clean: Array, attacked: Array) -> Array:
            losses = self.losses(clean, batch) + self.beta * kl_divergence(clean, attacked)
            if self.gamma:
                consistency = kl_divergence(clean_target, clean) + kl_divergence(attacked_target, attacked)
                losses = losses + self.gamma * consistency
            return jnp.mean(losses)

        def gradients_of(params: Params) -> Any:
            clean, pull_clean, statistics = jax.vjp(lambda p: f.forward(p, batch.x), params, has_aux=True)
            attacked, pull_attacked, statistics = jax.vjp(
                lambda p: f.after(statistics).forward(p, images), params, has_aux=True
            )
            value, (to_clean, to_attacked) = jax.value_and_grad(loss, argnums=(0, 1))(clean, attacked)
            gradients = jax.tree.map(jnp.add, pull_clean(to_clean)[0], pull_attacked(to_attacked)[0])
            prominence = ()
            if self.percentile:
                own = jax.grad(lambda outputs: jnp.mean(self.losses(outputs, batch)))
                prominence = _prominence(pull_clean(own(clean))[0], pull_attacked(own(attacked))[0], self.clean_share)
            return gradients, prominence, value, statistics

        gradients, prominence, value, statistics = canonical_convolutions(gradients_of)(state.params)
        gradients = jax.tree.map(lambda gradient: jnp.asarray(factor, gradient.dtype) * gradient, gradients)
        kept = jax.tree.map(lambda score: updated(score, self.percentile), prominence)
        if self.percentile and self.mask == "gradient":
            gradients = jax.tree.map(lambda keep, gradient: jnp.where(keep, gradient, 0), kept, gradients)
        new = state.descended(optimizer, gradients, statistics=statistics)
        if self.percentile and self.mask == "update":
            new = new._replace(params=jax.tree.map(jnp.where, kept, new.params, state.params))
        return new._replace(method=self._revised(state.method, new, batch)), {"loss": value}

    def _teachers(self, f: Forward, own: CUREState, x: Array, images: Array) -> tuple[Array, Array]:
        if not self.gamma:
            return x, images
        teacher = images_to_outputs(f.after(own.statistics), own.params, self.teacher_mode)
        return jax.lax.stop_gradient((teacher(x), teacher(images)))

    def _revised(self, own: CUREState, new: Any, batch: Batch) -> CUREState:
        """Move the revision network towards the new one, with a probability."""
        key = jax.random.fold_in(batch.keys[0], 2)
        rate = self.revision_rate * jnp.asarray(self.revision_decay, jnp.float32) ** own.step.astype(jnp.float32)
        is_due = jax.random.uniform(key, (), jnp.float32) < rate
        moved = moving_average(self.momentum, (own.params, own.statistics), (new.params, new.statistics))
        pairs = jax.tree.map(lambda a, b: jnp.where(is_due, a, b), moved, (own.params, own.statistics))
        return CUREState(pairs[0], pairs[1], own.step + 1)


def robust_gradient_prominence(f: Forward, params: Params, method: CURETraining, batch: Batch) -> Any:
    r"""Compute the prominence of every weight on one batch, see `CURETraining`.

    Returns:
        A pytree like the parameters.
    """
    images = jax.lax.stop_gradient(method.images(f, params, batch))

    def slope(params: Params, x: Array) -> Any:
        return jax.grad(lambda p: jnp.mean(method.losses(f(p, x), batch)))(params)

    slope = canonical_convolutions(slope)
    return _prominence(slope(params, batch.x), slope(params, images), method.clean_share)


def updated(prominence: Float[Array, "..."], percentile: float) -> Array:
    """Say which weights of a tensor are updated: all of a vector, those not below the percentile of a larger one."""
    if prominence.ndim < 2:
        return jnp.ones(prominence.shape, bool)
    return prominence >= jnp.percentile(prominence, percentile)


def _prominence(clean: Any, attacked: Any, clean_share: float) -> Any:
    def mix(a: Array, b: Array) -> Array:
        share = jnp.asarray(clean_share, a.dtype)
        return share * jnp.abs(a) + (1 - share) * jnp.abs(b)

    return jax.tree.map(mix, clean, attacked)
