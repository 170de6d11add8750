"""What an attack asks of a model: a function in JAX from images to logits, treating samples independently."""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ntkadv._convolutions import canonical_convolutions
from ntkadv._typing import AnyArray
from ntkadv.attacks.losses import Loss

Model: TypeAlias = Callable[[Array], Array]


def num_classes_of(model: Model, x: AnyArray) -> int:
    """Find the number of outputs of the model, without running it.

    Raises:
        TypeError: `model` is not callable, or does not return an array of floats.
        ValueError: its result does not have the shape (b, num_classes) with two classes at least.
    """
    if not callable(model):
        raise TypeError(f"model must be a function from images to logits, got {type(model).__name__}.")
    logits = jax.eval_shape(lambda x: model(x), jax.ShapeDtypeStruct(x.shape, jnp.asarray(x[:1]).dtype))
    _require_logits(logits, x.shape)
    return logits.shape[1]


def in_precision(model: Model, dtype: Any) -> Model:
    """Wrap a model for points that are computed in more precision than it takes: it sees them in `dtype`.

    Logits come back in float32 at least, whatever the model computes in; their shape is checked for every batch size.
    """

    def wrapped(z: Array) -> Array:
        logits = model(z.astype(dtype))
        _require_logits(logits, z.shape)
        return logits.astype(wider(logits.dtype, working_dtype(z.dtype)))

    return wrapped


@eqx.filter_jit
def logits_of(model: Model, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
    """Logits of one batch, compiled; in float32 at least."""
    return in_precision(model, x.dtype)(x)


def working_dtype(dtype: Any) -> Any:
    """Precision in which points of a dtype are computed: float32 at least."""
    return wider(dtype, jnp.float32)


def wider(first: Any, second: Any) -> Any:
    """Give the dtype of more bits; unlike `jnp.promote_types` whatever promotion is set to."""
    return jnp.dtype(first if jnp.finfo(first).bits >= jnp.finfo(second).bits else second)


def loss_and_gradient(
    model: Model, loss: Loss, x: Float[Array, "b h w c"], labels: Int[Array, " b"]
) -> tuple[Float[Array, " b"], Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Losses, their gradients in `x` (zero where not finite) and the logits, from one pass through the model."""

    def total(x):
        logits = model(x)
        losses = loss(logits, labels)
        return jnp.sum(losses), (losses, logits)

    (_, (losses, logits)), gradient = canonical_convolutions(jax.value_and_grad(total, has_aux=True))(x)
    return losses, jnp.where(jnp.isfinite(gradient), gradient, 0), logits


def _require_logits(logits: Any, shape: tuple[int, ...]) -> None:
    if not (hasattr(logits, "dtype") and jnp.issubdtype(logits.dtype, jnp.floating)):
        raise TypeError(f"model must return one array of floats, got {logits}; return the logits only.")
    if logits.ndim != 2 or logits.shape[0] != shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"model must return logits ({shape[0]}, num_classes) with at least two classes for images {shape}, "
            f"got {logits.shape}; write two classes with one score s as the columns (0, s)."
        )
