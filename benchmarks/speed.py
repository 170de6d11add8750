"""Speed of ntkadv against the same computations written down straightforwardly, both in one run.

    python benchmarks/speed.py --quick
    python benchmarks/speed.py --root FOLDER_WITH_CIFAR10_NPZ

(a) the linear algebra of one step of Adv-NTK: a dense matrix exponential, a dense solve and automatic differentiation
    against the eigendecomposition and Krylov, of the real kernel of images;
(b) a whole fit of Adv-NTK against the same loop with that linear algebra and a plain attack;
(c) predictions of the closed form at many times against one.

Kernels themselves are measured by `kernels.py`. Every side runs in its own process, so that its peak of memory is given
beside its time. Where two sides do not agree, the script ends with an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sides
from measure import NotRun, command_line, growth_exponent, in_child
from rich.console import Console
from rich.table import Table

from ntkadv.scripts import launch, settings_of

RESULTS = Path(__file__).parent / "results"
SIDES: tuple[Literal["straightforward", "eigh", "krylov"], ...] = ("straightforward", "eigh", "krylov")
AIMS = {"eigh": 4, "krylov": 30}
"""Times faster than the straightforward form that a step should be at AIM_SIZE images."""
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "XLA_FLAGS")
"""What in the environment sets the number of threads, and so the times."""
AIM_SIZE = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how often."""

    dataset: str = "cifar10"
    """Images; where they are not to be had, the digits take their place."""
    root: Path | None = None
    """Folder of the images."""
    parts: tuple[Literal["step", "fit", "dynamics"], ...] = ("step", "fit", "dynamics")
    """Comparisons to make."""
    sizes: tuple[int, ...] = (500, 1000, 2000, 4000, 8000)
    """Training images of one step."""
    batch_size: int = 128
    """Validation images of a step."""
    fit_size: int = 1000
    """Training images of the fit."""
    fit_steps: int = 10
    """Steps of the fit, two at least."""
    dynamics_size: int = 2000
    """Training images of the closed form."""
    times: int = 1000
    """Times at which the closed form predicts."""
    test_images: int = 256
    """Images of the robust accuracy after a fit, and of the predictions."""
    eps: float = 8 / 255
    """Size of the attacks."""
    repeats: int = 5
    """Repetitions after one to warm up."""
    budget: float = 240.0
    """Seconds that one side of one comparison may take; what would take longer is not run."""
    tolerance: float = 1e-4
    """Relative difference of gradients, and of predictions, above which two sides do not agree."""
    seed: int = 0
    """Seed of everything random."""
    quick: bool = False
    """Try everything once, small: sizes are overridden, results go to a file of their own."""
    output: Path | None = None
    """File of the results; benchmarks/results/speed.json, or speed-quick.json."""

    def __post_init__(self) -> None:
        # Below, a Krylov space is hardly smaller than the problem, and may end before it is accurate.
        if min(*self.sizes, self.fit_size, self.dynamics_size, 100) < 100:
            raise ValueError(f"sizes, fit_size and dynamics_size must be 100 images at least, got {self}")
        if self.fit_steps < 2 or self.repeats < 1 or self.batch_size < 1 or self.times < 2:
            raise ValueError("fit_steps and times must be 2 at least, repeats and batch_size 1")


QUICK = {"sizes": (100, 200, 400), "batch_size": 32, "fit_size": 200, "fit_steps": 3, "dynamics_size": 200}
QUICK |= {"times": 50, "test_images": 64, "repeats": 2}


def main(settings: Settings) -> int:
    """Measure, print and save; the exit status."""
    if settings.quick:
        settings = dataclasses.replace(settings, **QUICK)
    output = settings.output or RESULTS / ("speed-quick.json" if settings.quick else "speed.json")
    with tempfile.TemporaryDirectory() as folder:
        problem, result = prepared(settings, Path(folder))
        comparisons = {"step": compare_steps, "fit": compare_fits, "dynamics": compare_dynamics}
        console = Console()
        console.print(f"{result['data']}, {result['environment']['device']}; kernels are measured by kernels.py")
        for part in settings.parts:
            result[part] = comparisons[part](settings, problem, console)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"Results: {output}")
    disagreeing = [part for part in settings.parts if not result[part]["agree"]]
    if disagreeing:
        print(f"The sides do not agree: {', '.join(disagreeing)}. Their times mean nothing.", file=sys.stderr)
    return 1 if disagreeing else 0


