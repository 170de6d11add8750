"""What one update of a training run does: a method is an object, and a new method is a new file."""

from __future__ import annotations

import abc
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ntkadv._convolutions import canonical_convolutions
from ntkadv.architectures.base import Architecture
from ntkadv.attacks.losses import Loss, get_loss
from ntkadv.kernels.empirical import Network, Params

__all__ = ["Batch", "Method", "TrainState"]

Reduction: TypeAlias = Literal["mean", "sum"]


def function_of(network: Architecture | Network) -> Network:
    """Give a network as a function of parameters and images.

    Raises:
        TypeError: it is neither an architecture nor a function.
    """
    if isinstance(network, Architecture):
        return network.apply
    if not callable(network):
        raise TypeError(f"network must be an architecture or a function f(params, x), got {type(network).__name__}.")
    return network


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
    """

    x: Float[Array, "b *image"]
    labels: Int[Array, " b"]
    targets: Float[Array, "b c"]
    places: Int[Array, " b"]
    keys: Key[Array, " b"]
    time: Float[Array, ""]
    share: float


class TrainState(NamedTuple):
    """What changes while a network is trained: a pytree.

    Attributes:
        params: Parameters of the network.
        optimizer: State of the optimiser.
        method: State of the method; most have none, `()`.
    """

    params: Params
    optimizer: Any
    method: Any


@dataclass(frozen=True)
class Method(abc.ABC):
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

    def start(self, params: Params, n: int) -> Any:
        """Give the method's own state at the beginning, for a training set of n images."""
        del params, n
        return ()

    @abc.abstractmethod
    def images(self, f: Network, params: Params, batch: Batch) -> Float[Array, "b *image"]:
        """Give the images that the loss is taken at."""

    def update(
        self, f: Network, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """Make one update; `"loss"` among the metrics is the mean loss before it, at the images of the step."""
        images = jax.lax.stop_gradient(self.images(f, state.params, batch))
        factor = 1.0 if self.reduction == "mean" else batch.x.shape[0] / batch.share

        def objective(params: Params) -> tuple[Array, Array]:
            mean = jnp.mean(self.losses(f(params, images), batch))
            return factor * mean, mean

        gradients, mean = canonical_convolutions(partial(jax.grad, has_aux=True)(objective))(state.params)
        updates, inner = optimizer.update(gradients, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), inner, state.method), {"loss": mean}

    def losses(self, outputs: Float[Array, "b c"], batch: Batch) -> Float[Array, " b"]:
        """Give the loss of each image."""
        if self.loss == "squared":
            return jnp.sum((outputs - batch.targets) ** 2, axis=1) / 2
        return get_loss(self.loss)(outputs, batch.labels)
