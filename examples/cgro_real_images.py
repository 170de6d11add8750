"""Robust memorisation and width on real images: adversarial training of growing networks, and their loss landscape.

1. The LeNet family (or ResNet-9) is trained by PGD at growing width. Accuracies on clean and attacked, training and
   test images, in the end and where robust validation accuracy was best. Two questions: does robust memorisation grow
   with width? And do narrow networks collapse to a constant?
2. With --flatness, at every recorded epoch: local and global flatness, loss change and robust gap at radii inside and
   outside the training radius; and the rank correlation of global flatness with the robust gap, over epochs and widths.

    python examples/cgro_real_images.py                                             # MNIST, LeNet x1 to x16
    python examples/cgro_real_images.py --warm-up 15 --output runs/cgro_real_images_warm
    python examples/cgro_real_images.py --model lenet5 --widths 1 2 --eps 0.1 --epochs 20 --flatness \
        --radii 0 0.5 0.75 1 1.5 2 --output runs/cgro_flatness
    python examples/cgro_real_images.py --dataset cifar10 --model resnet9 --eps 0.031373 --widths 4 16 \
        --optimizer sgd --learning-rate 0.1 --batch-size 50 --epochs 15 --flatness --radii 0 0.5 0.75 1 1.5 2 \
        --output runs/cgro_cifar10

The published networks were trained on all images, and no settings of their training were found: what is chosen here is
in the configuration. Widths and seeds can be added to a run. One that was stopped goes on where it was when the same
command is given again.

Source: Li & Li, ICML 2025, arXiv 2306.01271; the LeNets are those of Madry et al., ICLR 2018, arXiv 1706.06083.
"""

from __future__ import annotations

import csv
import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv import cgro
from ntkadv.cgro import figures
from ntkadv.scripts import launch, settings_of
from ntkadv.training import CropFlip, PGDTraining, TrainedNetwork
from ntkadv.vision import LeNet, ResNet9, VisionModel

ACCURACIES = ("train_clean", "train_robust", "test_clean", "test_robust")
CURVES = tuple(field.name for field in dataclasses.fields(cgro.FlatnessCurves))

