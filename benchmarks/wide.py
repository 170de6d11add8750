"""Wide networks against their predictions, up to the widths that a GPU holds: distances, slopes, seconds.

    python benchmarks/wide.py --root FOLDER_WITH_MNIST_AND_CIFAR10
    python benchmarks/wide.py --widths 64 256 1024 --seeds 0 --time-limit 540

For every width and random start a network is trained without attacks, and under the theory's attack flow, full batch,
on the squared loss; what is kept is how far its outputs go from the closed form of its own linearisation, and from the
prediction at infinite width, at most over time (Fu & Wang, ICLR 2024, arXiv 2310.06112). Cases: an MLP on MNIST, and an
MLP and a CNN on CIFAR-10. All networks of a case are seen at the same times. Every network is saved as it is done: the
same command goes on with a run that was stopped. Results go to benchmarks/results/wide-<device>.json, after each.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from measure import command_line
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv.scripts import launch, settings_of
from ntkadv.training import AttackFlowTraining, DivergenceError, StandardTraining
from ntkadv.wide import Outputs, WideNetwork, distance

CaseName = Literal["mlp-mnist", "mlp-cifar10", "cnn-cifar10", "mlp-digits", "cnn-digits"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained."""

    cases: tuple[CaseName, ...] = ("mlp-mnist", "mlp-cifar10", "cnn-cifar10")
    """Architecture and images; each in turn."""
    widths: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    """Units of a hidden layer of the MLP."""
    channels: tuple[int, ...] = (16, 64, 256, 1024)
    """Channels of a convolution of the CNN."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random starts of each width."""
    root: Path | None = None
    """Folder of the images."""
    n_train: int = 64
    """Training images."""
    n_test: int = 64
    """Test images."""
    data_seed: int = 0
    """Seed of their choice."""
    depth: int = 2
    """Hidden layers, or convolutions."""
    strength: float = 0.01
    """Strength of the attack flow, for kernels of mean diagonal 1."""
    rate: float = 0.3
    """Learning rate, a share of what infinite width allows; a network that it is too fast for is noted."""
    steps: int = 3000
    """Steps of training."""
    looks: int = 20
    """Times at which outputs are compared."""
    max_bytes: int = 2**32
    """Memory for the Jacobians that are there at once."""
    time_limit: float = float("inf")
    """Seconds after which no network is begun."""
    output: Path = Path(__file__).parent / "results"
    """Folder of the results."""
    run: Path = Path("runs/wide")
    """Folder of the networks, one below it for each device."""

    def __post_init__(self) -> None:
        if not (self.cases and self.seeds and self.widths and self.channels):
            raise ValueError("cases, seeds, widths and channels must name one at least")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must lie between 0 and 1, got {self.rate}")


def main(settings: Settings) -> int:
    """Train all that there is time for; the exit status."""
    deadline = time.monotonic() + settings.time_limit
    console, environment = Console(), na.runs.environment()
    device = re.sub(r"\W+", "-", environment["device"].lower()).strip("-")
    path = settings.output / f"wide-{device}.json"
    plain = settings_of(settings, "run", "time_limit", "max_bytes", "cases", "widths", "channels", "seeds")
    # The same run serves other lists of cases, widths and seeds: networks are named by them.
    run = na.runs.Run(settings.run / device, {**plain, "device": environment["device"]})
    result: dict[str, Any] = {
        "benchmark": "wide", "command": command_line(), "environment": environment, "settings": plain,
        "complete": False, "cases": {},
    }  # fmt: skip

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")

    is_done = True
    for name in settings.cases:
        case = Case(settings, name, run)
        result["cases"][name] = case.record
        for width in case.widths:
            for seed in settings.seeds:
                if time.monotonic() > deadline:
                    is_done = False
                    break
                console.print(f"{name}, width {width}, seed {seed}")
                case.network(width, seed)
                save()
        case.conclude()
    result["complete"] = is_done
    save()
    for name, record in result["cases"].items():
        console.print(table_of(name, record))
    console.print(f"Results: {path}" + ("" if is_done else "\nThe time is over; the same command goes on from here."))
    return 0 if is_done else 1


