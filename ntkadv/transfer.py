"""Perturbations made against one model and shown to another."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from rich.console import Console, ConsoleOptions
from rich.table import Table
from tqdm.auto import tqdm

from ntkadv._checks import require_int, require_key, require_labels
from ntkadv._tables import as_text, build_table, fitting, markdown, pack, unpack, write_csv
from ntkadv._typing import AnyArray
from ntkadv.attacks.base import Attack
from ntkadv.attacks.model import Model, num_classes_of, working_dtype
from ntkadv.attacks.search import batches
from ntkadv.attacks.threat_model import ThreatModel, move, sample_keys
from ntkadv.data import Dataset
from ntkadv.evaluation import Split, is_correct, require_models, samples_of, settings_of
from ntkadv.statistics import require_confidence, wilson_intervals

__all__ = ["TransferMatrix", "transfer"]

NONE = "none"
RANDOM = "random"


@dataclasses.dataclass(frozen=True, eq=False)
class TransferMatrix:
    """What targets make of images that were perturbed against sources; printed as a table.

    Attributes:
        sources: What the images were perturbed against: `"none"`, perhaps `"random"`, and models.
        targets: The models that were shown them.
        correct: Whether each sample is classified correctly.
        attack: Settings of the attack, and its `name`.
        confidence: Level of the intervals.
    """

    sources: list[str]
    targets: list[str]
    correct: Bool[np.ndarray, "sources targets n"]
    attack: dict[str, Any]
    confidence: float = 0.95

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.correct.shape[2]

    @property
    def accuracy(self) -> Float[np.ndarray, "sources targets"]:
        """Accuracy of each target on the images perturbed against each source."""
        return self.correct.mean(axis=2)

    @property
    def interval(self) -> tuple[Float[np.ndarray, "sources targets"], Float[np.ndarray, "sources targets"]]:
        """Lower and upper ends of the Wilson intervals of the accuracies."""
        return wilson_intervals(self.correct.sum(axis=2), self.n, self.confidence)

    @property
    def clean(self) -> Float[np.ndarray, " targets"]:
        """Accuracy of each target on the images as they are."""
        return self.accuracy[self.sources.index(NONE)]

    @property
    def fooled(self) -> Float[np.ndarray, "sources targets"]:
        """Share of the samples that the target has right as they are, and wrong perturbed; NaN if it has none right."""
        fooled, right = self._fooled
        return np.where(right > 0, fooled / np.maximum(right, 1), np.nan)

    @property
    def fooled_interval(self) -> tuple[Float[np.ndarray, "sources targets"], Float[np.ndarray, "sources targets"]]:
        """Lower and upper ends of the Wilson intervals of `fooled`."""
        return wilson_intervals(*self._fooled, self.confidence)

    @property
    def caption(self) -> str:
        """What the numbers are."""
        return (
            f"Accuracy of each model (column) on {self.n} images perturbed against each source (row) with "
            f"{100 * self.confidence:g}% intervals; {self.attack['name']}, {self.attack['norm']} eps = "
            f"{self.attack['eps']:.4g}"
        )

    def to_markdown(self) -> str:
        """Write the accuracies in Markdown."""
        return markdown(self._head, self._cells(narrow=False), [self.caption])

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each source and target."""
        head = ["source", "target", "accuracy", "low", "high", "n"]
        head += ["fooled", "fooled_low", "fooled_high", "clean_correct", "norm", "eps"]
        columns = [self.accuracy, *self.interval, np.full(self.accuracy.shape, self.n)]
        columns += [self.fooled, *self.fooled_interval, self._fooled[1]]
        lines = [
            [source, target, *(column[i, j].item() for column in columns), self.attack["norm"], self.attack["eps"]]
            for i, source in enumerate(self.sources)
            for j, target in enumerate(self.targets)
        ]
        write_csv(path, head, lines)

    def to_json(self, path: str | Path) -> None:
        """Write all of it, with a bit for each sample; `TransferMatrix.from_json` is the way back."""
        values = {
            "sources": self.sources,
            "targets": self.targets,
            "n": self.n,
            "confidence": self.confidence,
            "attack": self.attack,
            "accuracy": self.accuracy.tolist(),
            "bits": [[pack(answers) for answers in row] for row in self.correct],
        }
        Path(path).write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "TransferMatrix":
        """Read the file that `to_json` wrote.

        Raises:
            ValueError: an entry is missing or damaged.
        """
        values = json.loads(Path(path).read_text())
        try:
            correct = np.array([[unpack(digits, values["n"]) for digits in row] for row in values["bits"]])
            return cls(values["sources"], values["targets"], correct, values["attack"], values["confidence"])
        except KeyError as error:
            raise ValueError(f"{path} must be what TransferMatrix.to_json writes, but {error} is missing.") from error

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        wide, narrow = (build_table(self._head, self._cells(narrow=n), self.caption, narrow=n) for n in (False, True))
        yield from fitting(console, options, wide, narrow)

    def __str__(self) -> str:
        return as_text(self)

    @property
    def _head(self) -> list[str]:
        return ["perturbed against", *self.targets]

    def _cells(self, *, narrow: bool) -> list[list[str]]:
        line = "{:.3f}\n{:.2f}-{:.2f}" if narrow else "{:.3f} [{:.3f}, {:.3f}]"
        numbers = np.stack([self.accuracy, *self.interval], axis=2)
        return [
            [source, *(line.format(*cell) for cell in row)]
            for source, row in zip(self.sources, numbers.tolist(), strict=True)
        ]

    @property
    def _fooled(self) -> tuple[Int[np.ndarray, "sources targets"], Int[np.ndarray, "sources targets"]]:
        """How many are fooled, and of how many."""
        right = self.correct[self.sources.index(NONE)]
        fooled = (right & ~self.correct).sum(axis=2)
        return fooled, np.broadcast_to(right.sum(axis=1), fooled.shape)


