"""What an attacker may do: a ball around the clean image, cut with the box [0, 1] of valid pixels."""

import abc
import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Key, UInt32

from ntkadv._checks import require_nonnegative

Images = Float[Array, "b h w c"]

_ROUNDING = 1e-6
"""By how much norms that sum over pixels stay below eps, relatively, since sums are rounded."""


@dataclass(frozen=True)
class ThreatModel(abc.ABC):
    """Perturbations of norm at most `eps`, in units of pixels in [0, 1], that keep every pixel in [0, 1].

    A threat model is a static value under `jax.jit`, but for `with_eps`. A new one defines `_into_ball`,
    `_random_offset`, `step` and `distance`; `_into_ball` must not move a coordinate away from its clean value, so that
    clipping keeps the ball.

    Raises:
        ValueError: `eps` is negative, NaN or infinite. Zero is allowed: nothing may be changed.
    """

    eps: float | int
    norm: ClassVar[str]

    def __post_init__(self):
        require_nonnegative("eps", self.eps)
        object.__setattr__(self, "eps", float(self.eps))

    def with_eps(self, eps: float | Array) -> "ThreatModel":
        """Give the same threat model with another radius, which may be traced: then it is not checked."""
        if isinstance(eps, Tracer):
            threat = copy.copy(self)
            object.__setattr__(threat, "eps", eps)
            return threat
        return dataclasses.replace(self, eps=eps)

    def project(self, x: Images, x_clean: Images) -> Images:
        """Nearest allowed point: the projection onto the ball and the box at once.

        No pixel is further from its clean value than the projection says: sums are rounded towards the clean image.
        """
        return move(x_clean, self._into_ball(x - x_clean, x_clean))

    def random_point(self, key: Key[Array, ""] | Key[Array, " b"], x_clean: Images) -> Images:
        """Draw points uniformly in the balls around the clean ones, clipped to [0, 1].

        `key` is one key, or one for each sample.
        """
        keys = sample_keys(key, len(x_clean)) if key.ndim == 0 else key
        return self.project(x_clean + jax.vmap(self._random_offset)(keys, x_clean), x_clean)

    @abc.abstractmethod
    def step(self, gradient: Images, x: Images | None = None) -> Images:
        """Direction of unit norm along which the loss grows fastest; zero where the gradient is zero.

        `x`, where the gradient was taken, says which pixels can move; only some threat models ask.
        """

    @abc.abstractmethod
    def distance(self, x: Images, x_clean: Images) -> Float[Array, " b"]:
        """Norm of each perturbation."""

    @abc.abstractmethod
    def _into_ball(self, offset: Images, x_clean: Images) -> Images: ...

    @abc.abstractmethod
    def _random_offset(self, key: Key[Array, ""], image: Float[Array, "h w c"]) -> Float[Array, "h w c"]: ...


@dataclass(frozen=True)
class Linf(ThreatModel):
    """Every pixel changes by at most `eps`; usual values are 8/255 on CIFAR and 0.3 on MNIST.

    Raises:
        ValueError: `eps` is negative, not finite, or above 1 (which looks like pixels in 0..255).
    """

    norm: ClassVar[str] = "Linf"

    def __post_init__(self):
        super().__post_init__()
        if self.eps > 1:
            raise ValueError(f"eps is in units of pixels in [0, 1], got {self.eps}; write 8 of 255 as 8 / 255.")

    def step(self, gradient: Images, x: Images | None = None) -> Images:
        """Sign of the gradient."""
        del x
        return jnp.sign(gradient)

    def distance(self, x: Images, x_clean: Images) -> Float[Array, " b"]:
        """Largest change of a pixel."""
        return jnp.max(jnp.abs(x - x_clean), axis=(1, 2, 3))

    def _into_ball(self, offset: Images, x_clean: Images) -> Images:
        del x_clean
        return jnp.clip(offset, -self.eps, self.eps)

    def _random_offset(self, key, image):
        return jax.random.uniform(key, image.shape, image.dtype, -self.eps, self.eps)


