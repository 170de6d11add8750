"""Real wide networks held against the theory of adversarial training: whether they follow it, and degenerate.

Networks of growing width, with the same few images and several random starts, are trained by full-batch gradient
descent on the squared loss, without attacks and with the theory's attack flow. Beside each stand the closed form of its
own linearisation, its linearisation trained by steps under the true attack, and the infinite-width prediction.

1. Sweep over widths: distance to each prediction over time; the largest against the width, with the fitted slope.
2. Long training at one width: how far the networks trained with and without attacks are apart, over time, and by the
   closed form; when they meet, against the strength of the attack; clean and robust accuracy, measured and predicted.
3. How far the kernels move: NTK and ARK, with and without attacks.

    python examples/degeneration.py                                 # digits, minutes on two cores
    python examples/degeneration.py --widths 64 256 1024 4096 --output runs/degeneration_4096      # hours
    python examples/degeneration.py --dataset cifar10 --n-train 64 --output runs/degeneration_cifar10

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import ntkadv as na
from ntkadv.kernels import KernelMovement
from ntkadv.plots import wide as wide_plots
from ntkadv.scripts import launch, settings_of
from ntkadv.training import AttackFlowTraining, StandardTraining
from ntkadv.wide import Outputs, WideNetwork, WideRun, distance, meeting_time

Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")
APART = "with attacks to without"


@dataclasses.dataclass(frozen=True)
class Config:
    """Real wide networks held against the theory."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "digits"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    n_train: int = 32
    """Training images."""
    n_test: int = 128
    """Test images."""
    label_noise: float = 0.0
    """Share of the training labels that are wrong."""
    depth: int = 2
    """Hidden layers."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Widths of the sweep."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the random starts."""
    strength: float = 0.1
    """Strength of the attack flow, learning rate times length."""
    time: float = 30.0
    """Training time of the sweep."""
    long_width: int = 256
    """Width of the network that is trained for long."""
    long_time: float = 100.0
    """Training time of that network."""
    strengths: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Strengths under which it is trained."""
    threshold: float = 0.05
    """Distance below which two networks have met, in units of the targets."""
    eps: float = 0.05
    """Radius of the l_inf ball in which robust accuracy is measured."""
    rate: float = 0.5
    """Learning rate, as a share of the largest that converges."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/degeneration")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""


def main(config: Config) -> None:
    """Images in, figures out."""
    console = Console()
    data = na.load_dataset(
        config.dataset, n_train=config.n_train, n_test=config.n_test, label_noise=config.label_noise, root=config.root
    )
    settings = settings_of(config)
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    title = f"{config.dataset}, n = {config.n_train}, MLP-{config.depth}, ηS = {config.strength:g}"

    console.print("1. widths")
    times, gaps, moves = sweep(config, data, run)
    shown = {name: found for name, found in gaps.items() if name.startswith("with attacks") and name.endswith("test")}
    run.figure(wide_plots.gaps_over_time(times, shown), "distance_over_time")
    largest = {name: {w: r.max(1) for w, r in by.items()} for name, by in gaps.items() if not name.startswith(APART)}
    last = {name: {w: r[:, -1] for w, r in by.items()} for name, by in gaps.items() if name.startswith(APART)}
    panels = {
        f"{part} images": {k.removesuffix(f", {part}"): v for k, v in largest.items() if k.endswith(f", {part}")}
        for part in PARTS
    }
    run.figure(wide_plots.gaps_against_width(panels, f"{title}, t ≤ {config.time:g}"), "distance_against_width")
    laws = {}
    if len(config.widths) > 1:
        at = np.repeat(config.widths, len(config.seeds))
        fitted = (largest | last | moves).items()
        laws = {name: na.power_law(at, np.concatenate([*rows.values()])) for name, rows in fitted}
    console.print(table_of(largest, laws, "largest distance over time, in units of the targets"))
    console.print(table_of(last, laws, f"distance at t = {config.time:g}, in units of the targets"))
    console.print(table_of(moves, laws, f"kernels with attacks, moved by t = {config.time:g}, relative to their norm"))

    console.print("2. long training")
    network = build(config, data, config.long_width, config.seeds[0], run)
    long = long_training(config, network)
    long_times = long[0.0].outputs.times
    curves, meetings = compare_long(config, network, long)
    strengths = [strength for strength in long if strength]
    run.figure(wide_plots.degeneration(long_times, curves, strengths, meetings, config.threshold), "degeneration")
    for part in PARTS:
        ends = ", ".join(f"{name} {values[-1]:.3f}" for name, values in curves[f"{part} images"].items())
        console.print(f"distance, with attacks to without, at t = {config.long_time:g} on {part} images: {ends}")
    accuracy = accuracies(config, network, long)
    run.figure(wide_plots.accuracies(long_times, accuracy, config.n_test), "accuracy_over_time")
    best = {name: float(long_times[int(np.argmax(values))]) for name, values in accuracy["robust"].items()}
    console.print("best robust accuracy: " + ", ".join(f"{name} at t = {time:.3g}" for name, time in best.items()))

    console.print("3. kernels")
    moved = kernels(config, network, long)
    run.figure(wide_plots.movements(moved, f"{title}, width {config.long_width}"), "kernel_movement")
    for name, movement in moved.items():
        console.print(f"{name}: moved by {movement.relative_distance[-1]:.3f} of its norm")

    run.save_json(
        "results",
        {
            "environment": na.runs.environment(), "config": settings,
            "times": times, "gaps": gaps, "largest": largest, "last": last, "moved": moves, "slopes": laws,
            "long": {"times": long_times, "distance": curves, "strengths": strengths, "meeting": meetings},
            "accuracy": accuracy, "best_robust_at": best,
            "kernels": {name: movement.to_dict() for name, movement in moved.items()},
        },
    )  # fmt: skip
    console.print(f"Figures (PNG, PDF) and results.json: {config.output.resolve()}")