def transfer(
    sources: Mapping[str, Model],
    data: Dataset | tuple[AnyArray, AnyArray],
    attack: Attack,
    *,
    key: Key[Array, ""],
    targets: Mapping[str, Model] | None = None,
    noise: bool = True,
    batch_size: int = 256,
    split: Split = "test",
    confidence: float = 0.95,
    progress: bool = True,
) -> TransferMatrix:
    """Perturb images against each source, and show them to every target.

    Where a target is a source, its cell on the diagonal is what `evaluate` finds with the same key.

    Args:
        sources: Models by name that are attacked.
        data: A data set, or images and labels.
        attack: The attack.
        key: A random key.
        targets: Models by name that are shown the images; the sources, if not given.
        noise: Add `"random"` to the sources: uniformly random points of the threat model, as a control.
        batch_size: Number of images at a time.
        split: Which part of a data set to use.
        confidence: Level of the intervals.
        progress: Show progress bars.

    Raises:
        TypeError, ValueError: as `evaluate` does; and if there are no models, or a source is called `"none"` or
            `"random"`.
    """
    sources = require_models("sources", sources)
    targets = sources if targets is None else require_models("targets", targets)
    taken = [name for name in (NONE, RANDOM) if name in sources]
    if taken:
        raise ValueError(f"sources must not be called {taken[0]!r}, which is a row of its own; choose another name.")
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be one attack, got {type(attack).__name__}: {attack!r}; write PGD(Linf(0.1)).")
    x, labels = samples_of(data, split)
    require_key("key", key)
    require_int("batch_size", batch_size, minimum=1)
    require_confidence(confidence)
    for model in (*sources.values(), *targets.values()):
        require_labels("labels", labels, num_classes_of(model, x))
    batch_size = min(batch_size, len(x))

    def judge(name: str, images: AnyArray) -> None:
        rows[name] = [
            is_correct(model, images, labels, batch_size, f"{target}, source {name}")
            for target, model in targets.items()
        ]

    rows: dict[str, list[np.ndarray]] = {}
    judge(NONE, x)
    if noise:
        judge(
            RANDOM, _random_points(attack.threat, x, jax.random.fold_in(key, zlib.crc32(RANDOM.encode())), batch_size)
        )
    attack_key = jax.random.fold_in(key, zlib.crc32(attack.name.encode()))
    for name, model in (bar := tqdm(sources.items(), disable=not progress)):
        bar.set_description(name)
        judge(name, attack.run(model, x, labels, key=attack_key, batch_size=batch_size, progress=progress).points)
    settings = settings_of(attack)
    return TransferMatrix(list(rows), list(targets), np.array(list(rows.values())), settings, confidence)


def _random_points(
    threat: ThreatModel, x: Float[AnyArray, "n h w c"], key: Key[Array, ""], batch_size: int
) -> Float[np.ndarray, "n h w c"]:
    keys = sample_keys(key, len(x))
    points = []
    for batch in batches(np.arange(len(x)), batch_size):
        images = jnp.asarray(x[batch.places])
        start = images.astype(working_dtype(images.dtype))
        points.append(np.asarray(move(images, threat.random_point(keys[batch.places], start) - start))[: batch.size])
    return np.concatenate(points)
