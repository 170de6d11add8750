"""Speed of infinite-width kernels and of their input gradients, ntkadv against neural-tangents.

    python benchmarks/kernels.py --root FOLDER_WITH_CIFAR10_NPZ

Both sides run in one process, one call of each in turn, so that whatever else the machine does meets both alike. Each
gets the same images and centres them itself. Where the two do not agree, the script ends with an error.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import command_line, finished
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv.scripts import launch, settings_of

RESULTS = Path(__file__).parent / "results"
Kernel = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how often."""

    dataset: str = "cifar10"
    """Images."""
    root: Path | None = None
    """Folder of the images."""
    depth: int = 5
    """Hidden layers or convolutions."""
    mlp_size: tuple[int, int] = (128, 2000)
    """Rows and columns of the MLP's kernel matrix."""
    cnn_size: tuple[int, int] = (64, 64)
    """Rows and columns of the CNN's."""
    repeats: int = 15
    """Calls of each side, after one to warm up."""
    tolerance: float = 1e-3
    """Relative difference above which two sides do not agree. Nearly parallel pixels, as white ones are, leave the
    float32 gradients of both uncertain by some 1e-4."""
    seed: int = 0
    """Seed of the choice of images and of the weights in the sum whose gradient is taken."""
    output: Path = RESULTS / "kernels.json"
    """File of the results."""

    def __post_init__(self) -> None:
        numbers = (self.depth, *self.mlp_size, *self.cnn_size, self.repeats)
        if min(numbers) < 1:
            raise ValueError(f"depth, sizes and repeats must be at least 1, got {numbers}")


def main(settings: Settings) -> int:
    """Measure, print and save; give 1 where two sides do not agree."""
    console = Console()
    needed = max(sum(settings.mlp_size), sum(settings.cnn_size))
    data = na.load_dataset(settings.dataset, root=settings.root, n_train=needed, n_val=0, n_test=1, seed=settings.seed)
    images = np.asarray(data.x_train)
    rows = []
    for name, (rows_, columns) in {"mlp": settings.mlp_size, "cnn": settings.cnn_size}.items():
        x1, x2 = jnp.asarray(images[:rows_]), jnp.asarray(images[rows_ : rows_ + columns])
        for what in ("value", "gradient"):
            rows.append({"network": f"{name}-{settings.depth}", "of": what, "size": [rows_, columns]})
            rows[-1] |= compare(kernels(name, settings.depth), what, x1, x2, settings)
    result = {
        "command": command_line(),
        "environment": na.runs.environment(),
        "settings": settings_of(settings),
        "comparisons": rows,
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table_of(rows), f"saved to {settings.output}")
    apart = [row for row in rows if row["relative_difference"] > settings.tolerance]
    for row in apart:
        console.print(f"the sides differ by {row['relative_difference']:.1e}: {row['network']}, {row['of']}")
    return 1 if apart else 0


def kernels(name: str, depth: int) -> dict[str, Kernel]:
    """Give the NTK of one network from both packages, as functions of pixels."""
    stax = na.architectures.import_neural_tangents().stax
    if name == "mlp":
        arch = na.architectures.mlp(depth=depth, num_classes=10)
        block = (stax.Dense(1, W_std=1.76, b_std=0.18), stax.Relu())
        layers = (stax.Flatten(), *block * depth)
    else:
        arch = na.architectures.cnn(depth=depth, num_classes=10)
        block = (stax.Conv(1, (3, 3), padding="SAME", W_std=1.76, b_std=0.18), stax.Relu())
        layers = (*block * depth, stax.Flatten())
    kernel_fn = stax.serial(*layers, stax.Dense(10, W_std=1.76, b_std=0.18))[2]
    half = np.float32(arch.center)
    return {"ntkadv": arch.ntk, "neural-tangents": lambda x1, x2: kernel_fn(x1 - half, x2 - half, "ntk")}


def compare(sides: dict[str, Kernel], what: str, x1: jax.Array, x2: jax.Array, settings: Settings) -> dict[str, Any]:
    """Time the kernel, or the gradient of a weighted sum of it in `x1`, of all sides in turn."""
    draw = np.random.default_rng(settings.seed).normal(size=(len(x1), len(x2)))
    weights = jnp.asarray(draw, jnp.float32)
    compiled, results, entries = {}, {}, {}
    for side, kernel in sides.items():
        compiled[side] = _program(kernel, what).lower(x1, x2, weights).compile()
        results[side], _ = finished(compiled[side], x1, x2, weights)
        memory = compiled[side].memory_analysis()
        peak = None if memory is None else (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
        entries[side] = {"program_mib": peak, "seconds": []}
    for _ in range(settings.repeats):
        for side, program in compiled.items():
            entries[side]["seconds"].append(finished(program, x1, x2, weights)[1])
    for entry in entries.values():
        seconds = entry.pop("seconds")
        entry |= {"min_s": min(seconds), "median_s": statistics.median(seconds)}
    ours, theirs = entries["ntkadv"], entries["neural-tangents"]
    return {
        **entries,
        "times_faster_min": theirs["min_s"] / ours["min_s"],
        "times_faster_median": theirs["median_s"] / ours["median_s"],
        "relative_difference": _relative_difference(results["ntkadv"], results["neural-tangents"]),
    }


def _program(kernel: Kernel, what: str) -> Any:
    if what == "value":
        return jax.jit(lambda x1, x2, weights: kernel(x1, x2))
    return jax.jit(jax.grad(lambda x1, x2, weights: jnp.sum(weights * kernel(x1, x2))))


def _relative_difference(value: jax.Array, reference: jax.Array) -> float:
    expected = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(value, np.float64) - expected) / np.linalg.norm(expected))


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Show times (minimum, median), their ratio, and the memory that the compiled programs take."""
    table = Table("network", "of", "size", "ntkadv", "neural-tangents", "times faster", "MiB", "MiB of theirs")
    for row in rows:
        ours, theirs = row["ntkadv"], row["neural-tangents"]
        times = [f"{1e3 * side['min_s']:.0f}, {1e3 * side['median_s']:.0f} ms" for side in (ours, theirs)]
        faster = f"{row['times_faster_min']:.2f}, {row['times_faster_median']:.2f}"
        memory = ["?" if side["program_mib"] is None else f"{side['program_mib']:.0f}" for side in (ours, theirs)]
        table.add_row(row["network"], row["of"], "{} x {}".format(*row["size"]), *times, faster, *memory)
    return table


if __name__ == "__main__":
    launch(main, Settings, __doc__)
