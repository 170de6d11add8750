"""PGD: projected gradient ascent, the attack that everything is judged by first."""

from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp

from ntkadv._checks import require_int, require_nonnegative
from ntkadv.attacks.base import Attack
from ntkadv.attacks.best import Best
from ntkadv.attacks.losses import Loss, get_loss, loss_suffix
from ntkadv.attacks.model import loss_and_gradient
from ntkadv.attacks.search import Cost
from ntkadv.attacks.threat_model import fold_in_each


@dataclass(frozen=True)
class PGD(Attack):
    r"""Projected gradient ascent on the loss, from a random point of the ball.

    .. math:: x_{k+1} = \mathrm{project}\bigl(x_k + \alpha\, \mathrm{step}(\nabla_x \ell(f(x_k), y))\bigr)

    The gradient is taken at the current iterate, the projection is around the clean image and onto [0, 1]. Of all
    iterates, first and last included, the strongest is returned: a misclassified one if there is any, then the one of
    largest loss. Memory does not grow with `steps`.

    Args:
        threat: What may be changed.
        steps: Number of gradient steps.
        step_size: Length of a step in the norm of the threat; 2.5 eps / steps if not given. (Fu & Wang, 2024, use eps/5
            with 10 steps; PGD-50-10 has eps/4.)
        loss: `"squared"`, `"cross_entropy"`, `"margin"`, or a function (logits, labels) -> (b,).
        random_start: Start uniformly in the ball rather than at the clean image.
        restarts: Number of starts, of which the strongest point is returned.
        keep_best: Return the strongest iterate; False returns the last one, as is common in training.

    Raises:
        ValueError: a setting is out of range, or several restarts would do the same.

    Source: Madry et al., ICLR 2018, arXiv 1706.06083.
    """

    _: KW_ONLY
    steps: int = 20
    step_size: float | int | None = None
    loss: str | Loss = "squared"
    random_start: bool = True
    restarts: int = 1
    keep_best: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_int("steps", self.steps, minimum=1)
        require_int("restarts", self.restarts, minimum=1)
        if self.step_size is not None:
            require_nonnegative("step_size", self.step_size, strict=True)
            object.__setattr__(self, "step_size", float(self.step_size))
        get_loss(self.loss)
        if self.restarts > 1 and not (self.random_start and self.keep_best):
            raise ValueError(
                f"restarts must be 1 with random_start={self.random_start} and keep_best={self.keep_best}, got "
                f"{self.restarts}; several starts need random_start=True and keep_best=True."
            )

    @property
    def name(self) -> str:
        """`PGD-20`; then the restarts, where there are several, and the loss, where it is not the squared one."""
        return f"PGD-{self.steps}" + (f"-{self.restarts}" if self.restarts > 1 else "") + loss_suffix(self.loss)

    def cost(self, num_classes: int) -> Cost:
        """Count passes through the model, see `Attack.cost`."""
        return Cost(gradients=self.steps, forwards=int(self.keep_best)).times(self.restarts)

    def perturb(self, model, x, labels, keys):
        """Attack one batch, see `Attack.perturb`."""
        loss = get_loss(self.loss)
        step_size = 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size

        def step(carry, _):
            point, best = carry
            losses, gradient, logits = loss_and_gradient(model, loss, point, labels)
            if self.keep_best:
                best = best.update(point, losses, logits, labels)
            return (self.threat.project(point + step_size * self.threat.step(gradient, point), x), best), None

        def restart(best, number):
            start = x
            if self.random_start:
                start = self.threat.random_point(fold_in_each(keys, number), x)
            (point, best), _ = jax.lax.scan(step, (start, best), length=self.steps)
            if not self.keep_best:
                return best._replace(point=point), None
            logits = model(point)
            return best.update(point, loss(logits, labels), logits, labels), None

        dtype = jax.eval_shape(lambda x: loss(model(x), labels), x).dtype
        nothing = Best.nothing(x, dtype)
        return jax.lax.scan(restart, nothing, jnp.arange(self.restarts, dtype=jnp.uint32))[0].point
