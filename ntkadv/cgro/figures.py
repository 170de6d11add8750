"""Figures of the CGRO laboratory: each takes what was measured and returns a matplotlib `Figure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ntkadv.cgro.dynamics import Trajectory
from ntkadv.cgro.flatness import FlatnessCurves
from ntkadv.cgro.phases import PhaseTimes
from ntkadv.cgro.sweeps import PhaseDiagram
from ntkadv.plots.style import BLUE, GREEN, ORANGE, PURPLE, STYLES, VERMILION

__all__ = [
    "accuracies_against_width",
    "accuracies_over_epochs",
    "cgro_bars",
    "count_diagram",
    "flatness_against_gap",
    "flatness_over_epochs",
    "parameters",
    "phase_diagram",
    "robust_accuracy_by_radius",
    "three_phases",
]

NAMES = {
    "train_clean": ("train, clean", BLUE, "-"),
    "train_robust": ("train, robust", VERMILION, "--"),
    "test_clean": ("test, clean", GREEN, "-."),
    "test_robust": ("test, robust", PURPLE, ":"),
}
"""Label, colour and line of each accuracy."""


def three_phases(run: Trajectory, times: PhaseTimes, *, title: str = "") -> Figure:
    """Draw signal and noise parts of the margins, the shares of the gradient, and accuracies, with the transitions.

    Args:
        run: a training run, recorded at logarithmic steps.
        times: its phases.
        title: above it all.
    """
    figure = Figure(figsize=(7.2, 8.0), layout="constrained")
    margins, shares, accuracy = figure.subplots(3, 1, sharex=True)
    steps = np.maximum(run.steps, 1)
    power = run.network.power
    clean = run.alpha**power * run.U.min(axis=1)
    left = (run.alpha - run.delta) ** power * run.U.min(axis=1)
    noise = np.abs(run.V)
    margins.plot(steps, _visible(clean), "-", color=BLUE, label=r"signal, clean: $\alpha^q U$")
    margins.plot(steps, _visible(left), "-.", color=GREEN, label=r"signal, attacked: $(\alpha-\delta)^q U$")
    margins.plot(steps, np.median(run.V, axis=1), "--", color=VERMILION, label=r"noise: median $V_i$")
    margins.fill_between(
        steps, noise.min(axis=1), noise.max(axis=1), color=VERMILION, alpha=0.15, linewidth=0, label=r"range of $|V_i|$"
    )
    margins.set_yscale("log")
    _finish(margins, "part of the margin")
    shares.plot(steps, run.signal_share, "-", color=BLUE, label="signal")
    shares.plot(steps, 1 - run.signal_share, "--", color=VERMILION, label="noise")
    _finish(shares, "share of the squared\ngradient norm")
    values = [run.accuracies(i) for i in range(len(run.steps))]
    for name, (label, colour, line) in NAMES.items():
        accuracy.plot(steps, [value[name] for value in values], line, color=colour, label=label)
    accuracy.axhline(0.5, color="black", linewidth=0.8, alpha=0.5)
    accuracy.set_ylim(-0.02, 1.04)
    _finish(accuracy, "accuracy")
    accuracy.set_xlabel("step of gradient descent")
    accuracy.set_xscale("log")
    _mark(margins, shares, accuracy, times, float(steps[-1]))
    figure.suptitle(title, fontsize=11)
    return figure


def phase_diagram(diagram: PhaseDiagram, *, title: str = "") -> Figure:
    """Draw the four accuracies over signal strength and radius, and where they make CGRO (hatched)."""
    figure = Figure(figsize=(8.6, 7.0), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    holds = diagram.holds()
    for axes, (name, (label, _, _)) in zip(grid.ravel(), NAMES.items(), strict=True):
        axes.imshow(diagram.accuracies[name].T, origin="lower", cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_title(label, fontsize=10)
        _ticks(axes, diagram.signals, diagram.ratios)
        _hatch(axes, holds.T)
    for axes in grid[1]:
        axes.set_xlabel(r"signal strength $\alpha$ (noise patch: norm " + f"{diagram.noise_norm:.2g})")
    for axes in grid[:, 0]:
        axes.set_ylabel(r"radius of the attack, $\delta/\alpha$")
    label = f"accuracy, mean of {diagram.seeds} runs"
    figure.colorbar(grid[0, 0].images[0], ax=grid, label=label, shrink=0.8)
    figure.suptitle(f"{title}\nhatched: clean generalization and robust overfitting", fontsize=11)
    return figure


def count_diagram(
    counts: Sequence[int],
    dimensions: Sequence[int],
    accuracies: Mapping[str, np.ndarray],
    holds: np.ndarray,
    *,
    title: str = "",
) -> Figure:
    """Draw robust accuracy on training and on test samples over N and d.

    Args:
        counts: numbers of training samples N, `(A,)`.
        dimensions: dimensions d of a patch, `(B,)`.
        accuracies: `train_robust`, `test_clean` and `test_robust`, each `(A, B)`.
        holds: where clean generalization goes with robust overfitting, `(A, B)`.
        title: above it all.
    """
    figure = Figure(figsize=(10.0, 3.8), layout="constrained")
    row = figure.subplots(1, 3, sharey=True)
    for axes, name in zip(row, ("train_robust", "test_clean", "test_robust"), strict=True):
        axes.imshow(accuracies[name].T, origin="lower", cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_title(NAMES[name][0], fontsize=10)
        _ticks(axes, counts, dimensions)
        _hatch(axes, holds.T)
        axes.set_xlabel("training samples N")
    row[0].set_ylabel("dimension of a patch, d")
    figure.colorbar(row[0].images[0], ax=row, label="accuracy")
    figure.suptitle(f"{title}\nhatched: clean generalization and robust overfitting", fontsize=11)
    return figure


def cgro_bars(
    groups: Mapping[str, Mapping[str, Sequence[float | int] | np.ndarray]],
    *,
    chance: float | None = 0.5,
    title: str = "",
) -> Figure:
    """Draw the four accuracies of several models, mean over seeds with each seed as a point.

    Args:
        groups: for each model, `train_clean`, `train_robust`, `test_clean` and `test_robust`, one number a seed.
        chance: accuracy of a guess, marked; None leaves it out.
        title: above the axes.
    """
    figure = Figure(figsize=(2.6 + 1.55 * len(groups), 4.2), layout="constrained")
    axes = figure.subplots()
    for offset, (name, (label, colour, _)) in enumerate(NAMES.items()):
        places = np.arange(len(groups)) + 0.2 * (offset - 1.5)
        values = [np.asarray(model[name], float) for model in groups.values()]
        axes.bar(places, [v.mean() for v in values], width=0.18, color=colour, alpha=0.75, label=label)
        for place, seeds in zip(places, values, strict=True):
            axes.plot(np.full(seeds.size, place), seeds, ".", color="black", markersize=3)
    if chance is not None:
        axes.axhline(chance, color="black", linewidth=0.8, linestyle="--", alpha=0.6)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=9)
    axes.set_ylim(0, 1.04)
    _finish(axes, "accuracy", legend=False)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(title, fontsize=11)
    return figure


def parameters(
    counts: Sequence[int], built: Sequence[int], bound: Sequence[int], clean: int, *, title: str = ""
) -> Figure:
    """Draw the parameters of the CGRO classifier against the number of memorised images, and the bound linear in it.

    Args:
        counts: memorised images.
        built: parameters of the network for each, without the clean classifier.
        bound: what they cannot exceed.
        clean: parameters of the clean classifier; 0 leaves them out.
        title: above the axes.
    """
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(counts, built, "-", color=BLUE, marker="o", markersize=4, label="network as built")
    axes.plot(counts, bound, "--", color=VERMILION, label=r"bound, $10\,N D + O(N c)$")
    if clean:
        axes.axhline(clean, color=GREEN, linestyle="-.", label="clean classifier")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("memorised images N")
    _finish(axes, "parameters", legend=False)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(title, fontsize=11)
    return figure


def robust_accuracy_by_radius(
    radii: Sequence[float | int] | np.ndarray,
    curves: Mapping[str, Sequence[float | int] | np.ndarray],
    delta: float,
    *,
    title: str = "",
) -> Figure:
    """Draw accuracy under attack against its radius, one curve for each way of attacking or part of the data.

    Args:
        radii: of the attack.
        curves: accuracies by name.
        delta: radius of the memorised balls, marked.
        title: above the axes.
    """
    figure = Figure(figsize=(7.4, 4.0), layout="constrained")
    axes = figure.subplots()
    styles = ((BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "D", "-."), (PURPLE, "^", ":"), (ORANGE, "v", "-"))
    for (name, values), (colour, marker, line) in zip(curves.items(), styles, strict=False):
        axes.plot(radii, values, line, color=colour, marker=marker, markersize=4, label=name)
    axes.axvline(delta, color="black", linewidth=0.9, linestyle="--", alpha=0.7)
    axes.text(delta, 1.03, "δ", transform=axes.get_xaxis_transform(), ha="center")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("radius of the attack, l_inf")
    _finish(axes, "accuracy")
    axes.set_title(title, fontsize=11, pad=22)
    return figure


def accuracies_against_width(
    panels: Mapping[str, Mapping[int, Mapping[str, Sequence[float | int] | np.ndarray]]], *, title: str = ""
) -> Figure:
    """Draw the four accuracies of adversarially trained networks against their width, mean over seeds with each seed.

    Args:
        panels: for each panel, for each width, one number a seed for each accuracy; some may be left out.
        title: above it all.
    """
    figure = Figure(figsize=(1.4 + 3.3 * len(panels), 3.9), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (panel, widths) in zip(row, panels.items(), strict=True):
        for (name, (label, colour, line)), marker in zip(NAMES.items(), "osD^", strict=True):
            seeds = {width: np.asarray(values[name], float) for width, values in widths.items() if name in values}
            if not seeds:
                continue
            means = [values.mean() for values in seeds.values()]
            axes.plot(list(seeds), means, line, color=colour, marker=marker, markersize=4, label=label)
            for width, values in seeds.items():
                axes.plot(np.full(values.size, width), values, ".", color=colour, markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(widths), [f"{width:g}" for width in widths], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("width")
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(panel, fontsize=10)
        _finish(axes, "accuracy" if axes is row[0] else "", legend=False)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    figure.suptitle(title, fontsize=11)
    return figure


def accuracies_over_epochs(models: Mapping[str, Mapping[str, np.ndarray]], *, title: str = "") -> Figure:
    """Draw the four accuracies over epochs, a panel for each model.

    Args:
        models: for each, `epochs` and the four accuracies, `(E,)` each.
        title: above it all.
    """
    columns = min(3, int(np.ceil(np.sqrt(len(models)))))
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(1.2 + 2.9 * columns, 0.9 + 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (model, values) in zip(grid, models.items(), strict=False):
        for name, (label, colour, line) in NAMES.items():
            axes.plot(values["epochs"], values[name], line, color=colour, label=label)
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(model, fontsize=10)
        _finish(axes, "", legend=False)
    for axes in grid[len(models) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    for axes in grid[max(0, len(models) - columns) : len(models)]:
        axes.set_xlabel("epoch")
        axes.tick_params(labelbottom=True)
    figure.supylabel("accuracy", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def flatness_over_epochs(curves: Sequence[tuple[int, FlatnessCurves]], eps: float, *, title: str = "") -> Figure:
    """Draw flatness, loss change and robust gaps over radii, one curve for each epoch.

    Args:
        curves: epochs, and what was measured at each.
        eps: radius of the training, marked.
        title: above it all.
    """
    figure = Figure(figsize=(10.6, 6.2), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True)
    parts = (
        ("local_flatness", "local flatness (train)"), ("train_loss_change", "loss change (train)"),
        ("robust_gap", "robust gap, accuracy"),
        ("global_flatness", "global flatness (test)"), ("test_loss_change", "loss change (test)"),
        ("robust_loss_gap", "robust gap, loss"),
    )  # fmt: skip
    epochs = [epoch for epoch, _ in curves]
    scale = Normalize(min(epochs), max(max(epochs), min(epochs) + 1))
    for axes, (name, label) in zip(grid.ravel(), parts, strict=True):
        for epoch, curve in curves:
            axes.plot(curve.radii, getattr(curve, name), "-", color=colormaps["viridis"](scale(epoch)), linewidth=1.3)
        axes.axvline(eps, color="black", linewidth=0.9, linestyle="--", alpha=0.7)
        axes.set_title(label, fontsize=10)
        _finish(axes, "", legend=False)
    for axes in grid[1]:
        axes.set_xlabel("radius, l_inf (dashed: of the training)")
    for column in (0, 1):
        top = max(axes.get_ylim()[1] for axes in grid[:, column])
        for axes in grid[:, column]:
            axes.set_ylim(0, top)
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=grid, label="epoch", shrink=0.7)
    figure.suptitle(title, fontsize=11)
    return figure


def flatness_against_gap(
    models: Mapping[str, Sequence[tuple[int, FlatnessCurves]]], eps: float, *, title: str = ""
) -> Figure:
    """Draw the robust gap, in accuracy and in the loss, against global flatness, a point for each epoch of each model.

    Args:
        models: for each, epochs and what was measured at each.
        eps: the radius that both are taken at, one of those measured.
        title: above it all.
    """
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    row = figure.subplots(1, 2)
    largest = max(epoch for curves in models.values() for epoch, _ in curves)
    for axes, (gap, label) in zip(
        row, (("robust_gap", "robust gap, accuracy"), ("robust_loss_gap", "robust gap, loss")), strict=True
    ):
        for i, (name, curves) in enumerate(models.items()):
            colour, marker, _ = STYLES[i % len(STYLES)]
            places = [int(np.argmin(np.abs(curve.radii - eps))) for _, curve in curves]
            pairs = list(zip(curves, places, strict=True))
            x = [float(curve.global_flatness[place]) for (_, curve), place in pairs]
            y = [float(getattr(curve, gap)[place]) for (_, curve), place in pairs]
            sizes = [12 + 40 * epoch / largest for epoch, _ in curves]
            axes.scatter(x, y, s=sizes, color=colour, marker=marker, alpha=0.75, linewidths=0, label=name)
        axes.set_xlabel(f"global flatness at radius {eps:.3g}")
        _finish(axes, label, legend=False)
    row[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{title}; larger marks: later epochs", fontsize=11)
    return figure


def _mark(margins: Axes, shares: Axes, accuracy: Axes, times: PhaseTimes, last: float) -> None:
    """Draw the transitions into all axes, and name the phases above the first."""
    ends = [times.signal_learnt, times.noise_leads, times.memorised]
    for axes in (margins, shares, accuracy):
        for end in ends:
            if end is not None:
                axes.axvline(max(end, 1), color="black", linewidth=0.8, linestyle="--", alpha=0.7)
    begin = 1.0
    for name, end in zip(("I", "II", "III"), ends, strict=True):
        if name not in times.absent and end is not None:
            middle = np.sqrt(begin * max(end, 1))
            margins.text(middle, 1.02, name, transform=margins.get_xaxis_transform(), ha="center", fontsize=11)
        begin = float(max(end or begin, 1))
    margins.set_xlim(1, last)


def _visible(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _ticks(axes: Axes, x: Sequence[float | int] | np.ndarray, y: Sequence[float | int] | np.ndarray) -> None:
    axes.set_xticks(range(len(x)), [f"{value:.3g}" for value in x], fontsize=8)
    axes.set_yticks(range(len(y)), [f"{value:.4g}" for value in y], fontsize=8)


def _hatch(axes: Axes, holds: np.ndarray) -> None:
    for row, column in np.argwhere(holds):
        cell = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", edgecolor=ORANGE, linewidth=0.0)
        axes.add_patch(cell)


def _finish(axes: Axes, y: str, *, legend: bool = True) -> None:
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
