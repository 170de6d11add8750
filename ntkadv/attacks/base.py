"""The base of every attack: checks, batches, keys, compilation. A new attack is a file with a subclass."""

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm.auto import tqdm

from ntkadv._checks import (
    require_images,
    require_int,
    require_key,
    require_labels,
    require_same_length,
)
from ntkadv._typing import AnyArray
from ntkadv.attacks.losses import Loss
from ntkadv.attacks.threat_model import ThreatModel, sample_keys

Model: TypeAlias = Callable[[Array], Array]


@dataclass(frozen=True)
class Attack(abc.ABC):
    """A search for allowed images that a model classifies wrongly.

    Settings are the fields of a frozen dataclass, checked when it is built and static under `jax.jit`.

    To write an attack, subclass this, add settings (keyword-only, checked in `__post_init__`), and define

    - `perturb`: the attack on one batch, in JAX;
    - `name`: a short label for tables, which tells apart the settings people vary.

    Attacks that decide on the host what to do next (such as running only on samples still unbroken) override `run`.

    Args:
        threat: What may be changed.
    """

    threat: ThreatModel

    def __post_init__(self):
        if not isinstance(self.threat, ThreatModel):
            raise TypeError(
                f"threat must be a threat model, got {self.threat!r} ({type(self.threat).__name__}); use Linf or L2."
            )

    @property
    def name(self) -> str:
        """Short label for tables."""
        return type(self).__name__

    @abc.abstractmethod
    def perturb(
        self,
        model: Model,
        x: Float[Array, "b h w c"],
        labels: Int[Array, " b"],
        keys: Key[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """Attack one batch; no checks, no compilation: for use inside `jax.jit`, with one key for each sample."""

    def run(
        self,
        model: Model,
        x: Float[Array, "n h w c"],
        labels: Int[Array, " n"],
        keys: Key[Array, " n"],
        *,
        batch_size: int,
        progress: bool = False,
    ) -> Float[Array, "n h w c"]:
        """Attack all samples, batch by batch, each of them compiled as one program."""
        adversarial = []
        for batch in batches(len(x), batch_size, self.name if progress else None):
            places = jnp.asarray(batch.places)
            points, is_finite = _perturb(self, model, x[places], labels[places], keys[places])
            _require_finite_logits(np.asarray(is_finite), batch)
            adversarial.append(points[: batch.size])
        return jnp.concatenate(adversarial)

    def __call__(
        self,
        model: Model,
        x: Float[AnyArray, "n h w c"],
        labels: Int[AnyArray, " n"],
        *,
        key: Key[Array, ""],
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Float[Array, "n h w c"]:
        """Attack images.

        Every sample has its own random numbers, made of `key` and its place: up to rounding, what happens to it does
        not depend on the size of the batches. The last batch is filled up, so that one program serves all.

        Args:
            model: A function in JAX from images (b, h, w, c) to logits (b, num_classes) that treats samples
                independently. A pytree (an Equinox module, a `KernelPredictor`) is compiled once for all its values; a
                plain function once for each function object, so pass the same object again, not a new lambda.
            x: Clean images, pixels in [0, 1].
            labels: True classes.
            key: A random key.
            batch_size: Number of images attacked at a time; all, if not given.
            progress: Show a bar over the batches.

        Returns:
            Attacked images within the threat model, in the dtype of `x`.

        Raises:
            TypeError: `x` is not a float array, `labels` not an integer array, or `key` not a key.
            ValueError: Pixels outside [0, 1], no images, labels out of range, a model whose result is not
                (b, num_classes), or which is not finite at the clean images.
        """
        require_images("x", x)
        require_same_length(x=x, labels=labels)
        require_key("key", key)
        if batch_size is not None:
            require_int("batch_size", batch_size, minimum=1)
        require_labels("labels", labels, num_classes_of(model, x))
        return self.run(
            model,
            jnp.asarray(x),
            jnp.asarray(labels, jnp.int32),
            sample_keys(key, len(x)),
            batch_size=len(x) if batch_size is None else min(batch_size, len(x)),
            progress=progress,
        )


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
    ) -> "Best":
        """Take `point` wherever it is stronger."""
        is_wrong = jnp.argmax(logits, axis=1) != labels
        is_stronger = (is_wrong & ~self.is_wrong) | ((is_wrong == self.is_wrong) & (loss >= self.loss))
        is_stronger &= jnp.isfinite(logits).all(axis=1)
        return Best(
            jnp.where(is_stronger[:, None, None, None], point, self.point),
            jnp.where(is_stronger, loss, self.loss),
            jnp.where(is_stronger, is_wrong, self.is_wrong),
        )


class Batch(NamedTuple):
    """Places of the samples of one batch, the last repeated to fill it; the first `size` of them count."""

    places: np.ndarray
    size: int


def batches(n: int, batch_size: int, label: str | None = None) -> Iterator[Batch]:
    """Cut n samples into batches of one size; with a `label`, show a progress bar over several."""
    for first in tqdm(range(0, n, batch_size), desc=label, disable=label is None or n <= batch_size, leave=False):
        places = np.minimum(np.arange(first, first + batch_size), n - 1)
        yield Batch(places, min(batch_size, n - first))


def loss_and_gradient(
    model: Model, loss: Loss, x: Float[Array, "b h w c"], labels: Int[Array, " b"]
) -> tuple[Float[Array, " b"], Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Losses, their gradients in `x` (zero where not finite) and the logits, from one pass through the model."""

    def total(x):
        logits = model(x)
        losses = loss(logits, labels)
        return jnp.sum(losses), (losses, logits)

    (_, (losses, logits)), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return losses, jnp.where(jnp.isfinite(gradient), gradient, 0), logits


def num_classes_of(model: Model, x: AnyArray) -> int:
    """Find the number of outputs of the model, without running it.

    Raises:
        TypeError: `model` is not callable, or does not return an array of floats.
        ValueError: its result does not have the shape (b, num_classes) with two classes at least.
    """
    if not callable(model):
        raise TypeError(f"model must be a function from images to logits, got {type(model).__name__}.")
    logits = jax.eval_shape(lambda x: model(x), jax.ShapeDtypeStruct(x.shape, jnp.asarray(x[:1]).dtype))
    if not (hasattr(logits, "dtype") and jnp.issubdtype(logits.dtype, jnp.floating)):
        raise TypeError(f"model must return one array of floats, got {logits}; return the logits only.")
    if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"model must return logits ({x.shape[0]}, num_classes) with at least two classes for images {x.shape}, "
            f"got {logits.shape}; write two classes with one score s as the columns (0, s)."
        )
    return logits.shape[1]


@eqx.filter_jit
def _perturb(attack: Attack, model: Model, x: Array, labels: Array, keys: Array) -> tuple[Array, Array]:
    return attack.perturb(model, x, labels, keys).astype(x.dtype), jnp.isfinite(model(x)).all(axis=1)


def _require_finite_logits(is_finite: np.ndarray, batch: Batch) -> None:
    bad = batch.places[: batch.size][~is_finite[: batch.size]]
    if bad.size:
        raise ValueError(
            f"model must be finite at the clean images, but its logits at x[{bad[0]}] are not ({bad.size} such in this "
            f"batch of {batch.size}); an attack on NaN proves nothing, so look into the model first."
        )
