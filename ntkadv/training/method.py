"""What one update of a training run does: a method is an object, and a new method is a new file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ntkadv._convolutions import canonical_convolutions
from ntkadv.attacks.losses import Loss, get_loss
from ntkadv.attacks.threat_model import ThreatModel
from ntkadv.kernels.empirical import Network, Params
from ntkadv.training.augmentation import Augmentation
from ntkadv.training.network import Forward

__all__ = ["Batch", "Method", "Mode", "Problem", "TrainState"]

Mode: TypeAlias = Literal["train", "eval"]

Reduction: TypeAlias = Literal["mean", "sum"]


class Batch(NamedTuple):
    """What a method sees of the training set in one step.

    Attributes:
        x: Images.
        labels: Their classes.
        targets: Their regression targets.
        places: Where the images are in the training set.
        keys: A random key for each.
        time: Training time, steps times learning rate.
        share: Number of images in the batch, over that in the training set.
        augmentation: What has been done to the images, or None.
        drawn: What it has drawn for each of them.
        step: Number of the step.
    """

    x: Float[Array, "b *image"]
    labels: Int[Array, " b"]
    targets: Float[Array, "b c"]
    places: Int[Array, " b"]
    keys: Key[Array, " b"]
    time: Float[Array, ""]
    share: float
    augmentation: Augmentation | None = None
    drawn: Any = ()
    step: Int[Array, ""] | int = 0

    def augmented(self, x: Float[Array, "b *image"]) -> Float[Array, "b *image"]:
        """Do to arrays like the images what has been done to these."""
        return x if self.augmentation is None else jax.vmap(self.augmentation.apply)(x, self.drawn)

    def restored(self, changed: Float[Array, "b *image"], original: Float[Array, "b *image"]) -> Array:
        """Undo that, see `Augmentation.restore`."""
        return (
            changed if self.augmentation is None else jax.vmap(self.augmentation.restore)(changed, original, self.drawn)
        )


class Problem(NamedTuple):
    """What a method is told when training begins.

    Attributes:
        f: The network.
        params: Its parameters.
        shape: Shape of the training images, (n, h, w, c).
        augmentation: What is done to them, or None.
        key: A random key for what the method draws at the beginning.
    """

    f: Forward
    params: Params
    shape: tuple[int, ...]
    augmentation: Augmentation | None
    key: Array


class Passes(NamedTuple):
    """How often a step passes through the network, for each image."""

    forward: int
    backward: int


class TrainState(NamedTuple):
    """What changes while a network is trained: a pytree.

    Attributes:
        params: Parameters of the network.
        optimizer: State of the optimiser.
        method: State of the method; most have none, `()`.
        statistics: What the network keeps besides its parameters: running averages of batch norm.
        average: Exponential averages of parameters and statistics, if any are asked for.
    """

    params: Params
    optimizer: Any
    method: Any
    statistics: Any = ()
    average: Any = ()

    def descended(self, optimizer: optax.GradientTransformation, gradients: Any, **changes: Any) -> TrainState:
        """Give the state after a step of the optimiser; `changes` are fields that are to be replaced besides."""
        updates, inner = optimizer.update(gradients, self.optimizer, self.params)
        return self._replace(params=optax.apply_updates(self.params, updates), optimizer=inner, **changes)


@dataclass(frozen=True)
class Method:
    r"""One update of a network: images, perhaps attacked, then a step of the optimiser on their loss.

    To write a method, subclass this, add settings (keyword-only, checked in `__post_init__`), and define `images`,
    which is all that most methods differ in; or `update`, for methods that do more. A method that carries a state of
    its own defines `start` too.

    Args:
        loss: `"squared"`, the theory's: :math:`\tfrac12 |f - y|^2` with the regression targets of the data;
            `"cross_entropy"`; or a function (logits, labels) -> (b,).
        reduction: `"mean"` over the batch; or `"sum"` over the training set, of which a batch gives an unbiased
            estimate: then a time is that of the theory, without a factor 1/n.

    Raises:
        ValueError: a setting is out of range.
    """

    _: KW_ONLY
    loss: str | Loss = "squared"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        get_loss(self.loss)
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}.")

    @property
    def name(self) -> str:
        """Short label for figures and tables."""
        return type(self).__name__.removesuffix("Training")

    @property
    def passes(self) -> Passes:
        """How often a step passes through the network, for each image, in cost: an update is 1 and 1."""
        return Passes(1, 1)

    def start(self, problem: Problem) -> Any:
        """Give the method's own state at the beginning.

        Raises:
            ValueError: the method cannot be used on this problem.
        """
        del problem
        return ()

    def report(self, state: Any) -> dict[str, Array]:
        """Give numbers of the method's own state, to be recorded beside the loss."""
        del state
        return {}

    def images(self, f: Network, params: Params, batch: Batch) -> Float[Array, "b *image"]:
        """Give the images that the loss is taken at."""
        del f, params
        return batch.x

    def update(
        self, f: Forward, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """Make one update; `"loss"` among the metrics is the mean loss before it, at the images of the step."""
        images = jax.lax.stop_gradient(self.images(f, state.params, batch))
        factor = self.factor(batch)

        def objective(params: Params) -> tuple[Array, Any]:
            outputs, statistics = f.forward(params, images)
            mean = jnp.mean(self.losses(outputs, batch))
            return factor * mean, (mean, statistics)

        gradients, (mean, statistics) = gradient_of(objective, state.params)
        return state.descended(optimizer, gradients, statistics=statistics), {"loss": mean}

    def factor(self, batch: Batch) -> float:
        """Give what the mean loss of a batch is multiplied by, see `reduction`."""
        return 1.0 if self.reduction == "mean" else batch.x.shape[0] / batch.share

    def losses(self, outputs: Float[Array, "b c"], batch: Batch) -> Float[Array, " b"]:
        """Give the loss of each image."""
        if self.loss == "squared":
            return jnp.sum((outputs - batch.targets) ** 2, axis=1) / 2
        return get_loss(self.loss)(outputs, batch.labels)


def gradient_of(objective: Callable[..., tuple[Array, Any]], *arguments: Any) -> tuple[Any, Any]:
    """Give the gradient of (value, aux) in the first argument, and aux; convolutions in the layout that is fast."""
    return canonical_convolutions(partial(jax.grad, has_aux=True)(objective))(*arguments)


def images_to_outputs(f: Forward | Network, params: Params, mode: Mode) -> Callable[[Array], Array]:
    """Give the network as a function of images, in training or in evaluation; a plain function knows no difference."""
    if mode == "eval" and isinstance(f, Forward):
        return partial(f.evaluate, params)
    return partial(f, params)


def grown(threat: ThreatModel, warmup: int, batch: Batch) -> ThreatModel:
    """Give a threat model whose radius rises linearly to its own over `warmup` steps, from the first on."""
    if not warmup:
        return threat
    share = jnp.minimum(1.0, (jnp.asarray(batch.step, batch.x.dtype) + 1) / warmup)
    return threat.with_eps(share * threat.eps)


def require_mode(name: str, mode: Any) -> None:
    """Require one of two modes; `ValueError` otherwise."""
    if mode not in ("train", "eval"):
        raise ValueError(f"{name} must be 'train' or 'eval', got {mode!r}.")
