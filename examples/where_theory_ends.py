"""Where the theory of adversarially trained wide networks stops holding: one thing at a time is changed.

One network of fixed width is trained without and with attacks, and three distances are measured on test images: the
largest over time to the closed form of its own linearisation; that to its linearisation trained by the same steps,
which is defined for every attack and loss; and, at the end, that between training with and without attacks, which the
theory says vanishes. What is changed: the strength of the attack flow, the learning rate, the depth, the activation, a
projected PGD instead of the flow, the cross-entropy instead of the squared loss. For each attack the table has the
share of perturbations that leave an l_inf ball, which nothing in the attack flow prevents.

    python examples/where_theory_ends.py
    python examples/where_theory_ends.py --width 2048 --output runs/where_theory_ends_2048        # an hour

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import ntkadv as na
from ntkadv.architectures import Erf, Gelu, Relu
from ntkadv.plots import wide as wide_plots
from ntkadv.scripts import launch, settings_of
from ntkadv.training import AttackFlowTraining, DivergenceError, Method, PGDTraining, StandardTraining, attack_flow
from ntkadv.wide import WideNetwork, distance


@dataclasses.dataclass(frozen=True)
class Config:
    """Where the theory stops holding."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "digits"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    n_train: int = 24
    """Training images."""
    n_test: int = 64
    """Test images."""
    width: int = 512
    """Width of the networks."""
    depth: int = 2
    """Hidden layers, where the depth is not what is changed."""
    strength: float = 0.1
    """Strength of the attack flow, where it is not what is changed."""
    strengths: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Strengths of the sweep."""
    rates: tuple[float, ...] = (0.1, 0.5, 0.9, 1.2, 2.5)
    """Learning rates of the sweep, as shares of the largest that converges."""
    depths: tuple[int, ...] = (1, 2, 4)
    """Depths of the sweep."""
    eps: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    """Radii of projected PGD."""
    ball: float = 0.1
    """Radius of the l_inf ball whose leaving is counted."""
    time: float = 20.0
    """Training time."""
    rate: float = 0.5
    """Learning rate, as a share of the largest that converges, where it is not what is changed."""
    seed: int = 0
    """Seed of the random start."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/where_theory_ends")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One setting: what it is, the network, the attack, the loss, the learning rate."""

    sweep: str
    value: str
    depth: int
    activation: str = "ReLU"
    method: Method
    rate: float

    @property
    def without(self) -> Method:
        """The same training without attacks."""
        return StandardTraining(loss=self.method.loss, reduction="sum")

    @property
    def strength(self) -> float | None:
        """Strength of the attack flow on the squared loss; None where there is no closed form."""
        if isinstance(self.method, AttackFlowTraining) and self.method.loss == "squared":
            return float(np.asarray(self.method.strength))
        return None


ACTIVATIONS = {"ReLU": Relu(), "GELU": Gelu(), "erf": Erf()}


def cases(config: Config) -> Iterator[Case]:
    """List what is tried."""
    flow = AttackFlowTraining(config.strength, reduction="sum", steps=1)
    usual: dict[str, Any] = {"depth": config.depth, "method": flow, "rate": config.rate}
    for strength in config.strengths:
        method = AttackFlowTraining(strength, reduction="sum", steps=2)
        yield Case(sweep="attack strength", value=f"{strength:g}", **{**usual, "method": method})
    for rate in config.rates:
        yield Case(sweep="learning rate / bound", value=f"{rate:g}", **{**usual, "rate": rate})
    for depth in config.depths:
        yield Case(sweep="hidden layers", value=str(depth), **{**usual, "depth": depth})
    for activation in ACTIVATIONS:
        yield Case(sweep="activation", value=activation, activation=activation, **usual)
    for loss in ("squared", "cross_entropy"):
        for eps in config.eps:
            attack = na.attacks.PGD(na.attacks.Linf(eps), steps=5, loss=loss, keep_best=False)
            method = PGDTraining(attack, loss=loss, reduction="sum")
            name = "PGD eps" if loss == "squared" else "PGD eps, cross-entropy"
            yield Case(sweep=name, value=f"{eps:g}", **{**usual, "method": method})


def main(config: Config) -> None:
    """Images in, table and figure out."""
    console = Console()
    data = na.load_dataset(config.dataset, n_train=config.n_train, n_test=config.n_test, root=config.root)
    settings = settings_of(config)
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    networks: dict[tuple[int, str], WideNetwork] = {}
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(tqdm(list(cases(config)), desc="cases")):
        which = case.depth, case.activation
        if which not in networks:
            arch = na.architectures.mlp(
                depth=case.depth, width=config.width, num_classes=data.num_classes,
                activation=ACTIVATIONS[case.activation],
            ).normalized(data.x_train)  # fmt: skip
            folder = run.path / "networks" / f"depth{case.depth}-{case.activation}"
            networks[which] = WideNetwork(arch, data, key=jax.random.key(config.seed), folder=folder, progress=False)
        network = networks[which]
        found = run.cached(f"case{number}", lambda case=case, network=network: measure(config, case, network))
        rows.append({"sweep": case.sweep, "value": case.value, **{k: float(v) for k, v in found.items()}})
    run.save_json("results", {"environment": na.runs.environment(), "config": settings, "cases": rows})
    title = f"{config.dataset}, n = {config.n_train}, width {config.width}, t ≤ {config.time:g}"
    run.figure(wide_plots.sweeps(rows, title), "where_theory_ends")
    table = table_of(rows)
    console.print(table)
    console.print(f"Figure (PNG, PDF) and results.json: {config.output.resolve()}")


def measure(config: Config, case: Case, network: WideNetwork) -> dict[str, np.ndarray]:
    """Train with and without attacks, and hold both against what is predicted; NaN where there is no prediction."""
    bound = network.max_learning_rate(case.method)
    rate = case.rate * bound
    grid = np.concatenate([[0], np.geomspace(2 * rate, config.time, 20)])
    label = f"{case.sweep} {case.value}"
    options: dict[str, Any] = {"learning_rate": rate, "check_rate": False}
    found = {
        "leaves ball at the start": left_ball(config, case, network, network.params),
        "rate": np.asarray(rate),
        **dict.fromkeys(NUMBERS, np.asarray(np.nan)),
    }
    try:
        real = network.train(case.method, grid, label=label, **options)
        plain = network.train(case.without, grid, label=f"{case.method.loss} at rate {rate:g}", **options)
        found["with attacks, to without"] = _at_end(real.outputs.test, plain.outputs.test, network)
        found["leaves ball at the end"] = left_ball(config, case, network, real.trained.params)
        if case.strength is not None:
            of_descent = rate if case.rate < 1 else None
            theory = network.theory(real.outputs.times, case.strength, learning_rate=of_descent)
            found["to own closed form"] = _largest(real.outputs.test, theory.test, network)
        linear = network.train(case.method, grid, label=label, linearized=True, **options)
        found["to linearisation, same steps"] = _largest(real.outputs.test, linear.outputs.test, network)
    except DivergenceError as error:
        found["diverged at step"] = np.asarray(float(error.step))
    return found


NUMBERS = (
    "to own closed form", "to linearisation, same steps", "with attacks, to without", "leaves ball at the end",
    "diverged at step",
)  # fmt: skip


def left_ball(config: Config, case: Case, network: WideNetwork, params: Any) -> np.ndarray:
    """Share of the training images whose perturbation is larger than the ball; 0 where it is projected on a smaller."""
    if not isinstance(case.method, AttackFlowTraining):
        assert isinstance(case.method, PGDTraining)
        return np.asarray(float(case.method.attack.threat.eps > config.ball))
    x, targets = jax.numpy.asarray(network.data.x_train), jax.numpy.asarray(network.data.targets_train)
    end = attack_flow(lambda z: network.arch.apply(params, z), x, targets, case.method.at(0.0), steps=case.method.steps)
    return np.asarray(np.mean(np.max(np.abs(np.asarray(end - x)), axis=(1, 2, 3)) > config.ball))


def _largest(first: np.ndarray, second: np.ndarray, network: WideNetwork) -> np.ndarray:
    return np.asarray(distance(first, second, network.data.targets_train).max())


def _at_end(first: np.ndarray, second: np.ndarray, network: WideNetwork) -> np.ndarray:
    return np.asarray(distance(first[-1], second[-1], network.data.targets_train))


def table_of(rows: list[dict[str, Any]]) -> Table:
    """One row a case."""
    columns = (*NUMBERS[:3], "leaves ball at the start", "leaves ball at the end", "diverged at step")
    table = Table("what is changed", "to", *columns, title="distances on test images, in units of the targets")
    before = ""
    for row in rows:
        shown = ["-" if np.isnan(row[name]) else f"{row[name]:.3g}" for name in columns]
        table.add_row(row["sweep"] if row["sweep"] != before else "", row["value"], *shown)
        before = row["sweep"]
    return table


if __name__ == "__main__":
    launch(main, Config)
