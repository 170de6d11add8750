"""The classes that a targeted attack goes for."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from ntkadv._checks import require_int


def require_targets(targets: int | tuple[int, ...]) -> None:
    """Require a number of classes, or distinct classes; `TypeError` or `ValueError` otherwise."""
    if not isinstance(targets, tuple):
        require_int("targets", targets, minimum=1)
        return
    if not targets:
        raise ValueError("targets must name at least one class, got none; pass a number to choose by the logits.")
    for target in targets:
        require_int("targets", target, minimum=0)
    if len(set(targets)) < len(targets):
        raise ValueError(f"targets must be distinct classes, got {targets}.")


@dataclass(frozen=True)
class Targets:
    """How many classes there are to go for, and which: those of `classes`, or the likeliest."""

    number: int
    classes: tuple[int, ...] | None

    def __len__(self) -> int:
        return self.number

    def of(
        self, logits: Float[Array, "b classes"], labels: Int[Array, " b"], number: UInt32[Array, ""]
    ) -> Int[Array, " b"]:
        """Give the class that each sample is led to in attempt `number`, never its label."""
        is_label = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
        ranked = jnp.argsort(-jnp.where(is_label, -jnp.inf, logits), axis=1).astype(labels.dtype)
        if self.classes is None:
            return jnp.take(ranked, number, axis=1)
        target = jnp.take(jnp.asarray(self.classes, labels.dtype), number)
        return jnp.where(labels == target, ranked[:, 0], target)


def target_classes(targets: int | tuple[int, ...], num_classes: int) -> Targets:
    """Fit targets to a model.

    Raises:
        ValueError: a class is named that the model does not have.
    """
    if not isinstance(targets, tuple):
        return Targets(min(targets, num_classes - 1), None)
    if max(targets) >= num_classes:
        raise ValueError(f"targets must lie in 0 .. {num_classes - 1}, the classes of the model, got {max(targets)}.")
    return Targets(len(targets), targets)
