"""FAB: the smallest perturbation that changes the class, by projections onto the linearised boundary."""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ntkadv._checks import (
    require_int,
    require_nonnegative,
)
from ntkadv._typing import AnyArray
from ntkadv.attacks._hyperplane import NORMS, dual_norm, step_to_hyperplane
from ntkadv.attacks.base import Attack, RepeatedAttack, prepared
from ntkadv.attacks.best import misclassified, select
from ntkadv.attacks.model import Model, in_precision, working_dtype
from ntkadv.attacks.search import Cost, batches
from ntkadv.attacks.targets import target_classes
from ntkadv.attacks.threat_model import fold_in_each


class Nearest(NamedTuple):
    """The nearest misclassified points found.

    Attributes:
        points: The points; the clean image where none was found.
        distances: Their distances from the clean images in the norm of the threat; infinite where none was found.
    """

    points: Float[Array, "n h w c"]
    distances: Float[Array, " n"]


@dataclass(frozen=True)
class FAB(RepeatedAttack):
    r"""The fast adaptive boundary attack: it minimises the perturbation, and then asks whether it is small enough.

    With :math:`\delta_k(z)` the smallest change that takes z to the boundary between label and target, linearised at
    :math:`x_k`, within the box [0, 1],

    .. math:: x_{k+1} = (1 - \alpha)\,(x_k + \eta\,\delta_k(x_k)) + \alpha\,(x + \eta\,\delta_k(x))

    clipped to the box, with :math:`\alpha = \min\bigl(\lVert\delta_k(x_k)\rVert / (\lVert\delta_k(x_k)\rVert +
    \lVert\delta_k(x)\rVert), \alpha_{\max}\bigr)`. From a misclassified point the search goes back to
    :math:`x + \beta\,(x_{k+1} - x)`. The nearest misclassified point is returned, projected onto the ball; radius and
    loss play no part in the search.

    An attempt is one target and one start: the wrong classes of largest logits at the clean image, one after the other,
    each from the clean image first, then from random points of the ball of half the radius. The final search along the
    segment to the clean image is left out, as in AutoAttack.

    Args:
        threat: `Linf`, `L2` or `L1`.
        targets: Number of targets; at most one less than there are classes are used.
        steps: Number of steps, each with one gradient.
        restarts: Number of starts for each target.
        alpha_max: Largest share of the clean image's projection.
        eta: By how much the steps go beyond the boundary.
        beta: What the search goes back to, as a share of the perturbation.
        untargeted: Go for the class whose linearised boundary is nearest, anew in each step, at the cost of a gradient
            for each class; `targets` is not used then.

    Raises:
        TypeError, ValueError: a setting is out of range, or the threat is another.

    Source: Croce & Hein, ICML 2020, arXiv 1907.02044.
    """

    _: KW_ONLY
    targets: int = 9
    steps: int = 100
    restarts: int = 1
    alpha_max: float | int = 0.1
    eta: float | int = 1.05
    beta: float | int = 0.9
    untargeted: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.threat.norm not in NORMS:
            raise TypeError(f"threat must be Linf, L2 or L1 for FAB, got {self.threat!r}; use another attack there.")
        for name in ("targets", "steps", "restarts"):
            require_int(name, getattr(self, name), minimum=1)
        for name in ("alpha_max", "eta", "beta"):
            value = getattr(self, name)
            require_nonnegative(name, value)
            object.__setattr__(self, name, float(value))
        if self.alpha_max > 1:
            raise ValueError(f"alpha_max is a share, got {self.alpha_max}; pass at most 1.")
        if self.eta < 1:
            raise ValueError(f"eta must be at least 1, got {self.eta}; a step that falls short changes no class.")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie between 0 and 1, got {self.beta}; it is the share that is kept.")

    @property
    def name(self) -> str:
        """`FAB-T`, `FAB` if untargeted; then steps and restarts, where they are not 100 and one."""
        restarts = f"-{self.restarts}" if self.restarts > 1 else ""
        steps = f"-{self.steps}" if restarts or self.steps != 100 else ""
        return ("FAB" if self.untargeted else "FAB-T") + steps + restarts

    def cost(self, num_classes: int) -> Cost:
        """Count passes through the model, see `Attack.cost`."""
        return Cost(gradients=self.steps * (num_classes if self.untargeted else 1), forwards=self.steps + 1)

    def attempts(self, num_classes: int) -> int:
        """Give the number of targets times that of starts."""
        return self.restarts * (1 if self.untargeted else len(target_classes(self.targets, num_classes)))

    def attempt(self, model, x, labels, keys, number):
        """One target and one start on one batch, see `RepeatedAttack.attempt`."""
        return self.threat.project(self._search(model, x, labels, keys, number).points, x)

    def nearest(
        self,
        model: Model,
        x: Float[AnyArray, "n h w c"],
        labels: Int[AnyArray, " n"],
        *,
        key: Key[Array, ""],
        batch_size: int | None = None,
    ) -> Nearest:
        """Find the nearest misclassified points, whatever the radius; all attempts are made for all samples.

        The radius matters for the random starts only. Images that are misclassified as they are have distance zero.
        The arguments are those of `Attack.__call__`.

        Raises:
            TypeError, ValueError: as `Attack.__call__`, but for logits that are not finite at a clean image.
        """
        samples, _, size = prepared(model, x, labels, key, batch_size)
        eps = jnp.asarray(self.threat.eps, working_dtype(samples.x.dtype))
        found = []
        for places, count in batches(np.arange(len(x)), size):
            nearest = _nearest(self.with_eps(0.0), eps, model, *(part[places] for part in samples))
            found.append(Nearest(*(part[:count] for part in nearest)))
        return Nearest(*(jnp.concatenate(parts) for parts in zip(*found, strict=True)))

    def _search(self, model: Model, x: Array, labels: Array, keys: Array, number: Array) -> Nearest:
        """Find the nearest misclassified points of one attempt."""
        logits = model(x)
        if self.untargeted:
            targets = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=labels.dtype)[:, None], logits.T.shape)
        else:
            ranks = target_classes(self.targets, logits.shape[1])
            targets = ranks.of(logits, labels, number // self.restarts)[None]
        is_first = number % self.restarts == 0
        start = x + jnp.where(is_first, 0, (self.threat.random_point(keys, x) - x) / 2)

        def step(carry, _):
            point, nearest = carry
            normal, gap = self._boundary(model, point, labels, targets)
            gap_of_clean = gap + jnp.sum(normal * (point - x), axis=(1, 2, 3))
            change = step_to_hyperplane(self.threat.norm, point, normal, gap)
            change_of_clean = step_to_hyperplane(self.threat.norm, x, normal, gap_of_clean)
            length, length_of_clean = (jnp.maximum(self._length(c), 1e-8) for c in (change, change_of_clean))
            share = jnp.minimum(length / (length + length_of_clean), self.alpha_max)[:, None, None, None]
            mixed = (1 - share) * (point + self.eta * change) + share * (x + self.eta * change_of_clean)
            point = jnp.clip(mixed, 0, 1)

            logits = model(point)
            is_wrong = misclassified(logits, labels)
            distance = self.threat.distance(point, x)
            is_nearer = is_wrong & (distance < nearest.distances)
            nearest = _take(is_nearer, Nearest(point, distance), nearest)
            goes_back = is_wrong | ~jnp.isfinite(logits).all(axis=1)
            return (select(goes_back, x + self.beta * (point - x), point), nearest), None

        distances = jnp.where(misclassified(logits, labels), 0, jnp.inf).astype(x.dtype)
        (_, nearest), _ = jax.lax.scan(step, (start, Nearest(x, distances)), length=self.steps)
        return nearest

    def _boundary(
        self, model: Model, point: Float[Array, "b h w c"], labels: Int[Array, " b"], targets: Int[Array, "t b"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
        """Linearise f_target - f_label for the target that is nearest then: gradient, and what it lacks to zero.

        Where it is not finite, or constant, or the target is the label, both are zero.
        """
        logits, pullback = jax.vjp(model, point)
        one_hot = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)

        def consider(nearest, target):
            difference = jax.nn.one_hot(target, logits.shape[1], dtype=logits.dtype) - one_hot
            (normal,) = pullback(difference)
            gap = -jnp.sum(jnp.where(difference == 0, 0, difference * logits), axis=1).astype(point.dtype)
            is_finite = jnp.isfinite(normal).all(axis=(1, 2, 3)) & jnp.isfinite(gap)
            slope = dual_norm(self.threat.norm, normal)
            distance = jnp.where(is_finite & (slope > 0), jnp.abs(gap) / slope, jnp.inf)
            chosen = distance < nearest[2]
            return (
                select(chosen, normal, nearest[0]),
                jnp.where(chosen, gap, nearest[1]),
                jnp.where(chosen, distance, nearest[2]),
            ), None

        zero = jnp.zeros(len(point), point.dtype)
        (normal, gap, _), _ = jax.lax.scan(consider, (jnp.zeros_like(point), zero, zero + jnp.inf), targets)
        return normal, gap

    def _length(self, change: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        return self.threat.distance(change, jnp.zeros_like(change))


def _take(choose: Array, ours: Nearest, theirs: Nearest) -> Nearest:
    return Nearest(select(choose, ours.points, theirs.points), jnp.where(choose, ours.distances, theirs.distances))


@eqx.filter_jit
def _nearest(template: Attack, eps: Array, model: Model, x: Array, labels: Array, keys: Array) -> Nearest:
    """Make all attempts on one batch."""
    attack = cast(FAB, template.with_eps(eps))
    clean, wrapped = x.astype(eps.dtype), in_precision(model, x.dtype)

    def step(nearest, number):
        found = attack._search(wrapped, clean, labels, fold_in_each(keys, number), number)
        return _take(found.distances < nearest.distances, found, nearest), None

    numbers = jnp.arange(attack.attempts(jax.eval_shape(wrapped, clean).shape[1]), dtype=jnp.uint32)
    nothing = Nearest(clean, jnp.full(len(x), jnp.inf, eps.dtype))
    nearest = jax.lax.scan(step, nothing, numbers)[0]
    points = nearest.points.astype(x.dtype)
    distances = attack.threat.distance(points.astype(eps.dtype), clean)
    return Nearest(points, jnp.where(jnp.isfinite(nearest.distances), distances, jnp.inf))