def build(config: Config, data: na.Dataset, width: int, seed: int, run: na.runs.Run) -> WideNetwork:
    """Make the network of one width and one random start."""
    arch = na.architectures.mlp(depth=config.depth, width=width, num_classes=data.num_classes).normalized(data.x_train)
    folder = run.path / "networks" / f"width{width}-seed{seed}"
    return WideNetwork(arch, data, key=jax.random.key(seed), folder=folder)


def sweep(
    config: Config, data: na.Dataset, run: na.runs.Run
) -> tuple[np.ndarray, dict[str, dict[int, np.ndarray]], dict[str, dict[int, np.ndarray]]]:
    """Measure distances to every prediction, and of training with attacks to that without: (seeds, times) a width.

    Beside times and these distances: how far the kernels have moved in the end, (seeds,) for each width.

    All networks share the learning rate, a share of what the fastest of them allows, so that they are seen at the same
    times.
    """
    pairs = itertools.product(config.widths, config.seeds)
    networks = {(width, seed): build(config, data, width, seed, run) for width, seed in pairs}
    attacked = AttackFlowTraining(config.strength, reduction="sum", steps=1)

    def smallest() -> dict[str, np.ndarray]:
        return {"rate": np.asarray(min(network.max_learning_rate(attacked) for network in networks.values()))}

    rate = config.rate * float(run.cached("rate", smallest)["rate"])
    grid = np.concatenate([[0], np.geomspace(2 * rate, config.time, 24)])

    def measure(network: WideNetwork) -> dict[str, np.ndarray]:
        found, seen = {}, []
        for kind, method, strength in (
            ("without", StandardTraining(reduction="sum"), 0.0),
            ("with attacks", attacked, config.strength),
        ):
            real = network.train(method, grid, learning_rate=rate).outputs
            predictions = {
                "own closed form": network.theory(real.times, strength, learning_rate=rate),
                "infinite width": network.infinite_width(real.times, strength),
            }
            if strength:
                steps = network.train(method, grid, learning_rate=rate, linearized=True)
                predictions["linearisation, true attack"] = steps.outputs
            for name, predicted in predictions.items():
                for part in PARTS:
                    found[f"{kind}: {name}, {part}"] = gap(real, predicted, part, network)
            seen.append((real, predictions["own closed form"]))
        (plain, plain_theory), (real, theory) = seen
        for part in PARTS:
            found[f"{APART}: network, {part}"] = gap(real, plain, part, network)
            found[f"{APART}: closed form, {part}"] = gap(theory, plain_theory, part, network)
        return found | {"times": real.times}

    def moved(network: WideNetwork) -> dict[str, np.ndarray]:
        params = network.train(attacked, grid, learning_rate=rate).trained.params
        return {
            "NTK": np.asarray(na.kernels.relative_distance(network.ntk_at(params), network.ntk)),
            "ARK": np.asarray(na.kernels.relative_distance(network.ark_at(params), network.ark)),
        }

    gaps: dict[str, dict[int, list[np.ndarray]]] = {}
    kernels: dict[str, dict[int, list[np.ndarray]]] = {}
    times = grid
    for (width, seed), network in tqdm(networks.items(), desc="networks"):
        found = run.cached(f"width{width}-seed{seed}", lambda network=network: measure(network))
        times = found.pop("times")
        ends = run.cached(f"moved-width{width}-seed{seed}", lambda network=network: moved(network))
        for collected, entries in ((gaps, found), (kernels, ends)):
            for name, values in entries.items():
                collected.setdefault(name, {}).setdefault(width, []).append(values)
    stacked = [
        {name: {width: np.stack(rows) for width, rows in by.items()} for name, by in collected.items()}
        for collected in (gaps, kernels)
    ]
    return times, stacked[0], stacked[1]