PUBLISHED = {
    1: {"train_robust": 0.1170, "test_clean": 0.1135, "test_robust": 0.1135},
    8: {"train_robust": 0.1170, "test_clean": 0.1135, "test_robust": 0.1135},
    12: {"train_robust": 0.9930, "test_clean": 0.9506, "test_robust": 0.7796},
    16: {"train_robust": 0.9950, "test_clean": 0.9485, "test_robust": 0.8343},
}
"""LeNet on MNIST, l_inf 0.3, by width (arXiv 2306.01271)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Robust memorisation and width on real images."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "mnist"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    model: Literal["lenet", "lenet5", "resnet9"] = "lenet"
    """Madry's family (x k: 2k and 4k filters, 64k hidden units), LeNet-5 and its multiples, or ResNet-9 of k to 8k
    channels."""
    widths: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    """Factors k."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of images, network, batches and attacks."""
    n_train: int = 1000
    """Training images."""
    n_val: int = 100
    """Validation images: the best epoch is chosen on them."""
    n_test: int = 500
    """Test images, and training images that are judged."""
    eps: float = 0.3
    """Radius of the l_inf ball."""
    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 25
    """Images a step."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam at a constant rate; or momentum 0.9 and weight decay 5e-4, the rate rising and falling once ("cyclic")."""
    learning_rate: float = 1e-3
    """Its learning rate, or the largest."""
    attack_steps: int = 7
    """Steps of the PGD of the training."""
    judge_steps: int = 20
    """Steps of the two PGDs that judge, by cross-entropy and by margin: an image must withstand both."""
    warm_up: int = 0
    """Epochs over which perturbations of the training grow to their full size. 0: the published collapse is without."""
    augment: bool = False
    """Crop and flip training images."""
    records: int = 6
    """Epochs at which the network is recorded, the first and the last included."""
    flatness: bool = False
    """Measure the loss landscape at these epochs."""
    n_flat: int = 100
    """Training and test images around which it is measured."""
    flat_steps: int = 5
    """Steps of its ascents."""
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    """Radii where it is measured, in units of eps; 1 must be one of them."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/cgro_real_images")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""

    def __post_init__(self):
        if 1.0 not in self.radii:
            raise ValueError(f"radii must hold 1, the training radius, got {self.radii}.")
        if not 2 <= self.records <= self.epochs + 1:
            raise ValueError(f"records must be from 2 to epochs + 1 = {self.epochs + 1}, got {self.records}.")

    @property
    def threat(self) -> na.attacks.Linf:
        """What an attacker may do."""
        return na.attacks.Linf(self.eps)

    @property
    def judges(self) -> list[na.attacks.Attack]:
        """The attacks that judge; the first watches over the training, too."""
        return [na.attacks.PGD(self.threat, steps=self.judge_steps, loss=loss) for loss in ("cross_entropy", "margin")]

    @property
    def record_epochs(self) -> list[int]:
        """Epochs at which the network is recorded."""
        return np.unique(np.linspace(0, self.epochs, self.records).round().astype(int)).tolist()


@dataclasses.dataclass(frozen=True)
class GrowingPGD(PGDTraining):
    """Training by PGD whose perturbations are shrunk at first, and reach their full size after some steps."""

    _: dataclasses.KW_ONLY
    warm_up: int = 0

    def images(self, f, params, batch):
        """Give the attacked images, nearer to the clean ones while the warm-up lasts."""
        attacked = super().images(f, params, batch)
        if not self.warm_up:
            return attacked
        share = jnp.minimum(batch.time / jnp.asarray(self.warm_up, batch.time.dtype), jnp.ones_like(batch.time))
        return batch.x + share.astype(attacked.dtype) * (attacked - batch.x)


def main(config: Config) -> None:
    """Images in, tables and figures out."""
    console = Console()
    settings = settings_of(config, "widths", "seeds")
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    cells: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for seed in config.seeds:
        data = na.load_dataset(
            config.dataset, n_train=config.n_train, n_val=config.n_val, n_test=config.n_test, seed=seed,
            root=config.root,
        )  # fmt: skip
        for width in config.widths:
            name = f"{config.model}-{width}-seed-{seed}"
            cells[width, seed] = run.cached(name, partial(one_cell, config, data, width, seed, run))
            console.print(f"{name}: {described(cells[width, seed])}")
    rows = rows_of(config, cells)
    run.save_json("table", rows)
    write_tables(rows, run.path, is_published(config))
    title = f"{config.dataset}, {config.model}, n = {config.n_train}, ε = {config.eps:.3g}"
    title += f", warm-up {config.warm_up} epochs" if config.warm_up else ""
    run.figure(figures.accuracies_against_width(panels_of(config, cells), title=title), "width")
    run.figure(figures.accuracies_over_epochs(over_epochs(config, cells), title=title), "epochs")
    console.print(table_of(rows, is_published(config)))
    if config.flatness:
        landscapes(config, cells, run, title, console)
    console.print(f"Figures (PNG, PDF) and tables (JSON, CSV, Markdown): {config.output.resolve()}")


def network(config: Config, image: tuple[int, int, int], classes: int, width: int, key: Array) -> VisionModel:
    """Build a network. LeNets see pixels as they are, as Madry's does."""
    if config.model == "resnet9":
        return ResNet9(num_classes=classes, width=width, channels_in=image[2], key=key)
    sizes: dict[str, Any] = {"width": width}
    if config.model == "lenet5":
        sizes = {"filters": (6 * width, 16 * width), "hidden": (120 * width, 84 * width)}
    return LeNet(num_classes=classes, image=image, mean=0.0, std=1.0, key=key, **sizes)


