r"""The CGRO classifier of the representation theorem, built: a ReLU network around any clean classifier.

    f_S(X) = f_clean(X) (1 - 1{X in union_i B(X_i, delta)}) + sum_i y_i 1{X in B(X_i, delta)}

with l_inf balls B around the training images. It classifies like f_clean outside the balls, and like the training
labels in them: as good as f_clean on clean test images, perfectly robust on training images, and no more robust than
f_clean on test images that lie outside all balls. The network, layer by layer:

    absolute   relu(x_k - X_ik), relu(X_ik - x_k); their sum is |x_k - X_ik|
    maximum    max(a, b) = relu(a) + relu(b - a) for a >= 0, as a tree: d_i = |x - X_i|_inf, exactly
    indicator  relu(delta + tau - d_i), relu(delta - d_i); I_i is their difference divided by tau
    gate       relu(f_k - B S), relu(-f_k - B S) with S = sum_i I_i and |f_k| <= B;  relu(+-sum_i y_ik I_i)
    output     sums of these

The values of f_clean, cut off at B by two units each, are carried past the tree. Construction and widths are inferences
of ours; the theorem only bounds the number of parameters, by poly(D) + O~(N D).

Source: Li & Li, ICML 2025, arXiv 2306.01271, Theorem 4.4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.spatial.distance
from jaxtyping import Array, Bool, Float, Int

from ntkadv._checks import require_images, require_int, require_labels, require_nonnegative, require_same_length
from ntkadv._typing import AnyArray
from ntkadv.attacks.model import Model, logits_of, num_classes_of, working_dtype

__all__ = [
    "CGROClassifier",
    "build_cgro_classifier",
    "class_distance",
    "forward",
    "parameter_bound",
    "parameter_counts",
]


class CGROClassifier(eqx.Module):
    """The network f_S: a pytree that is called, as any predictor; build it by `build_cgro_classifier`.

    Attributes:
        clean: the clean classifier.
        centres: memorised images, flattened, `(n, D)`.
        values: what f_S is in the ball of each, `(n, c)`.
        delta: radius of the balls.
        tau: width of their rims.
        bound: B, at which the values of the clean classifier are cut off.
        max_bytes: bound on the units that are there at once.
        fused: take absolute values and maxima as such, instead of unit by unit.
    """

    clean: Model
    centres: Float[Array, "n D"]
    values: Float[Array, "n c"]
    delta: float = eqx.field(static=True)
    tau: float = eqx.field(static=True)
    bound: float = eqx.field(static=True)
    max_bytes: int = eqx.field(static=True)
    fused: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, "b h w ch"]) -> Float[Array, "b c"]:
        """Values of the network, by its layers: units of whole tiles of centres at a time."""
        flat = x.reshape(len(x), -1).astype(self.centres.dtype)
        clean = self.clean(x).astype(flat.dtype)
        clipped = jax.nn.relu(clean + self.bound) - jax.nn.relu(clean - self.bound) - self.bound
        indicators = self._indicators(flat)
        covered = self.bound * jnp.sum(indicators, axis=1, keepdims=True)
        memory = jnp.matmul(indicators, self.values, precision=jax.lax.Precision.HIGHEST)
        return (
            jax.nn.relu(clipped - covered)
            - jax.nn.relu(-clipped - covered)
            + jax.nn.relu(memory)
            - jax.nn.relu(-memory)
        )

    def distances(self, x: Float[Array, "b h w ch"]) -> Float[Array, "b n"]:
        """Distances |x - X_i|_inf to all centres, `(b, n)`."""
        return self._distances(x.reshape(len(x), -1).astype(self.centres.dtype))

    def _indicators(self, flat: Float[Array, "b D"]) -> Float[Array, "b n"]:
        distance = self._distances(flat)
        return (jax.nn.relu(self.delta + self.tau - distance) - jax.nn.relu(self.delta - distance)) / self.tau

    def _distances(self, flat: Float[Array, "b D"]) -> Float[Array, "b n"]:
        n, D = self.centres.shape
        if n == 0:
            return jnp.zeros((len(flat), 0), flat.dtype)

        @jax.checkpoint
        def one(centre: Float[Array, " D"]) -> Float[Array, " b"]:
            if self.fused:
                return jnp.max(jnp.abs(flat - centre), axis=1)
            return _maximum(jax.nn.relu(flat - centre) + jax.nn.relu(centre - flat))

        # Two units a pixel in the first layer, as many again in the tree.
        tile = max(1, min(n, self.max_bytes // (4 * len(flat) * D * flat.dtype.itemsize)))
        return jax.lax.map(one, self.centres, batch_size=tile).T

    def parameter_counts(self) -> dict[str, int]:
        """Count the parameters of each layer, without the clean classifier; see `parameter_counts`."""
        n, D = self.centres.shape
        return parameter_counts(n, D, self.values.shape[1])

    def layers(self) -> list[Layer]:
        """Write the network down, as sparse matrices and biases on (x, f_clean(x)); see `forward`.

        For small networks: nothing else needs it, but that it gives the same values and has as many parameters as it is
        said to have.
        """
        return _layers(np.asarray(self.centres), np.asarray(self.values), self.delta, self.tau, self.bound)


class Layer(NamedTuple):
    """One layer, z -> relu(matrix z + bias); the last is without the ReLU. A bias of None is no parameter."""

    name: str
    matrix: scipy.sparse.csr_array
    bias: np.ndarray | None


def forward(layers: list[Layer], x: Float[AnyArray, "b D"], clean: Float[AnyArray, "b c"]) -> np.ndarray:
    """Evaluate layers written down by `CGROClassifier.layers`, in NumPy."""
    z = np.concatenate([np.asarray(x), np.asarray(clean)], axis=1).T
    for i, layer in enumerate(layers):
        z = layer.matrix @ z + (0 if layer.bias is None else layer.bias[:, None])
        z = np.maximum(z, 0) if i + 1 < len(layers) else z
    return z.T


def build_cgro_classifier(
    clean: Model,
    x_train: Float[AnyArray, "n h w ch"],
    y_train: Int[AnyArray, " n"],
    *,
    delta: float,
    tau: float | None = None,
    bound: float | None = None,
    values: Float[AnyArray, "n c"] | None = None,
    keep: Bool[AnyArray, " n"] | None = None,
    max_bytes: int = 2**28,
    fused: bool = True,
) -> CGROClassifier:
    r"""Build the CGRO classifier around a clean one.

    Args:
        clean: a function from images to logits, `(b, c)`.
        x_train: training images.
        y_train: their classes.
        delta: radius of the balls.
        tau: width of the rim in which an indicator falls from 1 to 0; by default a tenth of delta, or less where the
            classes are close. The theorem's indicator is the limit of tau to 0; a network needs a slope.
        bound: B. Values of the clean classifier are cut off at +-B, which changes no class unless two logits are
            beyond. By default twice the largest on the training images.
        values: f_S in the ball of each image; by default +1 for its class and -1 for the others. For one score s in
            logits (0, s), as in the theorem, they are (0, y_i).
        keep: which images are memorised; all by default. The variant that memorises only points of small margin, with
            O~(mu N D) parameters for a share mu, takes `small_margin` here.
        max_bytes: bound on the units that are there at once.
        fused: take absolute values and maxima as such, which compilers know how to do fast; False evaluates the ReLU
            units that they consist of, one by one, to the same values up to rounding.

    Raises:
        TypeError, ValueError: an argument is out of range; images of different classes are closer than 2 delta, or so
            close to it that no rim of width tau fits between.
    """
    require_images("x_train", x_train)
    require_same_length(x_train=x_train, y_train=y_train)
    classes = num_classes_of(clean, x_train)
    require_labels("y_train", y_train, classes)
    require_nonnegative("delta", delta, strict=True)
    require_int("max_bytes", max_bytes, minimum=1)
    keep = np.ones(len(x_train), bool) if keep is None else np.asarray(keep)
    if keep.shape != (len(x_train),) or keep.dtype != bool:
        raise ValueError(f"keep must say True or False for each of {len(x_train)} images, got {keep.dtype} "
                         f"{keep.shape}.")  # fmt: skip
    labels = np.asarray(y_train)
    gap = class_distance(np.asarray(x_train)[keep], labels[keep])
    if gap <= 2 * delta:
        raise ValueError(
            f"classes must be more than 2 delta = {2 * delta:.4g} apart, but two images of different classes are at "
            f"distance {gap:.4g}: their balls meet, and no classifier is right in both; lower delta, or drop images."
        )
    tau = min(delta / 10, (gap - 2 * delta) / 4) if tau is None else tau
    require_nonnegative("tau", tau, strict=True)
    if 2 * (delta + tau) > gap:
        raise ValueError(
            f"tau must be at most {gap / 2 - delta:.4g}, half of what the classes leave between their balls, got "
            f"{tau:.4g}."
        )
    if bound is None:
        logits = [np.abs(np.asarray(logits_of(clean, jnp.asarray(x_train[i : i + 256])))).max()
                  for i in range(0, len(x_train), 256)]  # fmt: skip
        bound = 2 * float(max(logits))
    require_nonnegative("bound", bound, strict=True)
    given = 2.0 * (labels[:, None] == np.arange(classes)) - 1 if values is None else np.asarray(values)
    if given.shape != (len(x_train), classes):
        raise ValueError(f"values must have shape {(len(x_train), classes)}, got {given.shape}.")
    dtype = working_dtype(jnp.asarray(x_train[:1]).dtype)
    centres = jnp.asarray(np.asarray(x_train)[keep].reshape(int(keep.sum()), math.prod(x_train.shape[1:])), dtype)
    chosen = jnp.asarray(given[keep], dtype)
    return CGROClassifier(clean, centres, chosen, float(delta), float(tau), float(bound), max_bytes, fused)


def class_distance(x: Float[AnyArray, "n *image"], y: Int[AnyArray, " n"]) -> float:
    """Find the smallest l_inf distance of two images of different classes; infinite if there is one class only."""
    flat, labels = np.asarray(x, np.float64).reshape(len(x), math.prod(x.shape[1:])), np.asarray(y)
    best = np.inf
    for label in np.unique(labels):
        own, later = flat[labels == label], flat[labels > label]
        for i in range(0, len(own), 256):
            if len(later):
                best = min(best, scipy.spatial.distance.cdist(own[i : i + 256], later, "chebyshev").min())
    return float(best)


def parameter_counts(n: int, D: int, num_classes: int) -> dict[str, int]:
    r"""Count the parameters of each layer of the network: stored weights and biases, without the clean classifier.

    With :math:`D_\ell = \lceil D / 2^\ell \rceil` values after :math:`\ell` levels of the tree, of which the last is
    the sum of :math:`e_\ell` units (1 where it was left over from an odd number, else 2) and the others of two, a
    level has :math:`6 \lfloor D_\ell / 2 \rfloor - (2 - e_\ell)` weights where :math:`D_\ell` is even and
    :math:`6 \lfloor D_\ell / 2 \rfloor + e_\ell` where it is odd; together 6 (D - 1) where D is a power of two. Then

    .. math:: \mathrm{absolute} = 4 n D + 4 c, \quad \mathrm{indicator} = n (2 e_L + 2) + 4 c, \quad
              \mathrm{gate} = 8 c (n + 1), \quad \mathrm{output} = 4 c

    and 2 c weights a level carry the values of the clean classifier.

    Args:
        n: images memorised.
        D: numbers in an image.
        num_classes: c.
    """
    for name, value in (("n", n), ("D", D), ("num_classes", num_classes)):
        require_int(name, value, minimum=0 if name == "n" else 1)
    counts = {"absolute": 4 * n * D + 4 * num_classes}
    size, last, level = D, 2, 0
    while size > 1:
        level += 1
        weights = 6 * (size // 2) + (last if size % 2 else last - 2)
        counts[f"maximum {level}"] = n * weights + 2 * num_classes
        last = (last if size == 1 else 1) if size % 2 else 2
        size = -(-size // 2)
    counts["indicator"] = n * (2 * last + 2) + 4 * num_classes
    counts["gate"] = 8 * num_classes * (n + 1)
    counts["output"] = 4 * num_classes
    return counts


def parameter_bound(n: int, D: int, num_classes: int) -> int:
    """Give a bound on the parameters that is linear in n D: 10 n D + 8 n c + 6 n + 2 c (log2 D + 12), rounded up."""
    levels = max(D - 1, 0).bit_length()
    return 10 * n * D + 8 * n * num_classes + 6 * n + 2 * num_classes * (levels + 12)


def _maximum(values: Float[Array, "b D"]) -> Float[Array, " b"]:
    """Take the maximum of numbers that are not negative, by a tree of ReLU units."""
    while values.shape[1] > 1:
        pairs = values.shape[1] // 2
        a, b = values[:, :pairs], values[:, pairs : 2 * pairs]
        rest = jax.nn.relu(values[:, 2 * pairs :])
        values = jnp.concatenate([jax.nn.relu(a) + jax.nn.relu(b - a), rest], axis=1)
    return values[:, 0]


class _Builder:
    """Collects the entries of one layer's matrix."""

    def __init__(self, name: str, inputs: int, *, biased: bool):
        self.name, self.inputs, self.biases = name, inputs, [] if biased else None
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.entries: list[float] = []
        self.units = 0

    def unit(self, weights: list[tuple[int, float]], bias: float = 0.0) -> int:
        """Add a unit that reads the given inputs; its number is the result."""
        for column, weight in weights:
            self.rows.append(self.units)
            self.columns.append(column)
            self.entries.append(weight)
        if self.biases is not None:
            self.biases.append(bias)
        self.units += 1
        return self.units - 1

    def layer(self) -> Layer:
        """Give the layer; zeros among its entries stay, as parameters."""
        matrix = scipy.sparse.coo_array((self.entries, (self.rows, self.columns)), shape=(self.units, self.inputs))
        return Layer(self.name, matrix.tocsr(), None if self.biases is None else np.array(self.biases))