def prepared(settings: Settings, folder: Path) -> tuple[sides.Problem, dict[str, Any]]:
    """Compute the kernels, and begin the results."""
    largest = max(
        *(settings.sizes if "step" in settings.parts else ()),
        settings.fit_size if "fit" in settings.parts else 0,
        settings.dynamics_size if "dynamics" in settings.parts else 0,
        0,
    )
    problem = sides.Problem(
        dataset=settings.dataset,
        root=settings.root,
        n_train=largest,
        n_val=2 * settings.batch_size,
        n_test=settings.test_images,
        seed=settings.seed,
        eps=settings.eps,
        folder=folder,
    )
    made = in_child(sides.prepare, problem, settings.batch_size, limit=1800)
    if isinstance(made, NotRun):
        raise RuntimeError(f"the kernels of {largest} images could not be computed: {made.reason}; ask for fewer")
    kept = settings_of(settings)
    head = {"benchmark": "speed", "command": command_line(), "seed": settings.seed, "data": made["data"]}
    environment = {**made["environment"], "threads": {name: os.environ.get(name) for name in THREADS}}
    return made["problem"], {**head, "environment": environment, "settings": kept}


def compare_steps(settings: Settings, problem: sides.Problem, console: Console) -> dict[str, Any]:
    """Time loss and gradient of one step by three methods, over the sizes."""
    rows: list[dict[str, Any]] = []
    best: dict[str, tuple[int, float]] = {}
    agree = True
    for n in sorted(n for n in settings.sizes if n <= problem.n_train):
        row: dict[str, Any] = {"n": n}
        reference = None
        for side in SIDES:
            answer = _within(settings, best.get(side), n) or in_child(
                sides.step, problem, n, side, settings.repeats, settings.budget, limit=2 * settings.budget
            )
            if isinstance(answer, NotRun):
                row[side] = {"not_run": answer.reason}
                best.setdefault(side, (n, float("inf")))
                continue
            gradient = answer.pop("gradient")
            reference = gradient if reference is None else reference
            difference = float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))
            agree &= difference <= settings.tolerance
            best[side] = (n, answer["min_s"])
            row[side] = {**answer, "gradient_difference": difference}
        for side in SIDES[1:]:
            if "min_s" in row[side] and "min_s" in row["straightforward"]:
                row[side]["times_faster"] = row["straightforward"]["min_s"] / row[side]["min_s"]
        rows.append(row)
    growth = {}
    for side in SIDES:
        ran = [row for row in rows if "min_s" in row[side]]
        growth[side] = growth_exponent([row["n"] for row in ran], [row[side]["min_s"] for row in ran])
    console.print(_table_of_steps(rows, growth))
    return {"rows": rows, "growth_exponent": growth, "aims": {"n": AIM_SIZE, **AIMS}, "agree": agree}


def _within(settings: Settings, last: tuple[int, float] | None, n: int) -> NotRun | None:
    """Judge by the size before, as the cube of the size: a warm-up and one repetition must fit into the budget."""
    expected = 0.0 if last is None else 2 * last[1] * (n / last[0]) ** 3
    if expected <= settings.budget:
        return None
    return NotRun(f"would take longer than the {settings.budget:.0f} s of the budget")


def _table_of_steps(rows: list[dict[str, Any]], growth: dict[str, float | None]) -> Table:
    table = Table(
        title="(a) loss and gradient of one step of Adv-NTK, float64: least time (compilation), peak of memory"
    )
    table.add_column("n", justify="right")
    for side in SIDES:
        table.add_column(side, justify="right")
    for row in rows:
        table.add_row(str(row["n"]), *(_cell_of_step(row["n"], side, row[side]) for side in SIDES))
    table.add_row("growth", *("" if growth[side] is None else f"n^{growth[side]:.2f}" for side in SIDES))
    return table


def _cell_of_step(n: int, side: str, entry: dict[str, Any]) -> str:
    if "not_run" in entry:
        return f"not run: {entry['not_run']}"
    lines = [f"{_seconds(entry['min_s'])} ({_seconds(entry['compile_s'])}), {entry['peak_mib']:.0f} MiB"]
    if "times_faster" in entry:
        lines.append(f"{entry['times_faster']:.1f}x")
        if n == AIM_SIZE:
            lines[-1] += f" (aim {AIMS[side]}x: {'met' if entry['times_faster'] >= AIMS[side] else 'missed'})"
    if entry["gradient_difference"]:
        lines.append(f"gradient differs by {entry['gradient_difference']:.0e}")
    return "\n".join(lines)


