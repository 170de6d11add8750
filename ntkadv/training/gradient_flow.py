r"""Training as the gradient flow that the theory speaks of, by an adaptive solver: for networks that are small enough.

.. math:: \dot\theta = -\sum_i \partial_\theta f(x_i')^\top (f(x_i') - y_i)

with :math:`x_i'` the end of the attack flow from image i (see `attack_flow`), or the image itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkadv._checks import require_int
from ntkadv.architectures.base import Architecture
from ntkadv.data import Dataset
from ntkadv.dynamics.closed_form import checked_times
from ntkadv.kernels.empirical import Network, Params
from ntkadv.training.attack_flow import AttackFlowTraining
from ntkadv.training.method import Batch, Method, Problem
from ntkadv.training.network import Forward, function_of, trainable
from ntkadv.training.standard import StandardTraining

__all__ = ["gradient_flow"]


def gradient_flow(
    network: Architecture | Network,
    params: Params,
    data: Dataset,
    times: Sequence[float] | Float[np.ndarray, " t"],
    *,
    method: StandardTraining | AttackFlowTraining | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    max_steps: int = 100_000,
) -> Params:
    """Integrate the gradient flow on the squared loss: parameters at each time.

    Args:
        network: An architecture, or any function f(params, x).
        params: Parameters to begin with.
        data: The training part is used.
        times: Times, without a factor 1/n, whatever the method's reduction.
        method: Standard training, or that with the attack flow. Its loss must be the squared one.
        rtol: Relative tolerance of the solver (Tsit5), in the parameters; float32 allows about 1e-6.
        atol: Absolute tolerance.
        max_steps: Steps after which to give up.

    Returns:
        A pytree as `params`, with a leading axis of times: the memory of one network for each.

    Raises:
        TypeError, ValueError: times are negative, infinite or NaN; the method is another.
        RuntimeError: the solver takes more than `max_steps` steps, as where the flow is stiff.
    """
    method = StandardTraining() if method is None else method
    if not isinstance(method, (StandardTraining, AttackFlowTraining)) or method.loss != "squared":
        raise TypeError(
            f"method must be StandardTraining or AttackFlowTraining with the squared loss, got {method!r}: the flow of "
            f"other methods is not defined, as their images jump."
        )
    require_int("max_steps", max_steps, minimum=1)
    grid = checked_times(times)
    if np.any(np.isinf(grid)):
        raise ValueError("times must be finite for the integrated flow, got inf.")
    f = function_of(network)
    method.start(Problem(Forward(trainable(f)[0]), params, data.x_train.shape, None, jax.random.key(0)))
    order, back = np.unique(grid, return_inverse=True)
    if order[-1] == 0:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(grid), *leaf.shape)), params)
    dtype = jax.tree.leaves(params)[0].dtype
    arrays = jnp.asarray(data.x_train, dtype), jnp.asarray(data.y_train), jnp.asarray(data.targets_train, dtype)
    # Only the leaves are integrated: the solver does not take layers that are empty, as those without parameters are.
    leaves, structure = jax.tree.flatten(params)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_slope(f, method, structure)),
        diffrax.Tsit5(),
        t0=0.0,
        t1=float(order[-1]),
        dt0=None,
        y0=leaves,
        args=arrays,
        saveat=diffrax.SaveAt(ts=jnp.asarray(order, dtype)),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=max_steps,
        throw=False,
    )
    if solution.result != diffrax.RESULTS.successful:
        raise RuntimeError(
            f"the flow could not be integrated to time {order[-1]:g} within {max_steps} steps; allow more with "
            f"max_steps, loosen rtol, or train by steps."
        )
    return jax.tree.unflatten(structure, [leaf[back] for leaf in solution.ys or ()])


def _slope(f: Network, method: Method, structure: Any) -> Any:
    def slope(time: Array, leaves: list[Array], arrays: tuple[Array, Array, Array]) -> list[Array]:
        params = jax.tree.unflatten(structure, leaves)
        x, labels, targets = arrays
        keys = jax.random.split(jax.random.key(0), len(x))  # neither method draws from them
        batch = Batch(x, labels, targets, jnp.arange(len(x)), keys, time, 1.0)
        images = jax.lax.stop_gradient(method.images(f, params, batch))
        outputs, pull = jax.vjp(lambda p: f(p, images), params)
        return jax.tree.leaves(pull(targets - outputs)[0])

    return slope
