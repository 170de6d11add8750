"""AutoAttack here, against the package of its authors: the same model, images, members, order and budgets.

    python benchmarks/autoattack.py --root FOLDER_WITH_MNIST_AND_CIFAR10

Two models: a CNN trained adversarially on MNIST, and a kernel predictor on CIFAR-10 (stopped early, since the
interpolating one has next to no robustness to judge). The original sees them through `ntkadv.attacks.torch_module`, so
that both sides judge one function; its adversarial images are judged here anew. Needs PyTorch and `pyautoattack`.
The script ends with an error where robust accuracies differ by more than `--tolerance`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measure import command_line
from networks import train
from rich.console import Console
from rich.table import Table

import ntkadv as na
from ntkadv.scripts import launch, settings_of

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is attacked, and how long."""

    subjects: tuple[str, ...] = ("mnist-cnn", "cifar10-kernel")
    """Models, of mnist-cnn and cifar10-kernel."""
    norms: tuple[str, ...] = ("Linf", "L2")
    """Threat models."""
    root: Path | None = None
    """Folder of the images."""
    n_test: tuple[int, int] = (300, 200)
    """Images attacked: of MNIST, of CIFAR-10."""
    n_train: tuple[int, int] = (10_000, 1_000)
    """Images that the models are made from."""
    train_steps: int = 600
    """Steps of adversarial training of the CNN."""
    steps: int = 100
    """Steps of APGD and FAB."""
    queries: int = 5000
    """Queries of Square."""
    batch_size: int = 250
    """Images at a time."""
    tolerance: float = 0.01
    """Difference of robust accuracies that is taken for agreement."""
    seed: int = 0
    """Seed of data, training and attacks, on both sides."""
    output: Path = RESULTS / "autoattack.json"
    """File of the results."""


EPS = {"mnist-cnn": {"Linf": 0.1, "L2": 1.0}, "cifar10-kernel": {"Linf": 4 / 255, "L2": 0.25}}


def main(settings: Settings) -> int:
    """Attack, print and save; give 1 where the sides differ."""
    console = Console()
    rows = []
    for subject in settings.subjects:
        model, x, labels = SUBJECTS[subject](settings)
        for norm in settings.norms:
            threat = {"Linf": na.attacks.Linf, "L2": na.attacks.L2}[norm](EPS[subject][norm])
            ours = native(model, x, labels, threat, settings)
            theirs = original(model, x, labels, threat, settings)
            robust = [side.pop("robust") for side in (ours, theirs)]
            rows.append(
                {
                    "model": subject,
                    "threat": repr(threat),
                    "n": len(x),
                    "ntkadv": ours,
                    "original": theirs,
                    "only_ntkadv_breaks": int((~robust[0] & robust[1]).sum()),
                    "only_original_breaks": int((robust[0] & ~robust[1]).sum()),
                    "times_faster": theirs["seconds"] / ours["seconds"],
                }
            )
            console.print(table_of(rows[-1:]))
    result = {
        "command": command_line(),
        "environment": na.runs.environment() | versions(),
        "settings": settings_of(settings),
        "comparisons": rows,
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table_of(rows), f"saved to {settings.output}")
    apart = [r for r in rows if abs(last(r["ntkadv"]) - last(r["original"])) > settings.tolerance + 1e-9]
    return 1 if apart else 0


def mnist_cnn(settings: Settings) -> tuple[Any, np.ndarray, np.ndarray]:
    """Train a CNN by PGD."""
    data = na.load_dataset(
        "mnist", root=settings.root, n_train=settings.n_train[0], n_val=0, n_test=settings.n_test[0], seed=settings.seed
    )
    arch = na.architectures.cnn(depth=3, num_classes=10, width=32, stride=2)
    attack = na.attacks.PGD(na.attacks.Linf(0.1), steps=5, loss="cross_entropy", keep_best=False)
    model = train(arch, data, key=jax.random.key(settings.seed), attack=attack, steps=settings.train_steps)
    return model, data.x_test, data.y_test


def cifar10_kernel(settings: Settings) -> tuple[Any, np.ndarray, np.ndarray]:
    """Stop the MLP-5's NTK dynamics where robust accuracy is about largest."""
    data = na.load_dataset(
        "cifar10",
        root=settings.root,
        n_train=settings.n_train[1],
        n_val=0,
        n_test=settings.n_test[1],
        seed=settings.seed,
    )
    arch = na.architectures.mlp(depth=5, num_classes=10).normalized(data.x_train)
    dynamics = na.TrainingDynamics(arch, data.x_train, data.targets_train, gram=na.gram(arch, data.x_train))
    return dynamics.predictor(time=0.07), data.x_test, data.y_test


