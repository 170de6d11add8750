"""Adv-NTK as one writes it down from the paper: what ntkadv is measured against.

    f(x) = Theta(x, X) Theta^-1 (I - exp(-Theta diag|w|)) Y

by a dense matrix exponential and a dense solve, differentiated by JAX, and attacked by a plain loop of gradient steps
(Fu & Wang, ICLR 2024, arXiv 2310.06112, Section 5). The batches, the attack and its random numbers are those of
`ntkadv.fit_adv_ntk` with the parametrization "absolute", and each function is compiled once.
"""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import expm
from jaxtyping import Array, Float, Int, Key

from ntkadv.architectures.base import Architecture
from ntkadv.attacks import PGD
from ntkadv.attacks.losses import squared
from ntkadv.attacks.threat_model import ThreatModel, sample_keys
from ntkadv.data import Dataset, targets

__all__ = ["coefficients", "fit", "loss_and_gradient"]


def coefficients(theta: Float[Array, "n n"], w: Float[Array, " n"], y: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """``Theta^-1 (I - exp(-Theta diag|w|)) Y``."""
    return jnp.linalg.solve(theta, y - expm(-theta * jnp.abs(w)) @ y)


def _loss(w: Array, theta: Array, y: Array, cross: Array, y_batch: Array) -> Array:
    residual = cross @ coefficients(theta, w, y) - y_batch
    return jnp.sum(residual**2) / (2 * len(y_batch))


loss_and_gradient = jax.value_and_grad(_loss)
"""(w, theta, y, cross, y_batch) -> mean of ``1/2 |f(x') - y|^2`` over a batch with cross kernel (b, n), and d/dw."""


def fit(
    arch: Architecture,
    data: Dataset,
    gram: Float[np.ndarray, "n n"],
    *,
    attack: PGD,
    key: Key[Array, ""],
    steps: int,
    learning_rate: float,
    batch_size: int,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n c"], list[float]]:
    """Fit Adv-NTK; the regularization ``|w|``, the coefficients of the last network, and the seconds of each step."""
    x_train, seconds = jnp.asarray(data.x_train), []
    with jax.enable_x64(True):
        theta, y = jnp.asarray(gram, jnp.float64), jnp.asarray(data.targets_train, jnp.float64)
    w = np.zeros(len(data.x_train))
    pool = np.random.default_rng(0).permutation(len(data.x_val))
    for step in range(steps):
        start = time.perf_counter()
        attack_key, batch_key = jax.random.split(jax.random.fold_in(key, step))
        places = pool[np.asarray(jax.random.choice(batch_key, len(pool), (batch_size,), replace=False))]
        images, labels = jnp.asarray(data.x_val[places]), jnp.asarray(data.y_val[places])
        u = _coefficients(theta, w, y)
        attacked = _attack(arch, x_train, u, attack, images, labels, attack_key)
        cross = np.asarray(_cross_kernel(arch, attacked, x_train))
        y_batch = targets(data.y_val[places], data.num_classes)
        with jax.enable_x64(True):
            arrays = (jnp.asarray(array, jnp.float64) for array in (cross, y_batch))
            gradient = np.asarray(_compiled_gradient(jnp.asarray(w), theta, y, *arrays)[1])
        w = w - learning_rate * gradient / np.linalg.norm(gradient)
        seconds.append(time.perf_counter() - start)
    return np.abs(w), _coefficients(theta, w, y), seconds


_compiled_coefficients = jax.jit(coefficients)
_compiled_gradient = jax.jit(loss_and_gradient)


def _coefficients(theta: Array, w: np.ndarray, y: Array) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(_compiled_coefficients(theta, jnp.asarray(w), y), np.float32)


@partial(jax.jit, static_argnums=0)
def _cross_kernel(arch: Architecture, x: Array, x_train: Array) -> Array:
    return arch.ntk(x, x_train)


def _attack(
    arch: Architecture,
    x_train: Array,
    u: np.ndarray,
    attack: PGD,
    x: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    key: Array,
) -> Float[Array, "b h w c"]:
    keys = jax.vmap(jax.random.fold_in, (0, None))(sample_keys(key, len(x)), jnp.uint32(0))
    point = attack.threat.random_point(keys, x)
    if attack.step_size is None:
        raise ValueError(f"attack must name its step_size, got {attack!r}")
    for _ in range(attack.steps):
        point = _attack_step(arch, attack.threat, attack.step_size, x_train, u, point, x, labels)
    return point


@partial(jax.jit, static_argnums=(0, 1, 2))
def _attack_step(
    arch: Architecture,
    threat: ThreatModel,
    step_size: float,
    x_train: Array,
    u: np.ndarray,
    point: Array,
    x: Array,
    labels: Array,
) -> Array:
    def total(point: Array) -> Array:
        return jnp.sum(squared(jnp.matmul(arch.ntk(point, x_train), u, precision="highest"), labels))

    return threat.project(point + step_size * threat.step(jax.grad(total)(point)), x)