def compare_fits(settings: Settings, problem: sides.Problem, console: Console) -> dict[str, Any]:
    """Time a whole fit, two ways; their networks must be about the same."""
    n = min(settings.fit_size, problem.n_train)
    found: dict[str, Any] = {}
    xi: dict[str, np.ndarray] = {}
    for side in ("straightforward", "ntkadv"):
        answer = in_child(
            sides.fit, problem, n, side, settings.fit_steps, settings.batch_size, limit=4 * settings.budget
        )
        if isinstance(answer, NotRun):
            found[side] = {"not_run": answer.reason}
        else:
            xi[side] = answer.pop("xi")
            found[side] = answer
    result: dict[str, Any] = {"n": n, "steps": settings.fit_steps, **found, "agree": True}
    table = Table("side", "whole fit", "a later step", "peak of memory", "robust accuracy", title=f"(b) a fit, n = {n}")
    for side, entry in found.items():
        table.add_row(side, *_cells_of_fit(entry))
    if len(xi) == 2:
        one, other = xi["straightforward"], xi["ntkadv"]
        result["xi_difference"] = float(np.linalg.norm(other - one) / np.linalg.norm(one))
        result["accuracy_difference"] = abs(
            found["ntkadv"]["robust_accuracy"] - found["straightforward"]["robust_accuracy"]
        )
        # The sign of a gradient near 0 turns on rounding, so the attacks of two correct fits part slowly.
        result["agree"] = result["xi_difference"] <= 0.05 and result["accuracy_difference"] <= 0.05
        result["times_faster"] = found["straightforward"]["fit_s"] / found["ntkadv"]["fit_s"]
        result["times_faster_later"] = found["straightforward"]["later_steps_s"] / found["ntkadv"]["later_steps_s"]
        table.add_row("", f"{result['times_faster']:.1f}x", f"{result['times_faster_later']:.1f}x", "", "")
        table.caption = f"xi differs by {result['xi_difference']:.0e}"
    console.print(table)
    return result


def _cells_of_fit(entry: dict[str, Any]) -> list[str]:
    if "not_run" in entry:
        return [f"not run: {entry['not_run']}", "", "", ""]
    times = (_seconds(entry["fit_s"]), _seconds(entry["later_steps_s"]))
    return [*times, f"{entry['peak_mib']:.0f} MiB", f"{entry['robust_accuracy']:.3f}"]


def compare_dynamics(settings: Settings, problem: sides.Problem, console: Console) -> dict[str, Any]:
    """Time predictions by the closed form at one time and at many, the last of which is that one."""
    n = min(settings.dynamics_size, problem.n_train)
    result: dict[str, Any] = {"n": n, "agree": True}
    last: dict[int, np.ndarray] = {}
    table = Table(
        "times", "first call", "again", "peak of memory", title=f"(c) predictions by the closed form, n = {n}"
    )
    for count in (1, settings.times):
        answer = in_child(sides.dynamics, problem, n, count, settings.repeats, limit=4 * settings.budget)
        if isinstance(answer, NotRun):
            result[f"{count}"] = {"not_run": answer.reason}
            table.add_row(str(count), f"not run: {answer.reason}", "", "")
            continue
        last[count] = answer.pop("last")
        result[f"{count}"] = answer
        times = (_seconds(answer["first_s"]), _seconds(answer["min_s"]))
        table.add_row(str(count), *times, f"{answer['peak_mib']:.0f} MiB")
    if len(last) == 2:
        one, many = (result[f"{count}"] for count in last)
        result["ratio_first"], result["ratio_again"] = (many[key] / one[key] for key in ("first_s", "min_s"))
        difference = np.linalg.norm(last[settings.times] - last[1]) / np.linalg.norm(last[1])
        result["difference"] = float(difference)
        result["agree"] = bool(difference <= settings.tolerance)
        table.add_row("cost", f"{result['ratio_first']:.2f}x", f"{result['ratio_again']:.2f}x", "")
    console.print(table)
    return result


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


if __name__ == "__main__":
    launch(main, Settings, __doc__)
