"""Figures show what they were given, and say what their axes are."""

import numpy as np
import pytest

from ntkadv import plots
from ntkadv.report import Report, Score, wilson_interval
from ntkadv.selection import RobustnessPath


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
