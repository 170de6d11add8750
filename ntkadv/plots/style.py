"""What all figures share: colours, axes, legends.

The colours are those of Okabe & Ito, which people with any colour vision tell apart; lines differ in style as well.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"

STYLES = (
    (BLUE, "o", "-"),
    (VERMILION, "s", "--"),
    (GREEN, "D", "-."),
    (PURPLE, "^", ":"),
    (ORANGE, "v", (0, (6, 1.5, 1, 1.5, 1, 1.5))),
    ("#56B4E9", "P", (0, (8, 2))),
    ("black", "X", (0, (1, 1))),
    ("#7F7F7F", "*", (0, (4, 1, 1, 1))),
)
"""Colour, marker and line of each of up to eight curves; no two share any."""


def one_panel(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure of one panel, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def finish(axes: Axes, x: str, y: str, title: str, *, legend: bool = True) -> None:
    """Label axes, in the style of all figures."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)


def legend_beside(axes: Axes, **options: Any) -> None:
    """Put the legend to the right of the axes, where it hides nothing."""
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), **options)
