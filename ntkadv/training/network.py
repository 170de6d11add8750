"""A network as the methods of training see it: outputs from parameters and images, whatever else it may keep."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ntkadv.architectures.base import Architecture
from ntkadv.kernels.empirical import Network, Params
from ntkadv.vision.base import Pass, VisionModel

__all__ = ["Forward", "Trainable", "function_of", "trainable"]


class Trainable(abc.ABC):
    """A kind of network that can be trained. A new kind is a subclass, and a line in `trainable`."""

    @abc.abstractmethod
    def forward(self, params: Params, statistics: Any, x: Array, through: Pass) -> tuple[Array, Any]:
        """Compute outputs, and what the network keeps besides its parameters after this pass."""

    @abc.abstractmethod
    def assembled(self, params: Params, statistics: Any) -> Any:
        """Put together what a record function is given, and what is called on images."""

    @abc.abstractmethod
    def predictor(self, params: Params, statistics: Any) -> Any:
        """Give the network as a function of images."""


class _Function(eqx.Module, Trainable):
    """Any function f(params, x); a record function is given its parameters."""

    # No static field: a linearised network brings arrays along.
    f: Network

    def forward(self, params: Params, statistics: Any, x: Array, through: Pass) -> tuple[Array, Any]:
        del through
        return self.f(params, x), statistics

    def assembled(self, params: Params, statistics: Any) -> Any:
        del statistics
        return params

    def predictor(self, params: Params, statistics: Any) -> Any:
        del statistics
        return eqx.Partial(self.f, params)


class _Model(eqx.Module, Trainable):
    """A network of `ntkadv.vision`, without its arrays; a record function is given the network itself."""

    rest: VisionModel

    def forward(self, params: Params, statistics: Any, x: Array, through: Pass) -> tuple[Array, Any]:
        model = eqx.combine(params, statistics, self.rest)
        outputs = model.forward(x, through)
        return outputs, model.after(through).split()[1]

    def assembled(self, params: Params, statistics: Any) -> Any:
        return eqx.combine(params, statistics, self.rest)

    predictor = assembled


class Forward(eqx.Module):
    """A network within one step of training, with what it keeps besides its parameters held fixed.

    Called, `f(params, x)`, it gives the outputs in training: batch norm takes the mean and variance of the batch.
    """

    network: Trainable
    statistics: Any = ()

    def __call__(self, params: Params, x: Float[Array, "b *image"]) -> Float[Array, "b c"]:
        """Compute outputs as in training."""
        return self.forward(params, x)[0]

    def forward(
        self, params: Params, x: Float[Array, "b *image"], shifts: Sequence[Array] = ()
    ) -> tuple[Float[Array, "b c"], Any]:
        """Compute outputs as in training, and the running averages after it; `shifts` are added to hidden states."""
        return self.network.forward(params, self.statistics, x, Pass(training=True, shifts=shifts))

    def evaluate(self, params: Params, x: Float[Array, "b *image"]) -> Float[Array, "b c"]:
        """Compute outputs as in evaluation: batch norm takes its running averages."""
        return self.network.forward(params, self.statistics, x, Pass())[0]

    def after(self, statistics: Any) -> Forward:
        """Give the network with running averages as a pass has left them."""
        return Forward(self.network, statistics)

    def hidden(self, params: Params, x: Any) -> list[jax.ShapeDtypeStruct]:
        """Give shapes and dtypes of the hidden states that the network offers to be perturbed, for such images."""

        def states(params: Params, x: Array) -> list[Array]:
            through = Pass(training=True)
            self.network.forward(params, self.statistics, x, through)
            return through.hidden

        return jax.eval_shape(states, params, x)


def function_of(network: Architecture | Network) -> Network:
    """Give a network as a function of parameters and images.

    Raises:
        TypeError: it is neither an architecture nor a function.
    """
    if isinstance(network, Architecture):
        return network.apply
    if isinstance(network, VisionModel):
        raise TypeError(
            f"network must be an architecture or a function f(params, x), got a {type(network).__name__} with its "
            f"parameters inside; take f, params = network.as_function(), which is its evaluation."
        )
    if not callable(network):
        raise TypeError(f"network must be an architecture or a function f(params, x), got {type(network).__name__}.")
    return network


def trainable(network: Architecture | VisionModel | Network) -> tuple[Trainable, Params | None, Any]:
    """Give a network for training, the parameters it brings, and what it keeps besides them.

    Raises:
        TypeError: it is nothing that can be trained.
    """
    if isinstance(network, VisionModel):
        params, statistics, rest = network.split()
        return _Model(rest), params, statistics
    return _Function(function_of(network)), None, ()


def moving_average(decay: float, old: PyTree, new: PyTree) -> PyTree:
    """Move averages towards new values."""
    return jax.tree.map(lambda a, b: jnp.asarray(decay, a.dtype) * a + jnp.asarray(1 - decay, a.dtype) * b, old, new)
