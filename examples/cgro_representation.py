"""The CGRO classifier of the representation theorem, built around real clean classifiers and attacked.

A ReLU network memorises the l_inf ball of each training image and leaves everything else to a clean classifier: an
interpolating NTK, or a network trained by Adam. Clean test accuracy, robust training and robust test accuracy, for the
clean classifier, for the network that memorises everything, and for the one that memorises only images of small margin.
The flat regions of the balls fool attacks by gradients, so robustness is judged by attacks on the network, by attacks
on its clean part, and by what the construction implies; the table shows how far each goes alone.

    python examples/cgro_representation.py                                       # digits
    python examples/cgro_representation.py --dataset mnist --n-train 1000 --eps 0.3 --n-test 300
    python examples/cgro_representation.py --dataset cifar10 --n-train 1000 --eps 0.031373 --n-test 300

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import ntkadv as na
from ntkadv import cgro
from ntkadv.cgro import figures
from ntkadv.scripts import launch, settings_of


@dataclasses.dataclass(frozen=True)
class Config:
    """The CGRO classifier of the representation theorem on real images."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "digits"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    n_train: int = 1000
    """Training images: N, all memorised in one of the networks."""
    n_test: int = 300
    """Test images."""
    eps: float = 0.15
    """Radius of the attack and of the balls, which are a thousandth larger; lowered where classes are too close."""
    clean: Literal["ntk", "network"] = "network"
    """The clean classifier: an interpolating NTK, or a finite network trained by Adam."""
    depth: int = 2
    """Hidden layers of the clean classifier."""
    width: int = 256
    """Its width, where it is finite."""
    train_steps: int = 600
    """Steps of Adam."""
    steps: int = 20
    """Steps of the attacks."""
    radii: int = 6
    """Points on the axis of the radii, up to twice eps; 0 makes no curve."""
    seed: int = 0
    """Seed of split, network and attacks."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/cgro_representation")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""


def main(config: Config) -> None:
    """Images in, table and figures out."""
    console = Console()
    data = na.load_dataset(
        config.dataset, n_train=config.n_train, n_val=0, n_test=config.n_test, seed=config.seed, root=config.root
    )
    settings = settings_of(config)
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    gap = float(run.cached("gap", lambda: {"gap": np.array(cgro.class_distance(data.x_train, data.y_train))})["gap"])
    eps = min(config.eps, 0.49 * gap)
    console.print(f"images of different classes are {gap:.4f} apart or more; eps = {eps:.4f}")
    key = jax.random.key(config.seed)
    clean, clean_parameters = clean_classifier(config, data, key, run)
    attacks = attacks_at(eps, config.steps)
    small = cgro.small_margin(clean, data.x_train, data.y_train, attack=attacks[0], key=key)
    # Rounding moves an attacked pixel by 1e-7: balls a thousandth larger than the attack leave no doubt.
    build = partial(cgro.build_cgro_classifier, clean, data.x_train, data.y_train, delta=1.001 * eps)
    networks = {
        "clean classifier": build(keep=np.zeros(len(small), bool)),
        "memorises small margins": build(keep=small),
        "memorises everything": build(),
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, network in tqdm(networks.items(), desc="networks", leave=False):
        rows[name] = judged(name, network, data, eps, attacks, key, run)
        rows[name] |= {"images": len(network.centres), "parameters": sum(network.parameter_counts().values())}
    run.save_json("table", {"eps": eps, "gap": gap, "clean_parameters": clean_parameters, "rows": rows})
    console.print(table_of(rows))
    title = f"{config.dataset}, n = {config.n_train}, clean: {config.clean}, ε = {eps:.3g}"
    run.figure(bars(rows, title), "cgro_classifier")
    counts = [max(1, config.n_train * i // 100) for i in (1, 3, 10, 30, 100)]
    size = int(np.prod(data.image_shape))
    built = [sum(cgro.parameter_counts(n, size, data.num_classes).values()) for n in counts]
    bound = [cgro.parameter_bound(n, size, data.num_classes) for n in counts]
    run.figure(figures.parameters(counts, built, bound, clean_parameters, title=f"D = {size}"), "parameters")
    console.print(
        f"parameters: {built[-1]:,} for N = {config.n_train}, D = {size}: {built[-1] / config.n_train / size:.2f} N D"
        f" (bound {bound[-1]:,}); clean classifier: {clean_parameters:,}"
    )
    layers = cgro.parameter_counts(config.n_train, size, data.num_classes)
    console.print("by layer: " + ", ".join(f"{name} {count:,}" for name, count in layers.items()))
    if config.radii:
        radii = 2 * eps * np.arange(1, config.radii + 1) / config.radii
        curves = over_radii(networks["memorises everything"], data, radii, config, key, run)
        run.figure(figures.robust_accuracy_by_radius(radii, curves, 1.001 * eps, title=title), "radii")
    console.print(f"Figures (PNG, PDF) and numbers (JSON): {config.output.resolve()}")


def attacks_at(eps: float, steps: int) -> list[na.attacks.Attack]:
    """Two attacks by gradients and one without."""
    threat = na.attacks.Linf(eps)
    return [
        na.attacks.PGD(threat, steps=steps, loss="margin"),
        na.attacks.APGD(threat, steps=steps, loss="cross_entropy"),
        na.attacks.SquareAttack(threat, queries=5 * steps),
    ]


def judged(
    name: str, network: cgro.CGROClassifier, data: na.Dataset, eps: float, attacks: list[na.attacks.Attack],
    key: Array, run: na.runs.Run,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Judge a network on training and on test images."""

    def judge(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        return vars(cgro.judge_cgro_classifier(network, x, y, eps=eps, attacks=attacks, key=key))

    # As many training images as test images: the same program serves both.
    some = slice(len(data.x_test))
    parts = {"train": (data.x_train[some], data.y_train[some]), "test": (data.x_test, data.y_test)}
    found = {}
    for part, (x, y) in parts.items():
        values = run.cached(f"{name.replace(' ', '_')}-{part}", lambda x=x, y=y: judge(x, y))
        found[part] = {kind: float(np.mean(value)) for kind, value in values.items()}
    return found


def over_radii(
    network: cgro.CGROClassifier, data: na.Dataset, radii: np.ndarray, config: Config, key: Array, run: na.runs.Run
) -> dict[str, list[float]]:
    """Accuracy of the network that memorises everything against the radius, by ways of attacking."""
    curves: dict[str, list[float]] = {
        "train, worst case": [], "test, PGD on the network": [], "test, PGD on its clean part": [],
        "test, worst case": [],
    }  # fmt: skip
    attack = [na.attacks.PGD(na.attacks.Linf(float(radii[0])), steps=config.steps, loss="margin")]
    some = slice(len(data.x_test))
    for i, eps in enumerate(tqdm(radii.tolist(), desc="radii", leave=False)):

        def judge(part: str, eps: float = eps) -> dict[str, np.ndarray]:
            x, y = (data.x_train[some], data.y_train[some]) if part == "train" else (data.x_test, data.y_test)
            return vars(cgro.judge_cgro_classifier(network, x, y, eps=eps, attacks=attack, key=key))

        train, test = (run.cached(f"radius-{i}-{part}", lambda part=part: judge(part)) for part in ("train", "test"))
        values = (train["worst"], test["direct"], test["transferred"], test["worst"])
        for curve, value in zip(curves.values(), values, strict=True):
            curve.append(float(np.mean(value)))
    return curves


def clean_classifier(config: Config, data: na.Dataset, key: Array, run: na.runs.Run) -> tuple[Any, int]:
    """Give the clean classifier, and the number of its parameters (for a kernel, its images and coefficients)."""
    if config.clean == "ntk":
        arch = na.architectures.mlp(depth=config.depth, num_classes=data.num_classes).normalized(data.x_train)
        gram = run.cached("gram", lambda: {"gram": na.gram(arch, data.x_train)})["gram"]
        dynamics = na.TrainingDynamics(arch, data.x_train, data.targets_train, gram=gram)
        return dynamics.predictor(np.inf), data.x_train.size + data.targets_train.size
    arch = na.architectures.mlp(depth=config.depth, width=config.width, num_classes=data.num_classes)
    trained = run.cached("network", lambda: na.runs.arrays_of(train(arch, data, config, key)))
    params = na.runs.tree_of(trained, jax.eval_shape(lambda: arch.init(key, data.image_shape)))
    return eqx.Partial(arch.apply, params), sum(leaf.size for leaf in jax.tree.leaves(params))


def train(arch: na.architectures.Architecture, data: na.Dataset, config: Config, key: Array) -> Any:
    """Train by Adam on the cross-entropy, in one compiled loop."""
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.01, config.train_steps))
    params = arch.init(key, data.image_shape)

    def loss(params: Any, places: Array) -> Array:
        return jnp.mean(na.attacks.LOSSES["cross_entropy"](arch.apply(params, x[places]), y[places]))

    def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Array]:
        params, state = carry
        places = jax.random.choice(key, len(x), (min(128, len(x)),))
        value, gradient = jax.value_and_grad(loss)(params, places)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(key, config.train_steps)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0][0])((params, optimiser.init(params)))


