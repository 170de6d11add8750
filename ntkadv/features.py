r"""Robust and non-robust features of a kernel, one for each eigenvector of its Gram matrix.

With :math:`\Theta(X, X) = \sum_k \lambda_k v_k v_k^T` the interpolant of the targets Y is a sum of features,

.. math:: f(x) = \sum_k \phi_k(x)\, v_k^T Y, \qquad \phi_k(x) = \Theta(x, X)\, v_k / \lambda_k,

each of which is itself a predictor that can be judged and attacked; gradient flow learns the k-th as
:math:`1 - e^{-\lambda_k t}`, so the leading ones first (Tsilivis & Kempe, NeurIPS 2022, arXiv 2210.05577). What a
perturbation can do to a feature is bounded by its eigenvalue,

.. math:: |\phi_k(x) - \phi_k(x')|^2 \le \bigl(\Theta(x, x) - 2 \Theta(x, x') + \Theta(x', x')\bigr) / \lambda_k,

which makes the leading ones robust, unless they vary little over the images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm.auto import tqdm

from ntkadv._checks import require_finite, require_int, require_key, require_labels
from ntkadv._tables import pack, unpack
from ntkadv._typing import AnyArray
from ntkadv.attacks.base import Attack
from ntkadv.attacks.pgd import PGD
from ntkadv.data import Dataset, targets
from ntkadv.dynamics import TrainingDynamics
from ntkadv.evaluation import Split, all_logits, samples_of
from ntkadv.kernels.gram import gram
from ntkadv.predictors import KernelPredictor
from ntkadv.statistics import require_confidence, wilson_intervals

__all__ = ["Eigenfeatures", "FeatureRobustness", "decorrelation", "feature_robustness"]

Ranges = Sequence[tuple[int, int]]


class Eigenfeatures:
    """The features of an infinitely wide network, from the largest eigenvalue of its NTK to the smallest.

    Ranges of features are named as in Python: `start` is the first, `stop` the one after the last, from 0 on. Modes
    below the noise floor of the Gram matrix are no features.

    Args:
        dynamics: Training of the network, from which images, targets and decomposition are taken; without attacks.

    Raises:
        TypeError: `dynamics` is something else.
        ValueError: it is training under attack, whose modes are not those of the kernel.
    """

    def __init__(self, dynamics: TrainingDynamics):
        if not isinstance(dynamics, TrainingDynamics):
            raise TypeError(f"dynamics must be TrainingDynamics, got {type(dynamics).__name__}.")
        if np.any(dynamics.regularization.rates(0.0) != 1):
            raise ValueError("dynamics must be training without attacks; leave out attack_strength.")
        self.dynamics = dynamics
        values, vectors, floor = dynamics.spectrum
        kept = np.flatnonzero(values > floor)[::-1]
        self.eigenvalues: Float[np.ndarray, " r"] = values[kept]
        self.vectors: Float[np.ndarray, "n r"] = vectors[:, kept]

    def __len__(self) -> int:
        return len(self.eigenvalues)

    @cached_property
    def weights(self) -> Float[np.ndarray, "r c"]:
        """What the interpolant multiplies each feature by, :math:`v_k^T Y`."""
        return self.vectors.T @ self.dynamics.targets

    @property
    def energy(self) -> Float[np.ndarray, " r"]:
        """Share of the targets that each feature carries, :math:`|v_k^T Y|^2 / |Y|_F^2`."""
        return np.sum(self.weights**2, axis=1) / np.sum(self.dynamics.targets**2)

    def predictor(self, start: int, stop: int, *, time: float = np.inf) -> KernelPredictor:
        r"""Give the sum of the features `start` to `stop - 1`, as far as a time has taught them.

        .. math:: f(x) = \sum_k (1 - e^{-\lambda_k t})\, \phi_k(x)\, v_k^T Y

        With all of them it is `TrainingDynamics.predictor(time)`.

        Raises:
            ValueError: there is no such range, or the time is not positive.
        """
        require_ranges([(start, stop)], len(self))
        if not time > 0:
            raise ValueError(f"time must be positive, got {time}; a network at time 0 is zero.")
        values = self.eigenvalues[start:stop]
        factors = -np.expm1(-values * time) / values
        return self._predictor(self.vectors[:, start:stop] @ (factors[:, None] * self.weights[start:stop]))

    def feature(self, k: int) -> KernelPredictor:
        r"""Give one feature with its weights, :math:`\phi_k(x)\, v_k^T Y`: it tells two classes apart, no more."""
        return self.predictor(k, k + 1)

    def top(self, k: int, *, time: float = np.inf) -> KernelPredictor:
        """Give the interpolant cut off after the leading k features, see `predictor`."""
        return self.predictor(0, k, time=time)

    def functions(self, start: int, stop: int) -> KernelPredictor:
        r"""Give the features :math:`\phi_k` themselves as functions of images, one output for each of a range."""
        require_ranges([(start, stop)], len(self))
        return self._predictor(self.vectors[:, start:stop] / self.eigenvalues[start:stop])

    def values(self, x: Float[AnyArray, "m *input"], *, progress: bool = False) -> Float[np.ndarray, "m r"]:
        """Evaluate all features at images, in float64 from the kernel on; at the training images they are `vectors`."""
        dtype = "float64" if self.dynamics.gram.dtype == np.float64 else "float32"
        cross = gram(self.dynamics.arch, x, self.dynamics.x_train, dtype=dtype, progress=progress)
        return cross.astype(np.float64) @ (self.vectors / self.eigenvalues)

    def learnt(self, outputs: Float[AnyArray, "n c"], ranges: Ranges) -> Float[np.ndarray, " ranges"]:
        r"""Compute how much of the targets a model has learnt in each range of features: 0 nothing, 1 all of it.

        .. math:: \langle V^T F, V^T Y \rangle / |V^T Y|_F^2

        with V the eigenvectors of the range. For the network itself at time t it is the mean of
        :math:`1 - e^{-\lambda_k t}`, weighted by the energy.

        Args:
            outputs: Outputs F of any model at the training images, in the units of the targets.
            ranges: Pairs (start, stop).

        Returns:
            A number for each range; NaN where the targets have nothing in it.

        Raises:
            ValueError: `outputs` are not finite or do not have the shape of the targets; there is no such range.
        """
        require_ranges(ranges, len(self))
        if np.shape(outputs) != self.dynamics.targets.shape:
            raise ValueError(f"outputs must have shape {self.dynamics.targets.shape}, got {np.shape(outputs)}.")
        require_finite("outputs", outputs)
        products = np.sum((self.vectors.T @ np.asarray(outputs, np.float64)) * self.weights, axis=1)
        squares = np.sum(self.weights**2, axis=1)
        sums = np.array([[part[a:b].sum() for a, b in ranges] for part in (products, squares)])
        return np.where(sums[1] > 0, sums[0] / np.where(sums[1] > 0, sums[1], 1), np.nan)

    def _predictor(self, coefficients: Float[np.ndarray, "n c"]) -> KernelPredictor:
        return KernelPredictor(self.dynamics.arch, self.dynamics.x_train, coefficients, kernel="ntk")


def require_ranges(ranges: Ranges, size: int) -> None:
    """Require non-empty ranges (start, stop) of the features 0 to size - 1."""
    if len(ranges) == 0:
        raise ValueError("ranges must hold at least one pair (start, stop), got none.")
    for pair in ranges:
        start, stop = pair
        require_int("start", start, minimum=0)
        require_int("stop", stop, minimum=1)
        if not start < stop <= size:
            raise ValueError(f"start and stop must have start < stop <= {size}, the number of features, got {pair}.")


def decorrelation(logits: Float[Array, "b classes"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    r"""Minus the product with the centred target, :math:`-\sum_k (\mathbb{1}[k = y] - 1/c) f_k`: a loss for attacks."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(logits, axis=1) - own


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureRobustness:
    """How useful ranges of features are, and what is left of that under attack; see `feature_robustness`.

    Attributes:
        ranges: First feature of each range, and the one after its last.
        eigenvalues: Largest and smallest of each.
        energy: Share of the targets that each carries.
        correct, correct_attacked: Whether it classifies each image correctly, as it is and attacked.
        usefulness, robust_usefulness: Correlation with the targets, as they are and in the worst case that was found.
        usefulness_error, robust_usefulness_error: Their standard errors.
        attack: Name of the attack on the classification.
        norm, eps: Of the ball.
    """

    ranges: Int[np.ndarray, "ranges 2"]
    eigenvalues: Float[np.ndarray, "ranges 2"]
    energy: Float[np.ndarray, " ranges"]
    correct: Bool[np.ndarray, "ranges n"]
    correct_attacked: Bool[np.ndarray, "ranges n"]
    usefulness: Float[np.ndarray, " ranges"]
    usefulness_error: Float[np.ndarray, " ranges"]
    robust_usefulness: Float[np.ndarray, " ranges"]
    robust_usefulness_error: Float[np.ndarray, " ranges"]
    attack: str
    norm: str
    eps: float

    @property
    def accuracy(self) -> Float[np.ndarray, " ranges"]:
        """Accuracy of each range on the images as they are."""
        return self.correct.mean(axis=1)

    @property
    def robust_accuracy(self) -> Float[np.ndarray, " ranges"]:
        """Accuracy of each range on the images that were attacked against it."""
        return self.correct_attacked.mean(axis=1)

    def intervals(self, *, attacked: bool, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Give lower and upper ends of the Wilson intervals of the accuracies."""
        require_confidence(confidence)
        answers = self.correct_attacked if attacked else self.correct
        return wilson_intervals(answers.sum(axis=1), answers.shape[1], confidence)

    def to_dict(self) -> dict[str, Any]:
        """Give all of it in plain values, for JSON; `FeatureRobustness.from_dict` is the way back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        bits = {name: [pack(row) for row in values[name]] for name in _ANSWERS}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        accuracies = {"accuracy": self.accuracy.tolist(), "robust_accuracy": self.robust_accuracy.tolist()}
        return {**plain, **bits, **accuracies, "n": self.correct.shape[1]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureRobustness:
        """Read what `to_dict` gave.

        Raises:
            ValueError: an entry is missing or damaged.
        """
        try:
            fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
            for name in _ANSWERS:
                fields[name] = np.array([unpack(digits, values["n"]) for digits in fields[name]])
        except KeyError as error:
            raise ValueError(f"values must be what FeatureRobustness.to_dict gives; {error} is missing.") from error
        fields["ranges"] = np.array(fields["ranges"], int)
        arrays = {name: np.array(value, float) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **arrays})


_ANSWERS = ("correct", "correct_attacked")


def feature_robustness(
    features: Eigenfeatures,
    ranges: Ranges,
    data: Dataset | tuple[AnyArray, AnyArray],
    attack: Attack,
    *,
    key: Key[Array, ""],
    steps: int = 20,
    batch_size: int = 256,
    split: Split = "test",
    progress: bool = True,
) -> FeatureRobustness:
    r"""Measure how useful ranges of features are on images, and how much of that an attack leaves.

    Each range is a predictor f, the sum of its features with their weights, and is attacked for itself, in two ways:

    - its classification, by `attack`: accuracy and robust accuracy. One feature with its weights ranks the classes in
      one of two orders, so its accuracy is that of two classes at most;
    - its correlation with the centred targets y, which does not depend on the scale of f:

      .. math:: \frac{E \langle y, f(x) \rangle}{\sqrt{E |y|^2\; E |f(x)|^2}}, \qquad
                \frac{E \min_{|x' - x| \le \varepsilon} \langle y, f(x') \rangle}{\sqrt{E |y|^2\; E |f(x)|^2}}

      by PGD without random start. A feature is useful where the first is positive, robust where the second is too, and
      useful but not robust where the second is negative.

    Args:
        features: The features.
        ranges: Pairs (start, stop); (k, k + 1) is one feature, (0, k) the leading k.
        data: A data set, or images (m, h, w, channels) and labels (m,).
        attack: The attack on the classification, whose ball serves for the correlation too.
        key: A random key; every range is attacked with the same.
        steps: Steps of the attack on the correlation.
        batch_size: Number of images at a time.
        split: Which part of a data set to use.
        progress: Show a bar over the ranges.

    Raises:
        TypeError, ValueError: `attack` is no attack; there is no such range; the labels are no classes of the targets;
            as `Attack`.

    Source: Tsilivis & Kempe, NeurIPS 2022, arXiv 2210.05577; Ilyas et al., NeurIPS 2019, arXiv 1905.02175, with the
    features scaled on the images that are judged.
    """
    require_ranges(ranges, len(features))
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be one attack, got {type(attack).__name__}; write PGD(Linf(0.1), loss='margin').")
    x, labels = samples_of(data, split)
    require_labels("labels", labels, features.dynamics.targets.shape[1])
    require_key("key", key)
    require_int("batch_size", batch_size, minimum=1)
    spoiler = PGD(attack.threat, steps=steps, loss=decorrelation, random_start=False, keep_best=False)
    wanted = targets(labels, features.dynamics.targets.shape[1]).astype(np.float64)
    size = min(batch_size, len(x))
    rows = []
    for start, stop in tqdm(ranges, desc="features", disable=not progress, leave=False):
        model = features.predictor(start, stop)
        clean = _outputs(model, x, size)
        points = attack(model, x, labels, key=key, batch_size=size)
        spoilt = _outputs(model, spoiler(model, x, labels, key=key, batch_size=size), size)
        scale = np.sqrt(np.mean(np.sum(wanted**2, axis=1)) * np.mean(np.sum(clean**2, axis=1)))
        products = np.sum(wanted * clean, axis=1)
        worst = np.minimum(products, np.sum(wanted * spoilt, axis=1))
        row: dict[str, Any] = {
            "ranges": (start, stop),
            "eigenvalues": features.eigenvalues[[start, stop - 1]],
            "energy": features.energy[start:stop].sum(),
            "correct": clean.argmax(axis=1) == np.asarray(labels),
            "correct_attacked": _outputs(model, points, size).argmax(axis=1) == np.asarray(labels),
        }
        for name, terms in (("usefulness", products), ("robust_usefulness", worst)):
            row[name] = terms.mean() / scale
            row[f"{name}_error"] = terms.std() / scale / np.sqrt(len(terms))
        rows.append(row)
    arrays = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return FeatureRobustness(**arrays, attack=attack.name, norm=attack.threat.norm, eps=attack.threat.eps)


def _outputs(model: KernelPredictor, x: AnyArray, batch_size: int) -> Float[np.ndarray, "m c"]:
    outputs = all_logits(model, x, batch_size).astype(np.float64)
    require_finite("outputs of the features", outputs)
    return outputs
