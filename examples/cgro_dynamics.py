"""Clean generalization and robust overfitting, watched as it happens: a two-layer CNN trained on patch data.

1. Three phases: the signal is learnt, it stalls, the noise of every training sample is memorised. Figure and times.
2. The result over seeds, in two settings: the theory's, where the attack moves the signal patch along w* (and test
   samples fall to chance); and a real PGD on all patches, of larger noise, where they fall below it.
3. When the phases end, against N, d, alpha, sigma, delta, lambda and width.
4. Phase diagrams over (signal strength, radius) and over (N, d).
5. The same data under the NTK: the kernel fitted to clean samples, to clean and attacked ones, and Adv-NTK.

    python examples/cgro_dynamics.py
    python examples/cgro_dynamics.py --counts --output runs/cgro_counts                # the diagram over N and d, too
    python examples/cgro_dynamics.py --activation cubic --output runs/cgro_cubic

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import ntkadv as na
from ntkadv import cgro
from ntkadv.cgro import figures
from ntkadv.scripts import launch, settings_of

ACCURACIES = ("train_clean", "train_robust", "test_clean", "test_robust")


@dataclasses.dataclass(frozen=True)
class Config:
    """Clean generalization and robust overfitting on patch data."""

    d: int = 1000
    """Numbers in a patch; alpha = d^0.249, sigma = d^-0.509, delta = alpha (1 - 1 / (sqrt(d) log d))."""
    n_train: int = 20
    """Training samples N."""
    n_test: int = 1000
    """Test samples."""
    patches: int = 2
    """Patches P of an input; one of them carries the signal."""
    width: int = 40
    """Filters of the network."""
    activation: Literal["relu", "cubic"] = "relu"
    """ReLU^3 with fixed signs and symmetric filters, or the cube."""
    init_std: float = 0.02
    """Standard deviation of the filters' entries at the start."""
    learning_rate: float = 0.02
    """Step of gradient descent."""
    steps: int = 120_000
    """Steps of gradient descent."""
    clean_weight: float = 0.5
    """lambda, the weight of the clean loss."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of data and filters."""
    pgd_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs with PGD on all patches."""
    pgd_noise: float = 3.2
    """Norm of a noise patch in units of the signal, where the attack is PGD: it must not erase the noise as well."""
    pgd_delta: float = 0.95
    """Radius of PGD in units of the signal, in the l_2 norm of the whole input."""
    pgd_width: int = 28
    """Filters of the network trained against PGD: with fewer some samples are not memorised, with more the noise is
    learnt before the signal."""
    pgd_steps: int = 2000
    """Steps of gradient descent against PGD."""
    sweeps: bool = True
    """Make the table of transition times and the diagram over signal and radius."""
    counts: bool = False
    """Make the diagram over N and d, too; it takes another minute."""
    grid: int = 8
    """Points on each axis of the diagram over signal and radius; half as many over N and d."""
    diagram_steps: int = 8000
    """Steps of gradient descent in sweeps and diagrams, at a learning rate of 0.1."""
    kernel: bool = True
    """Fit the NTK to the same data."""
    depth: int = 2
    """Hidden layers of the kernel's network."""
    kernel_seeds: tuple[int, ...] = (0, 1)
    """Seeds of the data that the kernel is fitted to."""
    fit_steps: int = 20
    """Steps of Adv-NTK."""
    fit_initial: float = 10.0
    """Where Adv-NTK starts, in units of 1 / kernel: from 0 it does not find a robust network in so few steps."""
    output: Path = Path("runs/cgro_dynamics")
    """Where results go."""
    overwrite: bool = False
    """Throw away results that are there."""


def main(config: Config) -> None:
    """Train, sweep, compare; figures out."""
    console = Console()
    scales = cgro.PatchScales()
    theory = cgro.PatchDistribution.scaled(config.d, scales, num_patches=config.patches)
    settings = settings_of(config)
    run = na.runs.Run(config.output, settings, overwrite=config.overwrite)
    title = f"{config.activation}, d = {config.d}, N = {config.n_train}, m = {config.width}"
    single = f"{title}, $\\alpha$ = {theory.alpha:.2f}, |noise| = {theory.noise_norm:.2f}, "
    single += f"$\\delta/\\alpha$ = {scales.delta(config.d) / theory.alpha:.4f}"

    console.print("three phases, and the result over seeds")
    results = {
        "CNN, attack\nalong the signal": over_seeds(config, theory, scales.delta(config.d), single, run, console)
    }
    results["CNN, PGD on\nall patches"] = against_pgd(config, run)
    if config.kernel:
        console.print("the same data under the NTK")
        results |= under_the_ntk(config, theory, scales.delta(config.d), run)
    run.save_json("accuracies", results)
    run.figure(figures.cgro_bars(results, title=single), "accuracies")
    console.print(table_of(results))
    if config.sweeps:
        console.print("transition times, and diagrams")
        console.print(transition_table(config, run))
        diagrams(config, theory, run)
    console.print(f"Figures (PNG, PDF) and numbers (JSON): {config.output.resolve()}")


