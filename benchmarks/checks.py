"""Whether a device computes what it should: products in full float32, decompositions of full size."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import ntkadv as na

__all__ = ["check_precision", "check_spectrum"]

LARGEST_ERROR = 1e-4
"""Relative: float32 leaves 1e-6 or so, TF32 more than 1e-3."""
LARGEST_RESIDUAL = 1e-8
"""Relative, of eigenpairs in float64."""


def check_precision(arch: na.architectures.Architecture, x: np.ndarray) -> dict[str, float]:
    """Relative errors, against float64, of a float32 product (asked for in full, and by default), a kernel, a gradient.

    Raises:
        ArithmeticError: the kernel or its input gradient is less precise than float32 makes it, as in TF32.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    left, right, u = x[:16], x[16:64], rng.standard_normal((len(x[16:64]), 1)).astype(np.float32)

    def total(points: Array, others: Array, weights: Array) -> Array:
        return jnp.sum(jnp.matmul(arch.ntk(points, others), weights, precision="highest"))

    compiled = jax.jit(jax.grad(total))
    single = np.asarray(arch.ntk(left, right)), np.asarray(compiled(left, right, u))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(array, jnp.float64) for array in (left, right, u)]
        double = np.asarray(arch.ntk(*arrays[:2])), np.asarray(compiled(*arrays))
    found = {
        "product_error": _relative(np.asarray(jnp.matmul(a, b, precision="highest")), exact),
        "default_product_error": _relative(np.asarray(jnp.matmul(a, b)), exact),
        "kernel_error": _relative(single[0], double[0]),
        "gradient_error": _relative(single[1], double[1]),
    }
    bad = {name: error for name, error in found.items() if name[:3] != "def" and not error <= LARGEST_ERROR}
    if bad:
        raise ArithmeticError(f"this device does not compute in float32 where it must: relative errors {bad}")
    return found


def check_spectrum(gram: np.ndarray, dynamics: na.TrainingDynamics, pairs: int = 64) -> dict[str, Any]:
    """Decompose the Gram matrix of `dynamics`, and test some eigenpairs: the extreme ones and others at random.

    `residual` is the largest `|Theta v - lambda v| / lambda_max`, `orthogonality` the largest entry of `V^T v - e`.

    Raises:
        ArithmeticError: the decomposition is wrong.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values, vectors, _ = dynamics.spectrum
    n = len(values)
    others = np.random.default_rng(0).integers(0, n, min(pairs, n))
    places = np.unique(np.concatenate([others, [0, n - 1]]))
    chosen = vectors[:, places]
    theta = gram.astype(np.float64)
    residual = np.linalg.norm((theta + theta.T) / 2 @ chosen - chosen * values[places], axis=0).max() / values[-1]
    overlap = vectors.T @ chosen
    overlap[places, np.arange(len(places))] -= 1
    orthogonality = np.abs(overlap).max()
    if not max(residual, orthogonality) <= LARGEST_RESIDUAL:
        raise ArithmeticError(
            f"the eigendecomposition of {n} x {n} is wrong: residual {residual:.1e}, orthogonality {orthogonality:.1e}"
        )
    return {
        "residual": float(residual),
        "orthogonality": float(orthogonality),
        "largest": float(values[-1]),
        "smallest": float(values[0]),
        "warnings": np.array([str(warning.message) for warning in caught], dtype=str),
    }


def _relative(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