class Case:
    """One kind of network on one kind of images."""

    def __init__(self, settings: Settings, name: CaseName, run: na.runs.Run):
        self.settings, self.name, self.run = settings, name, run
        self.kind, dataset = name.split("-")
        self.widths = settings.widths if self.kind == "mlp" else settings.channels
        self.data = na.load_dataset(
            dataset, root=settings.root, n_train=settings.n_train, n_val=0, n_test=settings.n_test,
            seed=settings.data_seed,
        )  # fmt: skip
        self.record: dict[str, Any] = {"data": repr(self.data), "networks": [], "skipped": [], "slopes": {}}
        # At infinite width no random number enters: the rate, and the times, are the same for all that come.
        arch = self.build(self.widths[0])
        gram = na.gram(arch, self.data.x_train, progress=False).astype(float)
        growth = float(np.exp(settings.strength * np.max(np.asarray(arch.ark(self.data.x_train[:1])))))
        self.rate = settings.rate * 2 / (np.linalg.eigvalsh(gram)[-1] * growth)
        self.times = self.rate * np.unique(np.geomspace(1, settings.steps, settings.looks).astype(int))
        self.record |= {"learning_rate": self.rate, "times": self.times.tolist()}

    def build(self, width: int) -> na.architectures.Network:
        """Make the architecture of one width, its kernel of mean diagonal 1."""
        make = {"mlp": na.architectures.mlp, "cnn": na.architectures.cnn}[self.kind]
        arch = make(depth=self.settings.depth, width=width, num_classes=self.data.num_classes)
        return arch.normalized(self.data.x_train)

    def network(self, width: int, seed: int) -> None:
        """Train one network, or read what is known of it; what cannot be trained is noted with the reason."""
        name = f"{self.name}-{width}-{seed}"
        try:
            found = self.run.cached(name, lambda: self.measured(width, seed))
        except (MemoryError, DivergenceError, jax.errors.JaxRuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.record["skipped"].append({"width": width, "seed": seed, "reason": reason})
            return
        gaps = {key: found[key].tolist() for key in found if "," in key}
        seconds = {key: float(value) for key, value in found.items() if "," not in key}
        self.record["networks"].append({"width": width, "seed": seed, **seconds, "distance": gaps})

    def measured(self, width: int, seed: int) -> dict[str, Any]:
        """Train one network, and compare."""
        begun = time.perf_counter()
        arch, settings = self.build(width), self.settings
        one = WideNetwork(
            arch, self.data, key=jax.random.key(seed), progress=False, max_bytes=settings.max_bytes,
            folder=self.run.path / "networks" / f"{self.name}-{width}-{seed}",
        )  # fmt: skip
        parameters = sum(leaf.size for leaf in jax.tree.leaves(one.params))
        found: dict[str, Any] = {"parameters": parameters}
        start = time.perf_counter()
        _ = one.ntk
        found["ntk_s"] = time.perf_counter() - start
        for kind, strength in (("standard", 0.0), ("attacked", settings.strength)):
            method = AttackFlowTraining(strength, reduction="sum") if strength else StandardTraining(reduction="sum")
            start = time.perf_counter()
            real = one.train(method, self.times, learning_rate=self.rate, check_rate=False).outputs
            found[f"{kind}_train_s"] = time.perf_counter() - start
            predictions = {
                "own closed form": one.theory(real.times, strength, learning_rate=self.rate),
                "infinite width": one.infinite_width(real.times, strength, learning_rate=self.rate),
            }
            for prediction, outputs in predictions.items():
                for part in ("train", "test"):
                    found[f"{kind}, {prediction}, {part}"] = self.gap(real, outputs, part)
        found["total_s"] = time.perf_counter() - begun
        return found

    def gap(self, first: Outputs, second: Outputs, part: str) -> np.ndarray:
        """Distance at each time, in units of the targets."""
        return distance(getattr(first, part), getattr(second, part), self.data.targets_train)

    def conclude(self) -> None:
        """Fit the slopes of the largest distance against the width."""
        networks = self.record["networks"]
        widths = np.array([network["width"] for network in networks])
        if len(set(widths.tolist())) < 3:
            return
        for key in networks[0]["distance"]:
            largest = np.array([max(network["distance"][key]) for network in networks])
            law = na.power_law(widths, largest)
            self.record["slopes"][key] = {"exponent": law.exponent, "interval": [law.low, law.high]}


def table_of(name: str, record: dict[str, Any]) -> Table:
    """Show the largest distances over time, mean over seeds, and the slopes."""
    widths: Sequence[int] = sorted({network["width"] for network in record["networks"]})
    table = Table("training, prediction, images", *map(str, widths), "slope [95%]", title=f"{name}: largest distance")
    if not record["networks"]:
        return table
    for key in record["networks"][0]["distance"]:
        cells = [
            np.mean([max(one["distance"][key]) for one in record["networks"] if one["width"] == width])
            for width in widths
        ]
        law = record["slopes"].get(key)
        slope = "" if law is None else f"{law['exponent']:.2f} [{law['interval'][0]:.2f}, {law['interval'][1]:.2f}]"
        table.add_row(key, *(f"{cell:.3g}" for cell in cells), slope)
    return table


if __name__ == "__main__":
    launch(main, Settings, __doc__)
