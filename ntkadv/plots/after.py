"""Figures of the kernels that training leaves behind, and of what is trained on top of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from ntkadv.kernels.movement import KernelMovement
from ntkadv.plots import wide as wide_plots
from ntkadv.plots.style import BLUE, GREEN, VERMILION, finish
from ntkadv.statistics import wilson_interval

LOOKS: dict[str, tuple[str, str, str]] = {
    "kernel, standard": (BLUE, "-", "o"),
    "kernel, adversarial": (VERMILION, "-", "s"),
    "network, standard": (BLUE, ":", ""),
    "network, adversarial": (VERMILION, ":", ""),
    "full on top": (BLUE, "--", "D"),
    "lazy on top": (VERMILION, "-", "s"),
    "kernel on top": (GREEN, "-.", "^"),
}
"""Colour, line and marker of each curve."""


def over_epochs(
    epochs: Sequence[int], correct: Mapping[str, Bool[np.ndarray, "seeds looks 2 n"]], label: str, title: str
) -> Figure:
    """Draw clean and robust accuracy at each look: the mean over seeds, a dot for each, the Wilson interval of one."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    n = next(iter(correct.values())).shape[-1]
    for j, (axes, part) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("clean", "robust"), strict=True)):
        for name, values in correct.items():
            colour, style, marker = LOOKS[name]
            # Before its first step the kernel on top is zero, which no accuracy describes.
            first = 1 if name == "kernel on top" else 0
            when, right = epochs[first:], values[:, first:, j]
            mean = right.mean(axis=(0, 2))
            axes.plot(when, mean, linestyle=style, marker=marker, markersize=4, color=colour, label=name)
            if marker:
                low, high = np.array([wilson_interval(round(a * n), n) for a in mean.tolist()]).T
                axes.fill_between(when, low, high, color=colour, alpha=0.15, linewidth=0)
                for one in right.mean(axis=2) if len(right) > 1 else ():
                    axes.plot(when, one, ".", color=colour, markersize=3, alpha=0.6)
        axes.set_xscale("symlog", linthresh=epochs[1])
        axes.set_xticks(epochs, map(str, epochs))
        axes.minorticks_off()
        finish(axes, label, f"accuracy on {n} test images, 95% bands" if j == 0 else "", f"{part} accuracy")
        axes.set_ylim(0, 1.02)
    figure.suptitle(title, fontsize=11)
    return figure


def movements(moved: Mapping[str, KernelMovement], title: str) -> Figure:
    """Draw how far the kernels are from where they began, with epochs on the axes."""
    figure = wide_plots.movements(moved, title)
    for axes in figure.axes:
        if axes.get_xlabel() == wide_plots.TIME:
            axes.set_xlabel("epoch t of the network")
    return figure


def distance_map(
    distances: Float[np.ndarray, "looks looks"], kinds: Sequence[str], epochs: Sequence[int], title: str
) -> Figure:
    """Draw the distances between the kernels at all looks of several trainings, one after another, as a map."""
    figure = Figure(figsize=(6.6, 5.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(distances, cmap="viridis", vmin=0)
    names = [f"{kind} {epoch}" for kind in kinds for epoch in epochs]
    size = len(names)
    axes.set_xticks(range(size), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(size), names, fontsize=8)
    for place in np.arange(1, len(kinds)) * len(epochs) - 0.5:
        axes.axhline(place, color="white", linewidth=1)
        axes.axvline(place, color="white", linewidth=1)
    figure.colorbar(image, ax=axes, label="distance of kernels, 1 - cosine (mean over seeds)")
    figure.suptitle(f"{title}\nNTKs of networks in standard and adversarial training, by epoch", fontsize=10)
    return figure