@dataclass(frozen=True)
class L2(ThreatModel):
    r"""The Euclidean norm of the change of an image, over all pixels and channels, is at most `eps`; usually 0.5.

    The projection is that onto the ball and the box [0, 1] at once. The ball's, followed by clipping, as is common,
    gives away what the clipped pixels do not use.

    .. math:: \delta_i = \mathrm{sign}(u_i)\, \min(s |u_i|, r_i)

    with :math:`r_i` the room that pixel i has in the direction of :math:`u_i`, and the largest :math:`s \le 1` that
    keeps the norm. From :math:`s = \epsilon / |u|` it grows to that value in a few steps, each of which finds more
    pixels full; every step is allowed.
    """

    norm: ClassVar[str] = "L2"

    def step(self, gradient: Images, x: Images | None = None) -> Images:
        """Gradient divided by its norm, sample by sample."""
        del x
        largest = jnp.max(jnp.abs(gradient), axis=(1, 2, 3), keepdims=True)
        scaled = gradient / jnp.where(largest > 0, largest, 1)
        norm = _norm(scaled)
        return scaled / jnp.where(norm > 0, norm, 1)

    def distance(self, x: Images, x_clean: Images) -> Float[Array, " b"]:
        """Euclidean norm of each perturbation."""
        return _norm(x - x_clean)[:, 0, 0, 0]

    def _into_ball(self, offset: Images, x_clean: Images) -> Images:
        size, room = jnp.abs(offset), _room(offset, x_clean)
        eps = self.eps * (1 - _ROUNDING)

        def grow(_, scale):
            is_full = size * scale >= room
            full = jnp.sum(jnp.where(is_full, room, 0) ** 2, axis=(1, 2, 3), keepdims=True)
            free = _norm(jnp.where(is_full, 0, size))
            longest = jnp.sqrt(jnp.maximum(eps**2 - full, 0)) / jnp.where(free > 0, free, 1)
            return jnp.maximum(scale, jnp.where(free > 0, jnp.minimum(longest, 1), scale))

        norm = _norm(offset)
        shrunk = jnp.where(norm > eps, eps / jnp.where(norm > 0, norm, 1), 1)
        scale = jax.lax.fori_loop(0, 6, grow, shrunk)
        return jnp.sign(offset) * jnp.minimum(size * scale, room)

    def _random_offset(self, key, image):
        direction_key, radius_key = jax.random.split(key)
        direction = jax.random.normal(direction_key, image.shape, image.dtype)
        radius = jax.random.uniform(radius_key, (), image.dtype) ** (1 / image.size)
        return self.eps * radius * direction / jnp.linalg.norm(direction)


@dataclass(frozen=True)
class L1(ThreatModel):
    r"""The absolute changes of an image, over all pixels and channels, sum to at most `eps`; usually 12 on CIFAR-10.

    The projection is that onto the ball and the box [0, 1] at once, which is not the ball's followed by clipping:

    .. math:: \delta_i = \mathrm{sign}(u_i)\, \min(\max(|u_i| - \lambda, 0), r_i)

    with :math:`r_i` the room that pixel i has in the direction of :math:`u_i`, and the smallest :math:`\lambda \ge 0`
    for which the changes sum to at most eps. It is piecewise linear in :math:`\lambda`, and solved exactly.

    Source: Croce & Hein, ICML 2021, arXiv 2103.01208.
    """

    norm: ClassVar[str] = "L1"

    def step(self, gradient: Images, x: Images | None = None) -> Images:
        """Sign of the gradient on the hundredth of the coordinates where it is largest, of unit norm (SLIDE).

        Coordinates that have no room at `x` are passed over.

        Source: Tramèr & Boneh, NeurIPS 2019, arXiv 1904.13000.
        """
        if x is not None:
            gradient = jnp.where(_room(gradient, x) > 0, gradient, 0)
        return sparse_step(gradient, jnp.full(len(gradient), 0.01, gradient.dtype))

    def distance(self, x: Images, x_clean: Images) -> Float[Array, " b"]:
        """Sum of the absolute changes."""
        return jnp.sum(jnp.abs(x - x_clean), axis=(1, 2, 3))

    def _into_ball(self, offset: Images, x_clean: Images) -> Images:
        room = _room(offset, x_clean).reshape(len(offset), -1)
        eps = self.eps * (1 - _ROUNDING)
        size = jax.vmap(_cut, (0, 0, None))(jnp.abs(offset).reshape(len(offset), -1), room, eps)
        return jnp.sign(offset) * size.reshape(offset.shape)

    def vertex(self, gradient: Images, x_clean: Images) -> Images:
        """Find the allowed point that maximises a linear function: the steepest coordinates are used up first."""
        flat = gradient.reshape(len(gradient), -1)
        order = jnp.argsort(-jnp.abs(flat), axis=1)
        room = jnp.take_along_axis(_room(gradient, x_clean).reshape(flat.shape), order, axis=1)
        left = jnp.maximum(self.eps * (1 - _ROUNDING) - (jnp.cumsum(room, axis=1) - room), 0)
        size = jnp.take_along_axis(jnp.minimum(room, left), jnp.argsort(order, axis=1), axis=1)
        return self.project(x_clean + (jnp.sign(flat) * size).reshape(gradient.shape), x_clean)

    def _random_offset(self, key, image):
        size_key, sign_key = jax.random.split(key)
        size = jax.random.exponential(size_key, (image.size + 1,), image.dtype)
        sign = jax.random.rademacher(sign_key, image.shape, image.dtype)
        return self.eps * sign * (size[:-1] / jnp.sum(size)).reshape(image.shape)


