"""What goes wrong in robust training, and what helps: collapse of FGSM, robust overfitting, and what each method costs.

A small CNN on MNIST by PGD, FGSM with and without a random start, GradAlign, APART, TRADES and CURE. Five figures:
robust accuracy over epochs, with the collapse of FGSM; how strong an FGSM generator is, by what its perturbations do to
one fixed robust network, beside random noise; how APART's generator grows; robust overfitting, best against last; and
which weights CURE calls prominent. And a table: passes through the network, seconds an epoch, best and last.

    python examples/robust_training.py
    python examples/robust_training.py --dataset digits --n-train 1000 --eps 0.15 --epochs 60 --output runs/digits

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv.attacks import FGSM, PGD, Linf
from ntkadv.plots import training as figures
from ntkadv.scripts import launch, settings_of
from ntkadv.training import (
    APARTTraining,
    Batch,
    CURETraining,
    FGSMTraining,
    Forward,
    GradAlignTraining,
    Method,
    PGDTraining,
    StandardTraining,
    TRADESTraining,
    accuracy,
    generator_strength,
    robust_accuracy,
    robust_gradient_prominence,
    train,
    triangular,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What goes wrong in robust training, and what helps."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "mnist"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    n_train: int = 3000
    """Training images."""
    n_test: int = 500
    """Test images, attacked at every look; as many training images are."""
    eps: float = 0.3
    """Radius of the l_inf ball."""
    warmup: float = 0.5
    """Share of the run over which the attack grows to eps; from the start, PGD stays at a constant answer."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 100
    """Images a step."""
    learning_rate: float = 3e-3
    """Peak of Adam's rate, which rises and falls."""
    attack_steps: int = 10
    """Steps of PGD and TRADES in training; the judge has twice as many."""
    looks: int = 10
    """How often accuracies are measured."""
    methods: tuple[str, ...] = ("pgd", "fgsm", "fgsm-rs", "gradalign", "apart", "trades", "cure")
    """Methods."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each: split, network, batches, attacks."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/robust_training")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""


LABELS = {
    "pgd": "PGD",
    "fgsm": "FGSM",
    "fgsm-rs": "FGSM, random start",
    "gradalign": "GradAlign",
    "apart": "APART",
    "trades": "TRADES",
    "cure": "CURE",
    "standard": "standard",
}


def main(config: Config) -> None:
    """Train, measure, draw."""
    console = Console()
    unknown = set(config.methods) - set(LABELS)
    if unknown or "pgd" not in config.methods:
        raise ValueError(f"methods must be among {sorted(LABELS)}, pgd with them, got {config.methods}.")
    settings = settings_of(config)
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    lab = Lab(config, run)
    found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in config.methods}
    for seed in config.seeds:
        # The generators are tried on the PGD network, so that comes first.
        for name in sorted(config.methods, key=lambda name: name != "pgd"):
            console.print(f"seed {seed}: {LABELS[name]}")
            found[name].append(lab.cell(name, seed))
    draw(config, run, lab, found)
    table = summary(config, lab, found)
    console.print(table_of(table))
    run.save_json("summary", {**na.runs.environment(), "config": settings, "methods": table})
    console.print(f"Figures (PNG, PDF) and numbers (JSON, npz): {config.output.resolve()}")


class Lab:
    """Data, network and methods of a run; one cell is one method and seed, and is computed once."""

    def __init__(self, config: Config, run: na.runs.Run):
        self.config, self.run = config, run
        self.threat = Linf(config.eps)
        self.per_epoch = config.n_train // config.batch_size
        self.steps = config.epochs * self.per_epoch
        looks = np.unique(np.linspace(0, config.epochs, config.looks + 1).round().astype(int))
        self.looks = [int(look) * self.per_epoch for look in looks]
        self.judges = {
            f"PGD-{2 * config.attack_steps}, ε = {share * config.eps:.3g}": PGD(
                Linf(share * config.eps), steps=2 * config.attack_steps, loss="cross_entropy"
            )
            for share in (1, 0.5)
        }
        self.methods = {name: self.method(name) for name in config.methods}
        # One optimiser for all, so that programs compiled for it are used again.
        self.optimizer = optax.adam(triangular(config.learning_rate, self.steps))

    def data(self, seed: int) -> na.Dataset:
        """Images of a seed."""
        config = self.config
        return na.load_dataset(
            config.dataset, n_train=config.n_train, n_val=0, n_test=config.n_test, seed=seed, root=config.root
        )

    def network(self, seed: int) -> na.vision.SmallCNN:
        """Draw the network of a seed."""
        image = self.data(seed).x_train.shape[1:]
        return na.vision.SmallCNN(image=image, key=jax.random.fold_in(jax.random.key(seed), 1))

    def method(self, name: str) -> Method:
        """Set up a method."""
        threat, steps = self.threat, self.config.attack_steps
        warmup = round(self.config.warmup * self.steps)
        pgd = PGD(threat, steps=steps, loss="cross_entropy", keep_best=False)
        made: dict[str, Any] = {
            "pgd": lambda: PGDTraining(pgd, loss="cross_entropy", warmup=warmup),
            "fgsm": lambda: FGSMTraining(threat, random_start=False, step=1.0, warmup=warmup),
            "fgsm-rs": lambda: FGSMTraining(threat, warmup=warmup),
            "gradalign": lambda: GradAlignTraining(threat),
            "apart": lambda: APARTTraining.scaled(threat, steps=self.steps),
            "trades": lambda: TRADESTraining(threat, steps=steps, warmup=warmup),
            "cure": lambda: CURETraining(threat, steps=steps, warmup=warmup),
            "standard": lambda: StandardTraining(loss="cross_entropy"),
        }
        return made[name]()

    def start(self, name: str, seed: int) -> na.vision.VisionModel:
        """Give the network to begin with: for CURE one that was trained without attacks, as published."""
        network = self.network(seed)
        if name != "cure":
            return network
        done = self._trained("natural", StandardTraining(loss="cross_entropy"), network, seed, None)
        return rebuilt(network, done)

    def cell(self, name: str, seed: int) -> dict[str, np.ndarray]:
        """Train one network, or read what it gave."""
        fixed = None if name == "pgd" else rebuilt(self.network(seed), self.cell("pgd", seed))
        return self._trained(name, self.methods[name], self.start(name, seed), seed, fixed)

    def _trained(
        self, name: str, method: Method, network: na.vision.VisionModel, seed: int, fixed: Any
    ) -> dict[str, np.ndarray]:
        data, key = self.data(seed), jax.random.fold_in(jax.random.key(seed), 2)
        measured = 0.0

        def record(model: Any) -> Mapping[str, float]:
            nonlocal measured
            begun = time.perf_counter()
            values = {"clean": accuracy(model, data.x_test, data.y_test)}
            for label, judge in self.judges.items():
                values[label] = robust_accuracy(model, data.x_test, data.y_test, judge, key=key)
            judge, n = next(iter(self.judges.values())), self.config.n_test
            values["train"] = robust_accuracy(model, data.x_train[:n], data.y_train[:n], judge, key=key)
            if fixed is not None:
                generator = FGSM(self.threat, loss="cross_entropy")
                strength = generator_strength(model, fixed, data.x_test, data.y_test, generator, key=key)
                values |= {"transferred": strength.transferred, "noise": strength.noise}
            measured += time.perf_counter() - begun
            return values

        def make() -> dict[str, np.ndarray]:
            begun = time.perf_counter()
            done = train(
                network, data, method=method, epochs=self.config.epochs, key=key, optimizer=self.optimizer,
                batch_size=self.config.batch_size, record=record, record_at=self.looks,
                checkpoint=self.run.checkpoint(f"{name}-{seed}"), metrics=self.run.path / f"{name}-{seed}.jsonl",
            )  # fmt: skip
            seconds = time.perf_counter() - begun - measured
            packed = na.runs.arrays_of((done.params, done.statistics))
            return {**packed, **done.history, "steps": done.steps, "seconds": np.asarray(seconds)}

        return self.run.cached(f"{name}-{seed}", make)


def rebuilt(network: na.vision.VisionModel, cell: Mapping[str, np.ndarray]) -> Any:
    """Put the arrays of a cell into its network."""
    params, statistics, rest = network.split()
    params, statistics = na.runs.tree_of(cell, (params, statistics))
    return na.vision.combined(params, statistics, rest)


def draw(config: Config, run: na.runs.Run, lab: Lab, found: Mapping[str, list[dict[str, np.ndarray]]]) -> None:
    """Make the figures."""
    epochs = np.asarray(lab.looks) // lab.per_epoch
    title = f"{config.dataset}, small CNN, n = {config.n_train}, ε = {config.eps:g}, seeds {list(config.seeds)}"

    def over(measure: str, names: Any = found) -> dict[str, np.ndarray]:
        return {LABELS[name]: np.stack([cell[measure] for cell in found[name]]) for name in names}

    measures = {"clean": over("clean")} | {label: over(label) for label in lab.judges}
    run.figure(figures.collapse(epochs, measures, warmup=config.warmup * config.epochs, title=title), "collapse")
    fast = [name for name in ("fgsm", "fgsm-rs", "gradalign", "apart") if name in found]
    judged = next(iter(lab.judges))
    if fast:
        noise = np.stack([cell["noise"] for cell in found[fast[0]]])
        run.figure(
            figures.generator(epochs, over("transferred", fast), noise, over(judged, fast), title=title), "generator"
        )
    if "apart" in found:
        cells = found["apart"]
        curves = {"image": np.stack([cell["alpha"] for cell in cells])}
        curves["stored starts"] = np.stack([cell["alpha_start"] for cell in cells])
        for block in range(cells[0]["alpha_hidden"].shape[1]):
            curves[f"hidden state {block + 1}"] = np.stack([cell["alpha_hidden"][:, block] for cell in cells])
        run.figure(figures.scalars(epochs, curves, config.eps, title=title), "apart_scalars")
    slow = [name for name in ("pgd", "trades", "cure") if name in found]
    run.figure(figures.overfitting(epochs, over("train", slow), over(judged, slow), title=title), "robust_overfitting")
    if "cure" in found:
        layers, shares = prominence(config, lab)
        run.figure(figures.prominence(layers, shares, title=title), "prominence")
        run.save_json("prominence", {"layers": layers, "percentiles_10_50_90": shares})


def prominence(config: Config, lab: Lab) -> tuple[list[str], dict[str, np.ndarray]]:
    """Measure CURE's prominence by weight tensor: of the network it begins with, and of the one it ends with."""
    seed = config.seeds[0]
    data, method = lab.data(seed), CURETraining(lab.threat, steps=config.attack_steps)
    n = min(512, config.n_train)
    x, labels, targets = (jnp.asarray(a[:n]) for a in (data.x_train, data.y_train, data.targets_train))
    keys = jax.random.split(jax.random.key(seed), n)
    batch = Batch(x, labels, targets, jnp.arange(n), keys, jnp.float32(0), n / config.n_train)
    ends = {"before": lab.start("cure", seed), "after CURE": rebuilt(lab.network(seed), lab.cell("cure", seed))}
    layers: list[str] = []
    shares: dict[str, np.ndarray] = {}
    for name, model in ends.items():
        form, params, statistics = na.training.trainable(model)
        measure: Any = jax.jit(partial(robust_gradient_prominence, method=method, batch=batch))
        scores = measure(Forward(form, statistics), params)
        tensors = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(scores) if leaf.ndim > 1]
        layers = [label_of(path) for path, _ in tensors]
        shares[name] = np.stack([np.percentile(np.asarray(leaf), (10, 50, 90)) for _, leaf in tensors])
    return layers, shares


