"""The kernel that adversarial training leaves behind, and what standard training makes of it.

A finite network is trained without attacks and under PGD. At several times t of both trainings its parameters are kept,
and its linearisation around them, without the offset, is trained from zero on CLEAN images: kernel machines with the
NTK at t. Three questions: how soon does the kernel move, and where to? How robust is what clean training makes of each
kernel? And if clean training goes on after the adversarial one, does it matter whether the kernel may still move?

    python examples/kernel_after_training.py                                  # digits
    python examples/kernel_after_training.py --output-scale 1 --output runs/kernel_after_lazy   # hardly moving kernels
    python examples/kernel_after_training.py --dataset mnist --n-train 3000 --eps 0.1 --epochs 0 1 3 10 30 \
        --output runs/kernel_after_mnist

Every training is momentum SGD with one rule for its learning rate: a share of what the largest eigenvalue of the NTK at
its beginning allows, so that kernels of different size are trained alike. A run that was stopped goes on where it was
when the same command is given again.

Source: Loo, Hasani, Amini & Rus, NeurIPS 2022, arXiv 2210.12030.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv.kernels import KernelMovement, cosine_distance, empirical_ntk, kernel_movement
from ntkadv.plots import after as after_plots
from ntkadv.scripts import launch, settings_of
from ntkadv.training import Linearized, PGDTraining, StandardTraining, linearize, train

KINDS = ("standard", "adversarial")


@dataclasses.dataclass(frozen=True)
class Config:
    """The kernel that adversarial training leaves behind."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "svhn"] = "digits"
    """Data set; digits comes with scikit-learn, the others are read from --root or fetched."""
    n_train: int = 1000
    """Training images."""
    n_test: int = 500
    """Test images: they are attacked."""
    n_kernel: int = 200
    """Training images whose kernels are compared."""
    network: Literal["mlp", "cnn"] = "mlp"
    """Kind of network."""
    depth: int = 2
    """Hidden layers, or convolutions."""
    width: int = 128
    """Their width, or channels."""
    output_scale: float = 0.1
    """Outputs, in units of those whose NTK has mean diagonal 1: the smaller, the more features must be learnt."""
    eps: float = 0.15
    """Radius of the l_inf ball, in training and in judgement; the curves go up to twice as far."""
    attack_steps: int = 7
    """Steps of PGD in training."""
    judge_steps: int = 20
    """Steps of PGD, on the margin, in judgement."""
    radii: int = 4
    """Points on the axis of the radii, besides zero."""
    epochs: tuple[int, ...] = (0, 1, 3, 10, 30, 100)
    """When parameters are kept; every training ends with the last."""
    batch_size: int = 128
    """Images a step."""
    rate: float = 0.3
    """Learning rate, in units of one over the largest eigenvalue of NTK / n at the beginning."""
    top_rate: float = 1.0
    """The same for clean training after adversarial training, whose gradients are small."""
    momentum: float = 0.9
    """Momentum of SGD."""
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    """Loss of every training, and of the attack in it."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of split, networks and attacks."""
    root: Path | None = None
    """Folder with the data files; by default the one named by NTKADV_DATA, then the cache."""
    output: Path = Path("runs/kernel_after_training")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""

    def __post_init__(self) -> None:
        if len(self.epochs) < 2 or self.epochs[0] != 0 or list(self.epochs) != sorted(set(self.epochs)):
            raise ValueError(f"epochs must begin with 0 and ascend, as 0 1 10, got {self.epochs}.")
        if not self.seeds or self.radii < 2:
            raise ValueError(f"seeds must hold one at least, got {self.seeds}; radii must be 2 or more: {self.radii}.")


class Centred(eqx.Module):
    r"""A linearised network without its offset: :math:`\partial_\theta f(\theta_t, x)\,(\theta - \theta_t)`.

    Trained from the origin it is a kernel machine with the NTK at the origin, and nothing else of the network there.
    """

    linear: Linearized

    def apply(self, params: Any, x: Array) -> Array:
        """Evaluate it, as any network."""
        change = jax.tree.map(jnp.subtract, params, self.linear.origin)
        return jax.jvp(lambda p: self.linear.f(p, jnp.asarray(x)), (self.linear.origin,), (change,))[1]


