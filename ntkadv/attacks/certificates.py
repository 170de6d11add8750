r"""Worst cases that are known or bounded, for attacks to be held against.

The largest margin loss within a threat model is exact for linear classifiers, and lies between two bounds for smooth
models of bounded curvature. All of it is computed in float64, on the host but for the derivatives of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ntkadv._checks import (
    require_images,
    require_int,
    require_key,
    require_labels,
    require_nonnegative,
    require_same_length,
)
from ntkadv._typing import AnyArray
from ntkadv.attacks.model import Model, in_precision, num_classes_of, working_dtype
from ntkadv.attacks.search import batches
from ntkadv.attacks.threat_model import L1, L2, Linf, ThreatModel, fold_in_each, sample_keys

Vectors = Float[np.ndarray, "n d"]
PerSample = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Certificate:
    r"""Bounds of the worst case of each sample, the largest margin loss over all allowed images.

    .. math:: \max_{x'} \max_{k \neq y} f_k(x') - f_y(x')

    Attributes:
        lower: No less than this is reached by some allowed image.
        upper: No more than this is reached by any.
        points: Allowed images that are the worst ones for a linear model, and nearly so for a model that is nearly
            linear within the ball; in float64.
    """

    lower: PerSample
    upper: PerSample
    points: Float[np.ndarray, "n h w c"]

    @property
    def is_robust(self) -> Bool[np.ndarray, " n"]:
        """Whether no allowed image is misclassified."""
        return self.upper < 0

    @property
    def is_broken(self) -> Bool[np.ndarray, " n"]:
        """Whether some allowed image is misclassified."""
        return self.lower > 0

    def summary(self) -> dict[str, int]:
        """Count the samples that are certainly robust, certainly broken, and neither."""
        robust, broken = int(self.is_robust.sum()), int(self.is_broken.sum())
        return {"robust": robust, "broken": broken, "undecided": len(self.lower) - robust - broken}


def linear_worst_case(
    weights: Float[AnyArray, "d classes"],
    bias: Float[AnyArray, " classes"],
    x: Float[AnyArray, "n h w c"],
    labels: Int[AnyArray, " n"],
    threat: ThreatModel,
) -> Certificate:
    r"""Solve for the worst case of a linear classifier, exactly up to rounding in float64.

    .. math:: f(x) = W^\top \mathrm{vec}(x) + b

    For each wrong class the linear function :math:`f_k - f_y` is maximised over the ball cut with the box [0, 1]: each
    pixel on its own for `Linf`; the pixels of largest weight first, as far as each has room, for `L1`; and for `L2` by

    .. math:: |\delta_i| = \min(t\, |g_i|, r_i), \qquad \lVert \delta \rVert_2 \le \epsilon

    with the gradient g, the room r, and the multiplier t, which is found by sorting the pixels by :math:`r_i / |g_i|`.

    Args:
        weights: One column a class, one row a pixel, in the order of `x.reshape(n, -1)`.
        bias: One number a class.
        x: Clean images.
        labels: True classes.
        threat: What may be changed.

    Returns:
        A certificate whose two bounds are the same number, and the images where it is reached.

    Raises:
        TypeError, ValueError: arrays do not fit together, or the threat model is not one of the three.
    """
    _require_samples(x, labels, threat)
    d = int(np.prod(x.shape[1:]))
    if weights.ndim != 2 or weights.shape[0] != d or weights.shape[1] < 2:
        raise ValueError(f"weights must have shape ({d}, num_classes), two classes at least, got {weights.shape}.")
    if bias.shape != weights.shape[1:]:
        raise ValueError(f"bias must have shape {weights.shape[1:]}, one number a class, got {bias.shape}.")
    require_labels("labels", labels, weights.shape[1])
    matrix, y = np.asarray(weights, np.float64), np.asarray(labels)
    logits = _flat(x) @ matrix + np.asarray(bias, np.float64)
    gradients = np.broadcast_to(matrix.T, (len(y), *matrix.T.shape))
    value, offset, _ = _worst_class(logits, gradients, x, y, threat, np.zeros(len(y)))
    return Certificate(value, value, _moved(x, offset))


def first_order_bound(
    model: Model,
    x: Float[AnyArray, "n h w c"],
    labels: Int[AnyArray, " n"],
    threat: ThreatModel,
    *,
    curvature: float | Float[AnyArray, " n"],
    batch_size: int | None = None,
) -> Certificate:
    r"""Bound the worst case of a smooth model by its first-order expansion and what may be missing from that.

    With the margins :math:`m_k = f_k - f_y`, C the curvature and R the Euclidean length of the longest allowed change,

    .. math::
        \max_k \max_\delta \bigl(m_k + \nabla m_k \cdot \delta\bigr) - \tfrac12 C \lVert \delta_k \rVert^2
        \;\le\; \max_{x'} \max_k m_k(x') \;\le\;
        \max_k \max_\delta \bigl(m_k + \nabla m_k \cdot \delta\bigr) + \tfrac12 C R^2

    where :math:`\delta_k` is the maximiser, found exactly over the ball cut with the box, and on the left any part
    :math:`s \delta_k` of it, whichever gives most.

    Args:
        model: A function in JAX from images to logits, twice differentiable, that treats samples independently.
        x: Clean images.
        labels: True classes.
        threat: What may be changed.
        curvature: A bound of the spectral norm of the Hessian of every :math:`m_k`, anywhere among the allowed images;
            one number, or one a sample. What is returned is as good as this: see `estimate_curvature`.
        batch_size: Number of images whose derivatives are taken at a time; all, if not given.

    Returns:
        A certificate with the maximisers of the expansion. Rounding in the model, about 1e-7 of its logits in float32,
        is not part of the bounds.

    Raises:
        TypeError, ValueError: arrays do not fit together, the curvature is negative or NaN, or the threat model is not
            one of the three.
    """
    num_classes = _require_model(model, x, labels, threat, batch_size)
    bound = np.asarray(curvature, np.float64)
    if bound.shape not in ((), (len(x),)):
        raise ValueError(f"curvature must be one number or one a sample, ({len(x)},), got shape {bound.shape}.")
    if not (bound >= 0).all():
        raise ValueError("curvature must not be negative or NaN; where nothing is known it is infinite.")
    bound = np.broadcast_to(bound, len(x))
    pixels, y = np.asarray(x), np.asarray(labels)
    value, lower, offset = np.empty(len(x)), np.empty(len(x)), np.empty_like(_flat(x))
    for batch in batches(np.arange(len(x)), len(x) if batch_size is None else min(batch_size, len(x))):
        derivatives = _linearised(model, jnp.asarray(pixels[batch.places]), num_classes)
        logits, gradients = (np.asarray(array, np.float64)[: batch.size] for array in derivatives)
        at = batch.places[: batch.size]
        value[at], offset[at], lower[at] = _worst_class(logits, gradients, pixels[at], y[at], threat, bound[at])
    reach = np.maximum(_flat(x), 1 - _flat(x))
    longest = np.sum(_sizes(reach, reach, threat) ** 2, axis=1)
    return Certificate(lower, value + _product(bound, longest) / 2, _moved(x, offset))


def estimate_curvature(
    model: Model,
    x: Float[AnyArray, "n h w c"],
    labels: Int[AnyArray, " n"],
    threat: ThreatModel,
    *,
    key: Key[Array, ""],
    samples: int = 8,
    iterations: int = 20,
    safety: float = 2.0,
    batch_size: int | None = None,
) -> PerSample:
    r"""Estimate the curvature of the margins within the threat model: an estimate from below, and not a bound.

    .. math:: \max_{x'} \max_{k \neq y} \bigl\lVert \nabla^2 (f_k - f_y)(x') \bigr\rVert_2

    Points between those that are looked at may be more curved, and power iteration comes from below. `safety` is the
    factor by which the largest found is multiplied, which makes a bound more plausible and proves nothing. Models whose
    gradient jumps, such as ReLU networks, have no such bound: what is found for them is meaningless.

    Args:
        model: A function in JAX from images to logits, twice differentiable, that treats samples independently.
        x: Clean images.
        labels: True classes.
        threat: What may be changed.
        key: A random key, for the points and for the first vectors.
        samples: Number of points a sample: the clean image, and others drawn uniformly in the ball.
        iterations: Number of Hessian-vector products for each point and each wrong class.
        safety: Factor on the result.
        batch_size: Number of images looked at at a time; all, if not given.

    Returns:
        One number a sample, infinite where a derivative is not finite.

    Raises:
        TypeError, ValueError: arrays do not fit together, or a setting is out of range.
    """
    num_classes = _require_model(model, x, labels, threat, batch_size)
    require_key("key", key)
    require_int("samples", samples, minimum=1)
    require_int("iterations", iterations, minimum=1)
    require_nonnegative("safety", safety, strict=True)
    pixels, y, keys = jnp.asarray(x), jnp.asarray(labels, jnp.int32), sample_keys(key, len(x))
    eps = jnp.asarray(threat.eps, working_dtype(pixels.dtype))
    curvature = np.empty(len(x))
    for batch in batches(np.arange(len(x)), len(x) if batch_size is None else min(batch_size, len(x))):
        at = jnp.asarray(batch.places)
        found = _curvature(
            threat.with_eps(0.0), eps, model, pixels[at], y[at], keys[at], num_classes, samples, iterations
        )
        curvature[batch.places[: batch.size]] = np.asarray(found)[: batch.size]
    return safety * curvature


@eqx.filter_jit
def _linearised(model: Model, x: Array, num_classes: int) -> tuple[Array, Array]:
    """Logits (b, classes), and the gradient of each (b, classes, d)."""
    wide = x.astype(working_dtype(x.dtype))
    logits, pull = jax.vjp(in_precision(model, x.dtype), wide)

    def gradient(row: Array) -> Array:
        return pull(jnp.broadcast_to(row, logits.shape))[0].reshape(len(x), -1)

    return logits, jnp.moveaxis(jax.lax.map(gradient, jnp.eye(num_classes, dtype=logits.dtype)), 0, 1)


@eqx.filter_jit
def _curvature(
    template: ThreatModel,
    eps: Array,
    model: Model,
    x: Array,
    labels: Array,
    keys: Array,
    num_classes: int,
    samples: int,
    iterations: int,
) -> Array:
    """Largest absolute eigenvalue that power iteration finds, over points and wrong classes; (b,)."""
    threat, clean, wrapped = template.with_eps(eps), x.astype(eps.dtype), in_precision(model, x.dtype)

    def at_point(largest: Array, number: Array) -> tuple[Array, None]:
        point_keys, vector_keys = (fold_in_each(keys, 2 * number + i) for i in range(2))
        z = jnp.where(number == 0, clean, threat.random_point(point_keys, clean))
        start = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:], clean.dtype))(vector_keys)

        def for_class(largest: Array, shift: Array) -> tuple[Array, None]:
            def total(z: Array) -> Array:
                logits = wrapped(z)
                wrong, right = (
                    jax.nn.one_hot(k, num_classes, dtype=logits.dtype) for k in ((labels + shift) % num_classes, labels)
                )
                return jnp.sum(logits * (wrong - right))

            def multiply(vector: Array, _: None) -> tuple[Array, Array]:
                # Samples are independent: one product with the Hessian of the sum is one with each of theirs.
                product = jax.jvp(jax.grad(total), (z,), (_unit(vector),))[1]
                return product, _norm(product)

            norms = jax.lax.scan(multiply, start, length=iterations)[1][-1]
            return jnp.maximum(largest, jnp.where(jnp.isfinite(norms), norms, jnp.inf)), None

        return jax.lax.scan(for_class, largest, jnp.arange(1, num_classes, dtype=labels.dtype))[0], None

    nothing = jnp.zeros(len(x), clean.dtype)
    return jax.lax.scan(at_point, nothing, jnp.arange(samples, dtype=jnp.uint32))[0]


def _norm(vectors: Array) -> Array:
    return jnp.sqrt(jnp.sum(vectors**2, axis=(1, 2, 3)))


def _unit(vectors: Array) -> Array:
    norms = _norm(vectors)
    return vectors / jnp.where(norms > 0, norms, 1)[:, None, None, None]


def _worst_class(
    logits: Float[np.ndarray, "n classes"],
    gradients: Float[np.ndarray, "n classes d"],
    x: AnyArray,
    labels: np.ndarray,
    threat: ThreatModel,
    curvature: PerSample,
) -> tuple[PerSample, Vectors, PerSample]:
    """Largest value of the linear margins with its maximiser, and what the margins surely reach despite curvature."""
    pixels, rows, num_classes = _flat(x), np.arange(len(labels)), logits.shape[1]
    value, lower, offset = np.full(len(rows), -np.inf), np.full(len(rows), -np.inf), np.zeros_like(pixels)
    for shift in range(1, num_classes):
        wrong = (labels + shift) % num_classes
        gradient = gradients[rows, wrong] - gradients[rows, labels]
        margin = logits[rows, wrong] - logits[rows, labels]
        change = _maximiser(gradient, pixels, threat)
        gain = np.sum(gradient * change, axis=1)
        # The best part s of the change gains max over s in [0, 1] of s gain - s^2 bend / 2.
        bend = _product(curvature, np.sum(change**2, axis=1))
        part = np.divide(gain, bend, out=np.ones_like(gain), where=bend > gain)
        lower = np.maximum(lower, margin + part * gain / 2 + np.where(bend > gain, 0, (gain - bend) / 2))
        is_worse = margin + gain > value
        value = np.where(is_worse, margin + gain, value)
        offset = np.where(is_worse[:, None], change, offset)
    return value, offset, lower


def _maximiser(gradient: Vectors, pixels: Vectors, threat: ThreatModel) -> Vectors:
    """Find the allowed change along which a linear function grows most."""
    room = np.where(gradient > 0, 1 - pixels, np.where(gradient < 0, pixels, 0))
    return np.sign(gradient) * _sizes(np.abs(gradient), room, threat)


def _sizes(weight: Vectors, room: Vectors, threat: ThreatModel) -> Vectors:
    """Sizes in [0, room] within the ball whose weighted sum is largest; `room` is 0 where `weight` is."""
    return _SIZES[type(threat)](weight, room, float(threat.eps))


def _linf_sizes(weight: Vectors, room: Vectors, eps: float) -> Vectors:
    del weight
    return np.minimum(room, eps)


def _l1_sizes(weight: Vectors, room: Vectors, eps: float) -> Vectors:
    order = np.argsort(-weight, axis=1)
    room = np.take_along_axis(room, order, axis=1)
    size = np.clip(eps - (np.cumsum(room, axis=1) - room), 0, room)
    return np.take_along_axis(size, np.argsort(order, axis=1), axis=1)


def _l2_sizes(weight: Vectors, room: Vectors, eps: float) -> Vectors:
    """Sizes min(t weight, room), with the t for which they have length eps, or all the room there is."""
    largest = weight.max(axis=1, keepdims=True)
    weight = weight / np.where(largest > 0, largest, 1)
    # Weights whose square is nothing in float64 gain nothing either.
    weight, room = (np.where(weight > 1e-150, array, 0) for array in (weight, room))
    full_at = np.divide(room, weight, out=np.zeros_like(room), where=weight > 0)
    order = np.argsort(full_at, axis=1)
    at, r, w = (np.take_along_axis(array, order, axis=1) for array in (full_at, room, weight))
    # The first k sizes are full when t is at[k], and the others grow with it.
    full = np.pad(np.cumsum(r**2, axis=1), ((0, 0), (1, 0)))
    growing = np.pad(np.cumsum(w[:, ::-1] ** 2, axis=1)[:, ::-1], ((0, 0), (0, 1)))
    reached = full[:, 1:] + (at * np.sqrt(growing[:, 1:])) ** 2 >= eps**2
    k = np.argmax(reached, axis=1)[:, None]
    rest, rate = eps**2 - np.take_along_axis(full, k, axis=1), np.take_along_axis(growing, k, axis=1)
    t = np.sqrt(np.maximum(rest, 0) / np.where(rate > 0, rate, 1))
    return np.where(reached[:, -1:], np.minimum(t * weight, room), room)


_SIZES = {Linf: _linf_sizes, L1: _l1_sizes, L2: _l2_sizes}


def _product(curvature: PerSample, square: PerSample) -> PerSample:
    """Curvature times squared length, where no length is no product, however large the curvature."""
    return np.multiply(curvature, square, out=np.zeros_like(square), where=square > 0)


def _flat(x: AnyArray) -> Vectors:
    return np.asarray(x, np.float64).reshape(len(x), -1)


def _moved(x: AnyArray, offset: Vectors) -> Float[np.ndarray, "n h w c"]:
    return np.clip(_flat(x) + offset, 0, 1).reshape(x.shape)


def _require_samples(x: AnyArray, labels: AnyArray, threat: ThreatModel) -> None:
    require_images("x", x)
    require_same_length(x=x, labels=labels)
    if type(threat) not in _SIZES:
        raise TypeError(f"threat must be Linf, L2 or L1, whose linear worst case is known, got {threat!r}.")


def _require_model(model: Model, x: AnyArray, labels: AnyArray, threat: ThreatModel, batch_size: int | None) -> int:
    """Check what a model is looked at with; the number of its classes."""
    _require_samples(x, labels, threat)
    if batch_size is not None:
        require_int("batch_size", batch_size, minimum=1)
    num_classes = num_classes_of(model, x)
    require_labels("labels", labels, num_classes)
    return num_classes
