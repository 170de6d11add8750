"""The scalar functions behind the closed form: divided differences of the exponential at non-positive points.

Write `h_a(t) = (1 - e^{-ta}) / a`, the time a mode of rate `a` has effectively been trained at time `t`. Each
function below is a divided difference of `exp`, hence positive and smooth, and each is evaluated by a formula whose
terms do not cancel: in exact arithmetic all of them follow from the first, in floating point they do not.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def phi(s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`phi(s) = (1 - e^-s) / s`, with `phi(0) = 1`: the divided difference `exp[0, -s]`, for `s >= 0`."""
    safe = jnp.where(s == 0, jnp.ones_like(s), s)
    return jnp.where(s == 0, jnp.ones_like(s), -jnp.expm1(-safe) / safe)


def exp_pair(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`int_0^1 e^{-ta} e^{-(1-t)b} dt = (e^-a - e^-b) / (b - a)`: the divided difference `exp[-a, -b]`."""
    return jnp.exp(-jnp.minimum(a, b)) * phi(jnp.abs(a - b))


def growth_mean(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`H(a) = int_0^1 h_a(t) dt = (1 - phi(a)) / a`: the divided difference `exp[0, 0, -a]`."""
    large = jnp.maximum(a, jnp.ones_like(a))
    _, weights, growth = _growth(jnp.minimum(a, jnp.ones_like(a)))
    return jnp.where(a < 1, jnp.tensordot(weights, growth, 1), (1 - phi(large)) / large)


def growth_overlap(a: Float[Array, " p"], b: Float[Array, " q"]) -> Float[Array, "p q"]:
    """`M(a, b) = int_0^1 h_a(t) h_b(1-t) dt` for every pair: the divided difference `exp[0, 0, -a, -b]`.

    With `a` the larger of the two and at least 1, `M = (H(b) - N) / a` with `N = exp[0, -a, -b] =
    (phi(b) - exp_pair(a, b)) / a`. Below 1 the integrand is smooth enough for 16 Gauss-Legendre nodes.
    """
    p, q = a.shape[0], b.shape[0]
    rows, columns = jnp.broadcast_to(a[:, None], (p, q)), jnp.broadcast_to(b[None, :], (p, q))
    small, large = jnp.minimum(rows, columns), jnp.maximum(rows, columns)
    safe = jnp.maximum(large, jnp.ones_like(large))
    nested = (phi(small) - exp_pair(safe, small)) / safe
    recursive = (growth_mean(small) - nested) / safe

    one = jnp.ones((), a.dtype)
    _, weights, growth_a = _growth(jnp.minimum(a, one))
    _, _, growth_b = _growth(jnp.minimum(b, one))
    quadrature = jnp.einsum("j,jp,jq->pq", weights, growth_a, growth_b[::-1], precision="highest")
    return jnp.where(large < 1, quadrature, recursive)


def _growth(a: Float[Array, "*shape"]) -> tuple[Float[Array, " j"], Float[Array, " j"], Float[Array, "j *shape"]]:
    """Quadrature nodes on [0, 1], their weights, and `h_a = t phi(ta)` at the nodes (symmetric about 1/2)."""
    nodes, weights = jnp.asarray(_NODES, a.dtype), jnp.asarray(_WEIGHTS, a.dtype)
    spread = nodes.reshape((-1,) + (1,) * a.ndim)
    times = jnp.broadcast_to(spread, (nodes.shape[0], *a.shape))
    return nodes, weights, times * phi(times * a[None])
