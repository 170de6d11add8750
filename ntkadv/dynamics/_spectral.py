"""One symmetric eigendecomposition on the host, in float64, and all that is read off it."""

import warnings
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float
from tqdm.auto import tqdm

from ntkadv._checks import require_finite
from ntkadv._typing import AnyArray

if TYPE_CHECKING:
    from ntkadv.architectures.base import Architecture

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


def spectrum(gram: Float[np.ndarray, "n n"], scale: Float[np.ndarray, " n"]) -> Spectrum:
    """Decompose `S = D^1/2 Theta D^1/2` for positive `D = diag(scale)`.

    The floor is `max(eps lambda_max, |most negative eigenvalue|)`, eps that of the dtype `gram` came in; eigenvalues
    below it carry no information, and negative ones become 0.

    Raises `ValueError` where negative eigenvalues are too large to be rounding.
    """
    eps = float(np.finfo(gram.dtype).eps)
    root = np.sqrt(scale)
    scaled = gram.astype(np.float64)
    scaled += scaled.T
    scaled *= 0.5
    scaled *= root[:, None]
    scaled *= root[None, :]
    values, vectors = _eigh(scaled)
    smallest, largest = float(values[0]), float(max(values[-1], 0.0))
    if smallest < -100 * eps * np.sqrt(len(values)) * largest:
        raise ValueError(
            f"gram is not positive semi-definite: its smallest eigenvalue (weighted by the attack) is {smallest:.3g}, "
            f"its largest {largest:.3g}, where rounding in {gram.dtype} explains no more than "
            f"-{100 * eps * np.sqrt(len(values)) * largest:.1g}. It is no kernel of these images, or was computed "
            f"with too little precision."
        )
    return Spectrum(np.maximum(values, 0.0), vectors, max(eps * largest, -smallest))


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

    def __init__(
        self,
        arch: "Architecture",
        x_train: Float[AnyArray, "n h w ch"],
        targets: Float[AnyArray, "n c"],
        spectrum: Spectrum,
        scale: Float[np.ndarray, " n"],
        *,
        progress: bool,
    ):
        self.arch = arch
        self.x_train = x_train
        self.spectrum = spectrum
        self.root = np.sqrt(scale)[:, None]
        self.weights = spectrum.vectors.T @ (self.root * np.asarray(targets, np.float64))
        self.progress = progress

    def coefficients(self, filters: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n c"]:
        """`D^1/2 V diag(filter) V^T D^1/2 Y` for k filters, in one product."""
        kept = np.where(self.spectrum.values > self.spectrum.floor, filters, 0.0)
        (k, n), c = kept.shape, self.weights.shape[1]
        stacked = (kept.T[:, :, None] * self.weights[:, None, :]).reshape(n, k * c)
        product = self.root * (self.spectrum.vectors @ stacked)
        return np.moveaxis(product.reshape(n, k, c), 1, 0)

    def operator(self, cross: Float[np.ndarray, "m n"], values: Float[np.ndarray, " n"]) -> Float[np.ndarray, "m n"]:
        """`Theta(x, X) D^1/2 V diag(filter) V^T D^1/2` for one filter."""
        kept = np.where(self.spectrum.values > self.spectrum.floor, values, 0.0)
        vectors, root = self.spectrum.vectors, self.root[:, 0]
        return ((cross.astype(np.float64) * root) @ vectors * kept) @ vectors.T * root

    def predict(self, x: Float[AnyArray, "m h w ch"], filters: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k m c"]:
        """`f(x)` for k filters; images and filters are taken in chunks of bounded memory."""
        n, c = self.weights.shape
        k, m = len(filters), len(x)
        rows, columns = max(1, _CHUNK_BYTES // (8 * n)), max(1, _CHUNK_BYTES // (8 * n * c))
        predictions = np.empty((k, m, c))
        chunks = [slice(start, start + columns) for start in range(0, k, columns)]
        solved = self.coefficients(filters) if len(chunks) == 1 else None
        starts = range(0, m, rows)
        for start in tqdm(starts, desc="predictions", disable=not self.progress or len(starts) == 1):
            cross = cross_kernel(self.arch, x[start : start + rows], self.x_train, progress=self.progress)
            for chunk in chunks:
                coefficients = self.coefficients(filters[chunk]) if solved is None else solved
                flat = np.moveaxis(coefficients, 0, 1).reshape(n, -1)
                values = (cross.astype(np.float64) @ flat).reshape(len(cross), -1, c)
                predictions[chunk, start : start + rows] = np.moveaxis(values, 1, 0)
        return predictions


def cross_kernel(
    arch: "Architecture", x1: AnyArray, x2: AnyArray | None = None, *, kernel: str = "ntk", progress: bool = True
) -> Float[np.ndarray, "m n"]:
    """The kernel matrix of the architecture between two sets of images, or of one with itself."""
    from ntkadv.kernels.gram import gram  # the rooms above the kernels load without them

    if kernel == "ntk":
        return gram(arch, x1, x2, kernel="ntk", progress=progress)
    return gram(arch, x1, x2, kernel="nngp", progress=progress)
