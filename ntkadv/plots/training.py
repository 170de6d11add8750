"""Figures of robust training: accuracies over epochs, what is left of a generator, which weights matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkadv.plots.style import BLUE, GREEN, ORANGE, STYLES, VERMILION, finish, legend_beside, one_panel

Epochs = Int[np.ndarray, " looks"]
Curves = Float[np.ndarray, "seeds looks"]


def collapse(
    epochs: Epochs, curves: Mapping[str, Mapping[str, Curves]], *, warmup: float | None = None, title: str = ""
) -> Figure:
    """Draw accuracy over epochs of several methods, a panel for each measure: the mean, and a thin line a seed.

    Args:
        epochs: When it was measured.
        curves: Measure, then method.
        warmup: Epoch at which the attack of training has its whole radius.
        title: Of the figure.
    """
    figure = Figure(figsize=(1.8 + 3.3 * len(curves), 3.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(curves), sharey=True))
    for number, (axes, (measure, methods)) in enumerate(zip(panels, curves.items(), strict=True)):
        for (name, values), (colour, marker, line) in zip(methods.items(), STYLES, strict=False):
            _band(axes, epochs, values, name, colour, marker, line)
        if warmup:
            axes.axvline(warmup, color="0.5", linewidth=0.9, linestyle=":")
        finish(axes, "epoch", "accuracy on test images" if number == 0 else "", measure, legend=False)
        axes.set_ylim(-0.02, 1.02)
    legend_beside(panels[-1])
    figure.suptitle(title, fontsize=11)
    return figure


def generator(
    epochs: Epochs, transferred: Mapping[str, Curves], noise: Curves, own: Mapping[str, Curves], *, title: str = ""
) -> Figure:
    """Draw what generators do to a fixed robust model, beside random noise, and the robustness of their own networks.

    Args:
        epochs: When it was measured.
        transferred: Accuracy of the fixed model on each network's perturbations.
        noise: The same on random signs.
        own: Accuracy of each network itself under PGD.
        title: Of the figure.
    """
    figure = Figure(figsize=(11.2, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, values), (colour, marker, line) in zip(transferred.items(), STYLES, strict=False):
        _band(left, epochs, values, name, colour, marker, line)
        _band(right, epochs, own[name], name, colour, marker, line)
    left.axhline(float(np.mean(noise)), color="0.4", linewidth=1.2)
    right.plot([], [], color="0.4", linewidth=1.2, label="random signs")
    finish(left, "epoch", "accuracy of the fixed PGD network", "on perturbations made against ...", legend=False)
    finish(right, "epoch", "own accuracy under PGD", "the network they are made against", legend=False)
    right.set_ylim(-0.02, 1.02)
    legend_beside(right)
    figure.suptitle(title, fontsize=11)
    return figure


def scalars(epochs: Epochs, curves: Mapping[str, Curves], eps: float, *, title: str = "") -> Figure:
    """Draw the scalars of APART's generator over epochs, in units of eps; those of hidden states by number."""
    figure, axes = one_panel(6.6, 3.8)
    for (name, values), (colour, marker, line) in zip(curves.items(), STYLES, strict=False):
        _band(axes, epochs, values / eps, name, colour, marker, line)
    finish(axes, "epoch", "scalar / ε", title, legend=False)
    legend_beside(axes)
    return figure


def overfitting(epochs: Epochs, train: Mapping[str, Curves], test: Mapping[str, Curves], *, title: str = "") -> Figure:
    """Draw robust accuracy on training and test images over epochs, a panel a method; best and last test marked."""
    figure = Figure(figsize=(1.0 + 3.2 * len(train), 3.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(train), sharey=True))
    for number, (axes, name) in enumerate(zip(panels, train, strict=True)):
        _band(axes, epochs, train[name], "training images", ORANGE, "", "--")
        _band(axes, epochs, test[name], "test images", BLUE, "", "-")
        mean = test[name].mean(axis=0)
        best = int(np.argmax(mean))
        axes.plot(epochs[best], mean[best], "*", color=GREEN, markersize=11, label=f"best: {mean[best]:.3f}")
        axes.plot(epochs[-1], mean[-1], "X", color=VERMILION, markersize=7, label=f"last: {mean[-1]:.3f}")
        finish(axes, "epoch", "robust accuracy" if number == 0 else "", name)
        axes.set_ylim(-0.02, 1.02)
    figure.suptitle(title, fontsize=11)
    return figure


def prominence(
    layers: Sequence[str], shares: Mapping[str, Float[np.ndarray, "layers 3"]], *, title: str = ""
) -> Figure:
    """Draw the prominence of weights by layer: the median and the middle eighty percent, a colour for each network.

    Args:
        layers: Names of the weight tensors.
        shares: For each network the tenth, fiftieth and ninetieth percentile in each tensor.
        title: Of the figure.
    """
    figure, axes = one_panel(2.5 + 1.1 * len(layers), 4.0)
    for number, ((name, values), (colour, marker, _)) in enumerate(zip(shares.items(), STYLES, strict=False)):
        places = np.arange(len(layers)) + (number - (len(shares) - 1) / 2) * 0.18
        low, middle, high = np.maximum(values.T, 1e-12)
        axes.errorbar(
            places, middle, (middle - low, high - middle), fmt=marker, color=colour, markersize=5, capsize=3, label=name
        )
    axes.set_yscale("log")
    # Weights of units that never answer have none; their bars end at the edge.
    axes.set_ylim(bottom=max(min(float(values[:, 1].min()) for values in shares.values()), 1e-12) / 30)
    axes.set_xticks(np.arange(len(layers)), layers, fontsize=8)
    finish(axes, "weight tensor", "prominence, 10th to 90th percentile", title, legend=False)
    legend_beside(axes)
    return figure


def accuracy_trade(
    points: Mapping[str, Mapping[str, tuple[float, float, float, float, float, float]]], column: str, *, title: str = ""
) -> Figure:
    """Draw clean against robust accuracy with intervals, a colour for each family and a marker for each method.

    Args:
        points: Family, then method: clean accuracy with the ends of its interval, then robust accuracy with those.
        column: What the robust accuracy is measured by.
        title: Of the figure.
    """
    figure, axes = one_panel(8.4, 5.2)
    methods = list(dict.fromkeys(method for family in points.values() for method in family))
    markers = dict(zip(methods, "osD^vPX*<>hpd8H" * 3, strict=False))
    for (family, named), (colour, _, _) in zip(points.items(), STYLES, strict=False):
        for method, (clean, clean_low, clean_high, robust, low, high) in named.items():
            axes.errorbar(
                clean, robust, yerr=[[max(robust - low, 0)], [max(high - robust, 0)]],
                xerr=[[max(clean - clean_low, 0)], [max(clean_high - clean, 0)]], fmt="none", ecolor=colour, alpha=0.3,
                linewidth=0.9,
            )  # fmt: skip
            axes.plot(
                clean, robust, linestyle="", marker=markers[method], markersize=7, color=colour,
                label=f"{family}, {method}",
            )  # fmt: skip
    finish(axes, "clean accuracy", f"accuracy under {column}", title, legend=False)
    legend_beside(axes)
    return figure


def _band(axes: Axes, x: Epochs, values: Curves, name: str, colour: str, marker: str, line: object) -> None:
    axes.plot(
        x, values.mean(axis=0), color=colour, marker=marker, linestyle=line, markersize=3.5, linewidth=1.5, label=name
    )
    for one in values if len(values) > 1 else ():
        axes.plot(x, one, color=colour, linewidth=0.6, alpha=0.45)
