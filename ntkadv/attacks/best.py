"""The strongest points found so far, and how two points are compared."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Best(NamedTuple):
    """The strongest point found so far for each sample.

    A misclassified point beats every correctly classified one; among equals the larger loss wins, and of equal losses
    the later point. Points with logits that are not finite are never kept.
    """

    point: Float[Array, "b h w c"]
    loss: Float[Array, " b"]
    is_wrong: Bool[Array, " b"]

    @classmethod
    def nothing(cls, x: Float[Array, "b h w c"], dtype: Any) -> "Best":
        """Start from the points `x`, which any other beats."""
        return cls(x, jnp.full(len(x), -jnp.inf, dtype), jnp.zeros(len(x), bool))

    def update(
        self,
        point: Float[Array, "b h w c"],
        loss: Float[Array, " b"],
        logits: Float[Array, "b classes"],
        labels: Int[Array, " b"],
        *,
        until_wrong: bool = False,
    ) -> "Best":
        """Take `point` wherever it is stronger; with `until_wrong`, leave samples alone that are misclassified."""
        is_wrong = misclassified(logits, labels)
        is_stronger = (is_wrong & ~self.is_wrong) | ((is_wrong == self.is_wrong) & (loss >= self.loss))
        is_stronger &= jnp.isfinite(logits).all(axis=1)
        if until_wrong:
            is_stronger &= ~self.is_wrong
        return Best(
            select(is_stronger, point, self.point),
            jnp.where(is_stronger, loss, self.loss),
            jnp.where(is_stronger, is_wrong, self.is_wrong),
        )


def misclassified(logits: Float[Array, "b classes"], labels: Int[Array, " b"]) -> Bool[Array, " b"]:
    """Whether each sample is misclassified; logits that are not finite prove nothing."""
    return (jnp.argmax(logits, axis=1).astype(labels.dtype) != labels) & jnp.isfinite(logits).all(axis=1)


def select(
    choose: Bool[Array, " b"], ours: Float[Array, "b h w c"], theirs: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Images of `ours` where chosen, of `theirs` elsewhere."""
    return jnp.where(choose[:, None, None, None], ours, theirs)
