"""Auto-PGD: gradient ascent that chooses its own steps, on an untargeted or a targeted loss."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ntkadv._checks import require_int, require_nonnegative
from ntkadv.attacks._step_sizes import Where, resume, step_sizes
from ntkadv.attacks.base import RepeatedAttack
from ntkadv.attacks.best import Best, select
from ntkadv.attacks.losses import Loss, TargetedLoss, get_loss, get_targeted_loss, loss_name
from ntkadv.attacks.model import Model, loss_and_gradient
from ntkadv.attacks.search import Cost
from ntkadv.attacks.targets import require_targets, target_classes
from ntkadv.attacks.threat_model import L1, ThreatModel

_SHORT = {"cross_entropy": "CE", "dlr": "DLR"}


@dataclass(frozen=True)
class APGD(RepeatedAttack):
    """Auto-PGD: projected gradient ascent with momentum, whose steps shrink where they no longer help.

    The rule of the steps is in `ntkadv.attacks._step_sizes`: halving at checkpoints for `Linf` and `L2`, sparse steps
    for `L1`, where the ball shrinks from 3 eps over 2 eps to eps. It starts at a random point of the ball; of all
    points the strongest is returned, a misclassified one if there is any, then the one of largest loss. Memory does not
    grow with `steps`.

    Args:
        threat: What may be changed.
        steps: Number of steps.
        loss: `"cross_entropy"`, `"dlr"`, `"margin"`, `"squared"`, or a function (logits, labels) -> (b,).
        restarts: Number of starts; all but the first only for samples that are still classified correctly.
        rho: Share of the steps that must raise the loss for the step size to stay.

    Raises:
        ValueError: A setting is out of range.

    Source: Croce & Hein, ICML 2020, arXiv 2003.01690; for `L1` ICML 2021, arXiv 2103.01208.
    """

    _: KW_ONLY
    steps: int = 100
    loss: str | Loss = "cross_entropy"
    restarts: int = 1
    rho: float = 0.75

    def __post_init__(self):
        super().__post_init__()
        _require_settings(self)
        get_loss(self.loss)

    @property
    def name(self) -> str:
        """`APGD-CE`, `APGD-DLR`, `APGD-margin`, ...; then steps and restarts where they are not 100 and 1."""
        short = loss_name(self.loss)
        return f"APGD-{_SHORT.get(short, short)}" + _budget(self)

    def attempts(self, num_classes: int) -> int:
        """Give the number of starts."""
        del num_classes
        return self.restarts

    def cost(self, num_classes: int) -> Cost:
        """Count passes through the model, see `Attack.cost`."""
        del num_classes
        return _cost(self)

    def attempt(self, model, x, labels, keys, number):
        """Ascend once, see `RepeatedAttack.attempt`."""
        del number
        return ascend(model, get_loss(self.loss), self.threat, x, labels, keys, steps=self.steps, rho=self.rho)


@dataclass(frozen=True)
class TargetedAPGD(RepeatedAttack):
    """Auto-PGD towards one wrong class after the other, the likeliest first; each on what is still unbroken.

    Args:
        threat: What may be changed.
        steps: Number of steps for each class.
        loss: `"dlr"`, `"margin"`, `"cross_entropy"`, `"squared"`, or a function (logits, labels, targets) -> (b,).
        targets: Number of classes, in the order of the logits at the clean image; all others, if there are fewer. Or
            the classes themselves: where one of them is the label, the likeliest wrong class stands in.
        restarts: Number of starts for each class.
        rho: Share of the steps that must raise the loss for the step size to stay.

    Raises:
        ValueError: A setting is out of range; at the call, a class that the model does not have.

    Source: Croce & Hein, ICML 2020, arXiv 2003.01690.
    """

    _: KW_ONLY
    steps: int = 100
    loss: str | TargetedLoss = "dlr"
    targets: int | tuple[int, ...] = 9
    restarts: int = 1
    rho: float = 0.75

    def __post_init__(self):
        super().__post_init__()
        _require_settings(self)
        require_targets(self.targets)
        get_targeted_loss(self.loss)

    @property
    def name(self) -> str:
        """`APGD-T`; then the loss, the targets, steps and restarts, where they are not the usual ones."""
        loss = loss_name(self.loss)
        targets = "" if self.targets == 9 else f" {self.targets} targets"
        return "APGD-T" + ("" if loss == "dlr" else f"-{loss}") + targets + _budget(self)

    def attempts(self, num_classes: int) -> int:
        """Give the number of classes times that of starts."""
        return self.restarts * len(target_classes(self.targets, num_classes))

    def cost(self, num_classes: int) -> Cost:
        """Count passes through the model, see `Attack.cost`."""
        del num_classes
        return _cost(self).plus(Cost(forwards=1))

    def attempt(self, model, x, labels, keys, number):
        """Ascend once towards one class, see `RepeatedAttack.attempt`."""
        logits = model(x)
        ranks = target_classes(self.targets, logits.shape[1])
        target = ranks.of(logits, labels, number // self.restarts)
        targeted = get_targeted_loss(self.loss)

        def loss(logits, labels):
            return targeted(logits, labels, target)

        return ascend(model, loss, self.threat, x, labels, keys, steps=self.steps, rho=self.rho)


class _Ascent(NamedTuple):
    where: Where
    best: Where
    best_loss: Float[Array, " b"]
    last_loss: Float[Array, " b"]
    improved: Int[Array, " b"]
    rule: Any
    found: Best


def ascend(
    model: Model,
    loss: Callable[[Array, Array], Array],
    threat: ThreatModel,
    x: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    keys: Key[Array, " b"],
    *,
    steps: int,
    rho: float,
) -> Float[Array, "b h w c"]:
    """Ascend a loss from a random point of the ball; in the l_1 ball through two larger ones."""
    if not isinstance(threat, L1):
        return _ascend(model, loss, threat, threat.random_point(keys, x), x, labels, steps, rho).found.point
    # The projection of noise is sparse, as what follows; a uniformly random point of the ball is not.
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    point = threat.with_eps(3 * threat.eps).project(x + noise, x)
    few = 3 * steps // 10
    parts = [(3.0, few), (2.0, few), (1.0, steps - 2 * few)]
    gradient, found = jnp.zeros_like(x), Best.nothing(x, x.dtype)
    for factor, some in parts:
        if some:
            ball = threat.with_eps(factor * threat.eps)
            done = _ascend(model, loss, ball, ball.project(point, x), x, labels, some, rho)
            point, gradient, found = done.best.point, done.best.gradient, done.found
    # Sparse steps end near a corner of the allowed set; where the model is linear, this is the best one.
    corner = threat.vertex(gradient, x)
    logits = model(corner)
    return found.update(corner, loss(logits, labels), logits, labels).point


def _ascend(
    model: Model,
    loss: Callable[[Array, Array], Array],
    threat: ThreatModel,
    start: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    steps: int,
    rho: float,
) -> _Ascent:
    rule = step_sizes(threat, steps, rho)

    def step(ascent: _Ascent, now):
        is_first, is_checkpoint, window = now
        point = rule.move(ascent.rule, ascent.where, x, is_first=is_first)
        losses, gradient, logits = loss_and_gradient(model, loss, point, labels)
        where = Where(point, ascent.where.point, gradient)
        is_better = losses > ascent.best_loss
        best = Where(*(select(is_better, new, old) for new, old in zip(where, ascent.best, strict=True)))
        best_loss = jnp.where(is_better, losses, ascent.best_loss)
        improved = ascent.improved + (losses > ascent.last_loss).astype(jnp.int32)
        found = ascent.found.update(point, losses, logits, labels)
        state, back = rule.look_back(ascent.rule, x, best.point, best_loss, improved, window)
        state = jax.tree.map(lambda new, old: jnp.where(is_checkpoint, new, old), state, ascent.rule)
        where = resume(where, best, back & is_checkpoint)
        improved = jnp.where(is_checkpoint, 0, improved)
        return _Ascent(where, best, best_loss, losses, improved, state, found), None

    losses, gradient, logits = loss_and_gradient(model, loss, start, labels)
    where = Where(start, start, gradient)
    found = Best.nothing(x, losses.dtype).update(start, losses, logits, labels)
    state = rule.start(x, start, losses)
    ascent = _Ascent(where, where, losses, losses, jnp.zeros(len(x), jnp.int32), state, found)
    plan = (jnp.arange(steps) == 0, *(jnp.asarray(part) for part in rule.plan()))
    return jax.lax.scan(step, ascent, plan)[0]


def _cost(attack: APGD | TargetedAPGD) -> Cost:
    parts = 3 if isinstance(attack.threat, L1) else 1
    return Cost(gradients=attack.steps + parts, forwards=parts // 3)


def _budget(attack: APGD | TargetedAPGD) -> str:
    steps = "" if attack.steps == 100 else f" {attack.steps} steps"
    return steps + (f" x{attack.restarts}" if attack.restarts > 1 else "")


def _require_settings(attack: APGD | TargetedAPGD) -> None:
    require_int("steps", attack.steps, minimum=1)
    require_int("restarts", attack.restarts, minimum=1)
    require_nonnegative("rho", attack.rho, strict=True)
    if attack.rho > 1:
        raise ValueError(f"rho is a share of the steps and must be at most 1, got {attack.rho}.")