def one_cell(config: Config, data: na.Dataset, width: int, seed: int, run: na.runs.Run) -> dict[str, np.ndarray]:
    """Train one network, and judge it as it was in the end and at its best."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), width), 3)
    model = network(config, data.image_shape, data.num_classes, width, keys[0])
    trained = train(config, data, model, keys[1], run, f"{config.model}-{width}-seed-{seed}")
    per_epoch = config.n_train // config.batch_size
    found: dict[str, Any] = {f"over_{name}": values for name, values in trained.history.items()}
    found |= {"epochs": trained.steps // per_epoch, "parameters": model.num_params}
    assert trained.best is not None
    found["best_epoch"] = trained.best.step // per_epoch
    last = judged(config, data, trained.predictor, keys[2])
    is_last = trained.best.step == trained.step
    best = last if is_last else judged(config, data, trained.best_predictor, keys[2])
    for when, values in (("last", last), ("best", best)):
        found |= {f"{when}_{name}": value for name, value in values.items()}
    return found


def train(
    config: Config, data: na.Dataset, model: VisionModel, key: Array, run: na.runs.Run, name: str
) -> TrainedNetwork:
    """Train by PGD, and record accuracies and, where that is asked for, the landscape."""
    attack = na.attacks.PGD(config.threat, steps=config.attack_steps, loss="cross_entropy", keep_best=False)
    per_epoch = config.n_train // config.batch_size
    return na.training.train(
        model,
        data,
        method=GrowingPGD(attack, loss="cross_entropy", warm_up=config.warm_up * per_epoch),
        epochs=config.epochs,
        key=key,
        optimizer=optimizer_of(config.optimizer, config.learning_rate, config.epochs * per_epoch),
        batch_size=config.batch_size,
        augmentation=CropFlip() if config.augment else None,
        record=partial(recorded, config, data),
        record_at=[epoch * per_epoch for epoch in config.record_epochs],
        keep_best="val_robust",
        checkpoint=run.checkpoint(name),
        metrics=run.path / f"{name}.jsonl",
    )


@cache
def optimizer_of(name: str, rate: float, steps: int) -> optax.GradientTransformation:
    """Build the optimiser: the same object for the same settings, so that all seeds share one compiled program."""
    if name == "adam":
        return optax.adam(rate)
    return na.training.sgd(na.training.triangular(rate, steps, rise=0.4), weight_decay=5e-4)


def recorded(config: Config, data: na.Dataset, model: VisionModel) -> dict[str, Any]:
    """Accuracies while a network is trained, on as many images of each part as there are for validation."""
    watch, n = config.judges[0], config.n_val
    parts = {
        "val": (data.x_val, data.y_val), "train": (data.x_train[:n], data.y_train[:n]),
        "test": (data.x_test[:n], data.y_test[:n]),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for part, (x, y) in parts.items():
        found[f"{part}_clean"] = na.training.accuracy(model, x, y)
        found[f"{part}_robust"] = na.training.robust_accuracy(model, x, y, watch, key=jax.random.key(0))
    if config.flatness:
        n = config.n_flat
        curves = cgro.flatness_curves(
            model, (data.x_train[:n], data.y_train[:n]), (data.x_test[:n], data.y_test[:n]),
            [config.eps * factor for factor in config.radii], key=jax.random.key(1),
            settings=cgro.Flatness(steps=config.flat_steps),
        )  # fmt: skip
        found |= {f"flat_{name}": getattr(curves, name) for name in CURVES}
    return found


def judged(config: Config, data: na.Dataset, model: Any, key: Array) -> dict[str, Any]:
    """Accuracies by the judges, and how large a share of the test images falls into one class."""
    n = len(data.x_test)
    found: dict[str, Any] = {}
    for part, (x, y) in (
        ("train", (data.x_train[:n], data.y_train[:n])),
        ("test", (data.x_test, data.y_test)),
    ):
        result = na.evaluate(model, (x, y), config.judges, key=key, check=False, progress=False)
        found[f"{part}_clean"], found[f"{part}_robust"] = result.correct["clean"], result.worst_case
    answers = np.argmax(np.asarray(model(jnp.asarray(data.x_test))), axis=1)
    found["one_class"] = np.bincount(answers).max() / len(answers)
    return found


def landscapes(
    config: Config, cells: dict[tuple[int, int], dict[str, np.ndarray]], run: na.runs.Run, title: str,
    console: Console,
) -> None:  # fmt: skip
    """Draw the curves over radii by epoch, and correlate global flatness with the robust gap."""
    groups = {}
    for (width, seed), cell in cells.items():
        rows = range(len(cell["epochs"]))
        curves = [cgro.FlatnessCurves(**{name: cell[f"over_flat_{name}"][i] for name in CURVES}) for i in rows]
        # Before training there is nothing to correlate: every network is flat, and none has a gap.
        kept = [(int(e), c) for e, c in zip(cell["epochs"], curves, strict=True) if e > 0]
        groups[f"x{width}" + (f", seed {seed}" if len(config.seeds) > 1 else "")] = kept
        drawn = figures.flatness_over_epochs(kept, config.eps, title=f"{title}, x{width}, seed {seed}")
        run.figure(drawn, f"flatness-{width}-seed-{seed}")
    correlations: dict[str, Any] = {}
    pooled = {name: [curve for _, curve in kept] for name, kept in groups.items()}
    table = Table(title="Rank correlation of global flatness with the robust gap, over epochs and widths")
    for head in ("radius / eps", "gap in accuracy", "p", "gap in loss", "p"):
        table.add_column(head)
    for factor in config.radii:
        if not factor:
            continue
        row = {}
        for gap in ("robust_gap", "robust_loss_gap"):
            try:
                row[gap] = cgro.rank_correlation(pooled, factor * config.eps, gap=gap)._asdict()
            except ValueError:  # too few, or all the same
                row[gap] = {"rho": np.nan, "p": np.nan, "n": sum(map(len, pooled.values()))}
        correlations[f"{factor:g}"] = row
        table.add_row(f"{factor:g}", *(f"{row[gap][kind]:.2g}" for gap in row for kind in ("rho", "p")))
    run.save_json("rank_correlation", correlations)
    run.figure(figures.flatness_against_gap(groups, config.eps, title=title), "flatness_against_gap")
    console.print(table)


def rows_of(config: Config, cells: dict[tuple[int, int], dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """One row for each width, seed, and the best and the last network."""
    return [
        {
            "model": config.model, "width": width, "seed": seed, "parameters": int(cell["parameters"]), "when": when,
            "epoch": int(cell["best_epoch"] if when == "best" else cell["epochs"][-1]),
            "n": len(cell[f"{when}_test_clean"]), "one_class": float(cell[f"{when}_one_class"]),
            **{name: float(np.mean(cell[f"{when}_{name}"])) for name in ACCURACIES},
        }
        for (width, seed), cell in cells.items()
        for when in ("best", "last")
    ]  # fmt: skip


def write_tables(rows: list[dict[str, Any]], path: Path, published: bool) -> None:
    """Write table.csv, a line for each network, and table.md, means over seeds in percent."""
    with open(path / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    head, body = cells_of(rows, published)
    lines = [head, ["---:"] * len(head), *body]
    (path / "table.md").write_text("".join("| " + " | ".join(line) + " |\n" for line in lines), encoding="utf-8")


def table_of(rows: list[dict[str, Any]], published: bool) -> Table:
    """Print the same."""
    head, body = cells_of(rows, published)
    table = Table(title="Accuracies in percent; best: on validation images, under attack")
    for name in head:
        table.add_column(name, justify="right")
    for line in body:
        table.add_row(*line)
    return table


def cells_of(rows: list[dict[str, Any]], published: bool) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table: a line for each width, means over seeds, with their standard deviations."""
    names = {"test_clean": "clean test", "test_robust": "robust test", "train_robust": "robust train",
             "train_clean": "clean train", "one_class": "in one class"}  # fmt: skip
    head = ["width", "parameters", *names.values(), "best: clean test", "robust test", "robust train"]
    head += ["published: clean test", "robust test", "robust train"] if published else []

    def cell(values: list[float]) -> str:
        spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        return f"{100 * np.mean(values):.1f}{spread}"

    body = []
    for width in dict.fromkeys(row["width"] for row in rows):
        last, best = ([r for r in rows if r["width"] == width and r["when"] == when] for when in ("last", "best"))
        line = [f"x{width}", f"{last[0]['parameters']:,}", *(cell([r[name] for r in last]) for name in names)]
        line += [cell([r[name] for r in best]) for name in list(names)[:3]]
        if published:
            theirs = PUBLISHED.get(width, {})
            line += [f"{100 * theirs[name]:.2f}" if theirs else "" for name in list(names)[:3]]
        body.append(line)
    return head, body


