"""What an attack maximises: losses of one sample each, (logits (b, c), labels (b,)) -> (b,).

Scores fitted by regression, as those of kernel machines, are ill-scaled for the cross-entropy: attack them with the
squared loss and with the margin, and report the worst. A new loss is a function here and an entry of `LOSSES`.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Logits = Float[Array, "b classes"]
Labels = Int[Array, " b"]
PerSample = Float[Array, " b"]
Loss: TypeAlias = Callable[[Array, Array], Array]


def squared(logits: Logits, labels: Labels) -> PerSample:
    r"""Half the squared distance to the regression targets, one-hot minus 1/c (see `ntkadv.data.targets`).

    .. math:: \tfrac12 \lVert f - y \rVert^2
    """
    c = logits.shape[1]
    return jnp.sum((logits - (_one_hot(logits, labels) - 1 / c)) ** 2, axis=1) / 2


def cross_entropy(logits: Logits, labels: Labels) -> PerSample:
    r"""Negative log-likelihood of the label under the softmax.

    .. math:: -\log \mathrm{softmax}(f)_{y}
    """
    return -jnp.sum(_one_hot(logits, labels) * jax.nn.log_softmax(logits, axis=1), axis=1)


def margin(logits: Logits, labels: Labels) -> PerSample:
    r"""Lead of the best wrong class; positive exactly where the sample is misclassified (Carlini & Wagner, 2017).

    .. math:: \max_{k \neq y} f_k - f_y
    """
    is_label = _one_hot(logits, labels) > 0
    others = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=1)
    return others - jnp.sum(jnp.where(is_label, logits, 0), axis=1)


LOSSES: dict[str, Loss] = {"squared": squared, "cross_entropy": cross_entropy, "margin": margin}


def get_loss(loss: str | Loss) -> Loss:
    """Look up a loss by name; a callable is returned as it is.

    Raises:
        ValueError: no loss has that name.
        TypeError: `loss` is neither a string nor callable.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a function of (logits, labels), got {type(loss).__name__}.")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a function of (logits, labels), got {loss!r}.")
    return LOSSES[loss]


def _one_hot(logits: Logits, labels: Labels) -> Float[Array, "b classes"]:
    return jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)


def loss_suffix(loss: str | Loss) -> str:
    """End of an attack's name: empty for the squared loss, else a space and the loss."""
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return "" if name == "squared" else f" {name}"
