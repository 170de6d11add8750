"""The comparison run: infinitely wide networks beside finite ones, trained in every way, under one judge.

Kernels (NTK at the end of training, early stopping, ridge, Adv-NTK) stand beside finite networks of the same
architecture and training images (standard, PGD, FGSM, TRADES, APART, CURE), and beside the two-layer patch network of
CGRO's theory. Early stopping and ridge are chosen, and Adv-NTK and the best networks, on validation images under PGD.
One attack implementation judges all.

    python benchmarks/robustness.py                      # --scale small: digits, on two cores
    python benchmarks/robustness.py --scale smoke        # seconds
    python benchmarks/robustness.py --scale paper        # CIFAR-10, 12,000 images: for a GPU
    python benchmarks/robustness.py --scale small --dataset mnist --eps 0.2 --output runs/robustness_mnist

A run that was stopped goes on where it was when the same command is given again: finished cells are not computed again,
training goes on from its checkpoint. Everything is in one directory: a JSON file for each cell, the table (Markdown,
CSV, JSON), the figure.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from robust_models import FAMILIES, Bench, Made, Scale
from scipy import stats

import ntkadv as na
from ntkadv.plots.training import accuracy_trade
from ntkadv.scripts import launch

SCALES = {
    "smoke": Scale(
        dataset="digits", n_train=100, n_val=40, n_test=40, eps=0.1, epochs=2, batch_size=50, attack_steps=2,
        families=("MLP", "patch CNN"), depth=1, width=16, cnn_depth=1, cnn_width=4, times=4, fit_steps=2, judge_steps=3,
        queries=5, members=("apgd-ce", "apgd-t"), looks=2,
    ),
    "small": Scale(
        dataset="digits", n_train=1000, n_val=297, n_test=300, eps=0.15, epochs=30, batch_size=100, attack_steps=10,
        families=("MLP", "CNN", "patch CNN"), depth=3, width=256, cnn_depth=2, cnn_width=32, times=10, fit_steps=20,
        judge_steps=20, queries=100, targets=3, cnn_stride=2, members=("apgd-ce", "apgd-t", "square"), looks=10,
    ),
    "paper": Scale(
        dataset="cifar10", n_train=10_000, n_val=2_000, n_test=10_000, eps=8 / 255, epochs=60, batch_size=128,
        attack_steps=10, families=("MLP", "CNN", "PreActResNet-18"), depth=5, width=512, cnn_depth=5, cnn_width=128,
        times=20, fit_steps=100, judge_steps=100, queries=5000, members=("apgd-ce", "apgd-t", "fab-t", "square"),
        looks=20, crop=4,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """The comparison run."""

    scale: Literal["smoke", "small", "paper"] = "small"
    """How much is computed."""
    dataset: str | None = None
    """Another data set than the scale's."""
    n_train: int | None = None
    """Another number of training images."""
    n_test: int | None = None
    """Another number of test images."""
    eps: float | None = None
    """Another radius of the l_inf ball."""
    epochs: int | None = None
    """Another number of epochs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each: split, networks, batches, attacks."""
    families: tuple[str, ...] | None = None
    """Other families of architectures than the scale's: MLP, CNN, patch CNN, PreActResNet-18."""
    methods: tuple[str, ...] | None = None
    """Only these methods, by their names in the table."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path | None = None
    """Where results go; runs/robustness-SCALE by default."""
    overwrite: bool = False
    """Throw away results that are there."""


def main(config: Config) -> None:
    """Train what is missing, judge it, write table and figure."""
    console = Console()
    changes = {
        name: getattr(config, name)
        for name in ("dataset", "n_train", "n_test", "eps", "epochs", "families")
        if getattr(config, name) is not None
    }
    scale = dataclasses.replace(SCALES[config.scale], **changes)
    unknown = set(scale.families) - set(FAMILIES)
    if unknown:
        raise ValueError(f"families must be among {sorted(FAMILIES)}, got {sorted(unknown)}.")
    output = config.output or Path(f"runs/robustness-{config.scale}")
    # Seeds and methods may be added later: what is there stays.
    run = na.runs.Run(output, dataclasses.asdict(scale), overwrite=config.overwrite)
    if config.overwrite:
        for file in run.path.glob("cell-*.json"):
            file.unlink()
    bench = Bench(scale, run, config.root)
    wanted = [
        (seed, family, method)
        for seed in config.seeds
        for family in scale.families
        for method in bench.methods(family)
        if config.methods is None or method in config.methods
    ]
    cells = []
    for number, (seed, family, method) in enumerate(wanted, 1):
        path = run.path / f"cell-{_file(family)}-{_file(method)}-{seed}.json"
        if not path.exists():
            console.print(f"[{number}/{len(wanted)}] {family}, {method}, seed {seed}")
            run.save_json(path.stem, judged(bench, bench.make(family, method, seed), seed))
        cells.append({"family": family, "method": method, "seed": seed, **json.loads(path.read_text())})
    rows = aggregated(cells)
    settings = {"seeds": config.seeds, **dataclasses.asdict(scale)}
    report = {**na.runs.environment(), "config": settings, "columns": COLUMNS, "rows": rows}
    run.save_json("table", report)
    (run.path / "table.md").write_text(as_markdown(rows) + "\n")
    (run.path / "table.csv").write_text(as_csv(rows))
    title = f"{scale.dataset}, n = {scale.n_train}, ε = {scale.eps:.3g}, seeds {list(config.seeds)}"
    points: dict[str, dict[str, Any]] = {}
    for row in rows:
        points.setdefault(row["family"], {})[row["method"]] = (*row["clean"], *row["AutoAttack"])
    run.figure(accuracy_trade(points, "AutoAttack", title=title), "clean_against_robust")
    console.print(as_table(rows, title))
    console.print(f"Table (Markdown, CSV, JSON) and figure (PNG, PDF): {output.resolve()}")


COLUMNS = ("clean", "PGD-20", "AutoAttack", "PGD-20, last")


def judged(bench: Bench, made: Made, seed: int) -> dict[str, Any]:
    """Judge what was made: the best by validation under everything, the last under PGD."""
    scale, threat = bench.scale, bench.threat
    key = jax.random.fold_in(jax.random.key(seed), 9)
    data = bench.data(seed)
    attacks = {
        "PGD-20": na.attacks.PGD(threat, steps=20, loss="cross_entropy" if made.is_network else "squared"),
        "AutoAttack": na.attacks.AutoAttack(
            threat,
            version="custom",
            attacks_to_run=list(scale.members),
            steps=scale.judge_steps,
            queries=scale.queries,
            targets=scale.targets,
        ),
    }
    with warnings.catch_warnings():
        # What the checks say of a network that training has brought to a constant answer is in the table already.
        warnings.simplefilter("ignore", na.attacks.EvaluationWarning)
        found = na.evaluate(made.best, data, attacks, key=key, batch_size=scale.evaluation_batch)
        last = found
        if made.last is not None:
            last = na.evaluate(
                made.last, data, {"PGD-20": attacks["PGD-20"]}, key=key, batch_size=scale.evaluation_batch
            )
    return {
        "n": len(data.x_test),
        "correct": {
            "clean": int(found.correct["clean"].sum()),
            "PGD-20": int(found.correct["PGD-20"].sum()),
            "AutoAttack": int(found.correct["AutoAttack"].sum()),
            "PGD-20, last": int(last.correct["PGD-20"].sum()),
        },
        "flags": [str(flag) for flag in found.flags],
        "train_seconds": made.seconds,
        "judge_seconds": sum(found.seconds.values()),
        "size": made.size,
        "notes": made.notes,
    }


def aggregated(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds, with 95% intervals; of one seed, the interval is Wilson's."""
    rows = []
    for family, method in dict.fromkeys((cell["family"], cell["method"]) for cell in cells):
        ours = [cell for cell in cells if (cell["family"], cell["method"]) == (family, method)]
        row: dict[str, Any] = {"family": family, "method": method, "seeds": [cell["seed"] for cell in ours]}
        row |= {column: interval([(cell["correct"][column], cell["n"]) for cell in ours]) for column in COLUMNS}
        # The first seed compiles.
        row["train_seconds"] = float(np.median([cell["train_seconds"] for cell in ours]))
        row["size"] = ours[0]["size"]
        rows.append(row)
    return rows


