"""Kernels of a finite network at given parameters: NTK, NNGP and ARK, for any function f(params, x).

Networks of this package (`arch.apply`), Equinox (`lambda params, x: jax.vmap(eqx.combine(params, static))(x)`), Flax
(`model.apply`) or stax (`apply_fn`) all have that form: a pytree of parameters, and images to outputs, samples
independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from ntkadv._checks import require_finite, require_int, require_memory
from ntkadv._typing import AnyArray

__all__ = ["empirical_ark", "empirical_nngp", "empirical_ntk", "empirical_ntk_diagonal", "ntk_product"]

Params = Any
Network = Callable[[Params, Array], Array]
Outputs = Literal["full", "trace"]
Method = Literal["jacobian", "products"]

_STRIPPED = 32
"""Images from which on a symmetric block is computed by halves."""


def empirical_ntk(
    f: Network,
    params: Params,
    x1: Float[AnyArray, "n1 *input"],
    x2: Float[AnyArray, "n2 *input"] | None = None,
    *,
    outputs: Outputs = "full",
    method: Method | None = None,
    max_bytes: int = 2**30,
    progress: bool = False,
) -> Float[np.ndarray, "n1 n2 *outputs"]:
    r"""Compute the NTK of a finite network at its parameters.

    .. math:: \Theta(x, x')_{jk} = \partial_\theta f_j(x) \cdot \partial_\theta f_k(x')

    It is computed by tiles of images, in one of two ways:

    - `"jacobian"`: the Jacobians of both sides of a tile, then their product;
    - `"products"`: for each image of the second side and each output, the gradient of that output, and the change of
      all outputs of the first side along it. It is the cheaper way where a pass through the network costs little beside
      its parameters, as in fully connected networks with several outputs.

    Args:
        f: A function of parameters and images (b, ...) to outputs (b, c), differentiable in JAX; samples independent.
        params: A pytree of float arrays.
        x1: Images.
        x2: More of them; None for the symmetric kernel of `x1` with itself, of which half the tiles are computed.
        outputs: `"full"`, all pairs of outputs: (n1, n2, c, c); or `"trace"`, their trace divided by c: (n1, n2), which
            is what tends to the infinite-width kernel.
        method: One of the two ways; by default the one that takes fewer operations.
        max_bytes: Bound on the Jacobians, or gradients, that are there at once; the result comes on top.
        progress: Show a bar over the tiles.

    Returns:
        The kernel, in the dtype of the outputs, on the host.

    Raises:
        TypeError, ValueError: an argument is none of these, or the outputs have another shape or are not finite.
        MemoryError: the Jacobian of one image, or one gradient for `"products"`, exceeds `max_bytes`; or the result
            what the machine has available.

    Source: Novak, Sohl-Dickstein & Schoenholz, ICML 2022, arXiv 2206.08720.
    """
    if outputs not in ("full", "trace"):
        raise ValueError(f"outputs must be 'full' or 'trace', got {outputs!r}.")
    if method not in (None, "jacobian", "products"):
        raise ValueError(f"method must be 'jacobian' or 'products', got {method!r}.")
    require_int("max_bytes", max_bytes, minimum=1)
    size = _size_of(f, params, x1, "x1")
    other = x1 if x2 is None else x2
    if _size_of(f, params, other, "x2") != size:
        raise ValueError(f"x1 and x2 must be images of one shape, got {x1.shape} and {other.shape}.")
    tail = (size.classes,) * 2 if outputs == "full" else ()
    entry = int(np.prod(tail, dtype=int)) * size.dtype.itemsize
    require_memory("The kernel", len(x1) * len(other) * entry, "Ask for outputs='trace', or for fewer images.")
    chosen = method or _cheaper(f, params, x1, size, outputs)
    tile, together = _tile(size, chosen, max_bytes)
    blocks = _Jacobians(f, params, outputs == "trace") if chosen == "jacobian" else None
    kernel = np.empty((len(x1), len(other), *tail), size.dtype)
    steps = list(_pairs(len(x1), len(other), tile, symmetric=x2 is None))
    for rows, columns in tqdm(steps, desc="empirical NTK", disable=not progress or len(steps) < 2, leave=False):
        left, right = _padded(x1, rows, tile), _padded(other, columns, tile)
        is_own = x2 is None and rows == columns
        if blocks is None:
            static = (f, outputs == "trace", together, params)
            block = np.asarray(_own_by_products(*static, left) if is_own else _by_products(*static, left, right))
        else:
            block = np.asarray(blocks(rows.start, left, None if is_own else right))
        block = block[: rows.stop - rows.start, : columns.stop - columns.start]
        mirrored = np.swapaxes(np.moveaxis(block, 0, 1), -1, -2) if tail else block.T
        # Rounding differs from batch to batch, and where a ReLU is about to switch it decides by a whole unit.
        kernel[rows, columns] = (block + mirrored) / 2 if is_own else block
        if x2 is None and not is_own:
            kernel[columns, rows] = mirrored
    require_finite("the kernel", kernel)
    return kernel


def empirical_ntk_diagonal(
    f: Network, params: Params, x: Float[AnyArray, "n *input"], *, max_bytes: int = 2**30
) -> Float[np.ndarray, "n c c"]:
    """Compute the NTK of each image with itself, see `empirical_ntk`."""
    return _each(f, params, x, max_bytes, _own_ntk)


def empirical_ark(
    f: Network, params: Params, x: Float[AnyArray, "n *input"], *, max_bytes: int = 2**30
) -> Float[np.ndarray, "n c c"]:
    r"""Compute the adversarial regularization kernel of each image: the kernel of its input gradients.

    .. math:: \Theta_x(x, x)_{jk} = \partial_x f_j(x) \cdot \partial_x f_k(x)

    At random parameters the infinite-width ARK is its mean. It does not tend to it with the width alone: in the limit
    the outputs are a random function of the image still, and their gradients vary with it, the less the more pixels
    matter.

    Source: Fu & Wang, ICLR 2024, arXiv 2310.06112.
    """
    return _each(f, params, x, max_bytes, _own_ark)


def empirical_nngp(
    f: Network, params: Params, x1: Float[AnyArray, "n1 *input"], x2: Float[AnyArray, "n2 *input"] | None = None
) -> Float[Array, "n1 n2"]:
    r"""Average the products of outputs over the outputs: :math:`\tfrac1c f(x) \cdot f(x')`.

    Over random parameters its mean is the NNGP kernel of an architecture whose outputs are alike.
    """
    _size_of(f, params, x1, "x1")
    left = f(params, jnp.asarray(x1))
    right = left if x2 is None else f(params, jnp.asarray(x2))
    return jnp.matmul(left, right.T, precision="highest") / left.shape[1]


def ntk_product(
    f: Network,
    params: Params,
    x1: Float[AnyArray, "n1 *input"],
    vector: Float[AnyArray, "n2 c"],
    x2: Float[AnyArray, "n2 *input"] | None = None,
) -> Float[Array, "n1 c"]:
    r"""Multiply the NTK by a vector without forming it: one backward and one forward derivative of the network.

    .. math:: \sum_{x', k} \Theta(x, x')_{jk}\, v_k(x')

    Args:
        f: A function of parameters and images to outputs.
        params: A pytree of float arrays.
        x1: Images.
        vector: One row for each image of `x2` (or of `x1`, if that is not given), one column an output.
        x2: Images of the vector.

    Raises:
        TypeError, ValueError: the vector does not fit, or as `empirical_ntk`.
    """
    size = _size_of(f, params, x1, "x1")
    images = x1 if x2 is None else x2
    if vector.shape != (len(images), size.classes):
        raise ValueError(f"vector must have shape {(len(images), size.classes)}, got {vector.shape}.")
    return _product(f, params, jnp.asarray(x1), jnp.asarray(images), jnp.asarray(vector, size.dtype))


def require_params(params: Params) -> None:
    """Require a pytree of float arrays, one at least; `TypeError` otherwise."""
    leaves = jax.tree.leaves(params)
    if not leaves or not all(hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise TypeError("params must be a pytree of float arrays; take the rest out, as by equinox.partition.")


class _Size(NamedTuple):
    """What the cost depends on: outputs, parameters, and the dtype of the outputs."""

    classes: int
    params: int
    dtype: np.dtype
    shape: tuple[int, ...]


def _size_of(f: Network, params: Params, x: AnyArray, name: str) -> _Size:
    """Look at a network without running it.

    Raises:
        TypeError: there are no parameters, or they or the outputs are no floats.
        ValueError: there are no images, or the outputs are not (n, c).
    """
    if not hasattr(x, "shape") or x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"{name} must be a non-empty batch of images, got {getattr(x, 'shape', type(x).__name__)}.")
    require_params(params)
    leaves = jax.tree.leaves(params)
    outputs = jax.eval_shape(f, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    if not hasattr(outputs, "dtype") or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(f"f must return one array of floats, got {outputs}; return the outputs only, without state.")
    if outputs.ndim != 2 or outputs.shape[0] != len(x):
        raise ValueError(f"f must return outputs ({len(x)}, c) for images {x.shape}, got {outputs.shape}.")
    return _Size(outputs.shape[1], sum(leaf.size for leaf in leaves), np.dtype(outputs.dtype), tuple(x.shape[1:]))


def _cheaper(f: Network, params: Params, x: AnyArray, size: _Size, outputs: Outputs) -> Method:
    """Count the operations for a pair of images: products of Jacobians, or three passes for each output."""
    image = jax.ShapeDtypeStruct((1, *size.shape), x.dtype)
    cost = jax.jit(f).lower(params, image).cost_analysis()
    forward = (cost or {}).get("flops", float("inf"))
    contraction = 2 * size.params * size.classes ** (2 if outputs == "full" else 1)
    return "products" if 3 * forward * size.classes < contraction else "jacobian"


def _tile(size: _Size, method: Method, max_bytes: int) -> tuple[int, int]:
    """Give how many images a tile has on a side, and of how many outputs gradients are taken at once."""
    gradient = size.params * size.dtype.itemsize
    if method == "products":
        # A gradient, and the change of the weights along it; those of one image only, however many the tile has.
        together = min(max_bytes // (3 * gradient), size.classes)
        if together < 1:
            raise MemoryError(
                f"One gradient, of {size.params} parameters, takes {gradient} bytes, three times over; max_bytes is "
                f"{max_bytes}. Raise it, or use ntk_product."
            )
        return 64, together
    one = size.classes * gradient
    # Two Jacobians and a copy while they are made.
    tile = max_bytes // (3 * one)
    if tile < 1:
        raise MemoryError(
            f"The Jacobian of one image, {size.classes} outputs by {size.params} parameters, takes {one} bytes, three "
            f"times over; max_bytes is {max_bytes}. Raise it, or use ntk_product, or method='products'."
        )
    return min(tile, 128), size.classes


def _pairs(rows: int, columns: int, tile: int, *, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    for i in range(0, rows, tile):
        for j in range(i if symmetric else 0, columns, tile):
            yield slice(i, min(i + tile, rows)), slice(j, min(j + tile, columns))


def _padded(x: AnyArray, part: slice, tile: int) -> Array:
    """Cut out images, the last repeated to fill the tile, so that one program serves all."""
    images = np.asarray(x[part])
    missing = min(tile, len(x)) - len(images)
    return jnp.asarray(np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1), mode="edge"))


def _jacobian(f: Network, params: Params, x: Array) -> list[Array]:
    """Jacobian of each image, (n, c, parameters of the leaf) for each leaf."""

    def one(image: Array) -> Params:
        return jax.jacrev(lambda p: f(p, image[None])[0])(params)

    leaves = jax.tree.leaves(jax.vmap(one)(x))
    classes = jax.eval_shape(f, params, x).shape[1]
    return [leaf.reshape(len(x), classes, -1) for leaf in leaves]


class _Jacobians:
    """Blocks of the kernel by Jacobians; that of the left side is kept while a row of tiles is worked through."""

    def __init__(self, f: Network, params: Params, trace: bool):
        self.f, self.params, self.trace = f, params, trace
        self.row, self.left = -1, []

    def __call__(self, row: int, left: Array, right: Array | None) -> Array:
        """Compute the block of two sides, or of the left one with itself."""
        if row != self.row:
            self.left = []  # before the next is made
            self.row, self.left = row, _jacobians(self.f, self.params, left)
        if right is None:
            return _contracted_with_itself(self.trace, self.left)
        return _contracted(self.trace, self.left, _jacobians(self.f, self.params, right))


_jacobians = jax.jit(_jacobian, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _contracted(trace: bool, left: list[Array], right: list[Array]) -> Array:
    equation = "nkp,mkp->nm" if trace else "njp,mkp->nmjk"
    total = sum(jnp.einsum(equation, one, other, precision="highest") for one, other in zip(left, right, strict=True))
    return jnp.asarray(total) / (left[0].shape[1] if trace else 1)


@partial(jax.jit, static_argnums=0)
def _contracted_with_itself(trace: bool, jacobian: list[Array]) -> Array:
    def strip(a: int, b: int) -> Array:
        return _contracted(trace, [leaf[a:b] for leaf in jacobian], [leaf[a:] for leaf in jacobian])

    return _mirrored(trace, len(jacobian[0]), strip)


def _mirrored(trace: bool, n: int, strip: Callable[[int, int], Array]) -> Array:
    """Put a symmetric block together of four strips, each from the diagonal on: five eighths of the work.

    Few images are one strip: there what is read costs more than what is computed.

    Args:
        trace: Whether the block is (n, n), not (n, n, c, c).
        n: Number of images.
        strip: Gives the rows a, ..., b - 1 from column a on.
    """
    edges = np.linspace(0, n, 5 if n >= _STRIPPED else 2).astype(int).tolist()
    rows: list[Array] = []
    for a, b in pairwise(edges):
        upper = strip(a, b)
        left = [jnp.swapaxes(row[:, a:b], 0, 1) for row in rows]
        rows.append(jnp.concatenate([*(part if trace else jnp.swapaxes(part, 2, 3) for part in left), upper], axis=1))
    return jnp.concatenate(rows)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _own_by_products(f: Network, trace: bool, together: int, params: Params, x: Array) -> Array:
    def strip(a: int, b: int) -> Array:
        columns = jnp.swapaxes(_by_products(f, trace, together, params, x[a:], x[a:b]), 0, 1)
        return columns if trace else jnp.swapaxes(columns, 2, 3)

    return _mirrored(trace, len(x), strip)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _by_products(f: Network, trace: bool, together: int, params: Params, x1: Array, x2: Array) -> Array:
    classes = jax.eval_shape(f, params, x1).shape[1]

    def column(image: Array) -> Array:
        outputs, pull = jax.vjp(lambda p: f(p, image[None])[0], params)

        def along(basis: Array) -> Array:
            (gradient,) = pull(basis)
            change = jax.jvp(lambda p: f(p, x1), (params,), (gradient,))[1]
            return change @ basis if trace else change

        with jax.default_matmul_precision("highest"):
            changes = jax.lax.map(along, jnp.eye(classes, dtype=outputs.dtype), batch_size=together)
        return jnp.mean(changes, axis=0) if trace else jnp.transpose(changes, (1, 2, 0))

    return jnp.moveaxis(jax.lax.map(column, x2), 0, 1)


@partial(jax.jit, static_argnums=0)
def _product(f: Network, params: Params, x1: Array, x2: Array, vector: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        (gradient,) = jax.vjp(lambda p: f(p, x2), params)[1](vector)
        return jax.jvp(lambda p: f(p, x1), (params,), (gradient,))[1]


def _each(f: Network, params: Params, x: AnyArray, max_bytes: int, own: Callable[..., Array]) -> np.ndarray:
    """Compute a kernel of each image with itself, as many at a time as `max_bytes` allows."""
    require_int("max_bytes", max_bytes, minimum=1)
    size = _size_of(f, params, x, "x")
    tile = min(_tile(size, "jacobian", max_bytes)[0], len(x))
    blocks = [
        np.asarray(own(f, params, _padded(x, slice(i, min(i + tile, len(x))), tile)))[: len(x) - i]
        for i in range(0, len(x), tile)
    ]
    kernel = np.concatenate(blocks)
    require_finite("the kernel", kernel)
    return kernel


@partial(jax.jit, static_argnums=0)
def _own_ntk(f: Network, params: Params, x: Array) -> Array:
    jacobian = _jacobian(f, params, x)
    return jnp.asarray(sum(jnp.einsum("njp,nkp->njk", leaf, leaf, precision="highest") for leaf in jacobian))


@partial(jax.jit, static_argnums=0)
def _own_ark(f: Network, params: Params, x: Array) -> Array:
    def one(image: Array) -> Array:
        gradient = jax.jacrev(lambda z: f(params, z[None])[0])(image)
        flat = gradient.reshape(len(gradient), -1)
        return jnp.matmul(flat, flat.T, precision="highest")

    return jax.vmap(one)(x)
