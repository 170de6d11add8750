"""Robust overfitting at infinite width, and what stops it: from images to figures.

An infinitely wide network is trained for a time t (closed form). Early, its accuracy under attack rises; late it falls,
and the longer adversarial training goes on, the nearer it ends to training without attacks (Fu & Wang, ICLR 2024,
arXiv 2310.06112). Early stopping, ridge regression and Adv-NTK are held against that limit, all chosen on validation
images, all judged by the same attacks on test images.

    python examples/robust_overfitting.py                                   # digits with 10% label noise
    python examples/robust_overfitting.py --label-noise 0                   # clean digits: no robust overfitting
    python examples/robust_overfitting.py --dataset cifar10 --label-noise 0 --eps 0.031373 \
        --n-train 3000 --n-val 500 --n-test 1000 --times 15 --output runs/cifar10

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv.scripts import launch, settings_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Robust overfitting at infinite width."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "digits"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    n_train: int = 1000
    """Training images: they make the kernel."""
    n_val: int = 297
    """Validation images: everything is chosen on them, and Adv-NTK learns from them."""
    n_test: int = 500
    """Test images: looked at once, at the end."""
    label_noise: float = 0.1
    """Share of the training labels that are wrong."""
    architecture: Literal["mlp", "cnn"] = "mlp"
    """Fully connected, or convolutions 3x3 and flatten."""
    depth: int = 5
    """Hidden layers, or convolutions."""
    eps: float = 0.15
    """Radius of the l_inf ball, in units of the pixel range [0, 1]."""
    attack_steps: int = 20
    """Steps of the PGD that judges; Adv-NTK is attacked with half of them."""
    fit_steps: int = 50
    """Steps of Adv-NTK."""
    times: int = 25
    """Points on the time axis."""
    seeds: tuple[int, ...] = (0,)
    """One run each: split, noise, attacks and batches."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/robust_overfitting")
    """Where results go, a folder for each seed."""
    overwrite: bool = False
    """Throw away results that are there."""


def main(config: Config) -> None:
    """Run all seeds, print the tables, say where the results are."""
    console = Console()
    reports = {}
    for seed in config.seeds:
        reports[seed] = one_seed(config, seed, console)
    if len(reports) > 1:
        console.print(over_seeds(reports))
    console.print(f"Figures (PNG, PDF), tables (JSON, Markdown) and arrays (npz): {config.output.resolve()}")


