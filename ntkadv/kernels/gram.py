"""Kernel matrices of any size: cut into tiles, computed once per pair, stored, resumed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any, Literal, overload

import jax
import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from ntkadv._checks import require_finite, require_memory
from ntkadv._typing import AnyArray
from ntkadv.architectures.base import Architecture, Kernels
from ntkadv.kernels.storage import KernelName, Outputs

__all__ = ["gram", "memory_estimate"]

WORKING_BYTES = 2**28
"""Working memory that one tile may take unless the caller names the tile: small enough to stay near the caches."""

LARGEST_TILE = 1024


@overload
def gram(
    arch: Architecture,
    x1: Float[AnyArray, "n1 *input"],
    x2: Float[AnyArray, "n2 *input"] | None = ...,
    *,
    kernel: KernelName = ...,
    dtype: Literal["float32", "float64"] = ...,
    tile: int | None = ...,
    max_bytes: int | None = ...,
    store: str | PathLike[str] | None = ...,
    progress: bool = ...,
) -> np.ndarray: ...
@overload
def gram(
    arch: Architecture,
    x1: Float[AnyArray, "n1 *input"],
    x2: Float[AnyArray, "n2 *input"] | None = ...,
    *,
    kernel: Literal["both"],
    dtype: Literal["float32", "float64"] = ...,
    tile: int | None = ...,
    max_bytes: int | None = ...,
    store: str | PathLike[str] | None = ...,
    progress: bool = ...,
) -> Kernels: ...
def gram(
    arch: Architecture,
    x1: Float[AnyArray, "n1 *input"],
    x2: Float[AnyArray, "n2 *input"] | None = None,
    *,
    kernel: KernelName | Literal["both"] = "ntk",
    dtype: Literal["float32", "float64"] = "float32",
    tile: int | None = None,
    max_bytes: int | None = None,
    store: str | PathLike[str] | None = None,
    progress: bool = True,
) -> np.ndarray | Kernels:
    """Compute the kernel matrix of an architecture over images.

    Without `x2` the matrix is symmetric: every pair is computed once, and the diagonal comes from `arch.diagonal`, free
    of the rounding that the kernel of a ReLU network has between coincident inputs. The peak of memory is the result
    (`n1 * n2` numbers a kernel) and one tile's working memory; see `memory_estimate`.

    Args:
        arch: whose infinite-width kernel.
        x1: images, `(n1, height, width, channels)` in [0, 1], or vectors `(n1, features)`.
        x2: more of them, `(n2, ...)`; None for the symmetric matrix of `x1` with itself.
        kernel: `"ntk"`, `"nngp"`, or `"both"` from one pass.
        dtype: precision of the computation and of the result.
        tile: pairs are computed `tile x tile` at a time; chosen by memory if None. Any number will do.
        max_bytes: refuse to start if more memory than this were needed; by default what the machine has available.
        store: path of a `.npy` file (for `"both"`, of two, with `-nngp` and `-ntk` before the ending) that holds the
            result while it is computed, mapped to memory. A call that was stopped goes on from there.
        progress: show a progress bar.

    Returns:
        A NumPy array `(n1, n2)`; for `"both"`, `Kernels(nngp, ntk)` of such arrays.

    Raises:
        ValueError: an argument is out of range, the inputs do not match or are not finite, or `store` belongs to
            another matrix.
        MemoryError: the result cannot fit.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f'dtype must be "float32" or "float64", got {dtype!r}')
    images1 = _as_images("x1", x1, dtype)
    images2 = None if x2 is None else _as_images("x2", x2, dtype)
    shape = (len(images1), len(images1) if images2 is None else len(images2))
    names: tuple[KernelName, ...] = ("nngp", "ntk") if kernel == "both" else (kernel,)
    if images2 is not None and images2.shape[1:] != images1.shape[1:]:
        raise ValueError(f"x1 and x2 must hold inputs of one shape, got {images1.shape[1:]} and {images2.shape[1:]}")
    if any(name not in ("ntk", "nngp") for name in names):
        raise ValueError(f'kernel must be "ntk", "nngp" or "both", got {kernel!r}')
    tile = _choose_tile(arch, images1, shape, tile)
    in_memory = 0 if store is not None else len(names)
    working = memory_estimate(arch, *shape, images1.shape[1:], kernels=0, tile=tile) * images1.itemsize // 4
    result = in_memory * shape[0] * shape[1] * images1.itemsize
    require_memory(
        f"the {shape[0]} x {shape[1]} kernel matrix",
        working + result,
        "Take fewer samples, a smaller tile, or give store=, a file that holds the result on disk.",
        max_bytes=max_bytes,
    )

    tiles = _tiles(shape, tile, symmetric=images2 is None)
    outputs = Outputs(store, names, shape, dtype, "" if store is None else _fingerprint(images1, images2, tile))

    def compute(corner: tuple[int, int]) -> Kernels:
        rows = _padded(images1, corner[0], tile)
        columns = _padded(images1 if images2 is None else images2, corner[1], tile)
        with jax.enable_x64(dtype == "float64"):
            return arch.kernels(rows, columns)

    start = outputs.resume_at(compute, tiles)
    bar = tqdm(total=len(tiles), initial=start, desc="kernel matrix", unit="tile", disable=not progress, leave=False)
    with bar:
        for corner, block in _one_ahead(compute, tiles[start:]):
            outputs.write(corner, block, symmetric=images2 is None)
            bar.update()
    if images2 is None:
        with jax.enable_x64(dtype == "float64"):
            outputs.write_diagonal([arch.diagonal(_padded(images1, i, tile)) for i in range(0, shape[0], tile)])
    arrays = outputs.finish()
    return Kernels(arrays["nngp"], arrays["ntk"]) if kernel == "both" else arrays[names[0]]


