"""Predictors made of a kernel: pytrees that are called, logits = f(x)."""

from functools import partial
from math import prod
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntkadv._checks import require_int
from ntkadv._typing import AnyArray
from ntkadv.architectures.base import Architecture

Kernel = Literal["ntk", "nngp"]

_BYTES = jnp.dtype(jnp.float32).itemsize


class KernelPredictor(eqx.Module):
    r"""A linear combination of kernel functions at the training images.

    .. math:: f(x) = \sum_{i=1}^{n} k(x, x_i)\, a_i, \qquad a_i \in \mathbb{R}^c

    with the NTK or the NNGP kernel :math:`k` of an architecture. This is the form of the mean of every closed-form
    solution and of kernel regression. The kernel is evaluated in tiles of images by training images, whose size is
    chosen when the call is traced so that the working memory of a call, or of its gradient with respect to `x`, stays
    under `max_bytes`, a few copies of `x` aside; in reverse mode tiles are computed again rather than stored. Under
    `jax.vmap` the bound holds for each of the mapped calls. What fits into one tile is computed in one piece.

    The predictor is a pytree: passing it through `jax.jit` with new coefficients does not compile again.

    Args:
        arch: The architecture whose infinite-width kernel is used.
        x_train: Images (n, h, w, c).
        coefficients: One row a training image, one column a class: (n, num_classes).
        kernel: `"ntk"` or `"nngp"`.
        max_bytes: Bound on the working memory of one call, 1 GiB by default.

    Raises:
        ValueError: An array is empty or of another shape, the rows of `coefficients` are not as many as the images, the
            kernel is unknown, or `max_bytes` is too small for a single pair of images.
    """

    arch: Architecture = eqx.field(static=True)
    x_train: Float[Array, "n h w c"]
    coefficients: Float[Array, "n num_classes"]
    kernel: Kernel = eqx.field(static=True)
    max_bytes: int = eqx.field(static=True)

    def __init__(
        self,
        arch: Architecture,
        x_train: Float[AnyArray, "n h w c"],
        coefficients: Float[AnyArray, "n num_classes"],
        *,
        kernel: Kernel = "ntk",
        max_bytes: int = 2**30,
    ):
        if x_train.ndim != 4 or 0 in x_train.shape:
            raise ValueError(f"x_train must be images (n, h, w, c), none of them zero, got shape {x_train.shape}.")
        if coefficients.ndim != 2 or 0 in coefficients.shape:
            raise ValueError(
                f"coefficients must have shape (n, num_classes), neither of them zero, got {coefficients.shape}; "
                f"write a single output as a column, (n, 1)."
            )
        if len(coefficients) != len(x_train):
            raise ValueError(
                f"coefficients must have one row for each training image, got {len(coefficients)} rows for "
                f"{len(x_train)} images; pass the images the coefficients were computed with."
            )
        if kernel not in ("ntk", "nngp"):
            raise ValueError(f"kernel must be 'ntk' or 'nngp', got {kernel!r}.")
        require_int("max_bytes", max_bytes, minimum=1)
        self.arch = arch
        self.x_train = jnp.asarray(x_train, jnp.float32)
        self.coefficients = jnp.asarray(coefficients, jnp.float32)
        self.kernel = kernel
        self.max_bytes = max_bytes
        least = self._cost(1, 1)
        if max_bytes < least:
            raise ValueError(
                f"max_bytes must be at least {least}, the working memory of one pair of images, got {max_bytes}."
            )

    def __call__(self, x: Float[AnyArray, "b h w c"]) -> Float[Array, "b num_classes"]:
        """Logits at the images `x`, in float32.

        Raises:
            ValueError: The images are not of the shape of the training images, or there are none.
        """
        if x.ndim != 4 or len(x) == 0 or x.shape[1:] != self.x_train.shape[1:]:
            h, w, c = self.x_train.shape[1:]
            raise ValueError(
                f"x must be a non-empty batch of images (b, {h}, {w}, {c}), as in training, got shape {x.shape}; "
                f"pass one image as x[None]."
            )
        return eqx.filter_jit(KernelPredictor._evaluate)(self, jnp.asarray(x, jnp.float32))

    def _evaluate(self, x: Float[Array, "b h w c"]) -> Float[Array, "b num_classes"]:
        rows, columns = self._tile(len(x))
        with jax.default_matmul_precision("highest"):
            if rows == len(x):
                return self._stream(x, columns)
            batches = -(-len(x) // rows)
            padding = [(0, batches * rows - len(x))] + [(0, 0)] * 3
            stacked = jnp.pad(x, padding, mode="edge").reshape(batches, rows, *x.shape[1:])
            logits = jax.lax.map(jax.checkpoint(partial(self._stream, columns=columns)), stacked)
            return logits.reshape(batches * rows, -1)[: len(x)]

    def _stream(self, x: Float[Array, "b h w c"], columns: int) -> Float[Array, "b num_classes"]:
        """Sum over the training images, `columns` at a time.

        The last tile is moved back to end with the last image, and has zero coefficients where it overlaps.
        """
        n = len(self.x_train)
        if columns >= n:
            return self._block(x, self.x_train, self.coefficients)

        @jax.checkpoint
        def add_tile(logits, first):
            start = jnp.minimum(first, n - columns)
            images = jax.lax.dynamic_slice_in_dim(self.x_train, start, columns)
            coefficients = jax.lax.dynamic_slice_in_dim(self.coefficients, start, columns)
            is_new = start + jnp.arange(columns, dtype=jnp.int32) >= first
            return logits + self._block(x, images, jnp.where(is_new[:, None], coefficients, 0)), None

        zero = jnp.zeros((len(x), self.coefficients.shape[1]), jnp.float32)
        return jax.lax.scan(add_tile, zero, jnp.arange(0, n, columns, dtype=jnp.int32))[0]

    def _block(self, x: Array, images: Array, coefficients: Array) -> Array:
        return jnp.matmul(getattr(self.arch, self.kernel)(x, images), coefficients, precision="highest")

    def _tile(self, b: int) -> tuple[int, int]:
        """Rows and columns of a tile within the budget: the longer side is halved until it fits."""
        rows, columns = b, len(self.x_train)
        while self._cost(rows, columns) > self.max_bytes:
            if rows > columns:
                rows = -(-rows // 2)
            else:
                columns = -(-columns // 2)
        return rows, columns

    def _cost(self, rows: int, columns: int) -> int:
        """Bytes that a tile and its gradient take, with a quarter to spare, and a few copies of its images."""
        image = self.x_train.shape[1:]
        pair = -(-5 * self.arch.pair_bytes(image) // 4)
        return rows * columns * pair + 3 * _BYTES * prod(image) * (rows + columns)