def one_seed(config: Config, seed: int, console: Console) -> na.Report:
    """Images in, figures out."""
    data = na.load_dataset(
        config.dataset, n_train=config.n_train, n_val=config.n_val, n_test=config.n_test, seed=seed, root=config.root,
        label_noise=config.label_noise,
    )  # fmt: skip
    build = {"mlp": na.architectures.mlp, "cnn": na.architectures.cnn}[config.architecture]
    arch = build(depth=config.depth, num_classes=data.num_classes).normalized(data.x_train)
    threat = na.attacks.Linf(config.eps)
    judge = na.attacks.PGD(threat, steps=config.attack_steps)
    settings = settings_of(config, "seeds")
    run = na.runs.Run(config.output / f"seed-{seed}", {**settings, "seed": seed}, overwrite=config.overwrite)
    keys = dict(zip(["val", "test", "fit", "report"], jax.random.split(jax.random.key(seed), 4), strict=True))
    title = (
        f"{config.dataset}, {config.architecture.upper()}-{config.depth}, n = {config.n_train}, ε = {config.eps:.3g}"
    )
    title += f", {config.label_noise:.0%} label noise" if config.label_noise else ""

    console.print(f"[bold]seed {seed}[/bold]: kernel and closed form")
    gram = run.cached("gram", lambda: {"gram": na.gram(arch, data.x_train)})["gram"]
    dynamics = na.TrainingDynamics(arch, data.x_train, data.targets_train, gram=gram)
    ridge = dynamics.ridge()
    # The spectrum tells all time scales: the fastest direction is learnt at 1 / largest eigenvalue, the slowest last.
    smallest, largest = (max(float(dynamics.spectrum.values[i]), 1e-6) for i in (0, -1))
    times = np.geomspace(0.3 / largest, 10 / smallest, config.times)
    ridges = np.geomspace(smallest / 10, largest, config.times)[::-1]

    def path(name: str, predictor: Callable[[float], na.KernelPredictor], values: Any, split: str) -> na.RobustnessPath:
        x, y = (getattr(data, f"{part}_{split}") for part in "xy")

        def measure() -> dict[str, np.ndarray]:
            found = na.robustness_path(predictor, values, x, y, attack=judge, key=keys[split], batch_size=512)
            return {"values": found.values, "clean": found.clean, "robust": found.robust}

        return na.RobustnessPath(**run.cached(f"{name}-{split}", measure), n=len(x))

    console.print("accuracy under attack over time, on validation and test images")
    stopping = path("time", dynamics.predictor, times, "val").best
    shrinkage = path("ridge", ridge.predictor, ridges, "val").best
    over_time = path("time", dynamics.predictor, times, "test")
    limit = path("limit", dynamics.predictor, [np.inf], "test")
    run.figure(na.plots.over_time(over_time, limit=limit, chosen=stopping, title=title), "accuracy_over_time")

    console.print("Adv-NTK")
    fit = na.fit_adv_ntk(
        arch,
        data,
        attack=na.attacks.PGD(threat, steps=max(1, config.attack_steps // 2), step_size=config.eps / 5),
        key=keys["fit"],
        steps=config.fit_steps,
        # The unit of xi is time: ten steps along one direction come to the best time of early stopping.
        learning_rate=stopping * np.sqrt(config.n_train) / 10,
        held_out=0.25,
        gram=gram,
        checkpoint=run.checkpoint("adv_ntk"),
    )
    run.save("adv_ntk", xi=fit.xi)
    run.save_json("adv_ntk_history", fit.history)
    run.figure(na.plots.adv_ntk_progress(fit.history, step=fit.step, title=title), "adv_ntk_progress")

    console.print("the table")
    models = {
        "NTK, t = ∞": dynamics.predictor(np.inf),
        "early stopping": dynamics.predictor(stopping),
        "ridge": ridge.predictor(shrinkage),
        "Adv-NTK": fit.predictor,
    }
    attacks = {
        judge.name: judge,
        "margin, twice": na.attacks.PGD(threat, steps=config.attack_steps, loss="margin", restarts=2),
        "cross-entropy": na.attacks.PGD(threat, steps=config.attack_steps, loss="cross_entropy"),
    }
    report = na.compare(models, data, attacks, key=keys["report"], batch_size=512, keep_adversarial=True)
    report.to_json(run.path / "report.json")
    (run.path / "report.md").write_text(report.to_markdown() + "\n")
    run.save_json("choices", {"stopping_time": stopping, "ridge": shrinkage, "adv_ntk_step": fit.step})
    run.figure(na.plots.robustness(report, title=title), "robustness")
    run.figure(strip(data, models, report, judge.name, title), "images")
    console.print(report)
    return report


def strip(
    data: na.Dataset, models: dict[str, na.KernelPredictor], report: na.Report, attack: str, title: str
) -> Figure:
    """Show test images that the interpolating network gets right, and what the attack makes of them."""
    shown = {name: models[name] for name in (report.models[0], report.models[-1])}
    evaluations = report.evaluations or {}
    chosen = np.flatnonzero(evaluations[report.models[0]].correct["clean"])[:8]
    clean = data.x_test[chosen]
    attacked = {name: (evaluations[name].adversarial or {})[attack][chosen] for name in shown}
    predicted = {
        name: (np.argmax(model(clean), axis=1), np.argmax(model(attacked[name]), axis=1))
        for name, model in shown.items()
    }
    return na.plots.image_strip(clean, attacked, data.y_test[chosen], predicted, data.class_names, title=title)


def over_seeds(reports: dict[int, na.Report]) -> Table:
    """Mean and standard deviation of every accuracy over the seeds."""
    first = next(iter(reports.values()))
    table = Table("model", *first.columns, title=f"mean ± standard deviation over seeds {sorted(reports)}")
    for model in first.models:
        cells = []
        for column in first.columns:
            values = [report.cell(model, column).accuracy for report in reports.values()]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}")
        table.add_row(model, *cells)
    return table


if __name__ == "__main__":
    launch(main, Config)
