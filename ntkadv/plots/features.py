"""Figures of features and of what transfers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkadv._typing import AnyArray
from ntkadv.features import FeatureRobustness
from ntkadv.plots.style import BLUE, GREEN, ORANGE, PURPLE, VERMILION, finish
from ntkadv.transfer import TransferMatrix

__all__ = ["eigenfeatures", "learning", "perturbations", "transfer_bars", "usefulness"]

_STYLES = ((BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "D", "-."), (PURPLE, "^", ":"), (ORANGE, "v", "-"))


def usefulness(
    single: FeatureRobustness, bands: FeatureRobustness, leading: FeatureRobustness, *, title: str = ""
) -> Figure:
    """Draw usefulness and robustness against the index of the feature: of single ones, of bands, of the leading ones.

    Args:
        single: Of ranges of one feature: their correlation with the labels.
        bands: Of ranges side by side: their accuracy.
        leading: Of ranges from the first feature on: their accuracy.
        title: Above it all.
    """
    figure = Figure(figsize=(12.6, 4.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    numbers = single.ranges[:, 0] + 1
    for name, label, (colour, marker, line) in (
        ("usefulness", "as they are", _STYLES[0]),
        ("robust_usefulness", "worst case in the ball", _STYLES[1]),
    ):
        values, errors = getattr(single, name), 1.96 * getattr(single, f"{name}_error")
        left.errorbar(
            numbers, values, errors, color=colour, marker=marker, linestyle=line, markersize=4, capsize=2, label=label
        )
    left.axhline(0, color="black", linewidth=0.8)
    finish(left, "feature k, by falling eigenvalue", "correlation with labels, 95% intervals", "single features")
    left.set_xscale("log")

    places = np.arange(len(bands.ranges))
    for shift, attacked in ((-0.2, False), (0.2, True)):
        values = bands.robust_accuracy if attacked else bands.accuracy
        middle.bar(
            places + shift, values, 0.38, color=VERMILION if attacked else BLUE, yerr=_errors(bands, attacked),
            capsize=2, hatch="//" if attacked else None, edgecolor="white", label="attacked" if attacked else "clean",
        )  # fmt: skip
    ticks = [f"{a + 1}-{b}" for a, b in bands.ranges]
    middle.set_xticks(places, ticks, rotation=40, ha="right", rotation_mode="anchor")
    finish(middle, "features", "accuracy, 95% intervals", "bands of features, each for itself")

    ends = leading.ranges[:, 1]
    for attacked in (False, True):
        values = leading.robust_accuracy if attacked else leading.accuracy
        colour, marker, line = _STYLES[attacked]
        right.errorbar(
            ends, values, _errors(leading, attacked), color=colour, marker=marker, linestyle=line, markersize=4,
            capsize=2, label="attacked" if attacked else "clean",
        )  # fmt: skip
    right.set_xscale("log")
    finish(right, "number of leading features kept", "accuracy, 95% intervals", "the NTK cut off")
    for axes in (middle, right):
        axes.set_ylim(0, 1.02)
    figure.suptitle(f"{title}\n{single.attack}, {single.norm} eps = {single.eps:.3g}", fontsize=11)
    return figure


def learning(
    learnt: Mapping[str, tuple[AnyArray, Float[np.ndarray, "t ranges"]]],
    ranges: Sequence[tuple[int, int]],
    *,
    units: Mapping[str, str],
    title: str = "",
) -> Figure:
    """Draw how much of the labels models have learnt in each range of features, against time.

    Args:
        learnt: For each model its times (t,), and what `Eigenfeatures.learnt` says at each.
        ranges: The ranges.
        units: What the time of each model is.
        title: Above it all.
    """
    figure = Figure(figsize=(4.2 * len(learnt), 3.8), layout="constrained")
    grid: Any = figure.subplots(1, len(learnt), sharey=True, squeeze=False)[0]
    for axes, (name, (times, shares)) in zip(grid, learnt.items(), strict=True):
        for i, (start, stop) in enumerate(ranges):
            shade = 0.85 * i / max(len(ranges) - 1, 1)
            axes.plot(times, shares[:, i], color=_shade(shade), linewidth=1.6, label=f"{start + 1}-{stop}")
        axes.axhline(1, color="black", linewidth=0.6)
        axes.set_xscale("log")
        finish(axes, units[name], "share of the labels that is learnt" if axes is grid[0] else "", name, legend=False)
        axes.set_ylim(-0.1, 1.2)
    grid[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), title="features")
    figure.suptitle(title, fontsize=11)
    return figure


def transfer_bars(matrix: TransferMatrix, *, free: Sequence[str], title: str = "") -> Figure:
    """Draw the accuracy of each target on the images made against each source, with intervals.

    Args:
        matrix: What was measured.
        free: The sources that needed no training of a network, drawn full; the others are hatched.
        title: Above it all.
    """
    figure = Figure(figsize=(1.2 + 0.5 * matrix.accuracy.size, 4.4), layout="constrained")
    grid: Any = figure.subplots(1, len(matrix.targets), sharey=True, squeeze=False)[0]
    low, high = matrix.interval
    places = np.arange(len(matrix.sources))
    colours = [_GREY if s in _CONTROLS else GREEN if s in free else ORANGE for s in matrix.sources]
    hatches = ["" if s in _CONTROLS or s in free else "//" for s in matrix.sources]
    for j, (axes, target) in enumerate(zip(grid, matrix.targets, strict=True)):
        values = matrix.accuracy[:, j]
        errors = np.maximum([values - low[:, j], high[:, j] - values], 0)
        axes.bar(places, values, 0.8, yerr=errors, capsize=2, color=colours, hatch=hatches, edgecolor="white")
        for place, value, top in zip(places, values.tolist(), high[:, j].tolist(), strict=True):
            axes.text(place, top + 0.015, f"{value:.2f}", ha="center", fontsize=8)
        axes.set_xticks(places, matrix.sources, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        y = f"accuracy on {matrix.n} images, {100 * matrix.confidence:g}% intervals" if j == 0 else ""
        finish(axes, "images perturbed against", y, f"shown to: {target}", legend=False)
        axes.set_ylim(0, 1.1)
    attack = f"{matrix.attack['name']}, {matrix.attack['norm']} eps = {matrix.attack['eps']:.3g}"
    figure.suptitle(f"{title}\n{attack}; hatched: a trained network" if title else attack, fontsize=11)
    return figure


_GREY = "#999999"
_CONTROLS = ("none", "random", "random signs")


def eigenfeatures(
    gradients: Float[np.ndarray, "k h w c"], numbers: Sequence[int], eigenvalues: Sequence[float], *, title: str = ""
) -> Figure:
    """Show gradients of features with respect to the image, each scaled to its largest entry."""
    figure = Figure(figsize=(1.3 * len(gradients), 1.95), layout="constrained")
    grid: Any = figure.subplots(1, len(gradients), squeeze=False)[0]
    for axes, gradient, k, value in zip(grid, gradients, numbers, eigenvalues, strict=True):
        _show_signed(axes, gradient / max(float(np.abs(gradient).max()), 1e-30))
        axes.set_title(f"k = {k + 1}\nλ = {value:.3g}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def perturbations(
    clean: Float[AnyArray, "m h w c"],
    attacked: Mapping[str, Float[AnyArray, "m h w c"]],
    *,
    eps: float,
    title: str = "",
) -> Figure:
    """Show clean images, and what each model's attack adds to them, in units of eps."""
    figure = Figure(figsize=(1.45 * (1 + len(attacked)), 1.45 * len(clean) + 0.8), layout="constrained")
    grid: Any = figure.subplots(len(clean), 1 + len(attacked), squeeze=False)
    for row, image in enumerate(np.asarray(clean)):
        _show(grid[row, 0], image)
        for column, points in enumerate(attacked.values(), start=1):
            _show_signed(grid[row, column], (np.asarray(points[row]) - image) / eps)
    for axes, name in zip(grid[0], ["clean", *attacked], strict=True):
        axes.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _errors(measured: FeatureRobustness, attacked: bool) -> Float[np.ndarray, "2 ranges"]:
    values = measured.robust_accuracy if attacked else measured.accuracy
    low, high = measured.intervals(attacked=attacked)
    return np.maximum(np.array([values - low, high - values]), 0)


def _shade(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](share)


def _show(axes: Axes, image: AnyArray) -> None:
    pixels = np.asarray(image)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if pixels.shape[-1] == 1 else {}
    axes.imshow(pixels[..., 0] if grey else np.clip(pixels, 0, 1), interpolation="nearest", **grey)
    axes.set_xticks([])
    axes.set_yticks([])


def _show_signed(axes: Axes, change: AnyArray) -> None:
    """Show values in [-1, 1]: red is more, blue less; in colour, grey is nothing."""
    values = np.asarray(change)
    if values.shape[-1] == 1:
        axes.imshow(values[..., 0], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    else:
        axes.imshow(np.clip(0.5 + 0.5 * values, 0, 1), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
