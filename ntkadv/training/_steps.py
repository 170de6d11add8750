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
from ntkadv.training.augmentation import Augmentation
from ntkadv.training.method import Batch, Method, TrainState
from ntkadv.training.network import Forward, Trainable, moving_average

__all__ = ["Steps"]


@dataclass(frozen=True, eq=False)
class Steps:
    """What does not change in a run, and the updates."""

    network: Trainable
    optimizer: optax.GradientTransformation
    method: Method
    batch_size: int
    time_step: float
    arrays: tuple[Array, Array, Array]
    key: Array
    augmentation: Augmentation | None = None
    average: float | None = None

    @property
    def epoch(self) -> int:
        """Number of steps that make an epoch."""
        return len(self.arrays[0]) // self.batch_size

    def advance(self, state: TrainState, step: int, goal: int) -> tuple[TrainState, int, float]:
        """Make the updates `step`, ..., `goal - 1`, or up to the first from a loss that is not finite.

        Returns:
            The state, the step that was reached, and the loss that the last update started from.
        """
        time_step = jnp.asarray(self.time_step, self.arrays[0].dtype)
        static = (self.network, self.optimizer, self.method, self.batch_size, self.augmentation, self.average)
        state, reached, loss = _advance(
            static, state, jnp.int32(step), jnp.int32(goal), self.arrays, self.key, time_step
        )
        return state, int(reached), float(loss)

    def loss(self, state: TrainState, step: int) -> float:
        """Give the loss that the next update would start from, by the program that makes it."""
        return self.advance(state, step, step + 1)[2]

    def start(self, state: TrainState) -> TrainState:
        """Begin the averages, if any are asked for."""
        return state if self.average is None else state._replace(average=(state.params, state.statistics))

    def current(self, state: TrainState) -> tuple[Any, Any]:
        """Give parameters and statistics of the network as it is recorded and given: averaged if that is asked for."""
        return (state.params, state.statistics) if self.average is None else state.average


@eqx.filter_jit
def _advance(static, state, step, goal, arrays, key, time_step):
    network, optimizer, method, size, augmentation, average = static
    n = len(arrays[0])
    per_epoch = n // size

    def shuffled(step):
        return jax.random.permutation(jax.random.fold_in(key, step // per_epoch), n)

    def unfinished(carry):
        _, step, loss, _ = carry
        return (step < goal) & jnp.isfinite(loss)

    def body(carry):
        state, step, loss, order = carry
        if size < n:
            order = jax.lax.cond(step % per_epoch == 0, shuffled, lambda _: order, step)
        batch = _batch(arrays, key, step, size, time_step, order, augmentation)
        state, metrics = method.update(Forward(network, state.statistics), optimizer, state, batch)
        if average is not None:
            state = state._replace(average=moving_average(average, state.average, (state.params, state.statistics)))
        return state, step + 1, metrics["loss"].astype(loss.dtype), order

    order = shuffled(step) if size < n else None
    start = (state, step, jnp.zeros((), arrays[0].dtype), order)
    return jax.lax.while_loop(unfinished, body, start)[:3]


def _batch(
    arrays: tuple[Array, Array, Array],
    key: Array,
    step: Array,
    size: int,
    time_step: Any,
    order: Array | None,
    augmentation: Augmentation | None,
) -> Batch:
    x, labels, targets = arrays
    n = len(x)
    # Epochs are numbered by the key itself, so steps need one of their own.
    attack_key, augmentation_key = jax.random.split(jax.random.fold_in(jax.random.split(key)[1], step))
    keys = sample_keys(attack_key, size)
    places = jnp.arange(n)
    if order is not None:
        places = jax.lax.dynamic_slice(order, (step % (n // size) * size,), (size,))
        x, labels, targets = x[places], labels[places], targets[places]
    time_now = step.astype(arrays[0].dtype) * time_step
    batch = Batch(x, labels, targets, places, keys, time_now, size / n, step=step)
    if augmentation is None:
        return batch
    drawn = jax.vmap(augmentation.draw)(sample_keys(augmentation_key, size))
    batch = batch._replace(augmentation=augmentation, drawn=drawn)
    return batch._replace(x=batch.augmented(x))