def interval(counts: list[tuple[int, int]]) -> tuple[float, float, float]:
    """Give the mean accuracy, and a 95% interval: Student's over seeds, or Wilson's if there is one."""
    if len(counts) == 1:
        ((right, n),) = counts
        return right / n, *na.wilson_interval(right, n)
    accuracies = np.array([right / n for right, n in counts])
    mean = float(accuracies.mean())
    half = float(stats.t.ppf(0.975, len(counts) - 1) * accuracies.std(ddof=1) / len(counts) ** 0.5)
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)


def _cells(row: Mapping[str, Any]) -> list[str]:
    values = [f"{mean:.3f} [{low:.2f}, {high:.2f}]" for mean, low, high in (row[column] for column in COLUMNS)]
    return [row["family"], row["method"], *values, f"{row['train_seconds']:.1f}", row["size"]]


HEAD = ("family", "method", *COLUMNS, "train, s", "size")


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Write the table for a README."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * 2 + " ---: |" * (len(HEAD) - 2)]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in rows])


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Write the table with its intervals in columns of their own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{column}{end}" for column in COLUMNS for end in ("", " low", " high")]
    writer.writerow(["family", "method", *ends, "train_seconds", "size"])
    for row in rows:
        values = [value for column in COLUMNS for value in row[column]]
        writer.writerow([row["family"], row["method"], *values, row["train_seconds"], row["size"]])
    return text.getvalue()


def as_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Show the table."""
    table = Table(*HEAD, title=title)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


if __name__ == "__main__":
    launch(main, Config)