def memory_estimate(
    arch: Architecture, n1: int, n2: int, input_shape: tuple[int, ...], *, kernels: int = 1, tile: int = LARGEST_TILE
) -> int:
    """Estimate the peak memory, in bytes, of `gram` in float32: `kernels` results of n1 x n2, and two tiles at work."""
    block = min(tile, n1) * min(tile, n2)
    return 4 * kernels * n1 * n2 + block * (arch.pair_bytes(tuple(input_shape)) + 16)


def _as_images(name: str, x: Any, dtype: str) -> np.ndarray:
    images = np.asarray(x, dtype)
    if images.ndim < 2 or images.size == 0:
        raise ValueError(f"{name} must be a batch of at least one input, (n, ...), got shape {images.shape}")
    require_finite(name, images)
    return images


def _choose_tile(arch: Architecture, images: np.ndarray, shape: tuple[int, int], tile: int | None) -> int:
    if tile is not None:
        if tile < 1:
            raise ValueError(f"tile must be at least 1, got {tile}")
        return min(tile, max(shape))
    fitting = math.isqrt(WORKING_BYTES // max(1, arch.pair_bytes(images.shape[1:])))
    largest = max(1, min(LARGEST_TILE, fitting, max(shape)))
    return math.ceil(max(shape) / math.ceil(max(shape) / largest))


def _tiles(shape: tuple[int, int], tile: int, *, symmetric: bool) -> list[tuple[int, int]]:
    return [(i, j) for i in range(0, shape[0], tile) for j in range(i if symmetric else 0, shape[1], tile)]


def _padded(images: np.ndarray, start: int, size: int) -> np.ndarray:
    """Take `size` images from `start` on; past the end the last image is repeated, so that all tiles are alike."""
    return images[np.minimum(np.arange(start, start + size), len(images) - 1)]


def _one_ahead(
    compute: Callable[[tuple[int, int]], Kernels], tiles: list[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Kernels]]:
    """Start each tile before the one before it is fetched, so that the device does not wait for the host."""
    waiting: tuple[tuple[int, int], Kernels] | None = None
    for corner in tiles:
        started = (corner, compute(corner))
        if waiting is not None:
            yield waiting
        waiting = started
    if waiting is not None:
        yield waiting


def _fingerprint(images1: np.ndarray, images2: np.ndarray | None, tile: int) -> str:
    digest = hashlib.sha256(f"{images1.shape} {tile}".encode())
    for images in (images1, images2):
        digest.update(b"none" if images is None else np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()
