r"""A network linearised in its parameters.

.. math:: f^{lin}(\theta, x) = f(\theta_0, x) + \partial_\theta f(\theta_0, x)\,(\theta - \theta_0)

Its training has a closed form (Lee et al., NeurIPS 2019, arXiv 1902.06720), with the theory's linearised attack too,
and it is a function of parameters and images, which any method can train step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkadv._typing import AnyArray
from ntkadv.architectures.base import Architecture
from ntkadv.dynamics.linear import AttackRates, LinearDynamics, Strength, is_attack, rates_under
from ntkadv.kernels.empirical import Network, Params, empirical_ark, empirical_ntk, ntk_product, require_params
from ntkadv.training.network import function_of

__all__ = ["Linearized", "linearize"]


def linearize(network: Architecture | Network, params: Params) -> Linearized:
    """Linearise a network around parameters, usually those it starts from.

    Args:
        network: An architecture, or any function f(params, x), see `ntkadv.kernels.empirical_ntk`.
        params: A pytree of float arrays.

    Raises:
        TypeError: `network` is neither, or the parameters are no float arrays.
    """
    require_params(params)
    return Linearized(function_of(network), params)


class Linearized(eqx.Module):
    """A network that is linear in its parameters; a pytree.

    Attributes:
        f: The network that was linearised.
        origin: The parameters around which it was.
    """

    f: Network
    origin: Params

    def apply(self, params: Params, x: Float[AnyArray, "b *image"]) -> Float[Array, "b c"]:
        """Evaluate it, as any network: `train(linear.apply, data, params=linear.origin, ...)` trains it."""
        change = jax.tree.map(jnp.subtract, params, self.origin)
        value, moved = jax.jvp(lambda p: self.f(p, jnp.asarray(x)), (self.origin,), (change,))
        return value + moved

    def dynamics(
        self,
        x: Float[AnyArray, "n *image"],
        targets: Float[AnyArray, "n c"],
        *,
        strength: Strength = 0.0,
        ntk: Float[AnyArray, "n n c c"] | None = None,
        ark: Float[AnyArray, "n c c"] | None = None,
        max_bytes: int = 2**30,
        progress: bool = False,
    ) -> LinearDynamics:
        r"""Give the closed form of its training under the theory's linearised attack.

        Args:
            x: Training images.
            targets: Regression targets.
            strength: :math:`\eta_i S`, see `attack_rates`; or a function of time, in JAX. 0 is without attacks.
            ntk: Its NTK at the training images, if it is at hand.
            ark: Its ARK there, if it is at hand; at the origin, as the theory has it.
            max_bytes: See `empirical_ntk`.
            progress: Show a bar.

        Raises:
            TypeError, ValueError, MemoryError: as `empirical_ntk` and `LinearDynamics`.
        """
        if ntk is None:
            ntk = empirical_ntk(self.f, self.origin, x, max_bytes=max_bytes, progress=progress)
        start = np.asarray(self.f(self.origin, jnp.asarray(x)))
        rates: AttackRates = 1.0
        if is_attack(strength):
            kernel = empirical_ark(self.f, self.origin, x, max_bytes=max_bytes) if ark is None else ark
            rates = rates_under(kernel, strength)
        return LinearDynamics(ntk, targets, start=start, rates=rates)

    def at(self, x: Float[AnyArray, "n *image"], coefficients: Float[AnyArray, "n c"]) -> Params:
        r"""Give the parameters of coefficients u: :math:`\theta_0 + \sum_{i,k} u_{ik}\, \partial_\theta f_k(x_i)`."""
        return _moved(self.f, self.origin, jnp.asarray(x), jnp.asarray(coefficients))

    def outputs(
        self,
        images: Float[AnyArray, "m *image"],
        x: Float[AnyArray, "n *image"],
        coefficients: Float[AnyArray, "t n c"],
    ) -> Float[np.ndarray, "t m c"]:
        """Evaluate it at images, for coefficients at the training images `x`, without forming the kernel between."""
        first = np.asarray(self.f(self.origin, jnp.asarray(images)))
        rows = [
            np.asarray(ntk_product(self.f, self.origin, images, u, x)) for u in np.asarray(coefficients, first.dtype)
        ]
        return first + np.stack(rows)

    def predictor(
        self, x: Float[AnyArray, "n *image"], coefficients: Float[AnyArray, "n c"]
    ) -> Callable[[Array], Array]:
        """Give it as a function of images, a pytree, for coefficients at the training images `x`: what attacks take."""
        return eqx.Partial(self.apply, self.at(x, coefficients))


@partial(jax.jit, static_argnums=0)
def _moved(f: Network, origin: Params, x: Array, coefficients: Array) -> Params:
    outputs, pull = jax.vjp(lambda p: f(p, x), origin)
    (change,) = pull(coefficients.astype(outputs.dtype))
    return jax.tree.map(jnp.add, origin, change)
