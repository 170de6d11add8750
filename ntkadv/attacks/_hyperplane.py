"""Nearest points of a hyperplane within the box [0, 1], in three norms, exactly."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Images = Float[Array, "b h w c"]
PerSample: TypeAlias = Float[Array, " b"]

NORMS = ("Linf", "L2", "L1")


def dual_norm(norm: str, normal: Images) -> PerSample:
    """Norm by which the change of <normal, z> over the norm of the change of z is at most."""
    size = jnp.abs(normal).reshape(len(normal), -1)
    if norm == "Linf":
        return jnp.sum(size, axis=1)
    if norm == "L2":
        return jnp.sqrt(jnp.sum(size**2, axis=1))
    return jnp.max(size, axis=1)


def step_to_hyperplane(norm: str, point: Images, normal: Images, gap: PerSample) -> Images:
    r"""Smallest change of points in the box [0, 1] that takes them to a hyperplane and keeps them in the box.

    .. math:: \min_d \lVert d \rVert \quad\text{with}\quad \langle w, d \rangle = g, \quad 0 \le z + d \le 1

    Where no point of the box is on the hyperplane, the change goes as far towards it as the box allows; where the
    normal is zero, nothing changes.

    Args:
        norm: `"Linf"`, `"L2"` or `"L1"`.
        point: Points z, in the box.
        normal: Normals w.
        gap: By how much <w, z> is to grow.

    Source: Croce & Hein, ICML 2020, arXiv 1907.02044, section 2.2; solved here by Newton's method on the dual.
    """

    def one(point, normal, gap):
        # Weights relative to the largest: their squares do not overflow, and only what changes nothing underflows.
        largest = jnp.max(jnp.abs(normal))
        scale = jnp.where(largest > 0, largest, 1)
        weight = jnp.abs(normal) / scale
        weight = jnp.where(weight > jnp.finfo(weight.dtype).tiny ** 0.5, weight, 0)
        direction = jnp.where(gap < 0, -1, 1).astype(normal.dtype) * jnp.sign(normal)
        room = jnp.where(weight > 0, jnp.where(direction > 0, 1 - point, point), 0)
        return direction * _SIZES[norm](weight, room, jnp.abs(gap) / scale)

    flat = (len(point), -1)
    return jax.vmap(one)(point.reshape(flat), normal.reshape(flat), gap).reshape(point.shape)


def _linf_size(weight: Array, room: Array, need: Array) -> Array:
    return jnp.minimum(_level(weight, room, weight * room, need), room)


def _l2_size(weight: Array, room: Array, need: Array) -> Array:
    level = _level(weight**2, room / jnp.where(weight > 0, weight, 1), weight * room, need)
    return jnp.minimum(level * weight, room)


def _l1_size(weight: Array, room: Array, need: Array) -> Array:
    """Fill up the coordinates of largest weight first."""
    order = jnp.argsort(-weight)
    weight, room = weight[order], room[order]
    before = jnp.cumsum(jnp.concatenate([jnp.zeros(1, weight.dtype), (weight * room)[:-1]]))
    size = jnp.clip((need - before) / jnp.where(weight > 0, weight, 1), 0, room)
    return jnp.zeros_like(size).at[order].set(size)


_SIZES = {"Linf": _linf_size, "L2": _l2_size, "L1": _l1_size}


def _level(slope: Array, full_at: Array, gain: Array, need: Array) -> Array:
    """Level t at which the sum of min(slope * t, gain) is what is needed; one at which all are full, if none suffices.

    The sum is concave and made of straight pieces, so Newton's method from zero climbs to the level and never passes
    it; it stops where no further coordinate is full, which is exact, and takes a handful of passes. Sorting the
    breakpoints is many times slower on a CPU.
    """

    def climb(state):
        level, _, passes = state
        is_full = full_at <= level
        rising = jnp.sum(jnp.where(is_full, 0, slope))
        full = jnp.sum(jnp.where(is_full, gain, 0))
        higher = jnp.where(rising > 0, (need - full) / jnp.where(rising > 0, rising, 1), level)
        return jnp.maximum(level, higher), higher > level, passes + 1

    start = (jnp.zeros_like(need), jnp.asarray(True), jnp.int32(0))
    return jax.lax.while_loop(lambda state: state[1] & (state[2] < _MOST_PASSES), climb, start)[0]


_MOST_PASSES = 64