def panels_of(
    config: Config, cells: dict[tuple[int, int], dict[str, np.ndarray]]
) -> dict[str, dict[int, dict[str, list[float]]]]:
    """Accuracies by width, for the figure: the last network, the best one, and what was published."""
    panels: dict[str, dict[int, dict[str, list[float]]]] = {}
    for when, label in (("last", "last epoch"), ("best", "best epoch on validation")):
        panels[label] = {
            width: {
                name: [float(np.mean(cells[width, seed][f"{when}_{name}"])) for seed in config.seeds]
                for name in ACCURACIES
            }
            for width in config.widths
        }
    if is_published(config):
        panels["published"] = {
            width: {name: [value] for name, value in values.items()} for width, values in PUBLISHED.items()
        }
    return panels


def over_epochs(
    config: Config, cells: dict[tuple[int, int], dict[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """Accuracies over epochs by width, of the first seed."""
    seed = config.seeds[0]
    return {
        f"x{width}": {
            "epochs": cells[width, seed]["epochs"],
            **{name: cells[width, seed][f"over_{name}"] for name in ACCURACIES},
        }
        for width in config.widths
    }


def is_published(config: Config) -> bool:
    """Whether there are published numbers beside these."""
    return config.dataset == "mnist" and config.model == "lenet" and config.eps == 0.3


def described(cell: dict[str, np.ndarray]) -> str:
    """Say how a network ended."""
    said = ", ".join(f"{name.replace('_', ' ')} {np.mean(cell[f'last_{name}']):.3f}" for name in ACCURACIES)
    share = float(cell["last_one_class"])
    return said + (" (a constant)" if share == 1 else "")


if __name__ == "__main__":
    launch(main, Config)
