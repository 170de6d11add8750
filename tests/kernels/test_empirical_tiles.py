"""How the kernel of a finite network is put together: strips, tiles, gradients a few at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.kernels import empirical_ntk

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

CLASSES = 3


def f(params, x):
    hidden = jnp.tanh(jnp.matmul(x, params["first"], precision="highest"))
    return jnp.matmul(hidden, params["second"], precision="highest")


def problem(n):
    rng = np.random.default_rng(n)
    params = {"first": jnp.asarray(rng.normal(size=(4, 5))), "second": jnp.asarray(rng.normal(size=(5, CLASSES)))}
    x = rng.normal(size=(n, 4))
    hidden = np.tanh(x @ np.asarray(params["first"]))
    # The Jacobian by hand: d f_k / d second_jk = hidden_j, d f_k / d first_ij = x_i (1 - hidden_j^2) second_jk.
    back = (1 - hidden**2)[:, None, :] * np.asarray(params["second"]).T
    first = np.einsum("ni,nkj->nkij", x, back).reshape(n, CLASSES, -1)
    second = np.einsum("nj,kl->nkjl", hidden, np.eye(CLASSES)).reshape(n, CLASSES, -1)
    jacobian = np.concatenate([first, second], axis=2)
    return params, x, np.einsum("njp,mkp->nmjk", jacobian, jacobian)


@pytest.mark.parametrize("n", [1, 3, 32, 35])
@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_the_strips_of_a_symmetric_kernel_cover_it(n, outputs, x64):
    params, x, exact = problem(n)
    exact = exact if outputs == "full" else np.trace(exact, axis1=2, axis2=3) / CLASSES
    found = empirical_ntk(f, params, x, method="jacobian", outputs=outputs)
    np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_products_take_as_many_gradients_at_once_as_memory_allows(together, x64):
    """70 images are more than a tile has."""
    params, x, exact = problem(70)
    gradient = 8 * sum(leaf.size for leaf in jax.tree.leaves(params))
    for outputs in ("full", "trace"):
        found = empirical_ntk(f, params, x, method="products", outputs=outputs, max_bytes=3 * together * gradient)
        expected = exact if outputs == "full" else np.trace(exact, axis1=2, axis2=3) / CLASSES
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(MemoryError, match=r"One gradient, of 35 parameters, takes 280 bytes, three times over"):
        empirical_ntk(f, params, x, method="products", max_bytes=3 * gradient - 1)
    with pytest.raises(MemoryError, match="The Jacobian of one image, 3 outputs by 35 parameters"):
        empirical_ntk(f, params, x, method="jacobian", max_bytes=3 * gradient)


def test_the_jacobian_of_a_row_of_tiles_is_made_once(x64):
    params, x, exact = problem(9)
    gradient = 8 * sum(leaf.size for leaf in jax.tree.leaves(params))
    passes = []

    def counted(params, x):
        jax.debug.callback(lambda: passes.append(1))
        return f(params, x)

    # Three images a tile: rows of 3, 2 and 1 tiles, whose left sides are 3, and right sides 2 + 1.
    found = empirical_ntk(counted, params, x, method="jacobian", max_bytes=3 * 3 * CLASSES * gradient)
    np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-12)
    jax.effects_barrier()
    assert len(passes) == 6
