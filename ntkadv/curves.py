"""Accuracy under attack against the radius of the ball."""

import dataclasses
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm.auto import tqdm

from ntkadv._checks import require_int, require_key, require_labels, require_nonnegative
from ntkadv._tables import file_name, pack, unpack, write_csv
from ntkadv._typing import AnyArray
from ntkadv.attacks.base import Attack
from ntkadv.attacks.model import Model, num_classes_of
from ntkadv.attacks.search import search
from ntkadv.attacks.threat_model import sample_keys
from ntkadv.data import Dataset
from ntkadv.evaluation import Split, is_correct, require_models, samples_of, settings_of
from ntkadv.report import CLEAN
from ntkadv.statistics import require_confidence, wilson_intervals

__all__ = ["AccuracyCurves", "accuracy_curves"]


@dataclasses.dataclass(frozen=True, eq=False)
class AccuracyCurves:
    """Accuracy of several models under one attack, against its radius.

    Attributes:
        models: Names of the models.
        eps: Radii, ascending, from zero on, where the accuracy is the clean one.
        correct: Whether each sample is classified correctly, at this radius and at all smaller ones.
        seconds: Wall time of each model and radius, compilation included.
        gradients, forwards: Passes through the model of each, over all samples that were attacked.
        attack: Settings of the attack but for its radius, and its `name`.
        confidence: Level of the intervals.
    """

    models: list[str]
    eps: Float[np.ndarray, " radii"]
    correct: Bool[np.ndarray, "models radii n"]
    seconds: Float[np.ndarray, "models radii"]
    gradients: Int[np.ndarray, "models radii"]
    forwards: Int[np.ndarray, "models radii"]
    attack: dict[str, Any]
    confidence: float = 0.95

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.correct.shape[2]

    @property
    def accuracy(self) -> Float[np.ndarray, "models radii"]:
        """Accuracy of each model at each radius."""
        return self.correct.mean(axis=2)

    @property
    def interval(self) -> tuple[Float[np.ndarray, "models radii"], Float[np.ndarray, "models radii"]]:
        """Lower and upper ends of the Wilson intervals of the accuracies."""
        return wilson_intervals(self.correct.sum(axis=2), self.n, self.confidence)

    @property
    def median_eps(self) -> dict[str, float]:
        """Radius at which half of the samples are broken that a model has right as they are, by model.

        Between two radii the accuracy is taken to be a straight line. NaN, if fewer are broken, or none is right.
        """
        return {name: _crossing(self.eps, row) for name, row in zip(self.models, self.accuracy, strict=True)}

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each model and radius."""
        head = ["model", "norm", "eps", "accuracy", "low", "high", "n", "seconds", "gradients", "forwards"]
        columns = [np.broadcast_to(self.eps, self.accuracy.shape), self.accuracy, *self.interval]
        columns += [np.full(self.accuracy.shape, self.n), self.seconds, self.gradients, self.forwards]
        lines = [
            [model, self.attack["norm"], *(column[i, j].item() for column in columns)]
            for i, model in enumerate(self.models)
            for j in range(len(self.eps))
        ]
        write_csv(path, head, lines)

    def to_json(self, path: str | Path) -> None:
        """Write all of it, with a bit for each sample; `AccuracyCurves.from_json` is the way back."""
        values = {
            "models": self.models,
            "eps": self.eps.tolist(),
            "n": self.n,
            "confidence": self.confidence,
            "attack": self.attack,
            "accuracy": self.accuracy.tolist(),
            "seconds": self.seconds.tolist(),
            "gradients": self.gradients.tolist(),
            "forwards": self.forwards.tolist(),
            "bits": [[pack(answers) for answers in row] for row in self.correct],
        }
        Path(path).write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "AccuracyCurves":
        """Read the file that `to_json` wrote.

        Raises:
            ValueError: an entry is missing or damaged.
        """
        values = json.loads(Path(path).read_text())
        try:
            return cls(
                values["models"],
                np.array(values["eps"], float),
                np.array([[unpack(digits, values["n"]) for digits in row] for row in values["bits"]]),
                np.array(values["seconds"], float),
                np.array(values["gradients"], int),
                np.array(values["forwards"], int),
                values["attack"],
                values["confidence"],
            )
        except KeyError as error:
            raise ValueError(f"{path} must be what AccuracyCurves.to_json writes, but {error} is missing.") from error


def accuracy_curves(
    models: Mapping[str, Model],
    data: Dataset | tuple[AnyArray, AnyArray],
    attack: Attack,
    eps: Sequence[float | int] | Float[np.ndarray, " radii"],
    *,
    key: Key[Array, ""],
    batch_size: int = 256,
    split: Split = "test",
    confidence: float = 0.95,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> AccuracyCurves:
    """Measure the accuracy of models under an attack of growing radius.

    The balls are nested: a sample that is broken at one radius is so at all larger ones, and is not attacked there. The
    random numbers of a sample depend on `key`, its place and the radius, not on which other radii and samples there
    are. One compiled program serves all radii, and a few more the smaller batches of what is left.

    Args:
        models: Models by name, see `evaluate`.
        data: A data set, or images and labels.
        attack: The attack; its own radius does not matter. A step size that is not relative to it is kept.
        eps: Radii, in any order. Zero, the clean accuracy, is always among those of the result.
        key: A random key.
        batch_size: Number of images at a time.
        split: Which part of a data set to use.
        confidence: Level of the intervals.
        state: A folder for what has been computed, see `evaluate`; each model gets one inside it.
        progress: Show progress bars.

    Raises:
        TypeError, ValueError: as `evaluate` does; and if there are no models, no radii, or a radius is negative, not
            finite, or out of range for the threat model.
    """
    models = require_models("models", models)
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be one attack, got {type(attack).__name__}: {attack!r}; write PGD(Linf(0.1)).")
    x, labels = samples_of(data, split)
    radii = _radii(eps)
    attacks = [attack.with_eps(radius) for radius in radii[1:]]
    require_key("key", key)
    require_int("batch_size", batch_size, minimum=1)
    require_confidence(confidence)
    num_classes = {name: num_classes_of(model, x) for name, model in models.items()}
    for number in num_classes.values():
        require_labels("labels", labels, number)
    batch_size = min(batch_size, len(x))

    shape = (len(models), len(radii))
    correct, seconds = np.zeros((*shape, len(x)), bool), np.zeros(shape)
    costs = np.zeros((*shape, 2), int)
    for i, (name, model) in enumerate(models.items()):
        start = time.perf_counter()
        correct[i, 0] = is_correct(model, x, labels, batch_size, CLEAN)
        costs[i, 0] = 0, len(x)
        seconds[i, 0] = time.perf_counter() - start
        folder = None if state is None else Path(state) / file_name(name)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        for j, one in enumerate(tqdm(attacks, desc=name, disable=not progress), start=1):
            start = time.perf_counter()
            path = None if folder is None else folder / f"{file_name(repr(radii[j]))}.npz"
            places = np.flatnonzero(correct[i, j - 1])
            correct[i, j, places], costs[i, j] = _attack(
                one, model, x, labels, places, key, num_classes[name], batch_size, path, progress
            )
            seconds[i, j] = time.perf_counter() - start
    settings = settings_of(attack)
    del settings["eps"]
    gradients, forwards = costs[..., 0], costs[..., 1]
    return AccuracyCurves(list(models), np.array(radii), correct, seconds, gradients, forwards, settings, confidence)


def _attack(
    attack: Attack,
    model: Model,
    x: AnyArray,
    labels: AnyArray,
    places: Int[np.ndarray, " m"],
    key: Key[Array, ""],
    num_classes: int,
    batch_size: int,
    state_path: Path | None,
    progress: bool,
) -> tuple[Bool[np.ndarray, " m"], tuple[int, int]]:
    """Attack the samples at these places: which of them stay correct, and what it cost.

    Each has the random numbers it would have if all were attacked, and the batches keep the sizes for which the attack
    is compiled: `Attack.run` would do neither.
    """
    if not len(places):
        return np.zeros(0, bool), (0, 0)
    eps = np.float64(attack.threat.eps)
    keys = sample_keys(jax.random.fold_in(key, zlib.crc32(eps.tobytes())), len(x))
    images, classes = jnp.asarray(x[places]), jnp.asarray(labels[places], jnp.int32)
    attacked = search(
        attack,
        attack.stages(num_classes),
        model,
        images,
        classes,
        keys[places],
        num_classes=num_classes,
        batch_size=batch_size,
        state_path=state_path,
        progress=progress,
    )
    name = f"{attack.name}, eps = {eps:.4g}"
    return is_correct(model, attacked.points, classes, batch_size, name), attacked.cost


def _radii(eps: Sequence[float | int] | Float[np.ndarray, " radii"]) -> list[float]:
    """Zero and the radii, ascending, each once."""
    if np.ndim(eps) == 0 or len(eps) == 0:
        raise ValueError(f"eps must hold at least one radius, got {eps!r}; write [2 / 255, 4 / 255, 8 / 255].")
    for i, radius in enumerate(eps):
        require_nonnegative(f"eps[{i}]", radius)
    return sorted({0.0, *map(float, eps)})


def _crossing(eps: Float[np.ndarray, " radii"], accuracy: Float[np.ndarray, " radii"]) -> float:
    """Where the accuracy, which never grows, first falls to half of what it was."""
    half = accuracy[0] / 2
    below = np.flatnonzero(accuracy <= half)
    if not accuracy[0] or not len(below):
        return float("nan")
    j = int(below[0])
    share = (accuracy[j - 1] - half) / (accuracy[j - 1] - accuracy[j])
    return float(eps[j - 1] + share * (eps[j] - eps[j - 1]))
