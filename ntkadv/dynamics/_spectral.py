"""One symmetric eigendecomposition on the host, in float64, and all that is read off it."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from ntkadv._checks import require_finite, require_memory
from ntkadv._typing import AnyArray

_CHUNK_BYTES = 2**29


class Spectrum(NamedTuple):
    """`S = V diag(values) V^T`, and the level below which eigenvalues are noise."""

    values: Float[np.ndarray, " n"]
    vectors: Float[np.ndarray, "n n"]
    floor: float


def checked_gram(name: str, gram: AnyArray, n: int) -> Float[np.ndarray, "n n"]:
    """`gram` on the host; `ValueError` unless it is a finite, symmetric floating matrix (n, n)."""
    gram = np.asarray(gram)
    if gram.shape != (n, n):
        raise ValueError(f"{name} must have shape ({n}, {n}), one row for each training image, got {gram.shape}.")
    if not np.issubdtype(gram.dtype, np.floating):
        raise ValueError(f"{name} must be a floating matrix, got {gram.dtype}.")
    require_finite(name, gram)
    skew = float(np.max(np.abs(gram - gram.T)))
    if skew > 1e3 * np.finfo(gram.dtype).eps * float(np.max(np.abs(gram))):
        raise ValueError(
            f"{name} must be symmetric, but differs from its transpose by up to {skew:.3g}; pass the Gram matrix of "
            f"the training images with themselves, or (gram + gram.T) / 2 if this is rounding."
        )
    return gram


def with_equal_copies(gram: Float[np.ndarray, "n n"], x: AnyArray) -> Float[np.ndarray, "n n"]:
    """`gram` with one and the same entry between all copies of an image, as its diagonal has.

    Between coincident inputs the kernel of a ReLU network is computed to half the digits only (its angle is the arc
    cosine of 1), which would pass copies with different labels off as images that can be told apart.
    """
    places: dict[bytes, list[int]] = {}
    for i, image in enumerate(np.asarray(x)):
        places.setdefault(image.tobytes(), []).append(i)
    copies = [same for same in places.values() if len(same) > 1]
    if copies:
        gram = np.array(gram)
    for same in copies:
        gram[np.ix_(same, same)] = np.diag(gram)[same].mean()
    return gram


def spectrum(gram: Float[np.ndarray, "n n"], scale: Float[np.ndarray, " n"]) -> Spectrum:
    """Decompose `S = D^1/2 Theta D^1/2` for positive `D = diag(scale)`, see `decompose`."""
    _require_room(len(gram))
    root = np.sqrt(scale)
    scaled = gram.astype(np.float64)
    scaled += scaled.T
    scaled *= 0.5
    scaled *= root[:, None]
    scaled *= root[None, :]
    return decompose(scaled, gram.dtype)


def decompose(matrix: Float[np.ndarray, "n n"], dtype: np.dtype) -> Spectrum:
    """Decompose a symmetric positive semi-definite matrix in float64 that was computed in `dtype`.

    The floor is `max(eps lambda_max, |most negative eigenvalue|)`, eps that of `dtype` (or n times that of float64,
    which is what the decomposition adds); eigenvalues below it carry no information, and negative ones become 0.

    Raises `ValueError` where negative eigenvalues are too large to be rounding, `MemoryError` before starting where the
    machine has too little memory.
    """
    _require_room(len(matrix))
    eps = float(np.finfo(dtype).eps)
    values, vectors = _eigh(matrix)
    smallest, largest = float(values[0]), float(max(values[-1], 0.0))
    if smallest < -100 * eps * np.sqrt(len(values)) * largest:
        raise ValueError(
            f"gram is not positive semi-definite: its smallest eigenvalue (weighted by the attack) is {smallest:.3g}, "
            f"its largest {largest:.3g}, where rounding in {dtype} explains no more than "
            f"-{100 * eps * np.sqrt(len(values)) * largest:.1g}. It is no kernel of these images, or was computed "
            f"with too little precision."
        )
    noise = max(eps, len(values) * float(np.finfo(np.float64).eps))
    return Spectrum(np.maximum(values, 0.0), vectors, max(noise * largest, -smallest))


def _require_room(n: int) -> None:
    require_memory(
        f"the eigendecomposition of a {n} x {n} matrix in float64",
        5 * 8 * n**2,  # the matrix, LAPACK's copy, its workspace of twice the size, and the vectors
        "Take fewer samples; Adv-NTK, whose Krylov solves need no eigendecomposition, takes more.",
    )


def _eigh(matrix: Float[np.ndarray, "n n"]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n n"]]:
    """Eigenvalues and eigenvectors, on an accelerator where there is one and its answer stands a check."""
    if jax.default_backend() != "cpu":
        try:
            with jax.enable_x64(True):
                values, vectors = (np.asarray(part) for part in jnp.linalg.eigh(jnp.asarray(matrix)))
            if _decomposes(matrix, values, vectors):
                return values, vectors
            problem = "returned a wrong result"
        except jax.errors.JaxRuntimeError as error:
            problem = f"failed ({str(error).splitlines()[0]})"
        warnings.warn(
            f"The eigendecomposition of a {len(matrix)} x {len(matrix)} matrix on {jax.default_backend()} {problem}; "
            f"it is done again on the CPU by LAPACK, which takes longer.",
            RuntimeWarning,
            stacklevel=2,
        )
    return scipy.linalg.eigh(matrix, driver="evd", check_finite=False)


def _decomposes(
    matrix: Float[np.ndarray, "n n"], values: Float[np.ndarray, " n"], vectors: Float[np.ndarray, "n n"]
) -> bool:
    """Whether `V diag(values) V^T z = S z` and `V V^T z = z` for a random vector z, NaN being no."""
    z = np.random.default_rng(0).standard_normal(len(matrix))
    inside = vectors.T @ z
    exact = matrix @ z
    size = np.max(np.abs(values)) * np.linalg.norm(z)
    same = np.linalg.norm(vectors @ (values * inside) - exact) <= 1e-9 * size
    return bool(same and np.linalg.norm(vectors @ inside - z) <= 1e-9 * np.linalg.norm(z))


class SpectralModel:
    """Predictors `f(x) = Theta(x, X) D^1/2 V diag(filter) V^T D^1/2 Y`: the same spectrum under any filter.

    A filter (n,) gives each eigenvalue a factor; `1 / (lambda + ridge)` is ridge regression, `(1 - e^{-t lambda}) /
    lambda` gradient flow for a time t. Factors of eigenvalues below the noise floor are taken to be 0: in exact
    arithmetic these modes do not reach any prediction.
    """

    def __init__(self, targets: Float[np.ndarray, "n c"], spectrum: Spectrum, scale: Float[np.ndarray, " n"]):
        self.spectrum = spectrum
        self.root = np.sqrt(scale)[:, None]
        self.weights = spectrum.vectors.T @ (self.root * targets)

    def coefficients(self, filters: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n c"]:
        """`D^1/2 V diag(filter) V^T D^1/2 Y` for k filters, in one product."""
        return self._unstack(self.root * (self.spectrum.vectors @ self._modes(filters)))

    def operator(self, cross: Float[np.ndarray, "m n"], values: Float[np.ndarray, " n"]) -> Float[np.ndarray, "m n"]:
        """`Theta(x, X) D^1/2 V diag(filter) V^T D^1/2` for one filter."""
        kept = np.where(self.spectrum.values > self.spectrum.floor, values, 0.0)
        vectors, root = self.spectrum.vectors, self.root[:, 0]
        return ((cross.astype(np.float64) * root) @ vectors * kept) @ vectors.T * root

    def apply(self, cross: Float[np.ndarray, "m n"], filters: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k m c"]:
        """`f(x)` for k filters, given `Theta(x, X)`: as few products as memory allows.

        The eigenvectors are applied to the side that has fewer columns: to `Theta(x, X)`, once for all filters, or to
        the modes of the filters.
        """
        (m, n), c = cross.shape, self.weights.shape[1]
        cross = cross.astype(np.float64)
        project_images = m < len(filters) * c
        left = (cross * self.root.T) @ self.spectrum.vectors if project_images else cross
        together = max(1, _CHUNK_BYTES // (8 * n * c))
        parts = []
        for start in range(0, len(filters), together):
            modes = self._modes(filters[start : start + together])
            parts.append(
                self._unstack(left @ (modes if project_images else self.root * (self.spectrum.vectors @ modes)))
            )
        return np.concatenate(parts)

    def _modes(self, filters: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "n columns"]:
        """`diag(filter) V^T D^1/2 Y` for k filters side by side, (n, k c)."""
        kept = np.where(self.spectrum.values > self.spectrum.floor, filters, 0.0)
        return (kept.T[:, :, None] * self.weights[:, None, :]).reshape(kept.shape[1], -1)

    def _unstack(self, columns: Float[np.ndarray, "m columns"]) -> Float[np.ndarray, "k m c"]:
        return np.moveaxis(columns.reshape(len(columns), -1, self.weights.shape[1]), 1, 0)
