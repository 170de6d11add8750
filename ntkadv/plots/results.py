"""Figures of predictors under attack: accuracies over time and eps, tables, transfer, images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkadv._typing import AnyArray
from ntkadv.curves import AccuracyCurves
from ntkadv.plots.style import BLUE, GREEN, STYLES, VERMILION, finish, legend_beside, one_panel
from ntkadv.report import Report
from ntkadv.selection import RobustnessPath
from ntkadv.statistics import wilson_interval
from ntkadv.transfer import TransferMatrix

__all__ = [
    "accuracy_curves",
    "adv_ntk_progress",
    "image_strip",
    "over_time",
    "robustness",
    "transfer_matrix",
]


def over_time(
    path: RobustnessPath,
    *,
    limit: RobustnessPath | None = None,
    chosen: float | None = None,
    title: str = "",
    label: str = "training time t (gradient flow, unit 1 / kernel)",
) -> Figure:
    """Draw clean and robust accuracy against training time, with the optimum and the limit that the theory predicts.

    Args:
        path: accuracies over finite times.
        limit: accuracies at one value, t = infinity: what long training, adversarial or not, degenerates to.
        chosen: the time that was chosen on the validation images.
        title: above the axes.
        label: of the horizontal axis.
    """
    figure, axes = one_panel(6.4, 4.0)
    curves = (
        ("clean", path.clean, limit and limit.clean, BLUE, "-", "o"),
        ("robust", path.robust, limit and limit.robust, VERMILION, "--", "s"),
    )
    for name, accuracy, end, colour, style, marker in curves:
        low, high = np.array([wilson_interval(round(a * path.n), path.n) for a in accuracy.tolist()]).T
        axes.fill_between(path.values, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(path.values, accuracy, style, color=colour, marker=marker, markersize=3.5, label=f"{name} accuracy")
        if end is not None:
            axes.axhline(
                float(end[0]), color=colour, linestyle=":", linewidth=1.2, label=f"{name}, limit t = ∞: {end[0]:.3f}"
            )
    best = int(np.argmax(path.robust))
    axes.plot(
        path.values[best],
        path.robust[best],
        "*",
        color="black",
        markersize=12,
        zorder=5,
        label=f"best robust: {path.robust[best]:.3f} at t = {path.values[best]:.2g}",
    )
    if chosen is not None:
        axes.axvline(
            chosen, color="black", linewidth=0.9, linestyle="-.", label=f"chosen on validation: t = {chosen:.2g}"
        )
    axes.set_xscale("log")
    finish(axes, label, f"accuracy on {path.n} images, 95% bands", title)
    axes.set_ylim(0, 1.02)
    return figure


def adv_ntk_progress(history: Sequence[Mapping[str, Any]], *, step: int | None = None, title: str = "") -> Figure:
    """Draw loss and robust accuracy of an Adv-NTK fit against its steps.

    Args:
        history: `AdvNTKFit.history`.
        step: the step that was kept, if not the last.
        title: above the axes.
    """
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [entry["step"] for entry in history]
    left.plot(steps, [entry["loss"] for entry in history], color=BLUE, marker="o", markersize=3)
    finish(left, "step", r"loss on the attacked batch, mean $\frac{1}{2}|f-y|^2$", "", legend=False)
    right.plot(
        steps,
        [entry["robust_accuracy"] for entry in history],
        "--",
        color=VERMILION,
        marker="s",
        markersize=3,
        label="batch of the step",
    )
    watched = [(entry["step"], entry["held_out"]) for entry in history if entry["held_out"] is not None]
    if watched:
        right.plot(*zip(*watched, strict=True), "-", color=GREEN, marker="D", markersize=4, label="held-out images")
    for axes in (left, right):
        if step is not None:
            axes.axvline(step, color="black", linewidth=0.9, linestyle="-.", label=f"kept: step {step}")
    finish(right, "step", "robust accuracy", "")
    right.set_ylim(0, 1.02)
    figure.suptitle(title, fontsize=11)
    return figure


def robustness(report: Report, *, title: str = "") -> Figure:
    """Draw each model's accuracies, clean, under each attack and in the worst case, with their intervals."""
    columns = list(report.columns)
    models = list(report.models)
    figure, axes = one_panel(3.2 + 1.5 * len(models), 4.0)
    width = 0.8 / len(columns)
    for j, column in enumerate(columns):
        colour, marker, _ = STYLES[j % len(STYLES)]
        cells = [report.cell(model, column) for model in models]
        places = np.arange(len(models)) + (j - (len(columns) - 1) / 2) * width
        values = np.array([cell.accuracy for cell in cells])
        errors = np.array([[cell.accuracy - cell.low, cell.high - cell.accuracy] for cell in cells]).T
        axes.errorbar(
            places,
            values,
            np.maximum(errors, 0),
            fmt=marker,
            color=colour,
            markersize=7,
            capsize=3,
            label=column,
        )
    axes.set_xticks(np.arange(len(models)), models)
    finish(axes, "", f"accuracy, n = {report.n}, {100 * report.confidence:g}% intervals", title, legend=False)
    axes.set_ylim(-0.02, 1.02)
    legend_beside(axes)
    return figure


