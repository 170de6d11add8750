"""Speed of attacks: gradient evaluations per second, ntkadv against Foolbox and against loops in Python.

    python benchmarks/attacks.py --root FOLDER_WITH_MNIST_AND_CIFAR10

Network: PGD on a small network on MNIST, here, in Foolbox on the same function compiled (`foolbox_model`), and in
Foolbox as its own guide shows it, on the plain function. Kernel: PGD on a predictor with 2,000 training images of
CIFAR-10, here, and by loops in Python over the steps, of whole batches and of single images, around a compiled gradient
of the predictor as neural-tangents has it. All sides have the same budget, start at the clean image and end at the same
points, or the script ends with an error; they run in turn, in one process, and what is compared are minima after
compilation.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foolbox
import jax
import jax.numpy as jnp
import numpy as np
from measure import command_line
from networks import train
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv.scripts import launch, settings_of

RESULTS = Path(__file__).parent / "results"
Side = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is attacked, and how often."""

    root: Path | None = None
    """Folder of the images."""
    network_batches: tuple[int, ...] = (16, 128)
    """Images attacked at once, of the network."""
    network_steps: int = 40
    """Steps of PGD on the network."""
    kernel_train: int = 2000
    """Training images of the kernel predictor."""
    kernel_batch: int = 32
    """Images attacked at once, of the kernel predictor."""
    kernel_steps: int = 20
    """Steps of PGD on the kernel predictor."""
    repeats: int = 5
    """Runs of each side, after one to warm up."""
    seed: int = 0
    """Seed of the choice of images."""
    output: Path = RESULTS / "attacks.json"
    """File of the results."""


def main(settings: Settings) -> int:
    """Measure, print and save; give 1 where the sides end elsewhere."""
    console = Console()
    cases = [network(settings, batch) for batch in settings.network_batches] + [kernel(settings)]
    rows = [measure(settings, *case) for case in cases]
    result = {
        "command": command_line(),
        "environment": na.runs.environment() | {"foolbox": foolbox.__version__},
        "settings": settings_of(settings),
        "comparisons": rows,
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table_of(rows), f"saved to {settings.output}")
    return 1 if any(row["points_apart"] > 1e-3 for row in rows) else 0


def network(settings: Settings, batch: int) -> tuple[str, int, dict[str, Side]]:
    """PGD on a small trained network."""
    data = na.load_dataset("mnist", root=settings.root, n_train=2000, n_val=0, n_test=batch, seed=settings.seed)
    arch = na.architectures.mlp(depth=2, width=128, num_classes=10)
    model = train(arch, data, key=jax.random.key(settings.seed), steps=200)
    x, labels = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    eps, steps = 0.05, settings.network_steps
    attack = na.attacks.PGD(
        na.attacks.Linf(eps), steps=steps, step_size=eps / 10, loss="cross_entropy", random_start=False, keep_best=False
    )
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=eps / 10, steps=steps, random_start=False)
    compiled, plain = na.attacks.foolbox_model(model), foolbox.JAXModel(model, bounds=(0, 1))
    sides: dict[str, Side] = {
        "ntkadv": lambda: attack(model, x, labels, key=jax.random.key(0)),
        "Foolbox, compiled model": lambda: theirs(compiled, x, labels, epsilons=eps)[1],
        "Foolbox, plain model": lambda: theirs(plain, x, labels, epsilons=eps)[1],
    }
    return f"MLP-2, PGD-{steps}, {batch} images", batch * steps, sides


def kernel(settings: Settings) -> tuple[str, int, dict[str, Side]]:
    """PGD on a kernel predictor."""
    n, batch, steps = settings.kernel_train, settings.kernel_batch, settings.kernel_steps
    data = na.load_dataset("cifar10", root=settings.root, n_train=n, n_val=0, n_test=batch, seed=settings.seed)
    arch = na.architectures.mlp(depth=5, num_classes=10).normalized(data.x_train)
    dynamics = na.TrainingDynamics(arch, data.x_train, data.targets_train, gram=na.gram(arch, data.x_train))
    model = dynamics.predictor(time=0.07)
    x, labels = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    eps = 8 / 255
    attack = na.attacks.PGD(
        na.attacks.Linf(eps), steps=steps, step_size=eps / 4, loss="squared", random_start=False, keep_best=False
    )
    stax = na.architectures.import_neural_tangents().stax
    block = (stax.Dense(1, W_std=1.76, b_std=0.18), stax.Relu())
    kernel_fn = stax.serial(stax.Flatten(), *block * 5, stax.Dense(10, W_std=1.76, b_std=0.18))[2]
    scale = float(arch.ntk(x[:1], x[:1])[0, 0] / kernel_fn(x[:1] - 0.5, x[:1] - 0.5, "ntk")[0, 0])
    loss = na.attacks.LOSSES["squared"]

    @jax.jit
    def gradient(z: jax.Array, labels: jax.Array) -> jax.Array:
        def total(z: jax.Array) -> jax.Array:
            logits = scale * kernel_fn(z - 0.5, model.x_train - 0.5, "ntk") @ model.coefficients
            return jnp.sum(loss(logits, labels))

        return jax.grad(total)(z)

    def loop(z: jax.Array, labels: jax.Array) -> jax.Array:
        clean = z
        for _ in range(steps):
            z = jnp.clip(z + eps / 4 * jnp.sign(gradient(z, labels)), clean - eps, clean + eps)
            z = jnp.clip(z, 0, 1)
        return z

    sides: dict[str, Side] = {
        "ntkadv": lambda: attack(model, x, labels, key=jax.random.key(0)),
        "loop over steps, neural-tangents": lambda: loop(x, labels),
        "loop over images and steps, neural-tangents": lambda: jnp.concatenate(
            [loop(x[i : i + 1], labels[i : i + 1]) for i in range(batch)]
        ),
    }
    return f"NTK of MLP-5, n = {n}, PGD-{steps}, {batch} images", batch * steps, sides


def measure(settings: Settings, name: str, gradients: int, sides: dict[str, Side]) -> dict[str, Any]:
    """Run all sides in turn."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    first, points = {}, {}
    for repeat in range(settings.repeats + 1):
        for side, run in sides.items():
            start = time.perf_counter()
            points[side] = jax.block_until_ready(run())
            taken = time.perf_counter() - start
            if repeat:
                seconds[side].append(taken)
            else:
                first[side] = taken
    ours = np.asarray(points["ntkadv"])
    # A pixel whose gradient is all rounding may go either way: what must agree is nearly all of them.
    apart = max(float(np.mean(np.abs(np.asarray(p) - ours) > 1e-4)) for p in points.values())
    best = {side: min(taken) for side, taken in seconds.items()}
    return {
        "case": name,
        "gradients": gradients,
        "sides": {
            side: {"first_s": first[side], "min_s": best[side], "gradients_per_s": gradients / best[side]}
            for side in sides
        },
        "times_faster": {side: best[side] / best["ntkadv"] for side in sides if side != "ntkadv"},
        "points_apart": apart,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Show gradients per second, and how many times as many there are here."""
    table = Table("case", "side", "gradients / s", "ntkadv is faster", "first call")
    for row in rows:
        for side, entry in row["sides"].items():
            faster = f"{row['times_faster'][side]:.1f} x" if side in row["times_faster"] else ""
            table.add_row(row["case"], side, f"{entry['gradients_per_s']:.0f}", faster, f"{entry['first_s']:.1f} s")
    return table


if __name__ == "__main__":
    launch(main, Settings, __doc__)