def network(config: Config, data: na.Dataset) -> na.architectures.Architecture:
    """Build the network, with outputs of the size that was asked for."""
    build = na.architectures.mlp if config.network == "mlp" else na.architectures.cnn
    arch = build(depth=config.depth, width=config.width, num_classes=data.num_classes).normalized(data.x_train[:64])
    return dataclasses.replace(arch, output_scale=arch.output_scale * config.output_scale)


def momentum_sgd(rate: float, momentum: float) -> optax.GradientTransformation:
    """Give `optax.sgd(rate, momentum)` with the rate as data, so that one program serves all rates."""
    return optax.GradientTransformation(_begin, eqx.Partial(_step, jnp.float32(rate), jnp.float32(momentum)))


def _begin(params: Any) -> optax.TraceState:
    return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))


def _step(rate: Array, momentum: Array, gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    moved = jax.tree.map(lambda gradient, before: gradient + momentum * before, gradients, state.trace)
    return jax.tree.map(lambda change: -rate * change, moved), optax.TraceState(trace=moved)


class Experiment:
    """One seed: the trainings, the kernels, and their judgement, each computed once and kept in the run directory."""

    def __init__(self, config: Config, seed: int, run: na.runs.Run, arch: na.architectures.Architecture | None = None):
        self.config, self.seed, self.run = config, seed, run
        self.data = na.load_dataset(
            config.dataset, n_train=config.n_train, n_test=config.n_test, seed=seed, root=config.root
        )
        self.arch = network(config, self.data) if arch is None else arch
        init, *self.keys = jax.random.split(jax.random.key(seed), 4)
        self.start = self.arch.init(init, self.data.x_train.shape[1:])
        self.unravel = ravel_pytree(self.start)[1]
        self.judge = na.attacks.PGD(na.attacks.Linf(config.eps), steps=config.judge_steps, loss="margin")

    def follow(
        self, name: str, f: Any, origin: Any, kernel: np.ndarray, *, attack: bool = False, key: int = 0,
        rate: float | None = None,
    ) -> list[Any]:  # fmt: skip
        """Train a function f(params, x) from parameters, and give the parameters at each look.

        Args:
            name: Of what is kept in the run directory.
            f: What is trained.
            origin: Parameters to begin with.
            kernel: NTK of f there, which gives the learning rate.
            attack: Train on attacked images, not on clean ones.
            key: Which random key.
            rate: Learning rate, in units of one over the largest eigenvalue; `config.rate` by default.
        """
        config = self.config
        method: Any = StandardTraining(loss=config.loss)
        if attack:
            pgd = na.attacks.PGD(self.judge.threat, steps=config.attack_steps, loss=config.loss, keep_best=False)
            method = PGDTraining(pgd, loss=config.loss)
        size = min(config.batch_size, config.n_train)
        looks = [epoch * (config.n_train // size) for epoch in config.epochs]
        step = (rate or config.rate) * len(kernel) / float(np.linalg.eigvalsh(kernel)[-1])
        label = f"{name}-seed{self.seed}"

        def make() -> dict[str, np.ndarray]:
            trained = train(
                f, self.data, method=method, steps=looks[-1], key=self.keys[key],
                optimizer=momentum_sgd(step, config.momentum), params=origin, batch_size=size,
                record=lambda params: {"params": ravel_pytree(params)[0]}, record_at=looks,
                checkpoint=self.run.checkpoint(label),
            )  # fmt: skip
            return {"params": trained.history["params"]}

        return [self.unravel(jnp.asarray(row)) for row in self.run.cached(label, make)["params"]]

    @cached_property
    def first_kernel(self) -> np.ndarray:
        """NTK at the random start."""
        return self.kernels("start", [self.start])[0]

    @cached_property
    def bodies(self) -> dict[str, list[Any]]:
        """Parameters at each look, by kind of training; and of a standard one that differs in its batches only."""
        f, start, kernel = self.arch.apply, self.start, self.first_kernel
        return {
            "standard": self.follow("standard", f, start, kernel),
            "adversarial": self.follow("adversarial", f, start, kernel, attack=True),
            "standard again": self.follow("standard-again", f, start, kernel, key=1),
        }

    def kernels(self, name: str, trees: Sequence[Any]) -> np.ndarray:
        """NTKs of the same images (trace over outputs) at several parameters."""
        images = self.data.x_train[: self.config.n_kernel]

        def make() -> dict[str, np.ndarray]:
            return {"ntk": np.stack([empirical_ntk(self.arch.apply, tree, images, outputs="trace") for tree in trees])}

        return self.run.cached(f"ntk-{name.replace(' ', '-')}-seed{self.seed}", make)["ntk"]

    @cached_property
    def ntks(self) -> dict[str, np.ndarray]:
        """NTKs at each look, by kind of training."""
        return {kind: self.kernels(kind, self.bodies[kind]) for kind in KINDS}

    @cached_property
    def machines(self) -> dict[str, list[Any]]:
        """Kernel machines at each look, by kind of training: clean training of the centred linearisation there.

        The start is common to both kinds.
        """
        found: dict[str, list[Any]] = {}
        for kind in KINDS:
            found[kind] = []
            for t, epoch in enumerate(self.config.epochs):
                name = f"kernel-{kind}-{epoch}" if t else "kernel-start"
                f = Centred(linearize(self.arch, self.bodies[kind][t])).apply
                end = self.follow(name, f, self.bodies[kind][t], self.ntks[kind][t])[-1]
                found[kind].append(eqx.Partial(f, end))
        return found

    @cached_property
    def on_top(self) -> dict[str, list[Any]]:
        """Clean training after the adversarial one, at each look: of the network, its linearisation, its kernel."""
        origin, kernel = self.bodies["adversarial"][-1], self.ntks["adversarial"][-1]
        linear = linearize(self.arch, origin)
        trained = {
            "full on top": ("full-on-top", self.arch.apply),
            "lazy on top": ("lazy-on-top", linear.apply),
            "kernel on top": ("kernel-on-top", Centred(linear).apply),
        }
        return {
            name: [eqx.Partial(f, tree) for tree in self.follow(file, f, origin, kernel, rate=self.config.top_rate)]
            for name, (file, f) in trained.items()
        }

    @cached_property
    def models(self) -> dict[str, list[Any]]:
        """All that is judged, at each look."""
        networks = {
            f"network, {kind}": [eqx.Partial(self.arch.apply, tree) for tree in self.bodies[kind]] for kind in KINDS
        }
        return {f"kernel, {kind}": self.machines[kind] for kind in KINDS} | networks | self.on_top

    def correct(self) -> dict[str, np.ndarray]:
        """Which test images are right, (looks, 2, n): as they are, and under attack."""
        found = {}
        for name, models in self.models.items():
            label = f"judged-{name.replace(', ', '-').replace(' ', '-')}-seed{self.seed}"
            named = {str(epoch): model for epoch, model in zip(self.config.epochs, models, strict=True)}
            found[name] = self.run.cached(label, lambda named=named: self.judged(named, [self.config.eps]))["correct"]
        return found

    def curves(self) -> na.AccuracyCurves:
        """Accuracy against the radius of what there is in the end."""
        named = {name: models[-1] for name, models in self.models.items() if name != "kernel on top"}
        named["kernel, start"] = self.machines["standard"][0]
        eps = np.linspace(0, 2 * self.config.eps, self.config.radii + 1)
        arrays: Any = self.run.cached(f"curves-seed{self.seed}", lambda: self.judged(named, eps))
        attack = {"name": self.judge.name, "norm": self.judge.threat.norm}
        return na.AccuracyCurves(list(named), attack=attack, **arrays)

    def judged(self, models: Mapping[str, Any], eps: Any) -> dict[str, np.ndarray]:
        """Attack models at several radii."""
        found = na.accuracy_curves(
            models, self.data, self.judge, eps, key=self.keys[2], batch_size=min(128, self.config.n_test),
            progress=False,
        )  # fmt: skip
        return {name: getattr(found, name) for name in ("eps", "correct", "seconds", "gradients", "forwards")}

    def movements(self) -> dict[str, KernelMovement]:
        """How the kernels move, by kind of training."""
        targets = self.data.targets_train[: self.config.n_kernel]
        return {
            f"{kind} training": kernel_movement(self.ntks[kind], targets, times=self.config.epochs, progress=False)
            for kind in KINDS
        }

    def distances(self) -> np.ndarray:
        """Cosine distances between all kernels of both trainings and, last, that of the second standard training."""
        again = self.kernels("standard again", self.bodies["standard again"][-1:])
        stack = np.concatenate([*self.ntks.values(), again])
        return np.array([[cosine_distance(one, other) for other in stack] for one in stack])


def main(config: Config) -> None:
    """Images in, figures out."""
    console = Console()
    settings = settings_of(config)
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    title = f"{config.dataset}, n = {config.n_train}, {config.network.upper()}-{config.depth}, width {config.width}"
    title += f", output scale {config.output_scale:g}, eps = {config.eps:.3g}"

    experiments = []
    for seed in config.seeds:
        console.print(f"seed {seed}")
        # The seeds share the network, so that what is compiled for one serves all.
        experiments.append(Experiment(config, seed, run, experiments[0].arch if experiments else None))
        experiments[-1].correct()
        experiments[-1].curves().to_json(run.path / f"curves-seed{seed}.json")
    found = [experiment.correct() for experiment in experiments]
    correct = {name: np.stack([one[name] for one in found]) for name in found[0]}
    movements = [experiment.movements() for experiment in experiments]
    distances = np.stack([experiment.distances() for experiment in experiments])

    bodies = [name for name in correct if name.startswith(("kernel, ", "network, "))]
    caption = f"{title}\nkernel: NTK at t, trained on clean images; network: the one that it is taken from"
    chosen = {name: correct[name] for name in bodies}
    run.figure(after_plots.over_epochs(config.epochs, chosen, "epoch t of the network", caption), "accuracy_of_kernels")
    after = {name: correct[name] for name in correct if name.endswith("on top")}
    caption = f"{title}\nclean training, after adversarial training"
    run.figure(after_plots.over_epochs(config.epochs, after, "epoch of clean training", caption), "on_top")
    run.figure(after_plots.movements(movements[0], f"{title}, seed {config.seeds[0]}"), "kernel_movement")
    both = len(KINDS) * len(config.epochs)
    mapped = after_plots.distance_map(distances.mean(0)[:both, :both], KINDS, config.epochs, title)
    run.figure(mapped, "kernel_distances")
    run.figure(na.plots.accuracy_curves(experiments[0].curves(), title=title), "accuracy_against_eps")

    accuracy = {name: values.mean(axis=-1) for name, values in correct.items()}
    run.save_json(
        "results",
        {
            "environment": na.runs.environment(), "config": settings, "epochs": config.epochs, "accuracy": accuracy,
            "movement": [{name: moved.to_dict() for name, moved in one.items()} for one in movements],
            "distances": distances,
        },
    )  # fmt: skip
    console.print(table_of(config, accuracy))
    for line in (*moved_where(config, distances), *verdict(config, correct)):
        console.print(line)
    console.print(f"Figures (PNG, PDF) and numbers (JSON): {config.output.resolve()}")


def table_of(config: Config, accuracy: Mapping[str, np.ndarray]) -> Table:
    """Accuracies, (seeds, looks, 2) by name: mean over seeds, and the standard deviation in the end."""
    table = Table(title="accuracy by epoch, mean over seeds; ± standard deviation in the end")
    table.add_column("robust", no_wrap=True)
    for column in (*map(str, config.epochs), "±"):
        table.add_column(column)
    for j, part in ((1, "robust"), (0, "clean")):
        if part == "clean":
            table.add_section()
            table.add_row("clean", style="bold")
        for name, values in accuracy.items():
            spread = f"{values[:, -1, j].std(ddof=1):.3f}" if len(values) > 1 else ""
            table.add_row(name, *(f"{value:.3f}" for value in values[..., j].mean(axis=0)), spread)
    return table


def moved_where(config: Config, distances: np.ndarray) -> list[str]:
    """Say how far the kernels went, how soon, and whether to one place; distances are (seeds, looks, looks)."""
    epochs, looks = config.epochs, len(config.epochs)
    lines, halves = [], []
    for i, kind in enumerate(KINDS):
        ways = distances[:, 0, i * looks : (i + 1) * looks]
        halves.append(np.argmax(ways >= ways[:, -1:] / 2, axis=1))
        way = ways.mean(axis=0)
        half = epochs[int(np.argmax(way >= way[-1] / 2))]
        last = distances[:, (i + 1) * looks - 2, (i + 1) * looks - 1].mean()
        lines.append(
            f"{kind} training: NTK ends {way[-1]:.3f} (1 - cosine) from where it began, half of that by epoch {half}; "
            f"from epoch {epochs[-2]} to {epochs[-1]} it moves by {last:.3f}"
        )
    sooner = answer(np.sign(halves[0] - halves[1]).tolist())
    lines.append(f"The kernel of adversarial training is half-way sooner than that of standard training: {sooner}")
    between, again = distances[:, looks - 1, 2 * looks - 1], distances[:, looks - 1, -1]
    lines.append(
        f"In the end standard and adversarial kernels are {between.mean():.3f} apart; two standard trainings with "
        f"other batches {again.mean():.3f}. A different kernel: {answer((between > again).tolist())}"
    )
    return lines


def verdict(config: Config, correct: Mapping[str, np.ndarray]) -> list[str]:
    """Hold the claims of the paper against robust accuracies, on the same images, (seeds, looks, 2, n) by name."""
    pairs = {
        "After clean training the last kernel of adversarial training is more robust than that of standard training": (
            correct["kernel, adversarial"][:, -1, 1], correct["kernel, standard"][:, -1, 1],
        ),
        "... than the kernel of the random start": (
            correct["kernel, adversarial"][:, -1, 1], correct["kernel, adversarial"][:, 0, 1],
        ),
        "Clean training on top ends more robust with the kernel held fixed (lazy) than with all moving (full)": (
            correct["lazy on top"][:, -1, 1], correct["full on top"][:, -1, 1],
        ),
    }  # fmt: skip
    lines = []
    for claim, (first, second) in pairs.items():
        found = [na.mcnemar(one, other) for one, other in zip(first, second, strict=True)]
        lines.append(f"{claim}: {answer([1 if f.low > 0 else -1 if f.high < 0 else 0 for f in found])}")
        lines += [f"    seed {seed}: {one}" for seed, one in zip(config.seeds, found, strict=True)]
    kernel, network = (correct[f"{name}, adversarial"][:, -1, 1].mean() for name in ("kernel", "network"))
    standard, full, lazy = (
        correct[name][:, -1, 1].mean() for name in ("network, standard", "full on top", "lazy on top")
    )
    lines += [
        f"Seed {seed}: adversarial training collapsed (clean accuracy {clean:.2f}), so this seed says nothing; lower "
        f"the rate or eps."
        for seed, clean in zip(config.seeds, correct["network, adversarial"][:, -1, 0].mean(axis=-1), strict=True)
        if clean < 0.5
    ]
    lines.append(
        f"Robust accuracy in the end: adversarially trained network {network:.3f}; clean training of its kernel from "
        f"zero {kernel:.3f}, on top of it lazily {lazy:.3f}, fully {full:.3f}; standard network {standard:.3f}"
    )
    return lines


def answer(signs: Sequence[int | bool]) -> str:
    """Put the outcomes of the seeds, 1 for, -1 against, 0 open, into words."""
    count = len(signs)
    if all(sign > 0 for sign in signs):
        return f"yes ({count} of {count} seeds)"
    if all(sign < 0 for sign in signs):
        return f"no, the reverse ({count} of {count} seeds)"
    against = sum(sign < 0 for sign in signs)
    return f"not clear (yes in {sum(sign > 0 for sign in signs)}, the reverse in {against}, of {count} seeds)"


if __name__ == "__main__":
    launch(main, Config)
