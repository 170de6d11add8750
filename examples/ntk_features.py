"""Robust and non-robust features of the NTK, and attacks that need no training.

Every eigenvector of the NTK's Gram matrix is a feature of images. Three questions: which features are useful, and which
of these stay so under attack? In what order does the infinitely wide network learn them, and do finite ones follow? And
do perturbations made against the kernel, which was never trained, break networks that were?

    python examples/ntk_features.py                                      # digits
    python examples/ntk_features.py --dataset cifar10 --eps 0.015686 --n-train 2000 --output runs/features_cifar10

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import json
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
from scipy.stats import spearmanr
from tqdm.auto import tqdm

import ntkadv as na
from ntkadv.features import Eigenfeatures, FeatureRobustness, feature_robustness
from ntkadv.plots import features as plots
from ntkadv.scripts import launch, settings_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Robust and non-robust features of the NTK, and attacks that need no training."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "digits"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    n_train: int = 1000
    """Training images."""
    n_test: int = 500
    """Test images: they are attacked."""
    label_noise: float = 0.0
    """Share of the training labels that are wrong."""
    depth: int = 3
    """Hidden layers of the kernel and of the MLP."""
    width: int = 256
    """Width of the MLP."""
    channels: int = 32
    """Channels of the CNN, which has two convolutions."""
    eps: float = 0.1
    """Radius of the l_inf ball."""
    steps: int = 20
    """Steps of PGD."""
    singles: int = 20
    """Number of single features that are judged."""
    edges: tuple[int, ...] = (10, 20, 50, 100, 200, 500)
    """Where bands of features end."""
    cut: int = 20
    """Leading features of the kernel that is cut off; what it leaves out is the tail."""
    time: float = 0.3
    """A finite training time of the kernel, in units of its mean diagonal."""
    train_steps: int = 1000
    """Steps of Adam on the finite networks."""
    seed: int = 0
    """Seed of split, noise, networks and attacks."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/ntk_features")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""


