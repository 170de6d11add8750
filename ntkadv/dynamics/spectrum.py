"""One symmetric eigendecomposition in float64, made safe: checked, clipped where that is harmless, refused where not."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from ntkadv._checks import require_finite

__all__ = ["Spectrum", "decompose"]


class Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors of a positive semi-definite matrix, in float64.

    Attributes:
        values: eigenvalues in ascending order, negative ones set to 0, `(n,)`.
        vectors: eigenvectors in columns, `(n, n)`.
        floor: eigenvalues at or below it are rounding of the matrix's entries, not information.
    """

    values: Float[np.ndarray, " n"]
    vectors: Float[np.ndarray, "n n"]
    floor: float

    @property
    def known(self) -> np.ndarray:
        """Which eigenvalues are above the floor, `(n,)`."""
        return self.values > self.floor


def decompose(matrix: np.ndarray, *, eps: float, name: str = "gram") -> Spectrum:
    """Decompose a symmetric matrix that should be positive semi-definite.

    Rounding of the entries, of relative size `eps`, moves eigenvalues by about `eps * lambda_max` and can make small ones
    negative. Those are set to 0; the floor is the larger of that size and the most negative eigenvalue.

    Args:
        matrix: symmetric, `(n, n)`, of any real dtype.
        eps: relative rounding error of its entries, say `np.finfo(np.float32).eps`.
        name: what to call it in errors.

    Raises:
        ValueError: not square, not finite, not symmetric, or with an eigenvalue too negative for rounding.
    """
    dense = np.asarray(matrix, np.float64)
    if dense.ndim != 2 or dense.shape[0] != dense.shape[1] or dense.size == 0:
        raise ValueError(f"{name} must be a square matrix, got shape {dense.shape}")
    require_finite(name, dense)
    size = float(np.abs(dense).max())
    skew = float(np.abs(dense - dense.T).max())
    if skew > 1e4 * eps * size:
        raise ValueError(
            f"{name} must be symmetric, but differs from its transpose by up to {skew:.3g} (entries up to {size:.3g}); was "
            "it computed between two different sets of images?"
        )
    values, vectors = _eigh((dense + dense.T) / 2)
    smallest, largest = float(values[0]), max(float(values[-1]), 0.0)
    allowed = 100 * eps * np.sqrt(len(dense)) * max(largest, size)
    if smallest < -allowed:
        raise ValueError(
            f"{name} is indefinite: its smallest eigenvalue is {smallest:.6g}, its largest {largest:.6g}, and rounding "
            f"explains {-allowed:.3g} at most. It is no kernel matrix; recompute it, in float64 if need be"
        )
    return Spectrum(np.maximum(values, 0), vectors, max(eps * largest, -smallest))


def _eigh(matrix: Float[np.ndarray, "n n"]) -> tuple[np.ndarray, np.ndarray]:
    """LAPACK on the host where JAX computes on CPUs; else the device, if its answer passes a test."""
    if jax.default_backend() == "cpu":
        return _lapack(matrix)
    try:
        with jax.enable_x64(True):
            values, vectors = (np.asarray(part) for part in jnp.linalg.eigh(jnp.asarray(matrix)))
        probe = np.random.default_rng(0).standard_normal(len(matrix))
        error = np.linalg.norm(vectors @ (values * (vectors.T @ probe)) - matrix @ probe)
        failure = None if error <= 1e-8 * np.abs(values).max() * np.linalg.norm(probe) else f"residual {error:.3g}"
    except (jax.errors.JaxRuntimeError, MemoryError) as exception:
        failure = str(exception).splitlines()[0]
        values = vectors = np.empty(0)
    if failure is None:
        return values, vectors
    warnings.warn(
        f"the device's eigendecomposition of a {len(matrix)} x {len(matrix)} matrix in float64 failed ({failure}); it is "
        "done on the host",
        RuntimeWarning,
        stacklevel=3,
    )
    return _lapack(matrix)


def _lapack(matrix: Float[np.ndarray, "n n"]) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = scipy.linalg.eigh(matrix, driver="evd", check_finite=False)
    return values, vectors