def sparse_step(gradient: Images, share: Float[Array, " b"]) -> Images:
    """Sign of the gradient on the given share of the coordinates where it is largest, one at least; of unit L1 norm."""
    flat = jnp.abs(gradient).reshape(len(gradient), -1)
    size = flat.shape[1]
    place = jnp.clip(jnp.floor((1 - share) * size), 0, size - 1).astype(jnp.int32)
    least = jnp.take_along_axis(jnp.sort(flat, axis=1), place[:, None], axis=1)
    sign = jnp.where(flat >= least, jnp.sign(gradient.reshape(flat.shape)), 0)
    count = jnp.sum(jnp.abs(sign), axis=1, keepdims=True)
    return (sign / jnp.maximum(count, 1)).reshape(gradient.shape)


def move(x: Images, offset: Images) -> Images:
    """Images x + offset, clipped to [0, 1], in the dtype of `x`; rounded towards `x`, so never further off.

    `offset` has the precision of `x` at least.
    """
    work = offset.dtype
    start = x.astype(work)
    moved = jnp.clip(start + offset, 0, 1).astype(x.dtype)
    is_too_far = jnp.abs(moved.astype(work) - start) > jnp.abs(offset)
    return jnp.where(is_too_far, jnp.nextafter(moved, x), moved)


def sample_keys(key: Key[Array, ""], n: int, *, first: int = 0) -> Key[Array, " n"]:
    """One key for each of the samples first, ..., first + n - 1, the same however samples are grouped."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(first, first + n, dtype=jnp.uint32))


def fold_in_each(keys: Key[Array, " b"], number: UInt32[Array, ""]) -> Key[Array, " b"]:
    """Fold one number into each key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _room(offset: Images, x_clean: Images) -> Images:
    """How far each pixel can go in the direction of the offset."""
    return jnp.where(offset > 0, 1 - x_clean, x_clean)


def _norm(x: Images) -> Float[Array, "b 1 1 1"]:
    return jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3), keepdims=True))


def _cut(size: Float[Array, " d"], room: Float[Array, " d"], eps: float | Array) -> Float[Array, " d"]:
    """Sizes min(max(size - lambda, 0), room) that sum to eps at most, for the smallest lambda >= 0."""
    # As lambda grows, the sum falls by one more coordinate from size - room on, and by one less from size on.
    starts, ends = jnp.maximum(size - room, 0), size
    order = jnp.argsort(jnp.concatenate([starts, ends]))
    points = jnp.concatenate([starts, ends])[order]
    falling = jnp.cumsum(jnp.where(order < len(size), 1, -1)).astype(size.dtype)
    total = jnp.sum(jnp.minimum(size, room))
    sums = total - jnp.cumsum(jnp.diff(points, append=points[-1:]) * falling)
    # The piece that begins at points[k] ends with the sum sums[k].
    k = jnp.argmax(sums <= eps)
    before = jnp.where(k > 0, sums[k - 1], total)
    shift = points[k] + (before - eps) / jnp.maximum(falling[k], 1)
    cut = jnp.clip(size - jnp.where(total > eps, jnp.maximum(shift, 0), 0), 0, room)
    return cut * jnp.minimum(1, eps / jnp.maximum(jnp.sum(cut), jnp.finfo(size.dtype).tiny))
