"""The compiled part of a training run: updates from one step to another, as many as there are, in one program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ntkadv.attacks.threat_model import sample_keys
from ntkadv.kernels.empirical import Network
from ntkadv.training.method import Batch, Method, TrainState

__all__ = ["Steps"]


@dataclass(frozen=True, eq=False)
class Steps:
    """What does not change in a run, and the updates."""

    f: Network
    optimizer: optax.GradientTransformation
    method: Method
    batch_size: int
    time_step: float
    arrays: tuple[Array, Array, Array]
    key: Array

    def advance(self, state: TrainState, step: int, goal: int) -> tuple[TrainState, int, float]:
        """Make the updates `step`, ..., `goal - 1`, or up to the first from a loss that is not finite.

        Returns:
            The state, the step that was reached, and the loss that the last update started from.
        """
        time_step = jnp.asarray(self.time_step, self.arrays[0].dtype)
        static = (self.f, self.optimizer, self.method, self.batch_size)
        state, reached, loss = _advance(
            *static, state, jnp.int32(step), jnp.int32(goal), self.arrays, self.key, time_step
        )
        return state, int(reached), float(loss)

    def loss(self, state: TrainState, step: int) -> float:
        """Give the loss that the next update would start from, by the program that makes it."""
        return self.advance(state, step, step + 1)[2]


@eqx.filter_jit
def _advance(f, optimizer, method, batch_size, state, step, goal, arrays, key, time_step):
    def unfinished(carry):
        _, step, loss = carry
        return (step < goal) & jnp.isfinite(loss)

    def body(carry):
        state, step, loss = carry
        batch = _batch(arrays, key, step, batch_size, time_step)
        state, metrics = method.update(f, optimizer, state, batch)
        return state, step + 1, metrics["loss"].astype(loss.dtype)

    return jax.lax.while_loop(unfinished, body, (state, step, jnp.zeros((), arrays[0].dtype)))


def _batch(arrays: tuple[Array, Array, Array], key: Array, step: Array, size: int, time_step: Any) -> Batch:
    x, labels, targets = arrays
    n = len(x)
    place_key, attack_key = jax.random.split(jax.random.fold_in(key, step))
    keys = sample_keys(attack_key, size)
    time_now = step.astype(x.dtype) * time_step
    if size == n:
        return Batch(x, labels, targets, jnp.arange(n), keys, time_now, 1.0)
    # Where the largest of n random numbers are is a choice without replacement. jax.random.choice sorts them all, which
    # on a CPU takes 50 ms for 60,000 images, forty times as long as this.
    places = jax.lax.top_k(jax.random.uniform(place_key, (n,), jnp.float32), size)[1]
    return Batch(x[places], labels[places], targets[places], places, keys, time_now, size / n)
