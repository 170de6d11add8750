"""Functions compute the same with their convolutions in another layout, wherever in the program they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from jax.extend.core.primitives import conv_general_dilated_p

from ntkadv._convolutions import canonical_convolutions

X = np.random.default_rng(0).normal(size=(2, 7, 6, 4)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(3, 3, 4, 4)).astype(np.float32)


def layouts(closed):
    """Dimension numbers of all convolutions of a program."""
    found = []

    def look(value):
        if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
            for eqn in value.eqns:
                if eqn.primitive is conv_general_dilated_p:
                    found.append(tuple(map(tuple, eqn.params["dimension_numbers"])))
                for parameter in eqn.params.values():
                    look(parameter)
        elif isinstance(value, tuple):
            for one in value:
                look(one)

    look(closed)
    return found


CANONICAL = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolve(x, numbers=("NHWC", "HWIO", "NHWC"), **settings):
    return lax.conv_general_dilated(
        x, KERNEL, settings.pop("stride", (1, 1)), "SAME", dimension_numbers=numbers, **settings
    )


def gradient(x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(convolve(x, stride=(2, 1)))))(x)


def kernel_gradient(x):
    def total(kernel):
        return jnp.sum(jnp.cos(lax.conv(jnp.transpose(x, (0, 3, 1, 2)), kernel, (1, 1), "SAME")))

    return jax.grad(total)(jnp.transpose(KERNEL, (3, 2, 0, 1)))


PROGRAMS = {
    "another layout": lambda x: convolve(x, ("NWHC", "WHIO", "CNWH")),
    "dilated and grouped": lambda x: convolve(x[..., :8], feature_group_count=1, rhs_dilation=(2, 1)),
    "input gradient": gradient,
    "kernel gradient": kernel_gradient,
    "compiled on its own": lambda x: jax.jit(gradient)(x) + 1,
    "in a scan": lambda x: lax.scan(lambda c, _: (c - 0.1 * gradient(c), jnp.sum(c)), x, length=3),
    "in a loop": lambda x: lax.while_loop(
        lambda c: jnp.sum(c[0]) < 3, lambda c: (c[0] + 1, c[1] - 0.01 * gradient(c[1])), (0, x)
    )[1],
    "in a branch": lambda x: lax.cond(x[0, 0, 0, 0] > 0, gradient, lambda x: -gradient(x), x),
    "in a checkpoint": lambda x: jax.grad(lambda x: jnp.sum(jax.checkpoint(convolve)(x) ** 2))(x),
    "under vmap": lambda x: jax.vmap(gradient)(jnp.stack([x, 2 * x])),
    "no convolution": lambda x: jnp.sin(x) @ x[0, 0, 0],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_result_is_the_same_and_every_layout_the_canonical_one(name):
    function = PROGRAMS[name]
    rewritten = canonical_convolutions(function)
    for one, other in zip(jax.tree.leaves(rewritten(X)), jax.tree.leaves(function(X)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    inside = layouts(jax.make_jaxpr(rewritten)(X))
    assert set(inside) <= {CANONICAL}
    assert len(inside) == len(layouts(jax.make_jaxpr(function)(X)))
    np.testing.assert_allclose(
        jax.tree.leaves(jax.jit(rewritten)(X))[0], jax.tree.leaves(function(X))[0], rtol=1e-5, atol=1e-5
    )


def test_layouts_are_not_canonical_by_themselves():
    assert CANONICAL not in layouts(jax.make_jaxpr(PROGRAMS["another layout"])(X))
    assert set(layouts(jax.make_jaxpr(gradient)(X))) != {CANONICAL}


def test_derivatives_go_through():
    def total(x):
        return jnp.sum(canonical_convolutions(gradient)(x) ** 2)

    expected = jax.grad(lambda x: jnp.sum(gradient(x) ** 2))(X)
    np.testing.assert_allclose(jax.grad(total)(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("count", [1, 8, 19, 40])
def test_gradients_of_filters_are_summed_over_groups_of_images(count, padding, stride):
    # 19 images leave a group that is not full.
    x = np.random.default_rng(2).normal(size=(count, 18, 17, 3)).astype(np.float32)
    kernel = np.random.default_rng(3).normal(size=(3, 3, 3, 5)).astype(np.float32)

    def total(kernel, x):
        y = lax.conv_general_dilated(x, kernel, (stride, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.mean(jnp.sin(y) ** 2)

    def slope(kernel, x):
        return jax.grad(total)(kernel, x)

    with jax.enable_x64(True):
        expected = slope(kernel.astype(np.float64), x.astype(np.float64))
    found = canonical_convolutions(slope)(kernel, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    program = jax.make_jaxpr(canonical_convolutions(slope))(kernel, x)
    assert ("scan" in str(program)) == (count > 8)
    assert set(layouts(program)) == {CANONICAL}


@pytest.mark.parametrize(("channels", "outputs", "added"), [(3, 24, 1), (5, 32, 1), (3, 16, 0), (1, 32, 0), (4, 32, 0)])
def test_odd_channels_get_one_more_where_that_is_faster(channels, outputs, added):
    x = np.random.default_rng(4).normal(size=(2, 6, 5, channels)).astype(np.float32)
    kernel = np.random.default_rng(5).normal(size=(3, 3, channels, outputs)).astype(np.float32)

    def function(x, kernel):
        return lax.conv_general_dilated(x, kernel, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    rewritten = canonical_convolutions(function)
    np.testing.assert_allclose(rewritten(x, kernel), function(x, kernel), rtol=1e-5, atol=1e-5)
    assert (f"f32[3,3,{channels + 1},{outputs}]" in str(jax.make_jaxpr(rewritten)(x, kernel))) == bool(added)
