"""The base of every attack: checks, stages, keys. A new attack is a file with a subclass."""

import abc
import copy
import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, UInt32

from ntkadv._checks import (
    require_images,
    require_int,
    require_key,
    require_labels,
    require_same_length,
)
from ntkadv._typing import AnyArray
from ntkadv.attacks.best import Best
from ntkadv.attacks.losses import margin
from ntkadv.attacks.model import Model, num_classes_of
from ntkadv.attacks.search import Attacked, Cost, Stage, search
from ntkadv.attacks.threat_model import ThreatModel, fold_in_each, sample_keys


@dataclass(frozen=True)
class Attack(abc.ABC):
    """A search for allowed images that a model classifies wrongly.

    Settings are the fields of a frozen dataclass, checked when it is built. All but the eps of the threat model are
    static under `jax.jit`: one program serves any number of radii.

    To write an attack, subclass this, add settings (keyword-only, checked in `__post_init__`), and define

    - `perturb`: the attack on one batch, in JAX; where the samples that it breaks early should not be tried again, by
      other starts or targets, subclass `RepeatedAttack` instead and define one `attempt`;
    - `cost`: how often it passes through the model;
    - `name`: a short label for tables, which tells apart the settings people vary;
    - `black_box = True` as a class attribute, if it uses no gradients.

    Args:
        threat: What may be changed.
    """

    threat: ThreatModel
    black_box: ClassVar[bool] = False

    def __post_init__(self):
        if not isinstance(self.threat, ThreatModel):
            raise TypeError(
                f"threat must be a threat model, got {self.threat!r} ({type(self.threat).__name__}); use Linf or L2."
            )

    @property
    def name(self) -> str:
        """Short label for tables."""
        return type(self).__name__

    def cost(self, num_classes: int) -> Cost:
        """Count the passes through the model that one attempt makes for one sample, at most."""
        del num_classes
        return Cost()

    @abc.abstractmethod
    def perturb(
        self,
        model: Model,
        x: Float[Array, "b h w c"],
        labels: Int[Array, " b"],
        keys: Key[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """Attack one batch; no checks, no compilation: for use inside `jax.jit`, with one key for each sample."""

    def attempt(
        self,
        model: Model,
        x: Float[Array, "b h w c"],
        labels: Int[Array, " b"],
        keys: Key[Array, " b"],
        number: UInt32[Array, ""],
    ) -> Float[Array, "b h w c"]:
        """One stage of the attack on one batch, in JAX; for most attacks there is one, the whole of it."""
        del number
        return self.perturb(model, x, labels, keys)

    def stages(self, num_classes: int) -> tuple[Stage, ...]:
        """List what is compiled and run, one after the other, each on the samples that all before it left unbroken."""
        del num_classes
        return (Stage(self, 0, (), self.name),)

    @property
    def starts_from_correct(self) -> bool:
        """Whether samples that are misclassified as they are stay as they are."""
        return False

    @property
    def black_box_parts(self) -> tuple[str, ...]:
        """Names of the parts of a composed attack that use no gradients."""
        return ()

    def with_eps(self, eps: float | Array) -> "Attack":
        """Give the same attack with another radius, which may be traced: then nothing is checked."""
        if isinstance(eps, Tracer):
            attack = copy.copy(self)
            object.__setattr__(attack, "threat", self.threat.with_eps(eps))
            return attack
        return dataclasses.replace(self, threat=self.threat.with_eps(eps))

    def run(
        self,
        model: Model,
        x: Float[AnyArray, "n h w c"],
        labels: Int[AnyArray, " n"],
        *,
        key: Key[Array, ""],
        batch_size: int | None = None,
        state_path: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Attacked:
        """Attack images, and say what was done: see `__call__` for the arguments that both have.

        Args:
            model: A function in JAX from images to logits.
            x: Clean images.
            labels: True classes.
            key: A random key.
            batch_size: Number of images attacked at a time.
            state_path: A file for what has been computed. Where it exists, the attack goes on from there, and ends as
                if it had never been stopped, bit for bit.
            progress: Show a bar over the batches.

        Returns:
            The attacked images, which samples are misclassified and what broke them, a log, and the cost.

        Raises:
            TypeError, ValueError: as `__call__` does; and if the state file is that of another evaluation.
        """
        return self._attacked(model, x, labels, key, batch_size, state_path=state_path, progress=progress)

    def _attacked(
        self,
        model: Model,
        x: Float[AnyArray, "n h w c"],
        labels: Int[AnyArray, " n"],
        key: Key[Array, ""],
        batch_size: int | None,
        **options: Any,
    ) -> Attacked:
        """Check what was given, and search; `options` are those of `search`."""
        samples, num_classes, size = prepared(model, x, labels, key, batch_size)
        self._before(model, x, labels)
        stages = self.stages(num_classes)
        return search(self, stages, model, *samples, num_classes=num_classes, batch_size=size, **options)

    def _before(self, model: Model, x: AnyArray, labels: AnyArray) -> None:
        """Look at a model before it is attacked, for attacks that warn."""
        del model, x, labels

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
            x: Clean images, pixels in [0, 1]. The search is done in float32 at least; the model sees the dtype of `x`.
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
        return self._attacked(model, x, labels, key, batch_size, judge=False, progress=progress).points


@dataclass(frozen=True)
class RepeatedAttack(Attack):
    """An attack that tries more than once, from other starts or towards other classes, until a sample is broken.

    Define `attempts`, how many there are, and `attempt`, one of them. The first is made on all samples, the others on
    those that are still classified correctly. Of the points found for a sample that stays so, the one of largest margin
    loss is kept.
    """

    @abc.abstractmethod
    def attempts(self, num_classes: int) -> int:
        """Give the number of attempts."""

    @abc.abstractmethod
    def attempt(self, model, x, labels, keys, number) -> Array:
        """One attempt on one batch, in JAX; `keys` are its own."""

    def stages(self, num_classes: int) -> tuple[Stage, ...]:
        """Give the attempts, see `Attack.stages`."""
        return tuple(Stage(self, i, (i,), self.name) for i in range(self.attempts(num_classes)))

    def perturb(self, model, x, labels, keys):
        """Attack one batch, see `Attack.perturb`."""
        logits = jax.eval_shape(model, x)

        def step(best, number):
            point = self.attempt(model, x, labels, fold_in_each(keys, number), number)
            logits = model(point)
            return best.update(point, margin(logits, labels), logits, labels, until_wrong=True), None

        numbers = jnp.arange(self.attempts(logits.shape[1]), dtype=jnp.uint32)
        return jax.lax.scan(step, Best.nothing(x, logits.dtype), numbers)[0].point


class Samples(NamedTuple):
    """Images, labels and a key for each, on the device."""

    x: Float[Array, "n h w c"]
    labels: Int[Array, " n"]
    keys: Key[Array, " n"]


def prepared(
    model: Model,
    x: Float[AnyArray, "n h w c"],
    labels: Int[AnyArray, " n"],
    key: Key[Array, ""],
    batch_size: int | None,
) -> tuple[Samples, int, int]:
    """Check what an attack is given, see `Attack.__call__`: the samples, the number of classes, the size of a batch."""
    require_images("x", x)
    require_same_length(x=x, labels=labels)
    require_key("key", key)
    if batch_size is not None:
        require_int("batch_size", batch_size, minimum=1)
    num_classes = num_classes_of(model, x)
    require_labels("labels", labels, num_classes)
    samples = Samples(jnp.asarray(x), jnp.asarray(labels, jnp.int32), sample_keys(key, len(x)))
    return samples, num_classes, len(x) if batch_size is None else min(batch_size, len(x))