def bars(rows: dict[str, dict[str, Any]], title: str) -> Any:
    """Accuracies of the three classifiers."""
    groups = {
        name.replace(" ", "\n", 1): {
            "train_clean": [row["train"]["clean"]], "train_robust": [row["train"]["worst"]],
            "test_clean": [row["test"]["clean"]], "test_robust": [row["test"]["worst"]],
        }
        for name, row in rows.items()
    }  # fmt: skip
    return figures.cgro_bars(groups, title=title, chance=None)


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    """Accuracies, shares and sizes: a column for each classifier."""
    table = Table(title="Robust: under all attacks, and by what the construction implies")
    table.add_column("")
    for name in rows:
        table.add_column(name)
    lines = {
        "images memorised": lambda row: f"{row['images']}",
        "parameters, less the clean part": lambda row: f"{row['parameters']:,}",
        "test, clean": lambda row: f"{row['test']['clean']:.3f}",
        "train, robust": lambda row: f"{row['train']['worst']:.3f}",
        "test, robust": lambda row: f"{row['test']['worst']:.3f}",
        "test, direct attacks only": lambda row: f"{row['test']['direct']:.3f}",
        "test, through the clean part": lambda row: f"{row['test']['transferred']:.3f}",
        "train, robust for certain": lambda row: f"{row['train']['certified']:.3f}",
        "test, inside training balls": lambda row: f"{row['test']['inside']:.3f}",
        "test, reach a wrong ball": lambda row: f"{row['test']['near_wrong']:.3f}",
    }
    for line, cell in lines.items():
        table.add_row(line, *(cell(row) for row in rows.values()))
    return table


if __name__ == "__main__":
    launch(main, Config)
