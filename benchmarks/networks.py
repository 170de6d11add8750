"""Small finite networks that withstand something, for benchmarks that need one."""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from tqdm.auto import tqdm

import ntkadv as na

__all__ = ["train"]


def train(
    arch: na.architectures.Architecture,
    data: na.Dataset,
    *,
    key: Array,
    attack: na.attacks.Attack | None = None,
    steps: int = 600,
    batch_size: int = 64,
    learning_rate: float = 0.02,
) -> eqx.Partial:
    """Train a finite network by Adam on the cross-entropy, of attacked images if an attack is given.

    The radius of the attack grows over the first half of the steps: at full strength from the start, small networks
    stay at a constant answer. The learning rate is that of the NTK parametrisation, where weights are of size one.
    """
    params_key, key = jax.random.split(key)
    params = arch.init(params_key, data.x_train.shape[1:])
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimiser = optax.adam(schedule)
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)

    def loss(params: Any, images: Array, labels: Array) -> Array:
        return jnp.mean(na.attacks.LOSSES["cross_entropy"](arch.apply(params, images), labels))

    @jax.jit
    def step(params: Any, state: Any, key: Array, strength: Array) -> tuple[Any, Any]:
        batch_key, attack_key = jax.random.split(key)
        places = jax.random.choice(batch_key, len(x), (batch_size,), replace=False)
        images, labels = x[places], y[places]
        if attack is not None:
            weaker = attack.with_eps(strength * attack.threat.eps)
            keys = jax.random.split(attack_key, batch_size)
            images = weaker.perturb(partial(arch.apply, params), images, labels, keys)
        updates, state = optimiser.update(jax.grad(loss)(params, images, labels), state, params)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    for number in tqdm(range(steps), desc="training", leave=False):
        params, state = step(params, state, jax.random.fold_in(key, number), jnp.float32(min(1, 2 * number / steps)))
    return eqx.Partial(arch.apply, params)
