r"""phi(S) y and its exact derivatives: the one linear-algebra operation behind the closed form.

With `D = diag(xi) >= 0` and `S = D^1/2 Theta D^1/2`, the closed form of adversarial training (Fu & Wang, ICLR 2024,
arXiv 2310.06112) needs

`u = Theta^-1 (I - exp(-Theta D)) Y = D^1/2 phi(S) D^1/2 Y`,    `phi(s) = (1 - e^-s) / s`.

The right-hand side needs no inverse and no matrix exponential, never overflows, and holds for singular `Theta` and
for zeros in `D`. The prediction at `x` is `Theta(x, X) u`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from ntkadv._typing import AnyArray
from ntkadv.dynamics import _lanczos
from ntkadv.dynamics._divided import exp_pair, growth_mean, growth_overlap, phi
from ntkadv.dynamics._lanczos import Projection

__all__ = ["PhiSolution", "exp_pair", "growth_mean", "growth_overlap", "phi", "solve", "training_coefficients"]

Method = Literal["krylov", "eigh"]


class PhiSolution(NamedTuple):
    """What `solve` found, and how.

    `coefficients` is u. `products` counts products of `theta` with a block of `c` columns. `error_bound`
    bounds `|D^-1/2 (error of u)| / |D^-1/2 u|`: truncation of the Krylov space plus rounding of the order eps |S|.
    `converged` says whether the answer meets the tolerance, `fell_back` whether that took the eigendecomposition
    although Krylov was asked for. Only `coefficients` carries a gradient.
    """

    coefficients: Float[Array, "n c"]
    products: Int[Array, ""]
    error_bound: Float[Array, ""]
    converged: Bool[Array, ""]
    fell_back: Bool[Array, ""]


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """How to solve; static under `jit`."""

    method: Method
    tol: float
    counts: tuple[int, ...]
    fallback: bool


def training_coefficients(
    theta: Float[AnyArray, "n n"],
    xi: Float[AnyArray, " n"],
    targets: Float[AnyArray, "n c"],
    *,
    method: Method = "krylov",
    tol: float | None = None,
    max_blocks: int = 48,
    fallback: bool = True,
) -> Float[Array, "n c"]:
    """`u = D^1/2 phi(D^1/2 Theta D^1/2) D^1/2 Y`: `solve` for those who need the coefficients only.

    Calling `jax.vjp` on it runs one Krylov solve forward and one for the cotangent; the forward one is not repeated.
    """
    solution = _solve_checked(theta, xi, targets, method, tol, max_blocks, fallback)
    return solution.coefficients


def solve(
    theta: Float[AnyArray, "n n"],
    xi: Float[AnyArray, " n"],
    targets: Float[AnyArray, "n c"],
    *,
    method: Method = "krylov",
    tol: float | None = None,
    max_blocks: int = 48,
    fallback: bool = True,
) -> PhiSolution:
    r"""`u = D^1/2 phi(S) D^1/2 Y` with its diagnostics, in the dtype of the arguments.

    `theta` (n, n) is symmetric positive semi-definite (negative Ritz values are read as rounding, hence as 0), `xi`
    (n,) holds the non-negative entries of D, `targets` (n, c). Works under `jit`, `grad` and `vmap`; the
    problems of a `vmap` are solved one after another, each to its own stopping point.

    `method="krylov"` grows a block Krylov space to at most `max_blocks` blocks (one product with `theta` each)
    until the relative error is below `tol` (1e-10 in float64, 1e-5 in float32) or below what rounding allows. Where
    that is not reached, or where the space would be no smaller than the problem, `fallback=True` takes the
    eigendecomposition (with a `RuntimeWarning` outside `jit`) and `fallback=False` returns the best
    answer with `converged=False`; a gradient that rests on a Krylov space that did not converge is then NaN.
    `method="eigh"` always takes the eigendecomposition.

    The gradient is exact in `xi` and `targets`, also where `xi` is 0 and where eigenvalues repeat. With `G` the
    cotangent of u,

    `dL/dxi_i = int_0^1 sum_c r_ic(t) s_ic(1-t) dt`,    `r(t) = exp(-t Theta D) Y`,    `s(t) = exp(-t Theta D) G`,

    and `dL/dY = D^1/2 phi(S) D^1/2 G`. The integral is summed in closed form over the two eigenbases.

    Raises `ValueError` for shapes that do not match, a negative `xi` (outside `jit`) or settings out of range,
    `TypeError` for dtypes that are not one floating dtype, `NotImplementedError` for a gradient in `theta`.
    """
    return _solve_checked(theta, xi, targets, method, tol, max_blocks, fallback)


def _solve_checked(
    theta: AnyArray,
    xi: AnyArray,
    targets: AnyArray,
    method: Method,
    tol: float | None,
    max_blocks: int,
    fallback: bool,
) -> PhiSolution:
    theta, xi, targets = jnp.asarray(theta), jnp.asarray(xi), jnp.asarray(targets)
    _check_arrays(theta, xi, targets)
    if method not in ("krylov", "eigh"):
        raise ValueError(f"method must be 'krylov' or 'eigh', got {method!r}")
    if max_blocks < 2:
        raise ValueError(f"max_blocks must be at least 2, got {max_blocks}")
    if tol is None:
        tol = 1e-10 if theta.dtype == jnp.float64 else 1e-5
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    counts = _lanczos.stages(targets.shape[0], targets.shape[1], max_blocks) if method == "krylov" else ()
    settings = _Settings(method=method, tol=float(tol), counts=counts, fallback=fallback)
    solution = _compiled(settings, theta, xi, targets)
    solution = solution._replace(error_bound=lax.stop_gradient(solution.error_bound))

    cut_short = bool(counts) and counts[-1] == max_blocks
    if cut_short and not isinstance(solution.fell_back, Tracer) and bool(solution.fell_back):
        warnings.warn(
            f"{max_blocks} Krylov blocks did not reach tol={tol:g} (the spectrum of D^1/2 Theta D^1/2 is too wide, as "
            "at late times), so the eigendecomposition was used. Pass method='eigh' to go there at once.",
            RuntimeWarning,
            stacklevel=3,
        )
    return solution


def _check_arrays(theta: Array, xi: Array, targets: Array) -> None:
    n = theta.shape[0] if theta.ndim else 0
    if theta.shape != (n, n) or n == 0:
        raise ValueError(f"theta must be a square matrix (n, n), got shape {theta.shape}")
    if xi.shape != (n,):
        raise ValueError(f"xi must have shape ({n},), one entry per row of theta, got {xi.shape}")
    if targets.ndim != 2 or targets.shape[0] != n or targets.shape[1] == 0:
        raise ValueError(f"targets must have shape ({n}, c), one row per row of theta, got {targets.shape}")
    dtypes = {name: array.dtype for name, array in (("theta", theta), ("xi", xi), ("targets", targets))}
    if len(set(dtypes.values())) != 1 or not jnp.issubdtype(theta.dtype, jnp.floating):
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"theta, xi and targets must share one floating dtype, got {listed}")
    if not isinstance(xi, Tracer) and bool(jnp.any(xi < 0)):
        raise ValueError(f"xi must be non-negative, got a smallest entry of {float(jnp.min(xi)):g}")


def _forward(
    settings: _Settings, theta: Float[Array, "n n"], xi: Float[Array, " n"], targets: Float[Array, "n c"]
) -> tuple[PhiSolution, tuple[Array, Array] | tuple[Projection, Array, Array]]:
    """Solve, and keep what the gradient needs: the eigensystem, or the Krylov projection, its stage and its fate."""
    no, yes = jnp.asarray(False), jnp.asarray(True)
    if not settings.counts:
        values, vectors = _eigensystem(theta, xi)
        coefficients, bound = _eigen_solution(values, vectors, xi, targets)
        count = jnp.zeros((), jnp.int32)
        solution = PhiSolution(coefficients, count, bound, yes, jnp.asarray(settings.method == "krylov"))
        return solution, (values, vectors)
    run = _lanczos.krylov(theta, xi, targets, settings.counts, settings.tol)
    kept = run.projection, run.stage, run.converged
    if not settings.fallback:
        return PhiSolution(run.coefficients, run.products, run.error_bound, run.converged, no), kept
    coefficients, bound = lax.cond(
        run.converged,
        lambda: (run.coefficients, run.error_bound),
        lambda: _eigen_solution(*_eigensystem(theta, xi), xi, targets),
    )
    return PhiSolution(coefficients, run.products, bound, yes, ~run.converged), kept


def _one_by_one(function: Callable, *arguments: Any) -> Any:
    """Call `function`; under `vmap` in a loop, as a batched `lax.cond` would take every branch for everyone."""
    return jax.custom_batching.sequential_vmap(function)(*arguments)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(settings: _Settings, theta: Array, xi: Array, targets: Array) -> PhiSolution:
    return _one_by_one(partial(_forward, settings), theta, xi, targets)[0]


def _solve_fwd(settings: _Settings, theta: CustomVJPPrimal, xi: CustomVJPPrimal, targets: CustomVJPPrimal):
    if theta.perturbed:
        raise NotImplementedError(
            "the coefficients are differentiable in xi and targets, not in theta; wrap theta in jax.lax.stop_gradient "
            "if the Gram matrix is meant to be a constant"
        )
    arguments = theta.value, xi.value, targets.value
    solution, kept = _one_by_one(partial(_forward, settings), *arguments)
    return solution, (*arguments, kept)


def _solve_bwd(settings: _Settings, residuals: tuple, cotangent: PhiSolution):
    theta, xi, targets, kept = residuals
    outer = cotangent[0]
    if isinstance(outer, SymbolicZero):
        return None, jnp.zeros_like(xi), jnp.zeros_like(targets)
    return None, *_one_by_one(partial(_backward, settings), theta, xi, targets, kept, outer)


def _backward(
    settings: _Settings,
    theta: Float[Array, "n n"],
    xi: Float[Array, " n"],
    targets: Float[Array, "n c"],
    kept: tuple,
    outer: Float[Array, "n c"],
) -> tuple[Float[Array, " n"], Float[Array, "n c"]]:
    """`dL/dxi` and `dL/dY` from what the forward solution kept and a solution for the cotangent."""
    if not settings.counts:
        values, vectors = kept
        return _eigen_gradient(values, vectors, theta, xi, targets, outer)
    projection, stage, converged = kept
    adjoint = _lanczos.krylov(theta, xi, outer, settings.counts, settings.tol)
    columns = targets.shape[1]

    def at(blocks: int):
        def gradient(left: Projection, right: Projection) -> Array:
            size = blocks * columns
            left, right = (Projection(p.images[:, :size], p.values[:size], p.weights[:size]) for p in (left, right))
            return _xi_gradient(targets, outer, left, right)

        return gradient

    def from_projections() -> tuple[Array, Array]:
        reached = jnp.maximum(stage, adjoint.stage)
        branches = [at(blocks) for blocks in settings.counts]
        return lax.switch(reached, branches, projection, adjoint.projection), adjoint.coefficients

    def otherwise() -> tuple[Array, Array]:
        if settings.fallback:
            values, vectors = _eigensystem(theta, xi)
            return _eigen_gradient(values, vectors, theta, xi, targets, outer)
        return jnp.full_like(xi, jnp.nan), jnp.full_like(targets, jnp.nan)

    return lax.cond(converged & adjoint.converged, from_projections, otherwise)


_solve.defvjp(_solve_fwd, _solve_bwd, symbolic_zeros=True)
_compiled = jax.jit(_solve, static_argnums=0)


def _xi_gradient(
    targets: Float[Array, "n c"], outer: Float[Array, "n c"], left: Projection, right: Projection
) -> Float[Array, " n"]:
    """`int_0^1 sum_c r_ic(t) s_ic(1-t) dt` from `r = Y - P h_a(t) alpha` and `s = G - Q h_b(t) beta`.

    `sum_c [Y G - Y (Q H_b beta) - G (P H_a alpha)] + sum_ab P_ia M_ab (alpha beta^T)_ab Q_ib`.
    """
    seen = _matmul(left.images, growth_mean(left.values)[:, None] * left.weights)
    outer_seen = _matmul(right.images, growth_mean(right.values)[:, None] * right.weights)
    coupling = growth_overlap(left.values, right.values) * _matmul(left.weights, right.weights.T)
    linear = jnp.sum(targets * (outer - outer_seen) - outer * seen, axis=1)
    return linear + jnp.sum(_matmul(left.images, coupling) * right.images, axis=1)


def _eigensystem(theta: Float[Array, "n n"], xi: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues (negative ones read as 0) and eigenvectors of `D^1/2 Theta D^1/2`."""
    root = jnp.sqrt(xi)
    scaled = root[:, None] * theta * root[None, :]
    values, vectors = jnp.linalg.eigh((scaled + scaled.T) / 2)
    return jnp.maximum(values, jnp.zeros_like(values)), vectors


