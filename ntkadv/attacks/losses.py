"""What an attack maximises: losses of one sample each, (logits (b, c), labels (b,)) -> (b,).

Scores fitted by regression, as those of kernel machines, are ill-scaled for the cross-entropy: attack them with the
squared loss and with the margin, and report the worst. A new loss is a function here and an entry of `LOSSES`, or of
`TARGETED_LOSSES` if it leads to a class: (logits, labels, targets) -> (b,).
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
TargetedLoss: TypeAlias = Callable[[Array, Array, Array], Array]

_TINY = 1e-12


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


def dlr(logits: Logits, labels: Labels) -> PerSample:
    r"""Difference of logits ratio: the margin in units of the spread of the three largest logits.

    .. math:: -\frac{f_y - \max_{k \neq y} f_k}{f_{\pi_1} - f_{\pi_3}}

    with :math:`f_{\pi_1} \ge f_{\pi_2} \ge \dots`; unlike the cross-entropy it does not change with the scale of the
    logits.

    Raises:
        ValueError: there are fewer than three classes.

    Source: Croce & Hein, ICML 2020, arXiv 2003.01690, equation 6.
    """
    largest = _sorted(logits, 3, "dlr")
    return margin(logits, labels) / (largest[:, 0] - largest[:, 2] + _TINY)


LOSSES: dict[str, Loss] = {"squared": squared, "cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def targeted_squared(logits: Logits, labels: Labels, targets: Labels) -> PerSample:
    r"""Minus half the squared distance to the regression targets of class t: :math:`-\tfrac12 |f - y_t|^2`."""
    del labels
    return -squared(logits, targets)


def targeted_cross_entropy(logits: Logits, labels: Labels, targets: Labels) -> PerSample:
    r"""Log-likelihood of class t: :math:`\log \mathrm{softmax}(f)_t`."""
    del labels
    return -cross_entropy(logits, targets)


def targeted_margin(logits: Logits, labels: Labels, targets: Labels) -> PerSample:
    """Lead of class t over the label: :math:`f_t - f_y`."""
    return _at(logits, targets) - _at(logits, labels)


def targeted_dlr(logits: Logits, labels: Labels, targets: Labels) -> PerSample:
    r"""Lead of class t over the label in units of the spread of the largest logits.

    .. math:: -\frac{f_y - f_t}{f_{\pi_1} - (f_{\pi_3} + f_{\pi_4})/2}

    Raises:
        ValueError: there are fewer than four classes.

    Source: Croce & Hein, ICML 2020, arXiv 2003.01690, equation 7.
    """
    largest = _sorted(logits, 4, "targeted dlr")
    spread = largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2
    return targeted_margin(logits, labels, targets) / (spread + _TINY)


TARGETED_LOSSES: dict[str, TargetedLoss] = {
    "squared": targeted_squared,
    "cross_entropy": targeted_cross_entropy,
    "margin": targeted_margin,
    "dlr": targeted_dlr,
}


def get_loss(loss: str | Loss) -> Loss:
    """Look up a loss by name; a callable is returned as it is.

    Raises:
        ValueError: no loss has that name.
        TypeError: `loss` is neither a string nor callable.
    """
    return _look_up(loss, LOSSES, "(logits, labels)")


def get_targeted_loss(loss: str | TargetedLoss) -> TargetedLoss:
    """Look up a targeted loss by name; a callable is returned as it is.

    Raises:
        ValueError: no targeted loss has that name.
        TypeError: `loss` is neither a string nor callable.
    """
    return _look_up(loss, TARGETED_LOSSES, "(logits, labels, targets)")


def loss_suffix(loss: str | Loss) -> str:
    """End of an attack's name: empty for the squared loss, else a space and the loss."""
    name = loss_name(loss)
    return "" if name == "squared" else f" {name}"


def loss_name(loss: str | Callable) -> str:
    """Name of a loss for tables."""
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def _look_up(loss: str | Callable, known: dict[str, Callable], arguments: str) -> Callable:
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a function of {arguments}, got {type(loss).__name__}.")
    if loss not in known:
        raise ValueError(f"loss must be one of {', '.join(known)} or a function of {arguments}, got {loss!r}.")
    return known[loss]


def _at(logits: Logits, labels: Labels) -> PerSample:
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _sorted(logits: Logits, least: int, name: str) -> Float[Array, "b k"]:
    """Give the `least` largest logits, in falling order."""
    if logits.shape[1] < least:
        raise ValueError(
            f"the {name} loss needs at least {least} classes, but the model has {logits.shape[1]}; use 'margin'."
        )
    return jax.lax.top_k(logits, least)[0]


def _one_hot(logits: Logits, labels: Labels) -> Float[Array, "b classes"]:
    return jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