def label_of(path: Any) -> str:
    """Name a tensor by its place in the network."""
    parts = [str(getattr(step, "name", getattr(step, "idx", ""))) for step in path]
    return " ".join(part for part in parts if part != "weights")


def summary(
    config: Config, lab: Lab, found: Mapping[str, list[dict[str, np.ndarray]]]
) -> dict[str, dict[str, float | int | None]]:
    """Give costs and accuracies of each method, averaged over seeds."""
    judged = next(iter(lab.judges))
    rows: dict[str, dict[str, float | int | None]] = {}
    for name, cells in found.items():
        robust = np.stack([cell[judged] for cell in cells])
        train_robust = np.stack([cell["train"] for cell in cells])
        fall = [na.training.catastrophic_overfitting(one) for one in np.stack([cell[judged] for cell in cells])]
        passes = lab.methods[name].passes
        rows[LABELS[name]] = {
            "clean": float(np.mean([cell["clean"][-1] for cell in cells])),
            "best": float(np.mean(robust.max(axis=1))),
            "last": float(np.mean(robust[:, -1])),
            "last_min": float(np.min(robust[:, -1])),
            "last_max": float(np.max(robust[:, -1])),
            "train_last": float(np.mean(train_robust[:, -1])),
            "forward": passes.forward,
            "backward": passes.backward,
            # The first seed compiles.
            "seconds_per_epoch": float(np.median([float(cell["seconds"]) for cell in cells])) / config.epochs,
            "collapsed": sum(one is not None for one in fall),
        }
    return rows


def table_of(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Show the summary."""
    table = Table(
        "method", "clean", "robust: best", "last", "train, last", "passes", "s / epoch", title="mean over seeds"
    )
    for name, row in rows.items():
        spread = f" [{row['last_min']:.2f}, {row['last_max']:.2f}]"
        table.add_row(
            name, f"{row['clean']:.3f}", f"{row['best']:.3f}", f"{row['last']:.3f}{spread}", f"{row['train_last']:.3f}",
            f"{row['forward']} + {row['backward']}", f"{row['seconds_per_epoch']:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    launch(main, Config)
