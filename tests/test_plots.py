"""Figures show what they were given, and say what their axes are."""

import itertools

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ntkadv import plots
from ntkadv.curves import AccuracyCurves
from ntkadv.report import Report, Score
from ntkadv.selection import RobustnessPath
from ntkadv.statistics import wilson_interval
from ntkadv.transfer import TransferMatrix


@pytest.fixture
def path():
    return RobustnessPath(np.array([0.1, 1.0, 10.0]), np.array([0.5, 0.8, 0.9]), np.array([0.2, 0.6, 0.3]), 50)


def test_accuracy_over_time_marks_optimum_choice_and_limit(path):
    limit = RobustnessPath(np.array([np.inf]), np.array([0.92]), np.array([0.25]), 50)
    axes = plots.over_time(path, limit=limit, chosen=0.5).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_array_equal(lines["robust accuracy"].get_ydata(), path.robust)
    np.testing.assert_array_equal(lines["clean accuracy"].get_xdata(), path.values)
    assert lines["best robust: 0.600 at t = 1"].get_xdata()[0] == 1.0
    assert set(np.asarray(lines["robust, limit t = ∞: 0.250"].get_ydata())) == {0.25}
    assert "chosen on validation: t = 0.5" in lines
    assert axes.get_xscale() == "log"
    assert "time" in axes.get_xlabel()
    assert "accuracy on 50 images" in axes.get_ylabel()


def test_the_band_around_accuracy_is_the_wilson_interval(path):
    band = plots.over_time(path).axes[0].collections[0].get_paths()[0].vertices
    low, high = wilson_interval(25, 50)
    at_first = band[np.isclose(band[:, 0], 0.1)][:, 1]
    assert at_first.min() == pytest.approx(low)
    assert at_first.max() == pytest.approx(high)


def test_robustness_draws_every_cell_with_its_interval():
    rows = {model: {c: Score(k + i, 20, 0.0) for i, c in enumerate(("clean", "PGD", "worst case"))}
            for model, k in (("a", 3), ("b", 9))}  # fmt: skip
    report = Report(rows, {"PGD": {"norm": "Linf", "eps": 0.1}}, 20)
    axes = plots.robustness(report).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    drawn = [container.lines[0].get_ydata() for container in axes.containers]
    np.testing.assert_allclose(drawn, [[3 / 20, 9 / 20], [4 / 20, 10 / 20], [5 / 20, 11 / 20]])


def test_progress_shows_batches_and_held_out_measurements():
    history = [
        {"step": s, "loss": 1 / s, "robust_accuracy": 0.1 * s, "held_out": 0.5 if s == 2 else None} for s in (1, 2, 3)
    ]
    left, right = plots.adv_ntk_progress(history, step=2).axes
    np.testing.assert_allclose(left.get_lines()[0].get_ydata(), [1, 1 / 2, 1 / 3])
    held_out = next(line for line in right.get_lines() if line.get_label() == "held-out images")
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([2], [0.5])
    assert left.get_xlabel() == right.get_xlabel() == "step"


def test_the_strip_names_predictions_and_colours_those_that_were_fooled():
    images = np.random.default_rng(0).random((2, 4, 4, 3)).astype("float32")
    figure = plots.image_strip(
        images, {"NTK": images}, np.array([0, 1]), {"NTK": (np.array([0, 1]), np.array([1, 1]))}, ("cat", "dog")
    )
    titles = [(axes.get_title(), axes.title.get_color()) for axes in figure.axes]
    assert titles == [
        ("cat", "black"), ("dog", "black"), ("cat → dog", plots.VERMILION), ("dog → dog", plots.BLUE)
    ]  # fmt: skip