SUBJECTS: dict[str, Callable[[Settings], tuple[Any, np.ndarray, np.ndarray]]] = {
    "mnist-cnn": mnist_cnn,
    "cifar10-kernel": cifar10_kernel,
}


def native(model: Any, x: np.ndarray, labels: np.ndarray, threat: Any, settings: Settings) -> dict[str, Any]:
    """Run the ensemble of this package."""
    attack = na.attacks.AutoAttack(threat, steps=settings.steps, queries=settings.queries)
    start = time.perf_counter()
    done = attack.run(
        model, x, labels, key=jax.random.key(settings.seed), batch_size=settings.batch_size, progress=True
    )
    seconds = time.perf_counter() - start
    accuracy = {line["attack"].split("-")[0] + ("-T" if "-T" in line["attack"] else ""): line["robust_accuracy"]
                for line in done.log}  # fmt: skip
    clean = float(np.mean(done.fell_to != "clean"))
    names = {"APGD": "apgd-ce", "APGD-T": "apgd-t", "FAB-T": "fab-t", "Square": "square"}
    return {
        "accuracy": {"clean": clean} | {names[name]: value for name, value in accuracy.items()},
        "seconds": seconds,
        "cost": done.cost._asdict(),
        "robust": judge(model, np.asarray(done.points), x, labels, threat),
    }


def original(model: Any, x: np.ndarray, labels: np.ndarray, threat: Any, settings: Settings) -> dict[str, Any]:
    """Run the ensemble of its authors."""
    import pyautoattack  # pyright: ignore[reportMissingImports] - optional
    import torch  # pyright: ignore[reportMissingImports] - optional

    module = na.attacks.torch_module(model, batch_size=settings.batch_size)
    ensemble = pyautoattack.AutoAttack(
        module, norm=threat.norm, eps=threat.eps, version="standard", device="cpu", seed=settings.seed
    )
    for part in (ensemble.apgd, ensemble.apgd_targeted):
        part.n_iter = settings.steps
        part.n_iter_2, part.n_iter_min, part.size_decr = (
            max(int(share * settings.steps), 1) for share in (0.22, 0.06, 0.03)
        )
    ensemble.fab.n_iter, ensemble.square.n_queries = settings.steps, settings.queries
    heard = Heard()
    ensemble.logger.setLevel(logging.DEBUG)
    ensemble.logger.addHandler(heard)
    images = torch.tensor(np.ascontiguousarray(np.transpose(x, (0, 3, 1, 2))))
    start = time.perf_counter()
    points, _ = ensemble.run_standard_evaluation(
        images, torch.tensor(labels.astype(np.int64)), batch_size=settings.batch_size
    )
    seconds = time.perf_counter() - start
    ensemble.logger.removeHandler(heard)
    robust = judge(model, np.transpose(points.numpy(), (0, 2, 3, 1)), x, labels, threat)
    return {"accuracy": heard.accuracy, "seconds": seconds, "robust": robust}


class Heard(logging.Handler):
    """Picks the accuracies out of the original's log."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Look for a line with an accuracy."""
        said = record.getMessage()
        if found := re.match(r"initial accuracy: ([\d.]+)%", said):
            self.accuracy["clean"] = float(found[1]) / 100
        if found := re.match(r"robust accuracy after (\S+): ([\d.]+)%", said):
            self.accuracy[found[1].lower()] = float(found[2]) / 100


def judge(model: Any, points: np.ndarray, x: np.ndarray, labels: np.ndarray, threat: Any) -> np.ndarray:
    """Whether each sample is still classified correctly; points outside the ball or the box are an error."""
    distance = np.asarray(threat.distance(jax.numpy.asarray(points), jax.numpy.asarray(x)))
    if distance.max() > threat.eps + 1e-5 or points.min() < 0 or points.max() > 1:
        raise ArithmeticError(f"points leave the ball: {distance.max()} > {threat.eps}")
    return np.asarray(model(points)).argmax(axis=1) == labels


def versions() -> dict[str, str]:
    """Versions of the other side."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "pyautoattack")}


def last(side: dict[str, Any]) -> float:
    """Robust accuracy after all members."""
    return list(side["accuracy"].values())[-1]


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Show robust accuracy after each member, and the time of all."""
    members = ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    table = Table("model", "threat", "side", *members, "seconds", "it alone breaks")
    for row in rows:
        for side, alone in (("ntkadv", "only_ntkadv_breaks"), ("original", "only_original_breaks")):
            accuracy = row[side]["accuracy"]
            cells = [f"{accuracy[member]:.3f}" if member in accuracy else "" for member in members]
            table.add_row(row["model"], row["threat"], side, *cells, f"{row[side]['seconds']:.0f}", str(row[alone]))
    return table


if __name__ == "__main__":
    launch(main, Settings, __doc__)
