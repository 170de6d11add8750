"""Attack rates that vary over samples and time: the closed form, the true linear flow, and which the network follows.

The closed form exp(-Theta Xi(t)) of adversarial training is exact where the attack's rates are constant. Here half of
the images are attacked early and the other half late, with a smooth switch at time t0, so that the rates do not commute
with their integral, and the closed form differs from the flow it stands for. A network cannot follow both. Its place
between them is measured along the line that joins the two, at each time,

    c = <f - flow, closed form - flow> / |closed form - flow|^2,

0 where it follows the flow, 1 where it follows the closed form. The kernel of a finite network moves, which shows along
the line too; so its linearisation, whose kernel does not, is trained by the same steps and attacks, and placed beside.

    python examples/varying_rates.py

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from tqdm.auto import tqdm

import ntkadv as na
from ntkadv.plots import wide as wide_plots
from ntkadv.scripts import launch, settings_of
from ntkadv.training import AttackFlowTraining
from ntkadv.wide import Outputs, WideNetwork, distance


@dataclasses.dataclass(frozen=True)
class Config:
    """Attack rates that vary over samples and time."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "digits"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    n_train: int = 24
    """Training images."""
    n_test: int = 64
    """Test images."""
    depth: int = 2
    """Hidden layers."""
    widths: tuple[int, ...] = (128, 512)
    """Widths of the networks."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the random starts."""
    strength: float = 0.1
    """Mean strength of the attack flow, learning rate times length; it goes from 0 to twice this, or back."""
    switch: float = 0.5
    """Time of the switch."""
    sharpness: float = 4.0
    """How fast the switch is, in units of the logarithm of time."""
    time: float = 10.0
    """Training time."""
    rate: float = 0.25
    """Learning rate, as a share of the largest that converges, at infinite width and the largest strength."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/varying_rates")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""


def main(config: Config) -> None:
    """Images in, figure out."""
    console = Console()
    data = na.load_dataset(config.dataset, n_train=config.n_train, n_test=config.n_test, root=config.root)
    settings = settings_of(config)
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    is_late = np.arange(config.n_train) % 2 == 1
    varying = Switch(tuple(is_late.tolist()), config.strength, config.switch, config.sharpness)
    method = AttackFlowTraining(varying, reduction="sum", steps=1)

    found: dict[int, dict[str, list[np.ndarray]]] = {}
    times: dict[int, np.ndarray] = {}
    for width, seed in tqdm(list(itertools.product(config.widths, config.seeds)), desc="networks"):
        arch = na.architectures.mlp(depth=config.depth, width=width, num_classes=data.num_classes)
        folder = run.path / "networks" / f"width{width}-seed{seed}"
        network = WideNetwork(arch.normalized(data.x_train), data, key=jax.random.key(seed), folder=folder)

        def measure(network: WideNetwork = network) -> dict[str, np.ndarray]:
            rate = config.rate * network.infinite_dynamics(2 * config.strength).max_learning_rate
            grid = np.concatenate([[0], np.geomspace(config.switch / 20, config.time, 24)])
            real = network.train(method, grid, learning_rate=rate, check_rate=False).outputs
            linear = network.train(method, grid, learning_rate=rate, check_rate=False, linearized=True).outputs
            flow = network.theory(real.times, varying, flow=True)
            closed = network.theory(real.times, varying)
            return {"times": real.times} | {
                f"{name} {part}": values
                for part in ("train", "test")
                for name, values in compare(real, linear, flow, closed, part, data.targets_train).items()
            }

        measured = run.cached(f"width{width}-seed{seed}", measure)
        times[width] = measured.pop("times")
        for name, values in measured.items():
            found.setdefault(width, {}).setdefault(name, []).append(values)

    results = {width: {name: np.stack(rows) for name, rows in by.items()} for width, by in found.items()}
    run.figure(wide_plots.between(times, results, config.switch), "varying_rates")
    everything = {"environment": na.runs.environment(), "config": settings, "times": times, "found": results}
    run.save_json("results", everything)
    for width, by in results.items():
        for part in ("train", "test"):
            apart = by[f"closed form to flow {part}"]
            widest = apart.argmax(1)[:, None]
            places = {
                who: np.take_along_axis(by[f"{name} {part}"], widest, 1)[:, 0]
                for who, name in (("network", "place"), ("linearisation", "place of the linearisation"))
            }
            said = ", ".join(f"{who} {p.mean():+.2f} ({p.min():+.2f} to {p.max():+.2f})" for who, p in places.items())
            console.print(
                f"width {width}, {part} images: closed form and flow are {apart.max(1).mean():.3f} apart at most; "
                f"there, from 0 (flow) to 1 (closed form): {said}"
            )
    console.print(f"Figure (PNG, PDF) and results.json: {config.output.resolve()}")


@dataclasses.dataclass(frozen=True)
class Switch:
    """Strength of each image's attack: early for some, late for the others."""

    is_late: tuple[bool, ...]
    mean: float
    time: float
    sharpness: float

    def __call__(self, time: Any) -> Array:
        """Give the strengths at a time."""
        now = jnp.asarray(time)
        dtype = now.dtype if jnp.issubdtype(now.dtype, jnp.floating) else jnp.float32
        sign = jnp.where(jnp.asarray(self.is_late), 1, -1).astype(dtype)
        since = jnp.log(jnp.maximum(now.astype(dtype), 1e-6) / self.time)
        return 2 * self.mean * jax.nn.sigmoid(self.sharpness * sign * since)


def compare(
    real: Outputs, linear: Outputs, flow: Outputs, closed: Outputs, part: Literal["train", "test"], targets: np.ndarray
) -> dict[str, np.ndarray]:
    """Measure distances between them, and the places of network and linearisation between flow and closed form."""
    network, linearised, true, formula = (getattr(outputs, part) for outputs in (real, linear, flow, closed))
    line = formula - true
    length = np.sum(line**2, axis=(1, 2))

    def place(outputs: np.ndarray) -> np.ndarray:
        along = np.sum((outputs - true) * line, axis=(1, 2))
        return np.where(length > 0, along / np.where(length > 0, length, 1), np.nan)

    return {
        "place": place(network),
        "place of the linearisation": place(linearised),
        "closed form to flow": distance(formula, true, targets),
        "network to flow": distance(network, true, targets),
        "network to closed form": distance(network, formula, targets),
    }


if __name__ == "__main__":
    launch(main, Config)