def over_seeds(
    config: Config, distribution: cgro.PatchDistribution, delta: float, title: str, run: na.runs.Run, console: Console
) -> dict[str, list[float]]:
    """Train with the attack along the signal from every seed; the first gives the figure."""
    found: dict[str, list[float]] = {name: [] for name in ACCURACIES}
    for seed in tqdm(config.seeds, desc="attack along the signal", leave=False):
        trajectory = trained(config, distribution, cgro.SignalLine(delta), seed=seed)
        times = cgro.phase_times(trajectory)
        console.print(f"  seed {seed}: {described(times)}")
        for name, value in trajectory.accuracies().items():
            found[name].append(value)
        if seed == config.seeds[0]:
            run.figure(figures.three_phases(trajectory, times, title=title), "three_phases")
            run.save("three_phases", steps=trajectory.steps, u=trajectory.u, U=trajectory.U, V=trajectory.V,
                     signal_share=trajectory.signal_share, loss=trajectory.loss)  # fmt: skip
    return found


def against_pgd(config: Config, run: na.runs.Run) -> dict[str, list[float]]:
    """Train with PGD on all patches, and judge by a stronger one; noise patches are longer than the signal."""
    sigma = config.pgd_noise / np.sqrt(config.d - 1)
    distribution = cgro.PatchDistribution(config.d, alpha=1.0, sigma=sigma, num_patches=config.patches)
    judge = cgro.PatchPGD(config.pgd_delta, steps=50, step_size=config.pgd_delta / 10)

    def compute(seed: int) -> dict[str, np.ndarray]:
        attack = cgro.PatchPGD(config.pgd_delta, steps=5)
        changes = {
            "steps": config.pgd_steps,
            "learning_rate": 0.1,
            "width": config.pgd_width,
            "n_test": min(config.n_test, 300),
        }
        small = dataclasses.replace(config, **changes)
        trajectory = trained(small, distribution, attack, seed=seed, records=5)
        data, test, _ = drawn(small, distribution, seed)
        network, filters = trajectory.network, jnp.asarray(trajectory.filters)
        values = {}
        for part, samples in (("train", data), ("test", test)):
            attacked = judge.perturb(network, filters, samples)
            for kind, x in (("clean", samples.x), ("robust", attacked)):
                values[f"{part}_{kind}"] = np.mean(np.asarray(network.margins(filters, x, samples.y)) > 0)
        return values

    found: dict[str, list[float]] = {name: [] for name in ACCURACIES}
    for seed in tqdm(config.pgd_seeds, desc="PGD on all patches", leave=False):
        values = run.cached(f"pgd-{seed}", lambda seed=seed: compute(seed))
        for name in ACCURACIES:
            found[name].append(float(values[name]))
    return found