def accuracy_curves(curves: AccuracyCurves, *, title: str = "") -> Figure:
    """Draw the accuracy of each model against the radius of the attack, with its interval as a band.

    With more than eight models styles repeat.
    """
    figure, axes = one_panel(7.2, 4.2)
    low, high = curves.interval
    for i, model in enumerate(curves.models):
        colour, marker, line = STYLES[i % len(STYLES)]
        axes.fill_between(curves.eps, low[i], high[i], color=colour, alpha=0.12, linewidth=0)
        axes.plot(
            curves.eps,
            curves.accuracy[i],
            linestyle=line,
            color=colour,
            marker=marker,
            markersize=7 if marker in "PX*" else 5,
            label=model,
        )
    finish(
        axes,
        f"radius eps of the {curves.attack['norm']} ball, pixels in [0, 1]",
        f"robust accuracy on {curves.n} images, {100 * curves.confidence:g}% bands",
        f"{title}\n{curves.attack['name']}" if title else curves.attack["name"],
        legend=False,
    )
    axes.set_ylim(-0.02, 1.02)
    legend_beside(axes, handlelength=4)
    return figure


def transfer_matrix(matrix: TransferMatrix, *, title: str = "") -> Figure:
    """Draw the accuracy of each target on the images perturbed against each source, as a map with its numbers."""
    rows, columns = matrix.accuracy.shape
    longest = max(map(len, matrix.sources)), max(map(len, matrix.targets))
    figure, axes = one_panel(2.4 + 0.75 * columns + 0.09 * longest[0], 1.5 + 0.45 * rows + 0.06 * longest[1])
    image = axes.imshow(matrix.accuracy, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(matrix.accuracy.tolist()):
        for j, value in enumerate(row):
            red, green, blue, _ = image.cmap(value)
            is_light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18
            axes.text(
                j, i, f"{value:.3f}", ha="center", va="center", fontsize=9, color="black" if is_light else "white"
            )
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if longest[1] > 8 else {}
    axes.set_xticks(range(columns), matrix.targets, **slant)
    axes.set_yticks(range(rows), matrix.sources)
    axes.set_xlabel("shown to")
    axes.set_ylabel("perturbed against")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    attack = f"{matrix.attack['name']}, {matrix.attack['norm']} eps = {matrix.attack['eps']:.3g}"
    figure.colorbar(image, ax=axes, label=f"accuracy on {matrix.n} images")
    figure.suptitle(f"{title}\n{attack}" if title else attack, fontsize=11)
    return figure


def image_strip(
    clean: Float[AnyArray, "m h w c"],
    attacked: Mapping[str, Float[AnyArray, "m h w c"]],
    labels: Int[AnyArray, " m"],
    predicted: Mapping[str, tuple[Int[AnyArray, " m"], Int[AnyArray, " m"]]],
    class_names: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Show clean images above attacked ones, a row for each model, each with the model's prediction.

    Args:
        clean: images.
        attacked: for each model, the images attacked against it.
        labels: true classes.
        predicted: for each model, its classes for the clean and for the attacked images.
        class_names: names of the classes.
        title: above it all.
    """
    rows = 1 + len(attacked)
    figure = Figure(figsize=(1.15 * len(clean) + 1.3, 1.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, len(clean), squeeze=False)
    for column, image in enumerate(clean):
        _show(grid[0, column], image, class_names[int(labels[column])], "black")
        for row, (model, images) in enumerate(attacked.items(), start=1):
            before, after = (int(classes[column]) for classes in predicted[model])
            text = f"{class_names[before]} → {class_names[after]}"
            _show(grid[row, column], images[column], text, BLUE if after == int(labels[column]) else VERMILION)
    for row, name in enumerate(["clean\n(true class)", *attacked]):
        grid[row, 0].set_ylabel(name, fontsize=9)
    legend = "predicted: clean → attacked; blue: right under attack, orange: wrong"
    figure.suptitle(f"{title}\n{legend}", fontsize=11)
    return figure


def _show(axes: Axes, image: Any, text: str, colour: str) -> None:
    pixels = np.asarray(image)
    if pixels.shape[-1] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(np.clip(pixels, 0, 1), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(text, fontsize=7, color=colour)
