"""Kernels and networks under one strong attack: accuracy against eps, what transfers, and AutoAttack's judgement.

Infinitely wide networks (the interpolating NTK, early stopping, Adv-NTK) stand beside finite networks of the same
architecture, trained by Adam on clean and on attacked images. Three questions: how fast does each lose its accuracy as
the ball grows? Do perturbations made against the kernel, which needs no training, break the networks? And what is left
under the whole ensemble?

    python examples/strong_attacks.py                                    # digits with 10% label noise
    python examples/strong_attacks.py --dataset cifar10 --label-noise 0 --eps 0.031373 --n-train 3000 --n-val 500 \
        --n-test 500 --output runs/strong_cifar10

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
from tqdm.auto import tqdm

import ntkadv as na
from ntkadv.scripts import launch, settings_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Kernels and networks under one strong attack."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "digits"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    n_train: int = 1000
    """Training images."""
    n_val: int = 297
    """Validation images: the stopping time is chosen on them, and Adv-NTK learns from them."""
    n_test: int = 500
    """Test images: they are attacked."""
    label_noise: float = 0.1
    """Share of the training labels that are wrong."""
    depth: int = 3
    """Hidden layers."""
    width: int = 256
    """Width of the finite networks."""
    eps: float = 0.15
    """Radius of the l_inf ball; the curves go up to twice as far."""
    radii: int = 9
    """Points on the axis of the radii."""
    steps: int = 50
    """Steps of Auto-PGD and FAB."""
    queries: int = 500
    """Queries of Square."""
    fit_steps: int = 50
    """Steps of Adv-NTK."""
    train_steps: int = 1500
    """Steps of Adam on the finite networks."""
    seed: int = 0
    """Seed of split, noise, networks and attacks."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/strong_attacks")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""


def main(config: Config) -> None:
    """Images in, figures out."""
    console = Console()
    data = na.load_dataset(
        config.dataset, n_train=config.n_train, n_val=config.n_val, n_test=config.n_test, seed=config.seed,
        root=config.root, label_noise=config.label_noise,
    )  # fmt: skip
    settings = settings_of(config)
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    threat = na.attacks.Linf(config.eps)
    keys = jax.random.split(jax.random.key(config.seed), 4)
    title = f"{config.dataset}, MLP-{config.depth}, n = {config.n_train}, ε = {config.eps:.3g}"
    title += f", {config.label_noise:.0%} label noise" if config.label_noise else ""

    console.print("the models")
    models = kernel_models(config, data, threat, keys[0], run) | networks(config, data, threat, keys[1], run)

    # Two members of AutoAttack: on these models the others break next to nothing that is left, as the table shows.
    strong = na.attacks.AutoAttack(threat, version="custom", attacks_to_run=["apgd-ce", "apgd-t"], steps=config.steps)
    console.print("accuracy against eps")
    eps = np.linspace(0, 2 * config.eps, config.radii)
    curves = na.accuracy_curves(models, data, strong, eps, key=keys[2], batch_size=512, state=run.path / "curves")
    curves.to_json(run.path / "curves.json")
    run.figure(na.plots.accuracy_curves(curves, title=title), "accuracy_against_eps")

    console.print("transfer")
    maker = na.attacks.APGD(threat, loss="margin", steps=config.steps)
    matrix = na.transfer(models, data, maker, key=keys[3], batch_size=512)
    matrix.to_json(run.path / "transfer.json")
    run.figure(na.plots.transfer_matrix(matrix, title=title), "transfer")
    console.print(matrix)

    console.print("the table")
    attacks = [
        na.attacks.PGD(threat, steps=20),
        na.attacks.AutoAttack(threat, steps=config.steps, queries=config.queries),
    ]
    report = na.compare(models, data, attacks, key=keys[2], batch_size=512, state=run.path / "report")
    report.to_json(run.path / "report.json")
    report.to_csv(run.path / "report.csv")
    (run.path / "report.md").write_text(report.to_markdown() + "\n")
    run.figure(na.plots.robustness(report, title=title), "robustness")
    console.print(report)
    first, second = "early stopping", "Adv-NTK"
    console.print(f"{first} against {second}, on the same images: {report.paired(first, second)}")
    console.print(f"Figures (PNG, PDF) and tables (JSON, CSV, Markdown): {config.output.resolve()}")