def curves_of(models, radii=3, n=40):
    rng = np.random.default_rng(0)
    correct = np.logical_and.accumulate(rng.random((models, radii, n)) < 0.7, axis=1)
    nothing = np.zeros((models, radii))
    attack = {"name": "PGD-20", "norm": "L2"}
    names = [f"model {i}" for i in range(models)]
    counts = nothing.astype(int)
    return AccuracyCurves(names, np.linspace(0, 0.5, radii), correct, nothing, counts, counts, attack, 0.9)


def test_curves_are_drawn_with_their_intervals():
    curves = curves_of(2)
    axes = plots.accuracy_curves(curves).axes[0]
    for line, expected in zip(axes.get_lines(), curves.accuracy, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), curves.eps)
        np.testing.assert_array_equal(line.get_ydata(), expected)
    low, high = curves.interval
    for i, band in enumerate(axes.collections):
        vertices = band.get_paths()[0].vertices
        at_last = vertices[np.isclose(vertices[:, 0], 0.5)][:, 1]
        assert (at_last.min(), at_last.max()) == pytest.approx((low[i, -1], high[i, -1]))
    assert "L2" in axes.get_xlabel()
    assert all(text in axes.get_ylabel() for text in ("40 images", "90%"))
    assert "PGD-20" in axes.get_title()


def test_eight_curves_differ_in_colour_in_marker_and_in_line():
    axes = plots.accuracy_curves(curves_of(8)).axes[0]
    lines = axes.get_lines()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"model {i}" for i in range(8)]
    colours, markers = ({getattr(line, name)() for line in lines} for name in ("get_color", "get_marker"))
    dashes = {str(line._unscaled_dash_pattern) for line in lines}
    assert (len(colours), len(markers), len(dashes)) == (8, 8, 8)


def contrast(colour, background):
    """Ratio of luminances, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour):
        parts = np.array(matplotlib.colors.to_rgb(colour))
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    dark, light = sorted([luminance(colour), luminance(background)])
    return (light + 0.05) / (dark + 0.05)


def matrix_of(names):
    shape = (len(names) + 1, len(names), 100)
    correct = np.arange(100) < np.linspace(0, 100, shape[0] * shape[1]).reshape(shape[:2])[..., None]
    return TransferMatrix(["none", *names], names, correct, {"name": "PGD-20", "norm": "Linf", "eps": 0.1})


def test_numbers_in_the_map_are_the_accuracies_and_can_be_read():
    matrix = matrix_of([f"model {i}" for i in range(4)])
    axes = plots.transfer_matrix(matrix, title="CIFAR-10").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == matrix.sources
    assert [label.get_text() for label in axes.get_xticklabels()] == matrix.targets
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("perturbed against", "shown to")
    image = axes.get_images()[0]
    np.testing.assert_array_equal(image.get_array(), matrix.accuracy)
    assert len(axes.texts) == 5 * 4
    for text in axes.texts:
        j, i = text.get_position()
        assert text.get_text() == f"{matrix.accuracy[i, j]:.3f}"
        assert contrast(text.get_color(), image.to_rgba(matrix.accuracy[i, j])[:3]) > 4.5


def test_long_names_below_the_map_do_not_overlap_nor_leave_the_figure():
    figure = plots.transfer_matrix(matrix_of(["early stopping, t = 0.01", "ridge regression", "Adv-NTK"]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    starts = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x1 - 10 for left, right in itertools.pairwise(starts))
    everything = [*starts, *(label.get_window_extent() for label in axes.get_yticklabels())]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 for box in everything)
    assert axes.get_xticklabels()[0].get_rotation() == 40


def test_legend_of_robustness_hides_no_point():
    columns = ["clean", *(f"attack {i}" for i in range(5)), "worst case"]
    rows = {"a": {column: Score(3 * i, 20, 0.0) for i, column in enumerate(columns)}}
    figure = plots.robustness(Report(rows, {c: {"norm": "Linf", "eps": 0.1} for c in columns[1:-1]}, 20, 0.9))
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    assert len({container.lines[0].get_marker() for container in axes.containers}) == 7
    assert "90% intervals" in axes.get_ylabel()
