"""phi(S) times a block of vectors, from a block Krylov space that grows until the answer is good enough."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ntkadv.dynamics._divided import phi

# Few, since each is compiled for itself; 8 blocks are what a step of Adv-NTK needs.
_STAGES = (8, 16, 32, 48)
_HEAD = np.polynomial.legendre.leggauss(8)
_TAIL = np.polynomial.legendre.leggauss(32)


class Projection(NamedTuple):
    """The residual flow of a block inside a Krylov space, in the eigenbasis of the projected matrix.

    `exp(-t Theta D) Y = Y - P diag(h_a(t)) alpha` with `P = Theta D^1/2 V` for Ritz vectors `V`, Ritz values
    `a` and `alpha = V^T D^1/2 Y`. Columns beyond the space that was built are zero.
    """

    images: Float[Array, "n k"]
    values: Float[Array, " k"]
    weights: Float[Array, "k c"]


class KrylovOutcome(NamedTuple):
    """`coefficients` = D^1/2 phi(S) D^1/2 Y, how they were reached, and how far off they can be (relative)."""

    coefficients: Float[Array, "n c"]
    projection: Projection
    stage: Int[Array, ""]
    products: Int[Array, ""]
    error_bound: Float[Array, ""]
    converged: Bool[Array, ""]


class _Space(NamedTuple):
    """An orthonormal basis `V`, `W = Theta D^1/2 V`, and the next block with its factor: `S V_m = ... + X B`."""

    basis: Float[Array, "n k"]
    images: Float[Array, "n k"]
    block: Float[Array, "n c"]
    factor: Float[Array, "c c"]
    scale: Float[Array, ""]


class _Answer(NamedTuple):
    """The projected problem solved, and the result of the stopping test."""

    values: Float[Array, " k"]
    vectors: Float[Array, "k k"]
    weights: Float[Array, "k c"]
    result: Float[Array, "k c"]
    error_bound: Float[Array, ""]
    converged: Bool[Array, ""]


def stages(n: int, c: int, max_blocks: int) -> tuple[int, ...]:
    """Numbers of blocks after which the result is tested; empty where a Krylov space is no smaller than the problem."""
    limit = min(max_blocks, n // c)
    return (*(m for m in _STAGES if m < limit), limit) if limit >= 2 else ()


def krylov(
    theta: Float[Array, "n n"], xi: Float[Array, " n"], block: Float[Array, "n c"], counts: tuple[int, ...], tol: float
) -> KrylovOutcome:
    """`D^1/2 phi(S) D^1/2 Y` from the block Krylov space of `S = D^1/2 Theta D^1/2` and `D^1/2 Y`.

    Full re-orthogonalisation (twice), rank-revealing block orthonormalisation (a lost direction becomes a zero
    column), Rayleigh-Ritz projection. `counts` lists the numbers of blocks after which the answer is tested; it grows
    only while the test is not met, also under `jit`.

    The test is an a-posteriori bound. Let `y(s) = e^{-sT} E_1 beta` be the projected flow. The flow in the space
    misses `S V y = V T y + X B E_m^T y` by the last term, and `e^{-sS}` does not expand, so

    `|error of phi(S) D^1/2 Y| <= int_0^1 (1 - s) |B E_m^T y(s)| ds`.

    Accepted when this is below `tol` times the result, or below what rounding in this dtype does to the result
    anyway; and, lest a bound be lucky, when the last block moved the result by less than `sqrt(tol)`.
    """
    root = jnp.sqrt(xi)
    columns, largest = block.shape[1], counts[-1] * block.shape[1]
    eps = jnp.finfo(block.dtype).eps
    start = root[:, None] * block
    first, beta, _ = _orthonormal(start, columns * eps * jnp.linalg.norm(start))
    empty = jnp.zeros((block.shape[0], 0), block.dtype)
    space = _Space(empty, empty, first, jnp.zeros_like(beta), jnp.zeros((), block.dtype))

    def climb(space: _Space, stage: int) -> KrylovOutcome:
        space = _grow(theta, root, space, counts[stage])
        answer = _project(root, space, beta, tol)

        def finish() -> KrylovOutcome:
            extra = largest - counts[stage] * columns
            projection = Projection(
                jnp.pad(_matmul(space.images, answer.vectors), ((0, 0), (0, extra))),
                jnp.pad(answer.values, (0, extra)),
                jnp.pad(answer.weights, ((0, extra), (0, 0))),
            )
            coefficients = root[:, None] * _matmul(space.basis, answer.result)
            reached = jnp.asarray(stage, jnp.int32), jnp.asarray(counts[stage], jnp.int32)
            return KrylovOutcome(coefficients, projection, *reached, answer.error_bound, answer.converged)

        if stage == len(counts) - 1:
            return finish()
        return lax.cond(answer.converged, finish, lambda: climb(space, stage + 1))

    return climb(space, 0)


def _grow(theta: Float[Array, "n n"], root: Float[Array, " n"], space: _Space, blocks: int) -> _Space:
    """Extend the space to `blocks` blocks: one product with `theta` each."""
    columns = space.block.shape[1]
    done = space.basis.shape[1] // columns
    room = ((0, 0), (0, (blocks - done) * columns))
    space = space._replace(basis=jnp.pad(space.basis, room), images=jnp.pad(space.images, room))
    eps = jnp.finfo(space.block.dtype).eps

    def step(j: Int[Array, ""], space: _Space) -> _Space:
        at = (jnp.zeros_like(j), j * columns)
        image = _matmul(theta, root[:, None] * space.block)
        basis = lax.dynamic_update_slice(space.basis, space.block, at)
        images = lax.dynamic_update_slice(space.images, image, at)
        applied = root[:, None] * image
        scale = jnp.maximum(space.scale, jnp.linalg.norm(applied))
        block, factor, lost = _orthonormal(_without(basis, applied), 8 * eps * scale)
        # A direction that barely survived carries the rounding of all of `applied`: the second pass is on unit vectors.
        block, change = jnp.linalg.qr(_without(basis, block))
        block = jnp.where(lost[None, :], jnp.zeros_like(block), block)
        factor = _matmul(jnp.where(lost[:, None], jnp.zeros_like(change), change), factor)
        return _Space(basis, images, block, factor, scale)

    return lax.fori_loop(done, blocks, step, space)


def _project(root: Float[Array, " n"], space: _Space, beta: Float[Array, "c c"], tol: float) -> _Answer:
    """Solve in the space and test the result (see `krylov`)."""
    columns, dtype = beta.shape[0], beta.dtype
    projected = _matmul(space.basis.T, root[:, None] * space.images)
    values, vectors, weights, result = _solve_projected(projected, beta)
    *_, shorter = _solve_projected(projected[:-columns, :-columns], beta)
    change = jnp.linalg.norm(result - jnp.pad(shorter, ((0, columns), (0, 0))))

    nodes, measure = _graded_quadrature(values[-1])
    decay = jnp.exp(-nodes[:, None] * values[None, :])
    last = _matmul(space.factor, vectors[-columns:])
    residual = jnp.einsum("ik,jk,kl->jil", last, decay, weights, precision="highest")
    truncation = jnp.dot(measure, jnp.sqrt(jnp.sum(residual**2, axis=(1, 2))))
    size = jnp.linalg.norm(result)
    rounding = rounding_error(values, weights, size)

    limit = jnp.asarray(tol, dtype)
    small_bound = truncation <= jnp.maximum(limit * size, rounding)
    small_change = change <= jnp.maximum(jnp.sqrt(limit) * size, rounding)
    bound = relative(truncation + rounding, size)
    return _Answer(values, vectors, weights, result, bound, small_bound & small_change)


def _solve_projected(
    projected: Float[Array, "k k"], beta: Float[Array, "c c"]
) -> tuple[Float[Array, " k"], Float[Array, "k k"], Float[Array, "k c"], Float[Array, "k c"]]:
    """Ritz values and vectors, `alpha = U^T E_1 beta`, and `phi(T) E_1 beta`."""
    values, vectors = jnp.linalg.eigh((projected + projected.T) / 2)
    values = jnp.maximum(values, jnp.zeros_like(values))
    weights = _matmul(vectors[: beta.shape[0]].T, beta)
    return values, vectors, weights, _matmul(vectors, phi(values)[:, None] * weights)


def rounding_error(
    values: Float[Array, " k"], weights: Float[Array, "k c"], size: Float[Array, ""]
) -> Float[Array, ""]:
    """Estimate what rounding does to `phi(S) D^1/2 Y`: a backward error of `eps |S|` in `S`, plus the last digit.

    `eps |S| int_0^1 (1 - s) |e^{-sS} D^1/2 Y| ds + 16 eps |phi(S) D^1/2 Y|`.
    """
    nodes, measure = _graded_quadrature(values[-1])
    squares = jnp.sum(weights**2, axis=1)
    norms = jnp.sqrt(_matmul(jnp.exp(-2 * nodes[:, None] * values[None, :]), squares))
    return jnp.finfo(values.dtype).eps * (values[-1] * jnp.dot(measure, norms) + 16 * size)


def relative(error: Float[Array, ""], size: Float[Array, ""]) -> Float[Array, ""]:
    """`error / size`, 0 for an exact zero."""
    return jnp.where(error == 0, jnp.zeros_like(error), error / jnp.where(error == 0, jnp.ones_like(size), size))


def _graded_quadrature(largest: Float[Array, ""]) -> tuple[Float[Array, " j"], Float[Array, " j"]]:
    """Nodes for `int_0^1 (1 - s) f(s) ds`, where `f` changes on every scale from `1 / largest` to 1."""
    one = jnp.ones_like(largest)
    lowest = one / jnp.maximum(largest, one)
    head, head_weights = (jnp.asarray(part, largest.dtype) for part in _HEAD)
    tail, tail_weights = (jnp.asarray(part, largest.dtype) for part in _TAIL)
    span = -jnp.log(lowest)
    near, far = lowest * (head + 1) / 2, jnp.exp(-span * (1 - tail) / 2)
    nodes = jnp.concatenate([near, far])
    measure = jnp.concatenate([lowest * head_weights / 2, far * span * tail_weights / 2])
    return nodes, (1 - nodes) * measure


def _orthonormal(
    block: Float[Array, "n c"], floor: Float[Array, ""]
) -> tuple[Float[Array, "n c"], Float[Array, "c c"], Bool[Array, " c"]]:
    """`block = X B` with orthonormal or, from the first singular value at or below `floor` on, zero columns."""
    orthogonal, triangle = jnp.linalg.qr(block)
    left, sizes, right = jnp.linalg.svd(triangle)
    lost = sizes <= floor  # False for NaN, which must stay visible
    basis = jnp.where(lost[None, :], jnp.zeros_like(block), _matmul(orthogonal, left))
    return basis, jnp.where(lost, jnp.zeros_like(sizes), sizes)[:, None] * right, lost


def _without(basis: Float[Array, "n k"], block: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """Return the part of `block` orthogonal to `basis`."""
    return block - _matmul(basis, _matmul(basis.T, block))


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