def under_the_ntk(
    config: Config, distribution: cgro.PatchDistribution, delta: float, run: na.runs.Run
) -> dict[str, dict[str, list[float]]]:
    """Accuracies of kernel predictors over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in tqdm(config.kernel_seeds, desc="NTK", leave=False):
        fit_kernels(config, distribution, delta, seed, run, found)
    return found


def fit_kernels(
    config: Config, distribution: cgro.PatchDistribution, delta: float, seed: int, run: na.runs.Run,
    found: dict[str, dict[str, list[float]]],
) -> None:  # fmt: skip
    """Fit kernel predictors to the data of a seed, as images, attack them along the signal, and note what is right.

    One affine map takes the data to [0, 1], with room for the attack, and the architecture takes off what it adds: the
    kernel sees the data up to scale.
    """
    data, test, _ = drawn(dataclasses.replace(config, n_test=min(config.n_test, 300)), distribution, seed)
    validation = distribution.sample(200, key=jax.random.key(1000))
    images = cgro.to_images(data, test, validation, room=delta)
    x_train, x_test, x_val = images.images
    labels = [np.asarray(part.labels) for part in (data, test, validation)]
    dataset = na.Dataset.from_arrays(
        name="patches", x_train=x_train, y_train=labels[0], x_test=x_test, y_test=labels[1], x_val=x_val,
        y_val=labels[2],
    )  # fmt: skip
    direction = np.zeros((distribution.num_patches, distribution.d))
    direction[0] = np.asarray(data.w_star)
    line = cgro.LineAttack(na.attacks.L2(delta * images.scale), direction=tuple(direction.ravel().tolist()), points=17)
    arch = na.architectures.mlp(depth=config.depth, num_classes=2).normalized(x_train)
    attacked = 0.5 + images.scale * np.asarray(cgro.linear_attack(data, delta))[..., None]
    both = np.concatenate([x_train, attacked.astype(np.float32)])

    def fit(x: np.ndarray) -> na.KernelPredictor:
        y = np.tile(dataset.targets_train, (len(x) // len(x_train), 1))
        return na.TrainingDynamics(arch, x, y, progress=False).predictor(np.inf)

    def adversarially(key: Array) -> Any:
        return na.fit_adv_ntk(
            arch, dataset, attack=line, key=key, steps=config.fit_steps, learning_rate=np.sqrt(len(x_train)),
            held_out=0.25, initial=config.fit_initial, checkpoint=run.checkpoint(f"adv_ntk-{seed}"), progress=False,
        ).predictor  # fmt: skip

    models = {
        "NTK,\nclean": fit(x_train),
        "NTK, clean\nand attacked": fit(both),
        "Adv-NTK": adversarially(jax.random.key(seed)),
    }
    everything, answers = np.concatenate([x_train, x_test]), np.concatenate(labels[:2])
    for name, model in models.items():
        points = line(model, everything, answers, key=jax.random.key(0), batch_size=256)
        right = {
            kind: np.argmax(np.asarray(model(x)), axis=1) == answers
            for kind, x in (("clean", everything), ("robust", points))
        }
        for part, where in (("train", slice(len(x_train))), ("test", slice(len(x_train), None))):
            for kind in ("clean", "robust"):
                found.setdefault(name, {}).setdefault(f"{part}_{kind}", []).append(float(np.mean(right[kind][where])))


def transition_table(config: Config, run: na.runs.Run) -> Table:
    """Transition times of single runs, each of seven settings varied alone."""
    base = dataclasses.replace(config, steps=2 * config.diagram_steps, learning_rate=0.1, n_test=400)
    scales = cgro.PatchScales()
    theory = cgro.PatchDistribution.scaled(config.d, scales, num_patches=config.patches)
    alpha, delta = theory.alpha, scales.delta(config.d)
    cases: list[tuple[str, str, dict[str, Any], cgro.PatchDistribution, float]] = []
    cases.append(("as above", "", {}, theory, delta))
    for n in (10, 40):
        cases.append(("N", str(n), {"n_train": n}, theory, delta))
    for d in (config.d // 4, 2 * config.d):
        here = cgro.PatchDistribution.scaled(d, scales, num_patches=config.patches)
        cases.append(("d", str(d), {"d": d}, here, scales.delta(d)))
    for factor in (0.25, 0.5):
        here = dataclasses.replace(theory, alpha=factor * alpha)
        cases.append(("alpha", f"{factor * alpha:.2f}", {}, here, factor * delta))
    for factor in (0.5, 2.0):
        here = dataclasses.replace(theory, sigma=factor * theory.sigma)
        cases.append(("sigma", f"{here.sigma:.3f}", {}, here, delta))
    for ratio in (0.5, 0.9):
        cases.append(("delta / alpha", f"{ratio}", {}, theory, ratio * alpha))
    for weight in (0.01, 0.9):
        cases.append(("lambda", f"{weight}", {"clean_weight": weight}, theory, delta))
    for width in (10, 80):
        cases.append(("width", str(width), {"width": width}, theory, delta))

    table = Table(title="Steps at which the phases end (learning rate 0.1)")
    for head in ("varied", "value", "I: signal learnt", "II: noise leads", "III: memorised", "train / test robust"):
        table.add_column(head)
    lines = []
    for name, value, changes, distribution, radius in tqdm(cases, desc="transition times", leave=False):
        trajectory = trained(
            dataclasses.replace(base, **changes), distribution, cgro.SignalLine(radius), seed=config.seeds[0]
        )
        times, accuracies = cgro.phase_times(trajectory), trajectory.accuracies()
        lines.append({"varied": name, "value": value, **dataclasses.asdict(times), **accuracies})
        ends = ["—" if end is None else str(end) for end in (times.signal_learnt, times.noise_leads, times.memorised)]
        robust = f"{accuracies['train_robust']:.2f} / {accuracies['test_robust']:.2f}"
        phases = zip(("I", "II", "III"), ends, strict=True)
        marks = [f"{end} (absent)" if part in times.absent else end for part, end in phases]
        table.add_row(name, value, *marks, robust)
    run.save_json("transitions", lines)
    return table


def diagrams(config: Config, distribution: cgro.PatchDistribution, run: na.runs.Run) -> None:
    """Where CGRO holds, over signal strength and radius, and over N and d."""
    network = network_of(config)
    ratios = np.concatenate([[0.0], 1 - np.geomspace(0.5, 0.005, config.grid - 1)])
    signals = np.geomspace(0.25, 8, config.grid)
    settings: dict[str, Any] = {"steps": config.diagram_steps, "learning_rate": 0.1, "init_std": config.init_std}
    settings |= {"key": jax.random.key(0), "clean_weight": config.clean_weight, "n_test": 300}

    def over_signals() -> dict[str, np.ndarray]:
        grid = cgro.phase_diagram(
            network, distribution, signals=signals, ratios=ratios, n=config.n_train, seeds=2, **settings
        )
        return grid.accuracies

    accuracies = run.cached("diagram", over_signals)
    grid = cgro.PhaseDiagram(signals, ratios, accuracies, distribution.noise_norm, 2)
    run.figure(
        figures.phase_diagram(grid, title=f"{config.activation}, d = {config.d}, N = {config.n_train}"), "diagram"
    )
    if not config.counts:
        return
    counts = [5 * 2**i for i in range(config.grid // 2)]
    dimensions = [30 * 5**i for i in range(config.grid // 2)] if config.grid < 8 else [10, 50, 250, 1250]

    def over_counts() -> dict[str, np.ndarray]:
        found = {name: np.zeros((len(counts), len(dimensions))) for name in ACCURACIES}
        scales = cgro.PatchScales()
        for i, n in enumerate(tqdm(counts, desc="N and d", leave=False)):
            for j, d in enumerate(dimensions):
                here = cgro.PatchDistribution.scaled(d, scales, num_patches=config.patches)
                ratio = scales.delta(d) / here.alpha
                one = cgro.phase_diagram(
                    network, here, signals=[here.alpha], ratios=[ratio], n=n, seeds=2, progress=False, **settings
                )
                for name, values in one.accuracies.items():
                    found[name][i, j] = values[0, 0]
        return found

    accuracies = run.cached("counts", over_counts)
    holds = cgro.is_cgro(accuracies)
    run.figure(
        figures.count_diagram(counts, dimensions, accuracies, holds, title=f"{config.activation}, scales of theory"),
        "counts",
    )


def network_of(config: Config) -> cgro.PatchNetwork:
    """Build the network of a configuration."""
    return cgro.PatchNetwork(width=config.width, activation=config.activation)


def drawn(
    config: Config, distribution: cgro.PatchDistribution, seed: int
) -> tuple[cgro.PatchData, cgro.PatchData, Array]:
    """Training data, test data and filters of a seed."""
    keys = jax.random.split(jax.random.key(seed), 3)
    filters = network_of(config).init(keys[2], distribution.d, std=config.init_std)
    return distribution.sample(config.n_train, key=keys[0]), distribution.sample(config.n_test, key=keys[1]), filters


def trained(
    config: Config, distribution: cgro.PatchDistribution, attack: cgro.Adversary, *, seed: int, records: int = 200
) -> cgro.Trajectory:
    """Train from a seed."""
    data, test, filters = drawn(config, distribution, seed)
    return cgro.train(
        network_of(config), data, test=test, filters=filters, attack=attack, steps=config.steps,
        learning_rate=config.learning_rate, clean_weight=config.clean_weight, records=records,
    )  # fmt: skip


def described(times: cgro.PhaseTimes) -> str:
    """Say when the phases end."""
    ends = (("I", times.signal_learnt), ("II", times.noise_leads), ("III", times.memorised))
    said = [f"{name} ends at {end}" for name, end in ends if name not in times.absent]
    return "; ".join([*said, *(f"{name} is absent: {why}" for name, why in times.absent.items())])


def table_of(results: dict[str, dict[str, list[float]]]) -> Table:
    """Mean and range over seeds."""
    table = Table(title="Accuracies, mean over seeds [smallest, largest]")
    table.add_column("model")
    for name in ACCURACIES:
        table.add_column(name.replace("_", ", "))
    for model, values in results.items():
        cells = [f"{np.mean(values[n]):.3f} [{np.min(values[n]):.3f}, {np.max(values[n]):.3f}]" for n in ACCURACIES]
        table.add_row(model.replace("\n", " "), *cells)
    return table


if __name__ == "__main__":
    launch(main, Config)