def _eigen_solution(
    values: Float[Array, " n"], vectors: Float[Array, "n n"], xi: Float[Array, " n"], targets: Float[Array, "n c"]
) -> tuple[Float[Array, "n c"], Float[Array, ""]]:
    """`u` and the relative effect of rounding on it."""
    root = jnp.sqrt(xi)[:, None]
    weights = _matmul(vectors.T, root * targets)
    result = phi(values)[:, None] * weights
    size = jnp.linalg.norm(result)
    bound = _lanczos.relative(_lanczos.rounding_error(values, weights, size), size)
    return root * _matmul(vectors, result), bound


def _eigen_gradient(
    values: Float[Array, " n"],
    vectors: Float[Array, "n n"],
    theta: Float[Array, "n n"],
    xi: Float[Array, " n"],
    targets: Float[Array, "n c"],
    outer: Float[Array, "n c"],
) -> tuple[Float[Array, " n"], Float[Array, "n c"]]:
    """`dL/dxi` and `dL/dY` with the full eigenbasis as both Krylov spaces."""
    root = jnp.sqrt(xi)[:, None]
    images = _matmul(theta, root * vectors)
    left = Projection(images, values, _matmul(vectors.T, root * targets))
    right = Projection(images, values, _matmul(vectors.T, root * outer))
    return _xi_gradient(targets, outer, left, right), _eigen_solution(values, vectors, xi, outer)[0]


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
