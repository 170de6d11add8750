"""Adv-NTK at the size of the publication: how long it takes on this device, and what comes out.

    python benchmarks/published_scale.py --root FOLDER_WITH_CIFAR10_NPZ
    python benchmarks/published_scale.py --architectures mlp --time-limit 540

CIFAR-10 with 10,000 training and 2,000 validation images, MLP-5 and CNN-5, eps 4/255 and 8/255, 50 steps with PGD-10
(Fu & Wang, ICLR 2024, arXiv 2310.06112, Section 6). Beside Adv-NTK stand the NTK trained for ever, early stopping and
ridge regression, chosen on validation images. Every stage is saved as it ends: the same command goes on with a run that
was stopped. Results go to benchmarks/results/published_scale-<device>.json, after each stage.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from checks import check_precision, check_spectrum
from measure import Compilations, command_line
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv.scripts import launch, settings_of

MODELS = ("NTK, t = inf", "early stopping", "ridge", "Adv-NTK")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is computed."""

    dataset: str = "cifar10"
    """Images."""
    root: Path | None = None
    """Folder of the images."""
    n_train: int = 10_000
    """Training images: they make the kernel."""
    n_val: int = 2_000
    """Validation images: Adv-NTK learns from them."""
    n_test: int | None = None
    """Test images; all there are."""
    architectures: tuple[Literal["mlp", "cnn"], ...] = ("mlp", "cnn")
    """Each of them in turn."""
    depth: int = 5
    """Hidden layers, or convolutions."""
    eps: tuple[float, ...] = (4 / 255, 8 / 255)
    """Radii of the l_inf ball."""
    steps: int = 50
    """Steps of Adv-NTK."""
    learning_rate: float = 0.1
    """Length of its steps, the kernel not being normalised."""
    batch_size: int = 128
    """Validation images in a step."""
    fit_attack_steps: int = 10
    """Steps of the PGD of the fit and of the selection, each of eps / 5."""
    attack_steps: int = 20
    """Steps of the PGD that judges."""
    candidates: int = 16
    """Stopping times, and ridges, to choose from."""
    selection_images: int = 500
    """Validation images on which they are chosen, at most."""
    evaluation_batch: int = 500
    """Images attacked at a time where it does not matter."""
    seed: int = 0
    """Seed of the split, the batches and the attacks."""
    time_limit: float = float("inf")
    """Seconds after which no stage, and no step of a fit, is begun."""
    output: Path = Path(__file__).parent / "results"
    """Folder of the results."""
    run: Path = Path("runs/published_scale")
    """Folder of the stages, one below it for each device."""

    def __post_init__(self) -> None:
        if not self.architectures or not self.eps:
            raise ValueError("architectures and eps must name one at least")
        if self.candidates < 2 or self.selection_images < 1:
            raise ValueError("candidates must be 2 at least, selection_images 1")


class OutOfTimeError(Exception):
    """The time limit was reached."""


