r"""How far a kernel is from another one, and what it looks like. `movement` has all of it over a training run.

Three forms are taken, those of `gram`, `empirical_ntk` and `empirical_ark`:

- (n, n), a kernel of images;
- (n, n, c, c), one of images and outputs. As a matrix it is that of the pairs (image, output), (n c, n c):
  :math:`K_{(ia)(jb)} = K_{ijab}`. Its norm and spectrum are those of this matrix;
- (n, c, c), one of the outputs at each image. As a matrix it has these blocks on its diagonal, and nothing beside them.

Everything is computed in float64 on the host.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float
from scipy.special import entr

from ntkadv._checks import require_finite, require_int
from ntkadv._typing import AnyArray

__all__ = [
    "Polar",
    "cosine_distance",
    "effective_rank",
    "kernel_spectrum",
    "polar",
    "relative_distance",
    "target_alignment",
    "top_share",
]

Rank = Literal["entropy", "participation", "stable"]

_ROUNDING = 64 * float(np.finfo(np.float64).eps)


class Polar(NamedTuple):
    """A kernel seen from another one: the ratio of their norms, and the angle between them in radians."""

    radius: float
    angle: float


def relative_distance(kernel: Float[AnyArray, "n *rest"], reference: Float[AnyArray, "n *rest"]) -> float:
    r"""Compute how far a kernel is from a reference, in units of its norm: :math:`|K - K_0|_F / |K_0|_F`.

    Args:
        kernel: A kernel of one of the forms above; rectangular ones, (m, n) or (m, n, c, c), will do.
        reference: Another one of the same shape.

    Raises:
        TypeError, ValueError: these are no kernels, or not of one shape; they are not finite; the reference is zero.
    """
    first, second = _pair(kernel, reference)
    size = float(np.linalg.norm(second))
    return _defined(float(np.linalg.norm(first - second)) / size if size else np.nan)


def cosine_distance(
    kernel: Float[AnyArray, "n *rest"], reference: Float[AnyArray, "n *rest"], *, centered: bool = False
) -> float:
    r"""Compute the kernel distance, one minus the cosine of the angle between two kernels.

    .. math::
        1 - \frac{\langle K, K' \rangle}{|K|_F |K'|_F}
        = \frac12 \left| \frac{K}{|K|_F} - \frac{K'}{|K'|_F} \right|_F^2

    It is computed by the right-hand side, which keeps its digits as the kernels come close.

    Args:
        kernel: A kernel of one of the forms above; rectangular ones will do.
        reference: Another one of the same shape.
        centered: Centre the features over the images before, :math:`H K H` with :math:`H = I - 11^T / n`, for each pair
            of outputs separately: one minus the centred kernel alignment, which ignores what all images share. Kernels
            (n, c, c) relate no two images and cannot be centred.

    Raises:
        TypeError, ValueError: as `relative_distance`; and if either kernel is zero, or is so once centred.

    Source: Fort et al., NeurIPS 2020, arXiv 2010.15110; centred: Kornblith et al., ICML 2019, arXiv 1905.00414.
    """
    first, second = _pair(kernel, reference)
    if centered:
        first, second = centered_kernel("kernel", first), centered_kernel("reference", second)
    return _defined(distance_of_units(unit(first), unit(second)))


def polar(kernel: Float[AnyArray, "n *rest"], reference: Float[AnyArray, "n *rest"]) -> Polar:
    r"""Compute the place of a kernel in the plane that it spans with a reference.

    .. math:: \Bigl(\frac{|K|_F}{|K_0|_F},\ \arccos \frac{\langle K, K_0 \rangle}{|K|_F |K_0|_F}\Bigr)

    A kernel that only grows moves along the radius, one that turns towards other features along the angle.

    Raises:
        TypeError, ValueError: as `relative_distance`; and if either kernel is zero.

    Source: Tsilivis & Kempe, NeurIPS 2022, arXiv 2210.05577.
    """
    first, second = _pair(kernel, reference)
    angle = _defined(angle_of_units(unit(first), unit(second)))
    return Polar(float(np.linalg.norm(first) / np.linalg.norm(second)), angle)


def kernel_spectrum(kernel: Float[AnyArray, "n *rest"]) -> Float[np.ndarray, " size"]:
    """Compute the eigenvalues of a kernel, largest first: n of them, or n c for the forms with outputs.

    Raises:
        TypeError, ValueError: it is no kernel of the forms above, not finite, not symmetric, or has eigenvalues too far
            below zero to be rounding; those that are rounding are zero here.
    """
    array = checked_kernel("kernel", kernel)
    require_symmetric("kernel", array, kernel.dtype)
    return spectrum_of("kernel", array, kernel.dtype)


def top_share(kernel: Float[AnyArray, "n *rest"], k: int) -> float:
    r"""Compute the share of the spectral mass in the largest k eigenvalues (of all, where there are no more).

    .. math:: \sum_{i \le k} \lambda_i \Big/ \sum_i \lambda_i

    Raises:
        TypeError, ValueError: as `kernel_spectrum`; and if k is not positive, or the kernel is zero.
    """
    require_int("k", k, minimum=1)
    return _defined(share_of_top(kernel_spectrum(kernel), k))


def effective_rank(kernel: Float[AnyArray, "n *rest"], definition: Rank = "entropy") -> float:
    r"""Compute how many eigenvalues a kernel has, in effect, with :math:`p_i = \lambda_i / \sum_j \lambda_j`.

    - `"entropy"`: :math:`\exp(-\sum_i p_i \log p_i)` (Roy & Vetterli, EUSIPCO 2007);
    - `"participation"`: :math:`1 / \sum_i p_i^2 = (\mathrm{tr} K)^2 / |K|_F^2`;
    - `"stable"`: :math:`1 / \max_i p_i = \mathrm{tr} K / \lambda_1`, the stable rank of the features (of J, where
      :math:`K = J J^T`).

    Each is r for a projection of rank r, and none is larger than the one before it.

    Raises:
        TypeError, ValueError: as `kernel_spectrum`; and for another definition, or if the kernel is zero.
    """
    require_rank(definition)
    return _defined(rank_of(kernel_spectrum(kernel), definition))


def target_alignment(
    kernel: Float[AnyArray, "n m *outputs"], targets: Float[AnyArray, "n c"], *, centered: bool = False
) -> float:
    r"""Compute the alignment of a kernel with the targets: the cosine of its angle with the kernel of the targets.

    .. math:: \frac{\langle K, Y Y^T \rangle}{|K|_F |Y Y^T|_F}

    Args:
        kernel: A kernel (n, n); or one (n, n, c, c), of which the mean over the outputs is taken, its trace over them
            divided by c: the (n, n) matrix that stands for it in the limit of infinite width.
        targets: One row for each image; as many columns as you like.
        centered: Centre both kernels over the images before, which takes out what all images share.

    Raises:
        TypeError, ValueError: the kernel is not one of these, not finite or not symmetric; the targets do not fit it;
            or one of both is zero, or is so once centred.

    Source: Cristianini et al., NIPS 2001; centred: Cortes, Mohri & Rostamizadeh, JMLR 13 (2012), arXiv 1203.0550.
    """
    array = checked_kernel("kernel", kernel)
    require_symmetric("kernel", array, kernel.dtype)
    return _defined(alignment_of("kernel", array, checked_targets(targets), centered))


def checked_kernel(name: str, kernel: Any, shape: tuple[int, ...] | None = None) -> Float[np.ndarray, "n *rest"]:
    """Bring a kernel to the host, in float64.

    Raises:
        TypeError: it is no array of floats.
        ValueError: it has none of the forms, or not this shape, or is not finite.
    """
    dtype = getattr(kernel, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be an array of floats, got {dtype or type(kernel).__name__}.")
    if shape is not None and kernel.shape != shape:
        raise ValueError(f"{name} must have the shape of the other, {shape}, got {kernel.shape}; use the same images.")
    if kernel.ndim not in (2, 3, 4) or 0 in kernel.shape or (kernel.ndim > 2 and len(set(kernel.shape[-2:])) > 1):
        raise ValueError(
            f"{name} must be a kernel (n, n), (n, n, c, c) or (n, c, c), got shape {kernel.shape}; several of them go "
            f"to kernel_movement."
        )
    require_finite(name, kernel)
    return np.asarray(kernel, np.float64)


def checked_targets(targets: Any) -> Float[np.ndarray, "n c"]:
    """Require a finite matrix of targets that are not all zero, and bring it to the host."""
    if np.ndim(targets) != 2 or 0 in np.shape(targets):
        raise ValueError(f"targets must have shape (n, c), one row for each image, got {np.shape(targets)}.")
    require_finite("targets", targets)
    if not np.any(targets):
        raise ValueError("targets must not be all zero: the alignment with them is not defined.")
    return np.asarray(targets, np.float64)


def require_rank(definition: str) -> None:
    """Require the name of a definition of the effective rank."""
    if definition not in ("entropy", "participation", "stable"):
        raise ValueError(f"definition must be 'entropy', 'participation' or 'stable', got {definition!r}.")


def require_symmetric(name: str, kernel: Float[np.ndarray, "n *rest"], dtype: Any) -> None:
    """Require a kernel of images with themselves, symmetric up to the rounding of the dtype in which it came."""
    blocks = _as_blocks(kernel)
    if blocks.shape[1] != blocks.shape[2]:
        raise ValueError(f"{name} must be of one set of images with itself, got shape {kernel.shape}.")
    skew = float(np.max(np.abs(blocks - blocks.transpose(0, 2, 1))))
    if skew > 1e3 * float(jnp.finfo(dtype).eps) * float(np.max(np.abs(blocks))):
        raise ValueError(f"{name} must be symmetric, but differs from its transpose by up to {skew:.3g}.")


def unit(kernel: Float[np.ndarray, "n *rest"]) -> Float[np.ndarray, "n *rest"]:
    """Divide a kernel by its norm; NaN for a zero one, which has no direction."""
    size = float(np.linalg.norm(kernel))
    return kernel / size if size else np.full_like(kernel, np.nan)


def distance_of_units(first: Float[np.ndarray, "n *rest"], second: Float[np.ndarray, "n *rest"]) -> float:
    """Compute one minus the cosine of unit kernels without cancellation."""
    return float(np.linalg.norm(first - second)) ** 2 / 2


def angle_of_units(first: Float[np.ndarray, "n *rest"], second: Float[np.ndarray, "n *rest"]) -> float:
    """Compute the angle between unit kernels; the arc cosine would lose half of the digits of a small one."""
    return 2 * float(np.arctan2(np.linalg.norm(first - second), np.linalg.norm(first + second)))


def centered_kernel(name: str, kernel: Float[np.ndarray, "n *rest"]) -> Float[np.ndarray, "n *rest"]:
    """Centre a kernel over its images; exactly zero where nothing but rounding is left."""
    if kernel.ndim == 3:
        raise ValueError(f"{name} is a kernel (n, c, c), which relates no two images and cannot be centred.")
    centered = kernel - kernel.mean(axis=0, keepdims=True)
    centered -= centered.mean(axis=1, keepdims=True)
    return centered * (np.linalg.norm(centered) > _ROUNDING * np.linalg.norm(kernel))


def spectrum_of(name: str, kernel: Float[np.ndarray, "n *rest"], dtype: Any) -> Float[np.ndarray, " size"]:
    """Compute the eigenvalues of a symmetric kernel, see `kernel_spectrum`."""
    blocks = _as_blocks(kernel)
    if len(blocks) == 1:
        values = scipy.linalg.eigvalsh(blocks[0], check_finite=False)
    else:
        values = np.linalg.eigvalsh(blocks).ravel()
    values = np.sort(values)[::-1]
    rounding = 100 * float(jnp.finfo(dtype).eps) * blocks.shape[1] ** 0.5 * max(values[0], 0.0)
    if values[-1] < -rounding:
        raise ValueError(
            f"{name} is not positive semi-definite: its smallest eigenvalue is {values[-1]:.3g}, its largest "
            f"{values[0]:.3g}. It is no kernel, or was computed with too little precision."
        )
    return np.maximum(values, 0.0)


def share_of_top(values: Float[np.ndarray, " size"], k: int) -> float:
    """Give the share of the first k eigenvalues; NaN if all are zero."""
    total = float(np.sum(values))
    return min(float(np.sum(values[:k])) / total, 1.0) if total else float("nan")


def rank_of(values: Float[np.ndarray, " size"], definition: Rank) -> float:
    """Give the effective rank of a spectrum, largest first; NaN if all eigenvalues are zero."""
    if values[0] == 0:
        return float("nan")
    shares = values / np.sum(values)
    if definition == "entropy":
        return float(np.exp(np.sum(entr(shares))))
    return float(1 / np.sum(shares**2) if definition == "participation" else 1 / shares[0])


def alignment_of(
    name: str, kernel: Float[np.ndarray, "n *rest"], targets: Float[np.ndarray, "m c"], centered: bool
) -> float:
    """Compute the alignment of a symmetric kernel with targets, see `target_alignment`; NaN for a zero kernel."""
    if kernel.ndim == 3:
        raise ValueError(f"{name} is a kernel (n, c, c), which relates no two images: it has no alignment.")
    if len(targets) != len(kernel):
        raise ValueError(f"targets must have one row for each of the {len(kernel)} images, got {len(targets)}.")
    matrix = np.trace(kernel, axis1=2, axis2=3) / kernel.shape[2] if kernel.ndim == 4 else kernel
    if centered:
        matrix = centered_kernel(name, matrix)
        size = np.linalg.norm(targets)
        targets = targets - targets.mean(axis=0)
        if np.linalg.norm(targets) <= _ROUNDING * size:
            raise ValueError("targets must not be the same for all images where they are centred; use centered=False.")
    return float(np.sum(targets * (unit(matrix) @ targets)) / np.linalg.norm(targets.T @ targets))


def _pair(kernel: AnyArray, reference: AnyArray) -> tuple[np.ndarray, np.ndarray]:
    second = checked_kernel("reference", reference)
    return checked_kernel("kernel", kernel, shape=second.shape), second


def _defined(value: float) -> float:
    if np.isnan(value):
        raise ValueError("a kernel is zero, or the same for all images and centred: it has no direction and no mass.")
    return value


def _as_blocks(kernel: np.ndarray) -> np.ndarray:
    """Give the blocks on the diagonal of the matrix that a kernel is; there is one, but for the form (n, c, c)."""
    if kernel.ndim == 4:
        n, m, c, _ = kernel.shape
        return kernel.transpose(0, 2, 1, 3).reshape(1, n * c, m * c)
    return kernel if kernel.ndim == 3 else kernel[None]
