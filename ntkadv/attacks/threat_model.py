"""What an attacker may do: a ball around the clean image, cut with the box [0, 1] of valid pixels."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ntkadv._checks import require_nonnegative

Images = Float[Array, "b h w c"]


@dataclass(frozen=True)
class ThreatModel(abc.ABC):
    """Perturbations of norm at most `eps`, in units of pixels in [0, 1], that keep every pixel in [0, 1].

    A threat model is a static value under `jax.jit`. A new one defines `_into_ball`, `_random_offset`, `step` and
    `distance`; `_into_ball` must not move a coordinate away from its clean value, so that clipping keeps the ball.

    Raises:
        ValueError: `eps` is negative, NaN or infinite. Zero is allowed: nothing may be changed.
    """

    eps: float | int
    norm: ClassVar[str]

    def __post_init__(self):
        require_nonnegative("eps", self.eps)
        object.__setattr__(self, "eps", float(self.eps))

    def project(self, x: Images, x_clean: Images) -> Images:
        """Nearest allowed point for `Linf`; for `L2` the nearest point of the ball, clipped to [0, 1]."""
        return jnp.clip(x_clean + self._into_ball(x - x_clean), 0, 1)

    def random_point(self, key: Key[Array, ""] | Key[Array, " b"], x_clean: Images) -> Images:
        """Draw points uniformly in the balls around the clean ones, clipped to [0, 1].

        `key` is one key, or one for each sample.
        """
        keys = sample_keys(key, len(x_clean)) if key.ndim == 0 else key
        return self.project(x_clean + jax.vmap(self._random_offset)(keys, x_clean), x_clean)

    @abc.abstractmethod
    def step(self, gradient: Images) -> Images:
        """Direction of unit norm along which the loss grows fastest; zero where the gradient is zero."""

    @abc.abstractmethod
    def distance(self, x: Images, x_clean: Images) -> Float[Array, " b"]:
        """Norm of each perturbation."""

    @abc.abstractmethod
    def _into_ball(self, offset: Images) -> Images: ...

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

    def step(self, gradient: Images) -> Images:
        """Sign of the gradient."""
        return jnp.sign(gradient)

    def distance(self, x: Images, x_clean: Images) -> Float[Array, " b"]:
        """Largest change of a pixel."""
        return jnp.max(jnp.abs(x - x_clean), axis=(1, 2, 3))

    def _into_ball(self, offset: Images) -> Images:
        return jnp.clip(offset, -self.eps, self.eps)

    def _random_offset(self, key, image):
        return jax.random.uniform(key, image.shape, image.dtype, -self.eps, self.eps)


@dataclass(frozen=True)
class L2(ThreatModel):
    """The Euclidean norm of the change of an image, over all pixels and channels, is at most `eps`; usually 0.5."""

    norm: ClassVar[str] = "L2"

    def step(self, gradient: Images) -> Images:
        """Gradient divided by its norm, sample by sample."""
        largest = jnp.max(jnp.abs(gradient), axis=(1, 2, 3), keepdims=True)
        scaled = gradient / jnp.where(largest > 0, largest, 1)
        norm = _norm(scaled)
        return scaled / jnp.where(norm > 0, norm, 1)

    def distance(self, x: Images, x_clean: Images) -> Float[Array, " b"]:
        """Euclidean norm of each perturbation."""
        return _norm(x - x_clean)[:, 0, 0, 0]

    def _into_ball(self, offset: Images) -> Images:
        norm = _norm(offset)
        return offset * jnp.where(norm > self.eps, self.eps / jnp.where(norm > 0, norm, 1), 1)

    def _random_offset(self, key, image):
        direction_key, radius_key = jax.random.split(key)
        direction = jax.random.normal(direction_key, image.shape, image.dtype)
        radius = jax.random.uniform(radius_key, (), image.dtype) ** (1 / image.size)
        return self.eps * radius * direction / jnp.linalg.norm(direction)


def sample_keys(key: Key[Array, ""], n: int, *, first: int = 0) -> Key[Array, " n"]:
    """One key for each of the samples first, ..., first + n - 1, the same however samples are grouped."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(first, first + n, dtype=jnp.uint32))


def _norm(x: Images) -> Float[Array, "b 1 1 1"]:
    return jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3), keepdims=True))