@dataclasses.dataclass
class Stages:
    """Stages of a run: each made once, timed until the device is done, and kept."""

    run: na.runs.Run
    deadline: float
    console: Console
    compilations: Compilations
    save: Callable[[], None]

    def check(self) -> None:
        """Raise `OutOfTimeError` after the deadline."""
        if time.monotonic() > self.deadline:
            raise OutOfTimeError

    def __call__(
        self, record: dict[str, Any], name: str, make: Callable[[], Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """Make the arrays of a stage, or load them; times go into `record`."""

        def measured() -> dict[str, Any]:
            self.check()
            self.console.print(name)
            before, start = self.compilations.snapshot(), time.perf_counter()
            arrays = jax.block_until_ready(dict(make()))
            seconds = time.perf_counter() - start
            count, compiling = self.compilations.since(before)
            return {**arrays, "seconds": seconds, "compilations": count, "compile_s": compiling}

        arrays = self.run.cached(name, measured)
        record |= {key: arrays.pop(key).item() for key in ("seconds", "compilations", "compile_s")}
        self.save()
        return arrays


def main(settings: Settings) -> int:
    """Run all stages that there is time for; the exit status."""
    start = time.monotonic()
    console, environment = Console(), na.runs.environment()
    device = re.sub(r"\W+", "-", environment["device"].lower()).strip("-")
    path = settings.output / f"published_scale-{device}.json"
    plain = settings_of(settings, "time_limit", "run")
    sizes = {"n_train": settings.n_train, "n_val": settings.n_val, "n_test": settings.n_test}
    data = na.load_dataset(settings.dataset, **sizes, seed=settings.seed, root=settings.root)
    result: dict[str, Any] = {"benchmark": "published_scale", "command": command_line(), "seed": settings.seed}
    result |= {"data": repr(data), "environment": environment, "settings": plain, "complete": False}
    result["architectures"] = {name: {} for name in settings.architectures}

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")

    # The same run serves other lists of architectures and radii: stages are named by them.
    config = {key: value for key, value in plain.items() if key not in ("architectures", "eps")}
    run = na.runs.Run(settings.run / device, {**config, "device": environment["device"]})
    with Compilations() as compilations:
        stages = Stages(run, start + settings.time_limit, console, compilations, save)
        try:
            for name in settings.architectures:
                one_architecture(settings, name, data, stages, result["architectures"][name])
        except OutOfTimeError:
            console.print(f"The {settings.time_limit:.0f} s are over; the same command goes on from here.")
        else:
            result["complete"] = True
    save()
    console.print(*tables(result), sep="\n")
    console.print(f"Results: {path}")
    return 0 if result["complete"] else 1


def one_architecture(
    settings: Settings, name: Literal["mlp", "cnn"], data: na.Dataset, stages: Stages, record: dict[str, Any]
) -> None:
    """Kernel and closed form of an architecture, then each radius."""
    build = {"mlp": na.architectures.mlp, "cnn": na.architectures.cnn}[name]
    arch = build(depth=settings.depth, num_classes=data.num_classes, w_std=1.76, b_std=0.18)
    for part in ("precision", "kernel", "spectrum", "eps"):
        record[part] = {}
    found = stages(record["precision"], f"precision-{name}", lambda: check_precision(arch, data.x_train))
    record["precision"] |= {key: value.item() for key, value in found.items()}
    gram = stages(record["kernel"], f"kernel-{name}", lambda: {"gram": na.gram(arch, data.x_train)})["gram"]
    forms = stages(record["spectrum"], f"spectrum-{name}", lambda: closed_forms(settings, arch, data, gram))
    checks = ("residual", "orthogonality", "largest", "smallest")
    record["spectrum"] |= {key: forms[key].item() for key in checks} | {"warnings": forms["warnings"].tolist()}
    for eps in settings.eps:
        label = f"{255 * eps:g}/255"
        record["eps"][label] = {}
        one_radius(settings, name, arch, data, gram, forms, eps, stages, record["eps"][label])


def closed_forms(settings: Settings, arch: Any, data: na.Dataset, gram: np.ndarray) -> dict[str, Any]:
    """Decompose the kernel, test that, and give the coefficients of all candidates."""
    dynamics = na.TrainingDynamics(arch, data.x_train, data.targets_train, gram=gram)
    checks = check_spectrum(gram, dynamics)
    smallest, largest = max(checks["smallest"], 1e-6 * checks["largest"]), checks["largest"]
    times = np.append(np.geomspace(0.3 / largest, 10 / smallest, settings.candidates - 1), np.inf)
    ridges = np.geomspace(smallest / 10, largest, settings.candidates)
    ridge = dynamics.ridge()
    return {
        **checks,
        "times": times,
        "ridges": ridges,
        "time_coefficients": np.stack([dynamics.coefficients(time) for time in times]).astype(np.float32),
        "ridge_coefficients": np.stack([ridge.coefficients(value) for value in ridges]).astype(np.float32),
    }


def one_radius(
    settings: Settings,
    name: str,
    arch: Any,
    data: na.Dataset,
    gram: np.ndarray,
    forms: dict[str, np.ndarray],
    eps: float,
    stages: Stages,
    record: dict[str, Any],
) -> None:
    """Choose, fit and evaluate at one radius."""
    threat, tag = na.attacks.Linf(eps), f"{name}-{255 * eps:g}"
    attack = na.attacks.PGD(threat, steps=settings.fit_attack_steps, step_size=eps / 5)
    selection_key, fit_key, judge_key = jax.random.split(jax.random.key(settings.seed), 3)
    x, y = (part[: settings.selection_images] for part in (data.x_val, data.y_val))
    coefficients = {MODELS[0]: forms["time_coefficients"][-1]}
    record["selection"], record["fit"], record["models"] = {}, {}, {}
    batch = {"batch_size": min(settings.evaluation_batch, len(x)), "key": selection_key}
    for model, kind in ((MODELS[1], "time"), (MODELS[2], "ridge")):
        values, choices = forms[f"{kind}s"], forms[f"{kind}_coefficients"]
        table = {float(value): row for value, row in zip(values, choices, strict=True)}

        def predictor(value: float, table: dict[float, np.ndarray] = table) -> na.KernelPredictor:
            return na.KernelPredictor(arch, data.x_train, table[value])

        def select(predictor: Any = predictor, values: np.ndarray = values) -> dict[str, np.ndarray]:
            path = na.robustness_path(predictor, values, x, y, attack=attack, **batch)
            return {"values": path.values, "clean": path.clean, "robust": path.robust}

        record["selection"][kind] = {}
        found = stages(record["selection"][kind], f"{kind}-{tag}", select)
        best = na.RobustnessPath(**found, n=len(x)).best
        record["selection"][kind] |= {"chosen": best if np.isfinite(best) else str(best), "images": len(x)}
        coefficients[model] = table[best]

    fitted = stages(record["fit"], f"fit-{tag}", lambda: fit(settings, arch, data, gram, attack, fit_key, tag, stages))
    record["fit"] |= {"later_compilations": fitted["later_compilations"].item()}
    record["fit"] |= {"history": json.loads(str(fitted["history"])), "xi_norm": float(np.linalg.norm(fitted["xi"]))}
    coefficients[MODELS[3]] = fitted["coefficients"]

    judge = na.attacks.PGD(threat, steps=settings.attack_steps)
    for number, (model, rows) in enumerate(coefficients.items()):
        record["models"][model] = {}

        def evaluate(rows: np.ndarray = rows) -> dict[str, Any]:
            evaluation = na.evaluate(
                na.KernelPredictor(arch, data.x_train, rows),
                data,
                {"attacked": judge},
                key=judge_key,
                batch_size=settings.evaluation_batch,
            )
            return {**evaluation.correct, "attack_s": evaluation.seconds["attacked"]}

        found = stages(record["models"][model], f"evaluation-{tag}-{number}", evaluate)
        for column in ("clean", "attacked"):
            correct = found[column]
            interval = na.wilson_interval(int(correct.sum()), len(correct))
            record["models"][model][column] = {"accuracy": float(correct.mean()), "interval": interval}
        record["models"][model] |= {"images": len(found["clean"]), "attack_s": found["attack_s"].item()}
        stages.save()


def fit(
    settings: Settings,
    arch: Any,
    data: na.Dataset,
    gram: np.ndarray,
    attack: na.attacks.PGD,
    key: jax.Array,
    tag: str,
    stages: Stages,
) -> dict[str, Any]:
    """Fit Adv-NTK, and count what is compiled after the first step of this call."""
    snapshots = []

    def on_step(_: dict[str, Any]) -> None:
        snapshots.append(stages.compilations.snapshot())
        stages.check()

    found = na.fit_adv_ntk(
        arch,
        data,
        attack=attack,
        key=key,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        gram=gram,
        checkpoint=stages.run.checkpoint(f"fit-{tag}"),
        on_step=on_step,
    )
    later = snapshots[-1].programs - snapshots[0].programs if snapshots else 0
    history = json.dumps(found.history)
    return {
        "xi": found.xi,
        "coefficients": np.asarray(found.predictor.coefficients),
        "later_compilations": later,
        "history": np.array(history),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Accuracies and seconds of what is done so far."""
    accuracies = Table("network", "eps", "model", "clean", "PGD", "seconds", title="accuracy on test images")
    seconds = Table("network", "eps", "stage", "seconds", "of it compiling", "compilations", title="time")
    for name, record in result["architectures"].items():
        for stage in ("kernel", "spectrum"):
            _add_times(seconds, name, "", stage, record.get(stage, {}))
        for label, at_eps in record.get("eps", {}).items():
            for kind, entry in at_eps.get("selection", {}).items():
                _add_times(seconds, name, label, f"choice of {kind}", entry)
            _add_times(seconds, name, label, "fit", at_eps.get("fit", {}))
            for model, entry in at_eps.get("models", {}).items():
                if "attacked" in entry:
                    cells = (f"{entry[column]['accuracy']:.4f}" for column in ("clean", "attacked"))
                    accuracies.add_row(name, label, model, *cells, f"{entry['seconds']:.1f}")
    return [accuracies, seconds]


def _add_times(table: Table, name: str, label: str, stage: str, entry: dict[str, Any]) -> None:
    if "seconds" in entry:
        times = (f"{entry['seconds']:.1f}", f"{entry['compile_s']:.1f}", str(entry["compilations"]))
        table.add_row(name, label, stage, *times)


if __name__ == "__main__":
    launch(main, Settings, __doc__)