def long_training(config: Config, network: WideNetwork) -> dict[float, WideRun]:
    """Train one network for long, without attacks (0) and under each strength; watch the first and the main one."""
    methods = {0.0: StandardTraining(reduction="sum")} | {
        strength: AttackFlowTraining(strength, reduction="sum", steps=1)
        for strength in sorted({*config.strengths, config.strength})
    }
    rate = config.rate * min(network.max_learning_rate(method) for method in methods.values())
    grid = np.concatenate([[0], np.geomspace(2 * rate, config.long_time, 30)])

    def robust(params: Any) -> float:
        return robust_accuracy(config, network, eqx.Partial(network.arch.apply, params))

    watch = {"robust": robust, "ntk": network.ntk_at, "ark": network.ark_at}
    return {
        strength: network.train(
            method, grid, learning_rate=rate, label=f"long {method.name}",
            watch=watch if strength in (0.0, config.strength) else None,
        )
        for strength, method in methods.items()
    }  # fmt: skip


def compare_long(
    config: Config, network: WideNetwork, long: Mapping[float, WideRun]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, list[float]]]:
    """Measure how far training under attack and without are apart, in the network, by its closed form, at infinity."""
    times = long[0.0].outputs.times
    strengths = [strength for strength in long if strength]
    versions = {
        "network": lambda strength: long[strength].outputs,
        "own closed form": lambda strength: network.theory(times, strength),
        "infinite width": lambda strength: network.infinite_width(times, strength),
    }
    curves: dict[str, dict[str, np.ndarray]] = {f"{part} images": {} for part in PARTS}
    meetings: dict[str, list[float]] = {}
    for name, version in versions.items():
        without = version(0.0)
        for strength in strengths:
            attacked = version(strength)
            for part in PARTS:
                apart = gap(attacked, without, part, network)
                meetings.setdefault(f"{name}, {part}", []).append(meeting_time(times, apart, config.threshold))
                if strength == config.strength:
                    curves[f"{part} images"][name] = apart
    return curves, meetings


def accuracies(config: Config, network: WideNetwork, long: Mapping[float, WideRun]) -> dict[str, dict[str, np.ndarray]]:
    """Accuracy on test images over time, clean and robust: measured, and predicted by the closed form."""
    labels = network.data.y_test
    found: dict[str, dict[str, np.ndarray]] = {"clean": {}, "robust": {}}
    for strength in (0.0, config.strength):
        run = long[strength]
        kind = "with attacks" if strength else "without"
        found["clean"][f"network, {kind}"] = (run.outputs.test.argmax(-1) == labels).mean(1)
        found["robust"][f"network, {kind}"] = run.watched["robust"]
    for strength in (0.0, config.strength):
        kind = "with attacks" if strength else "without"
        times = long[strength].outputs.times
        predicted = network.theory(times, strength).test
        found["clean"][f"closed form, {kind}"] = (predicted.argmax(-1) == labels).mean(1)
        x = network.data.x_train
        found["robust"][f"closed form, {kind}"] = np.array([
            robust_accuracy(config, network, network.linear.predictor(x, u.astype(np.float32)))
            for u in tqdm(network.dynamics(strength).coefficients(times), desc="closed form under attack", leave=False)
        ])  # fmt: skip
    return found


def robust_accuracy(config: Config, network: WideNetwork, model: Any) -> float:
    """Accuracy on the test images under PGD."""
    attack = na.attacks.PGD(na.attacks.Linf(config.eps), steps=10, loss="margin")
    x, y = network.data.x_test, network.data.y_test
    found = attack(model, x, y, key=jax.random.key(0))
    return float(np.mean(np.asarray(model(found)).argmax(1) == y))


def kernels(config: Config, network: WideNetwork, long: Mapping[float, WideRun]) -> dict[str, KernelMovement]:
    """Measure how far NTK and ARK move."""
    found = {}
    for name in ("ntk", "ark"):
        for strength in (0.0, config.strength):
            run = long[strength]
            found[f"{name.upper()}, {'with attacks' if strength else 'without'}"] = na.kernels.kernel_movement(
                run.watched[name],
                network.data.targets_train if name == "ntk" else None,
                times=run.outputs.times,
                progress=False,
            )
    return found


def gap(first: Outputs, second: Outputs, part: Part, network: WideNetwork) -> np.ndarray:
    """Distance of outputs at each time, in units of the targets."""
    return distance(getattr(first, part), getattr(second, part), network.data.targets_train)


def table_of(found: Mapping[str, Mapping[int, np.ndarray]], laws: Mapping[str, na.PowerLaw], title: str) -> Table:
    """Distances for each width, mean over seeds, and slopes against the width."""
    table = Table(title=f"{title} (mean over seeds)")
    widths = list(next(iter(found.values())))
    for column in ("training: prediction, images", *map(str, widths), "slope [95%]"):
        table.add_column(column)
    for name, by_width in found.items():
        table.add_row(name, *(f"{by_width[w].mean():.3f}" for w in widths), str(laws.get(name, "")))
    return table


if __name__ == "__main__":
    launch(main, Config)