def main(config: Config) -> None:
    """Images in, figures out."""
    console = Console()
    data = na.load_dataset(
        config.dataset, n_train=config.n_train, n_test=config.n_test, seed=config.seed, root=config.root,
        label_noise=config.label_noise,
    )  # fmt: skip
    settings = settings_of(config)
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    keys = jax.random.split(jax.random.key(config.seed), 4)
    title = f"{config.dataset}, NTK of MLP-{config.depth}, n = {config.n_train}"
    title += f", {config.label_noise:.0%} label noise" if config.label_noise else ""
    attack = na.attacks.PGD(na.attacks.Linf(config.eps), steps=config.steps, loss="margin")

    arch = na.architectures.mlp(depth=config.depth, num_classes=data.num_classes).normalized(data.x_train)
    gram = run.cached("gram", lambda: {"gram": na.gram(arch, data.x_train)})["gram"]
    dynamics = na.TrainingDynamics(arch, data.x_train, data.targets_train, gram=gram)
    features = Eigenfeatures(dynamics)

    console.print("features")
    size = len(features)
    ends = [*(edge for edge in config.edges if edge < size), size]
    bands = list(zip([0, *ends[:-1]], ends, strict=True))
    picked = np.unique(np.geomspace(1, size, config.singles).astype(int)) - 1
    measured = {
        name: judged(run, name, features, ranges, data, attack, keys[0])
        for name, ranges in (
            ("single", [(int(k), int(k) + 1) for k in picked]),
            ("bands", bands),
            ("leading", [(0, end) for end in ends]),
        )
    }
    run.save_json("features", {name: result.to_dict() for name, result in measured.items()})
    run.figure(plots.usefulness(*measured.values(), title=title), "features")
    console.print(table_of(measured))
    console.print(order_of(measured["single"]))

    console.print("networks")
    trained = {"MLP": network("MLP", config, data, keys[1], run), "CNN": network("CNN", config, data, keys[2], run)}
    times = np.geomspace(0.1 / features.eigenvalues[0], 10 / features.eigenvalues[-1], 40)
    learnt = {"NTK": (times, [features.learnt(f, bands) for f in dynamics.train_predict(times)])}
    for name, (_, arrays) in trained.items():
        learnt[name] = arrays["steps"], [features.learnt(f, bands) for f in arrays["outputs"]]
    shares = {name: (when, np.array(values)) for name, (when, values) in learnt.items()}
    run.save_json("learning", {name: {"time": t, "bands": bands, "learnt": s} for name, (t, s) in shares.items()})
    units = {"NTK": "training time t", **dict.fromkeys(trained, "step of Adam")}
    run.figure(plots.learning(shares, bands, units=units, title=title), "learning")
    for name, (when, values) in shares.items():
        halves = ", ".join(f"{half_of(when, row):.3g}" for row in values.T)
        console.print(f"{name}, {units[name]} at which half of a band is learnt: {halves}")

    console.print("transfer")
    cut = min(config.cut, size - 1)
    free = {
        "NTK, t = ∞": dynamics.predictor(np.inf),
        f"NTK, t = {config.time:g}": dynamics.predictor(config.time),
        f"NTK, top {cut}": features.top(cut),
        f"NTK, beyond {cut}": features.predictor(cut, size),
    }
    models = {name: model for name, (model, _) in trained.items()}
    matrix = na.transfer(free | models, data, attack, key=keys[3], targets=models, batch_size=512)
    matrix = with_random_signs(matrix, data, models, config.eps, keys[3])
    matrix.to_json(run.path / "transfer.json")
    matrix.to_csv(run.path / "transfer.csv")
    run.figure(plots.transfer_bars(matrix, free=list(free), title=title), "transfer")
    console.print(matrix)

    shown = [k for k in (0, 1, 2, 4, 9, 29, 99, 299, 999) if k < size]
    mean = jnp.asarray(data.x_train.mean(axis=0))
    gradients = np.array([gradient_of(features.functions(k, k + 1), mean) for k in shown])
    caption = "gradient of eigenfeatures with respect to the image, at the mean image"
    run.figure(plots.eigenfeatures(gradients, shown, features.eigenvalues[shown].tolist(), title=caption), "gradients")
    points = {
        name: attack(model, data.x_test, data.y_test, key=keys[3], batch_size=512)[:4]
        for name, model in (free | models).items()
    }
    caption = f"perturbations in units of eps = {config.eps:.3g}"
    run.figure(plots.perturbations(data.x_test[:4], points, eps=config.eps, title=caption), "perturbations")
    console.print(f"Figures (PNG, PDF) and numbers (JSON, CSV): {config.output.resolve()}")


def judged(
    run: na.runs.Run, name: str, features: Eigenfeatures, ranges: list[tuple[int, int]], data: na.Dataset,
    attack: na.attacks.PGD, key: Array,
) -> FeatureRobustness:  # fmt: skip
    """Judge ranges of features, or read what an earlier start has found."""

    def measure() -> dict[str, np.ndarray]:
        found = feature_robustness(features, ranges, data, attack, key=key, steps=attack.steps, batch_size=512)
        return {"json": np.array(json.dumps(found.to_dict()))}

    return FeatureRobustness.from_dict(json.loads(str(run.cached(name, measure)["json"])))


def table_of(measured: dict[str, FeatureRobustness]) -> Table:
    """Put all numbers of the features into one table."""
    table = Table("features", "eigenvalues", "labels", "clean", "attacked", "usefulness", "robust usefulness")
    for result in measured.values():
        for i, (start, stop) in enumerate(result.ranges):
            largest, smallest = result.eigenvalues[i]
            table.add_row(
                str(stop) if stop == start + 1 else f"{start + 1}-{stop}",
                f"{largest:.2g}" if stop == start + 1 else f"{largest:.2g}-{smallest:.2g}",
                f"{result.energy[i]:.4f}",
                f"{result.accuracy[i]:.3f}",
                f"{result.robust_accuracy[i]:.3f}",
                f"{result.usefulness[i]:.3f} ± {result.usefulness_error[i]:.3f}",
                f"{result.robust_usefulness[i]:.3f} ± {result.robust_usefulness_error[i]:.3f}",
            )
        table.add_section()
    return table


