"""What every network of this room is: an Equinox module from images to logits, and a pass through it in training."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkadv._typing import AnyArray

__all__ = ["Pass", "Statistics", "VisionModel", "combined"]

M = TypeVar("M", bound="VisionModel")


class Statistics(eqx.Module):
    """Running averages of a batch norm: what a network keeps besides its parameters."""

    mean: Float[Array, " c"]
    variance: Float[Array, " c"]


class Pass:
    """One pass of a batch through a network: how it normalises, what is added on the way, what is seen on the way.

    Args:
        training: Batch norm takes the mean and variance of the batch and moves its running averages; otherwise it takes
            those averages.
        shifts: What is added to the hidden states that the network offers to be perturbed, in their order; none by
            default. Derivatives in them are those in the hidden states.

    Attributes:
        hidden: The hidden states that were offered, without the shifts.
    """

    def __init__(self, *, training: bool = False, shifts: Sequence[Array] = ()):
        self.training = training
        self.hidden: list[Array] = []
        self._shifts = shifts
        self._moved: dict[int, tuple[Statistics, Statistics]] = {}

    def perturb(self, hidden: Array) -> Array:
        """Offer a hidden state to be perturbed.

        Raises:
            ValueError: there are shifts, but not as many as hidden states.
        """
        self.hidden.append(hidden)
        if not self._shifts:
            return hidden
        if len(self.hidden) > len(self._shifts):
            raise ValueError(
                f"shifts must be as many as the hidden states, got {len(self._shifts)}, which are too few."
            )
        return hidden + self._shifts[len(self.hidden) - 1]

    def move(self, old: Statistics, new: Statistics) -> None:
        """Note where running averages have moved."""
        # The old ones are kept too, since an object's id is its own for its lifetime only.
        self._moved[id(old)] = (old, jax.lax.stop_gradient(new))

    def moved(self, old: Statistics) -> Statistics:
        """Give running averages as they are after the pass."""
        return self._moved.get(id(old), (old, old))[1]


class VisionModel(eqx.Module):
    """A network from images (b, h, w, c), pixels in [0, 1], to logits (b, num_classes), with its parameters.

    Called as it is, it is a predictor: batch norm takes its running averages, so images do not mix. To train it, give
    it to `ntkadv.training.train`. A new network subclasses this and defines `logits`; it passes `through` on to its
    batch norms and offers hidden states by `through.perturb`, see `Pass`.

    Attributes:
        num_classes: Number of outputs.
        mean, std: Pixels come in as (x - mean) / std; numbers, or one for each channel.
        compute_dtype: Precision of convolutions and of what is between them; batch norm sums and logits are float32, as
            parameters are. `"bfloat16"` is for GPUs.
    """

    num_classes: int = eqx.field(static=True)
    mean: float | tuple[float, ...] = eqx.field(static=True)
    std: float | tuple[float, ...] = eqx.field(static=True)
    compute_dtype: str = eqx.field(static=True)

    def __init__(
        self,
        *,
        num_classes: int,
        mean: float | tuple[float, ...] = 0.5,
        std: float | tuple[float, ...] = 0.25,
        compute_dtype: str = "float32",
    ):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        if not np.all(np.isfinite(mean)) or not np.all(np.isfinite(std)) or np.any(np.asarray(std) <= 0):
            raise ValueError(f"mean and std must be finite, and std positive, got {mean} and {std}.")
        if compute_dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(
                f"compute_dtype must be 'float32', 'bfloat16', 'float16' or 'float64', got {compute_dtype!r}."
            )
        self.num_classes, self.mean, self.std, self.compute_dtype = num_classes, mean, std, compute_dtype

    @abc.abstractmethod
    def logits(self, x: Float[Array, "b h w c"], through: Pass) -> Float[Array, "b classes"]:
        """Compute logits of normalised images."""

    def __call__(self, x: Float[AnyArray, "b h w c"]) -> Float[Array, "b classes"]:
        """Classify images: logits, in evaluation."""
        return self.forward(jnp.asarray(x), Pass())

    def forward(self, x: Float[Array, "b h w c"], through: Pass) -> Float[Array, "b classes"]:
        """Compute logits of images, in float32 or in their own precision if that is more."""
        mean, std = (jnp.asarray(value, x.dtype) for value in (self.mean, self.std))
        precise = jnp.finfo(x.dtype).bits > 32
        normal = ((x - mean) / std).astype(x.dtype if precise else self.compute_dtype)
        return self.logits(normal, through).astype(x.dtype if precise else jnp.float32)

    def after(self: M, through: Pass) -> M:
        """Give the network with the running averages that a pass has left."""
        return jax.tree.map(
            lambda node: through.moved(node) if is_statistics(node) else node, self, is_leaf=is_statistics
        )

    def split(self: M) -> tuple[Any, Any, M]:
        """Take the network apart: parameters, running averages, and the rest, for `eqx.combine`."""
        wanted = jax.tree.map(
            lambda node: not is_statistics(node) and eqx.is_inexact_array(node), self, is_leaf=is_statistics
        )
        params, rest = eqx.partition(self, wanted)
        statistics, rest = eqx.partition(rest, eqx.is_array)
        return params, statistics, rest

    def as_function(self) -> tuple[Callable[[Any, Array], Array], Any]:
        """Give f(params, x) in evaluation, its running averages held fixed, and the parameters: for NTKs, say."""
        params, statistics, rest = self.split()

        # Not a partial function that is a pytree, which `jax.jit` does not take.
        def evaluate(params: Any, x: Array) -> Array:
            return combined(params, statistics, rest)(x)

        return evaluate, params

    @property
    def num_params(self) -> int:
        """Number of parameters that are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.split()[0]))


def combined(params: Any, statistics: Any, rest: M) -> M:
    """Put a network together again, see `VisionModel.split`."""
    return eqx.combine(params, statistics, rest)


def is_statistics(node: Any) -> bool:
    """Whether a node of a tree is a batch norm's running averages."""
    return isinstance(node, Statistics)