def _scaled(reads: list[tuple[int, float]], factor: float) -> list[tuple[int, float]]:
    return [(column, factor * weight) for column, weight in reads]


def _layers(centres: np.ndarray, values: np.ndarray, delta: float, tau: float, bound: float) -> list[Layer]:
    D = centres.shape[1]
    c = values.shape[1]
    one = _Builder("absolute", D + c, biased=True)
    tree = [[[(one.unit([(k, sign)], -sign * x), 1.0) for sign in (1.0, -1.0)] for k, x in enumerate(centre)]
            for centre in centres]  # fmt: skip
    carried = [(one.unit([(D + k, 1.0)], bound), one.unit([(D + k, 1.0)], -bound)) for k in range(c)]
    layers = [one]
    while max((len(values) for values in tree), default=1) > 1:
        level = _Builder(f"maximum {len(layers)}", layers[-1].units, biased=False)
        tree = [_level(level, reads) for reads in tree]
        carried = [(level.unit([(u, 1.0)]), level.unit([(v, 1.0)])) for u, v in carried]
        layers.append(level)
    rim = _Builder("indicator", layers[-1].units, biased=True)
    pairs = [[rim.unit(_scaled(reads[0], -1.0), edge) for edge in (delta + tau, delta)] for reads in tree]
    carried = [(rim.unit([(u, 1.0)]), rim.unit([(v, 1.0)])) for u, v in carried]
    layers.append(rim)
    gate = _Builder("gate", rim.units, biased=True)
    each = [[(p, 1 / tau), (q, -1 / tau)] for p, q in pairs]
    covered = [read for reads in each for read in _scaled(reads, -bound)]
    memory_of = [[read for i, reads in enumerate(each) for read in _scaled(reads, values[i, k])] for k in range(c)]
    outputs = []
    for k, (u, v) in enumerate(carried):
        open_units = [gate.unit([(u, sign), (v, -sign), *covered], -sign * bound) for sign in (1.0, -1.0)]
        outputs.append((open_units, [gate.unit(_scaled(memory_of[k], sign)) for sign in (1.0, -1.0)]))
    layers.append(gate)
    last = _Builder("output", gate.units, biased=False)
    for gated, memory in outputs:
        last.unit([(gated[0], 1.0), (gated[1], -1.0), (memory[0], 1.0), (memory[1], -1.0)])
    layers.append(last)
    return [layer.layer() for layer in layers]


def _level(level: _Builder, values: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """One level of the tree: each value is a sum of units, and so is the larger of two."""
    found, pairs = [], len(values) // 2
    for a, b in zip(values[:pairs], values[pairs : 2 * pairs], strict=True):
        found.append([(level.unit(a), 1.0), (level.unit([*b, *_scaled(a, -1.0)]), 1.0)])
    if len(values) % 2:
        found.append([(level.unit(values[-1]), 1.0)])
    return found
