"""Convolutions in the one layout that XLA computes fast inside loops on a CPU."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core.primitives import conv_general_dilated_p


def canonical_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the same function with every convolution in the layout NHWC, HWIO, for CPUs; elsewhere as it is.

    XLA brings convolutions into that layout itself, but on a CPU not inside the body of a loop, where others, and among
    them the input gradients of all, take several times as long (jax-ml/jax#12868). Derivatives must be taken inside
    `function`: those taken of the result bring their own layout. Arguments are arrays or pytrees of them.
    """

    @wraps(function)
    def wrapped(*arguments: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*arguments)
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        if not _has_convolutions(closed):
            return function(*arguments)
        outputs = _evaluate(closed, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return wrapped


def _has_convolutions(value: Any) -> bool:
    """Whether there is a convolution in a program, or in what is a parameter of one of its equations."""
    if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
        return any(
            eqn.primitive is conv_general_dilated_p or any(map(_has_convolutions, eqn.params.values()))
            for eqn in value.eqns
        )
    return isinstance(value, tuple) and any(map(_has_convolutions, value))


def _evaluate(closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Run a program with its convolutions in their layout, those inside loops and branches too."""
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    values.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(closed.jaxpr.invars, arguments, strict=True))
    for eqn in closed.jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            if eqn.primitive is conv_general_dilated_p:
                found = _convolve(*inputs, **eqn.params)
            else:
                parameters = {name: _rewritten(value) for name, value in eqn.params.items()}
                found = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(parameters))
        values.update(zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _rewritten(value: Any) -> Any:
    """Give a parameter of an equation, programs in it rewritten."""
    if not _has_convolutions(value):
        return value
    if isinstance(value, tuple):
        return tuple(map(_rewritten, value))
    # From JAX 0.12 on there is one class for programs, closed or not.
    if not isinstance(value, core.ClosedJaxpr):
        return _rewritten(core.ClosedJaxpr(value, ())).jaxpr
    shapes = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
        for aval in value.in_avals
    ]
    return jax.make_jaxpr(lambda *arguments: _evaluate(value, arguments))(*shapes)


def _convolve(lhs: Any, rhs: Any, *, dimension_numbers: Any, **parameters: Any) -> Any:
    spatial = lhs.ndim - 2
    images, kernel, result = dimension_numbers.lhs_spec, dimension_numbers.rhs_spec, dimension_numbers.out_spec
    lhs = jnp.transpose(lhs, (images[0], *images[2:], images[1]))
    rhs = jnp.transpose(rhs, (*kernel[2:], kernel[1], kernel[0]))
    channels_last = (0, spatial + 1, *range(1, spatial + 1))
    kernel_last = (spatial + 1, spatial, *range(spatial))
    canonical = lax.ConvDimensionNumbers(channels_last, kernel_last, channels_last)
    convolve = partial(conv_general_dilated_p.bind, dimension_numbers=canonical, **parameters)
    if lhs.shape[-1] != rhs.shape[-2]:  # channels in groups
        out = convolve(lhs, rhs)
    elif _is_filter_gradient(convolve, lhs, rhs):
        out = _by_features(convolve, lhs, rhs)
    else:
        out = convolve(*_with_even_channels(lhs, rhs))
    axes = [0] * out.ndim
    for here, there in zip(result, channels_last, strict=True):
        axes[here] = there
    return jnp.transpose(out, axes)


# Pixels of the images whose share in the gradient of a filter is computed at a time, and the fewest such images.
_PIXELS, _IMAGES = 2048, 8


def _is_filter_gradient(convolve: Callable[[Any, Any], Any], lhs: Any, rhs: Any) -> bool:
    """Whether the "kernel" is larger than the result, as where the images of a batch are features to be summed over."""
    return prod(rhs.shape[:-2]) > prod(jax.eval_shape(convolve, lhs, rhs).shape[1:-1])


def _with_even_channels(lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """Add a channel of zeros to 3, 5, 7, ... for 17 to 32 outputs, where XLA takes three to seven times as long."""
    channels, outputs = rhs.shape[-2:]
    if channels == 1 or channels % 2 == 0 or not 16 < outputs <= 32:
        return lhs, rhs
    one_more = [(0, 0)] * (lhs.ndim - 1) + [(0, 1)]
    return jnp.pad(lhs, one_more), jnp.pad(rhs, [*one_more[:-2], (0, 1), (0, 0)])


def _by_features(convolve: Callable[[Any, Any], Any], lhs: Any, rhs: Any) -> Any:
    """Convolve a few features at a time, and add: XLA's own work on all of them does not fit into the cache."""
    features = lhs.shape[-1]
    each = min(features, max(_IMAGES, _PIXELS // prod(rhs.shape[:-2])))
    whole, left = divmod(features, each)
    # Features first and channels last: as images are held, so that nothing is moved before the loop.
    images, slopes = jnp.swapaxes(lhs, 0, -1), jnp.moveaxis(rhs, -2, 0)

    def part(start: Any, size: int) -> Any:
        some, their_slopes = (lax.dynamic_slice_in_dim(array, start, size) for array in (images, slopes))
        return convolve(jnp.swapaxes(some, 0, -1), jnp.moveaxis(their_slopes, 0, -2))

    total = part(whole * each, left) if left else part(0, each)
    done = 0 if left else 1
    if whole > done:
        starts = each * jnp.arange(done, whole)
        total, _ = lax.scan(lambda total, start: (total + part(start, each), None), total, starts)
    return total