def order_of(single: FeatureRobustness) -> str:
    """Say whether robustness falls with the index of a feature: among all judged ones, and among the useful ones."""
    useful = single.usefulness > 2 * single.usefulness_error
    lines = []
    for name, chosen in (("all", np.ones_like(useful)), ("the useful ones (2 standard errors)", useful)):
        if chosen.sum() < 4:
            continue
        found: Any = spearmanr(single.ranges[chosen, 0], single.robust_usefulness[chosen])
        robust = int(np.sum(single.robust_usefulness[chosen] > 0))
        lines.append(
            f"{name}: {chosen.sum()} features, of which {robust} stay useful under attack; rank correlation of index "
            f"and robust usefulness {found.statistic:+.2f}"
        )
    return "\n".join(lines)


def half_of(times: np.ndarray, shares: np.ndarray) -> float:
    """Find when half is learnt for the first time, between two looks on a straight line; infinity for never."""
    j = int(np.argmax(shares >= 0.5))
    if j == 0:
        return float(times[0]) if shares[0] >= 0.5 else float("inf")
    return float(times[j - 1] + (0.5 - shares[j - 1]) / (shares[j] - shares[j - 1]) * (times[j] - times[j - 1]))


def network(
    name: Literal["MLP", "CNN"], config: Config, data: na.Dataset, key: Array, run: na.runs.Run
) -> tuple[Any, dict[str, np.ndarray]]:
    """Give a network trained on clean images, and its class probabilities on them over the training."""
    classes = data.num_classes
    if name == "MLP":
        arch = na.architectures.mlp(depth=config.depth, width=config.width, num_classes=classes)
    else:
        arch = na.architectures.cnn(depth=2, width=config.channels, num_classes=classes)
    arrays = run.cached(name, lambda: train(name, arch, data, config.train_steps, key))
    params = na.runs.tree_of(arrays, jax.eval_shape(lambda: arch.init(key, data.x_train.shape[1:])))
    return eqx.Partial(arch.apply, params), arrays


def train(
    name: str, arch: na.architectures.Architecture, data: na.Dataset, steps: int, key: Array
) -> dict[str, np.ndarray]:
    """Train by Adam on the cross-entropy; keep the parameters, and centred probabilities over the training."""
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    params = jax.jit(arch.init, static_argnums=1)(key, x.shape[1:])
    optimiser = optax.adam(optax.cosine_decay_schedule(0.01, steps))
    state = optimiser.init(params)

    def loss(params: Any, images: Array, labels: Array) -> Array:
        return jnp.mean(na.attacks.LOSSES["cross_entropy"](arch.apply(params, images), labels))

    @jax.jit
    def step(params: Any, state: Any, key: Array) -> tuple[Any, Any]:
        places = jax.random.choice(key, len(x), (min(128, len(x)),), replace=False)
        updates, state = optimiser.update(jax.grad(loss)(params, x[places], y[places]), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def probabilities(params: Any) -> Array:
        logits = jax.lax.map(lambda image: arch.apply(params, image[None])[0], x, batch_size=256)
        return jax.nn.softmax(logits) - 1 / data.num_classes

    looks = sorted({int(n) for n in np.geomspace(1, steps, 16)})
    outputs = []
    for number in tqdm(range(1, steps + 1), desc=name, leave=False):
        params, state = step(params, state, jax.random.fold_in(key, number))
        if number in looks:
            outputs.append(np.asarray(probabilities(params)))
    return {**na.runs.arrays_of(params), "steps": np.array(looks), "outputs": np.array(outputs)}


def with_random_signs(
    matrix: na.TransferMatrix, data: na.Dataset, models: dict[str, Any], eps: float, key: Array
) -> na.TransferMatrix:
    """Add a control: every pixel moved by eps, up or down at random."""
    signs = np.asarray(jax.random.rademacher(jax.random.fold_in(key, 1), data.x_test.shape, jnp.float32))
    points = np.clip(data.x_test + np.float32(eps) * signs, 0, 1)
    answers = [np.asarray(model(jnp.asarray(points))).argmax(axis=1) == data.y_test for model in models.values()]
    sources = [*matrix.sources[:2], "random signs", *matrix.sources[2:]]
    return dataclasses.replace(matrix, sources=sources, correct=np.insert(matrix.correct, 2, answers, axis=0))


@eqx.filter_jit
def gradient_of(function: na.KernelPredictor, image: Array) -> Array:
    """Differentiate one feature with respect to the image."""
    return jax.grad(lambda z: function(z[None])[0, 0])(image)


if __name__ == "__main__":
    launch(main, Config)