def kernel_models(
    config: Config, data: na.Dataset, threat: na.attacks.ThreatModel, key: Array, run: na.runs.Run
) -> dict[str, Any]:
    """Infinitely wide networks: trained forever, stopped in time, by Adv-NTK."""
    arch = na.architectures.mlp(depth=config.depth, num_classes=data.num_classes).normalized(data.x_train)
    gram = run.cached("gram", lambda: {"gram": na.gram(arch, data.x_train)})["gram"]
    dynamics = na.TrainingDynamics(arch, data.x_train, data.targets_train, gram=gram)
    smallest, largest = (max(float(dynamics.spectrum.values[i]), 1e-6) for i in (0, -1))
    judge = na.attacks.PGD(threat, steps=20, loss="margin")

    def choose() -> dict[str, np.ndarray]:
        times = np.geomspace(0.3 / largest, 10 / smallest, 15)
        path = na.robustness_path(
            dynamics.predictor, times, data.x_val, data.y_val, attack=judge, key=key, batch_size=512
        )
        return {"time": np.asarray(path.best)}

    stopping = float(run.cached("stopping", choose)["time"])
    fit = na.fit_adv_ntk(
        arch, data, attack=na.attacks.PGD(threat, steps=10, step_size=config.eps / 5), key=key, steps=config.fit_steps,
        learning_rate=stopping * np.sqrt(config.n_train) / 10, held_out=0.25, gram=gram,
        checkpoint=run.checkpoint("adv_ntk"),
    )  # fmt: skip
    return {
        "NTK, t = ∞": dynamics.predictor(np.inf),
        "early stopping": dynamics.predictor(stopping),
        "Adv-NTK": fit.predictor,
    }


def networks(
    config: Config, data: na.Dataset, threat: na.attacks.ThreatModel, key: Array, run: na.runs.Run
) -> dict[str, Any]:
    """Finite networks of the same architecture, trained on clean and on attacked images."""
    arch = na.architectures.mlp(depth=config.depth, width=config.width, num_classes=data.num_classes)
    pgd = na.attacks.PGD(threat, steps=7, loss="cross_entropy", keep_best=False)
    found = {}
    for name, attack in (("network", None), ("network, PGD", pgd)):
        trained = run.cached(
            name.replace(", ", "-"),
            lambda attack=attack: na.runs.arrays_of(train(arch, data, config.train_steps, attack, key)),
        )
        like = jax.eval_shape(lambda: arch.init(key, data.x_train.shape[1:]))
        params = na.runs.tree_of(trained, like)
        found[name] = eqx.Partial(arch.apply, params)
    return found


def train(
    arch: na.architectures.Architecture, data: na.Dataset, steps: int, attack: na.attacks.Attack | None, key: Array
) -> Any:
    """Train by Adam on the cross-entropy of clean images, or of attacked ones, whose radius grows in the first half."""
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    params = arch.init(key, x.shape[1:])
    optimiser = optax.adam(optax.cosine_decay_schedule(0.02, steps))
    state = optimiser.init(params)

    def loss(params: Any, images: Array, labels: Array) -> Array:
        return jnp.mean(na.attacks.LOSSES["cross_entropy"](arch.apply(params, images), labels))

    @jax.jit
    def step(params: Any, state: Any, key: Array, strength: Array) -> tuple[Any, Any]:
        place_key, attack_key = jax.random.split(key)
        places = jax.random.choice(place_key, len(x), (min(128, len(x)),), replace=False)
        images, labels = x[places], y[places]
        if attack is not None:
            weaker = attack.with_eps(strength * attack.threat.eps)
            keys = jax.random.split(attack_key, len(images))
            images = weaker.perturb(partial(arch.apply, params), images, labels, keys)
        updates, state = optimiser.update(jax.grad(loss)(params, images, labels), state, params)
        return optax.apply_updates(params, updates), state

    for number in tqdm(range(steps), desc="network" if attack is None else "network, PGD", leave=False):
        strength = jnp.float32(min(1, 2 * number / steps))
        params, state = step(params, state, jax.random.fold_in(key, number), strength)
    return params


if __name__ == "__main__":
    launch(main, Config)
