"""Figures of wide networks held against the theory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkadv.kernels.movement import KernelMovement
from ntkadv.plots.style import BLUE, GREEN, PURPLE, VERMILION, finish
from ntkadv.statistics import power_law

TIME = "training time t (unit 1 / kernel)"
DISTANCE = "distance of outputs / size of targets"

Series = Float[np.ndarray, " t"]


def shades(count: int) -> list[tuple[float, ...]]:
    """Give as many colours, dark to light, of one scale."""
    return [tuple(matplotlib.colormaps["viridis"](share)) for share in np.linspace(0, 0.88, count)]


def gaps_over_time(times: Series, gaps: Mapping[str, Mapping[int, Float[np.ndarray, "seeds t"]]]) -> Figure:
    """Draw distances to predictions over time: a panel for each, in it a curve for each width (mean and range)."""
    figure = Figure(figsize=(4.1 * len(gaps), 3.7), layout="constrained")
    panels = figure.subplots(1, len(gaps), sharey=True, squeeze=False)[0]
    for axes, (title, by_width) in zip(panels, gaps.items(), strict=True):
        for colour, (width, rows) in zip(shades(len(by_width)), by_width.items(), strict=True):
            axes.plot(times[1:], rows.mean(0)[1:], color=colour, label=f"width {width}")
            axes.fill_between(times[1:], rows.min(0)[1:], rows.max(0)[1:], color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        finish(axes, TIME, DISTANCE if axes is panels[0] else "", title, legend=axes is panels[-1])
    return figure


def gaps_against_width(
    panels: Mapping[str, Mapping[str, Mapping[int, Float[np.ndarray, " seeds"]]]], title: str = ""
) -> Figure:
    """Draw largest distances over time against the width, with fitted power laws and the intervals of their slopes.

    A panel for each entry, in it a line for each name, through the points of each width.
    """
    figure = Figure(figsize=(5.6 * len(panels), 4.4), layout="constrained")
    looks = [(BLUE, "o", "-"), (BLUE, "s", "--"), (VERMILION, "o", "-"), (VERMILION, "s", "--"), (GREEN, "D", ":")]
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (part, gaps) in zip(grid, panels.items(), strict=True):
        for i, (name, by_width) in enumerate(gaps.items()):
            colour, marker, style = looks[i % len(looks)]
            widths = np.repeat(list(by_width), [len(rows) for rows in by_width.values()]).astype(float)
            values = np.concatenate(list(by_width.values()))
            label = name
            if len(set(widths.tolist())) > 1 and len(widths) > 2:
                law = power_law(widths, values)
                axes.plot(np.unique(widths), law(np.unique(widths)), style, color=colour, linewidth=1)
                label = f"{name}: slope {law}"
            axes.plot(widths, values, marker, color=colour, markersize=4, alpha=0.7, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        finish(axes, "width", f"largest {DISTANCE}" if axes is grid[0] else "", part, legend=False)
        axes.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.suptitle(title, fontsize=11)
    return figure


def degeneration(
    times: Series,
    curves: Mapping[str, Mapping[str, Series]],
    strengths: Sequence[float],
    meetings: Mapping[str, Sequence[float]],
    threshold: float,
) -> Figure:
    """Draw how far networks trained with and without attacks are apart, and when they meet.

    Args:
        times: Training times.
        curves: A panel for each entry (training images, test images), in it a curve for each name.
        strengths: Strengths of the attack flow.
        meetings: Times from which on the two are closer than the threshold, for each strength; infinite ones are drawn
            at the top.
        threshold: That threshold.
    """
    figure = Figure(figsize=(12.6, 3.9), layout="constrained")
    panels = figure.subplots(1, 3)
    looks = [(BLUE, "-"), (VERMILION, "--"), (GREEN, ":"), (PURPLE, "-.")]
    top = 0.0
    for axes, (title, lines) in zip(panels[:2], curves.items(), strict=True):
        for (name, values), (colour, style) in zip(lines.items(), looks, strict=False):
            axes.plot(times[1:], values[1:], style, color=colour, label=name)
            top = max(top, float(values.max()))
        axes.axhline(threshold, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xscale("log")
        finish(axes, TIME, "distance, with attacks to without", title)
    for axes in panels[:2]:
        axes.set_ylim(0, 1.08 * top)
    last = panels[2]
    for (name, values), (colour, style) in zip(meetings.items(), looks, strict=False):
        numbers = np.asarray(values, float)
        is_finite = np.isfinite(numbers)
        at = np.asarray(strengths, float)
        last.plot(at[is_finite], numbers[is_finite], style, color=colour, marker="o", markersize=4, label=name)
        last.plot(at[~is_finite], np.full((~is_finite).sum(), times[-1]), "^", color=colour, markersize=6)
    last.set_xscale("log")
    last.set_yscale("log")
    finish(
        last, "attack strength ηS", f"time from which on they are within {threshold:g}\n(▲: not in the run)", "meeting"
    )
    return figure


def accuracies(times: Series, panels: Mapping[str, Mapping[str, Series]], n: int) -> Figure:
    """Draw accuracies over time: a panel for each entry, a curve for each name, a star at the largest value of each."""
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    looks = [
        (BLUE, "-", "o"),
        (VERMILION, "-", "s"),
        (BLUE, "--", ""),
        (VERMILION, "--", ""),
        (GREEN, ":", ""),
        ("black", ":", ""),
    ]
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for (name, values), (colour, style, marker) in zip(lines.items(), looks, strict=False):
            best = int(np.argmax(values))
            axes.plot(times[1:], values[1:], style, marker=marker, markersize=3, color=colour, label=name)
            axes.plot(max(times[best], times[1]), values[best], "*", color=colour, markersize=11)
        axes.set_xscale("log")
        finish(axes, TIME, f"accuracy on {n} test images" if axes is grid[0] else "", title)
    return figure


def movements(found: Mapping[str, KernelMovement], title: str = "") -> Figure:
    """Draw how kernels move over training: distances, polar coordinates, spectrum, alignment."""
    figure = Figure(figsize=(13.2, 6.8), layout="constrained")
    grid = figure.subplots(2, 3)
    looks = [(BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, "-.", "D"), (PURPLE, ":", "^")]

    def draw(axes: Axes, name: str, values: Series | None, label: str) -> None:
        if values is not None:
            colour, style, marker = looks[list(found).index(name)]
            axes.plot(found[name].times[1:], values[1:], style, marker=marker, markersize=3, color=colour, label=label)

    for name, movement in found.items():
        draw(grid[0, 0], name, movement.relative_distance, name)
        draw(grid[0, 1], name, movement.cosine_distance, name)
        colour, style, marker = looks[list(found).index(name)]
        x, y = movement.radius * np.cos(movement.angle), movement.radius * np.sin(movement.angle)
        grid[0, 2].plot(x, y, style, marker=marker, markersize=3, color=colour, label=name)
        if movement.top_share is not None:
            draw(grid[1, 0], name, movement.top_share[:, 0], f"{name}, top {movement.top[0]}")
        draw(grid[1, 1], name, movement.effective_rank, name)
        draw(grid[1, 2], name, movement.alignment, name)
    for axes in (*grid[0, :2], *grid[1]):
        axes.set_xscale("log")
    for axes in grid[0, :2]:
        axes.set_yscale("log")
    finish(grid[0, 0], TIME, r"$|K_t - K_0| / |K_0|$", "relative distance")
    finish(grid[0, 1], TIME, "1 - cosine", "kernel (cosine) distance", legend=False)
    finish(grid[0, 2], "radius · cos(angle)", "radius · sin(angle)", "polar: norm and turn, from (1, 0)", legend=False)
    finish(grid[1, 0], TIME, "share of the spectral mass", "largest eigenvalues")
    finish(grid[1, 1], TIME, "effective rank (entropy)", "effective rank", legend=False)
    finish(grid[1, 2], TIME, "kernel-target alignment", "alignment with the labels", legend=False)
    figure.suptitle(title, fontsize=11)
    return figure


def between(
    times: Mapping[int, Series], found: Mapping[int, Mapping[str, Float[np.ndarray, "seeds t"]]], switch: float
) -> Figure:
    """Draw where networks are between the true flow (0) and the closed form (1), and how far these are apart."""
    figure = Figure(figsize=(11.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    widest = max(found)
    for name, colour, style in (
        ("closed form to flow", "black", "-"),
        ("network to closed form", VERMILION, "--"),
        ("network to flow", BLUE, "-"),
    ):
        rows = found[widest][f"{name} test"]
        left.plot(times[widest][1:], rows.mean(0)[1:], style, color=colour, label=name)
        left.fill_between(times[widest][1:], rows.min(0)[1:], rows.max(0)[1:], color=colour, alpha=0.12, linewidth=0)
    for colour, (width, by) in zip(shades(len(found)), found.items(), strict=True):
        apart = by["closed form to flow test"].mean(0)
        # Where the two are one, there is no between.
        is_apart = apart > 0.3 * apart.max()
        at = times[width][is_apart]
        for name, style, label in (
            ("place test", "-", f"network, width {width}"),
            ("place of the linearisation test", "--", f"its linearisation, width {width}"),
        ):
            rows = by[name][:, is_apart]
            right.plot(at, rows.mean(0), style, color=colour, marker="o", markersize=3, label=label)
            right.fill_between(at, rows.min(0), rows.max(0), color=colour, alpha=0.12, linewidth=0)
    for level, name in ((0, "true flow"), (1, "closed form")):
        right.axhline(level, color="black", linewidth=0.8, linestyle=":")
        right.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    for axes in (left, right):
        axes.axvline(switch, color="black", linewidth=0.8, linestyle="-.")
        axes.set_xscale("log")
    finish(left, TIME, DISTANCE, f"width {widest}, test images")
    finish(right, TIME, "place", "between the true flow and the closed form, test images")
    right.set_ylim(-1, 2)
    return figure


def sweeps(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Draw distances against what is changed, a panel for each sweep; a cross at the top where training diverged."""
    names = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = Figure(figsize=(3.4 * -(-len(names) // 2), 6.6), layout="constrained")
    grid = figure.subplots(2, -(-len(names) // 2), sharey=True, squeeze=False)
    looks = {
        "to own closed form": (BLUE, "o", "-"),
        "to linearisation, same steps": (GREEN, "D", "-."),
        "with attacks, to without": (VERMILION, "s", "--"),
    }
    for axes, name in zip(grid.ravel(), names, strict=False):
        found = [row for row in rows if row["sweep"] == name]
        at = np.arange(len(found))
        for number, (colour, marker, style) in looks.items():
            values = np.array([row[number] for row in found])
            axes.plot(at, values, style, marker=marker, markersize=4, color=colour, label=number)
        for i, row in enumerate(found):
            if np.isfinite(row["diverged at step"]):
                axes.annotate(
                    "x", (i, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", in_layout=False
                )
        axes.set_xticks(at, [row["value"] for row in found])
        axes.set_yscale("log")
        finish(axes, name, DISTANCE if axes in grid[:, 0] else "", "", legend=False)
    for axes in grid.ravel()[len(names) :]:
        axes.set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"{title} (crosses: diverged)", fontsize=11)
    return figure
