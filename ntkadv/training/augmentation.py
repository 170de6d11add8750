"""Random changes of training images. A new one is a subclass of `Augmentation`."""

from __future__ import annotations

import abc
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ntkadv._checks import require_int

__all__ = ["Augmentation", "CropFlip"]


@dataclass(frozen=True)
class Augmentation(abc.ABC):
    """A random change of an image: drawn, applied, and, where `invertible`, undone.

    To write one, define `draw` and `apply` for one image; and `restore`, with `invertible = True`, if it moves pixels
    but makes none: methods that keep something for each pixel of each image, as APART does, need that.
    """

    invertible: ClassVar[bool] = False

    @abc.abstractmethod
    def draw(self, key: Key[Array, ""]) -> Any:
        """Draw what is done to one image: a pytree of arrays."""

    @abc.abstractmethod
    def apply(self, image: Float[Array, "h w c"], drawn: Any) -> Float[Array, "h w c"]:
        """Change one image."""

    def restore(
        self, changed: Float[Array, "h w c"], original: Float[Array, "h w c"], drawn: Any
    ) -> Float[Array, "h w c"]:
        """Bring pixels back to where they came from; those that `apply` had left out are taken from `original`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be undone.")


@dataclass(frozen=True)
class CropFlip(Augmentation):
    """Pad with zeros, crop at a random place to the old size, and mirror every second image: as usual on CIFAR-10.

    Args:
        padding: Pixels of zeros at each side.
        flip: Whether to mirror.

    Raises:
        ValueError: `padding` is negative.
    """

    _: KW_ONLY
    padding: int = 4
    flip: bool = True
    invertible: ClassVar[bool] = True

    def __post_init__(self):
        require_int("padding", self.padding, minimum=0)

    def draw(self, key):
        """Draw a corner, (2,), and whether to mirror."""
        corner_key, flip_key = jax.random.split(key)
        corner = jax.random.randint(corner_key, (2,), 0, 2 * self.padding + 1)
        return corner, self.flip & jax.random.bernoulli(flip_key)

    def apply(self, image, drawn):
        """Crop and mirror one image."""
        (row, column), is_flipped = drawn
        cropped = jax.lax.dynamic_slice(self._padded(image), (row, column, jnp.zeros_like(row)), image.shape)
        return jnp.where(is_flipped, cropped[:, ::-1], cropped)

    def restore(self, changed, original, drawn):
        """Bring pixels back."""
        (row, column), is_flipped = drawn
        cropped = jnp.where(is_flipped, changed[:, ::-1], changed)
        whole = jax.lax.dynamic_update_slice(self._padded(original), cropped, (row, column, jnp.zeros_like(row)))
        height, width, _ = original.shape
        return whole[self.padding : self.padding + height, self.padding : self.padding + width]

    def _padded(self, image: Array) -> Array:
        return jnp.pad(image, ((self.padding,) * 2, (self.padding,) * 2, (0, 0)))
