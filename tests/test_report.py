import io
import json

import pytest
import rich.console
import rich.text
import scipy.stats

from ntkadv.report import Report, Score, wilson_interval

ATTACKS = {"PGD-20": {"attack": "PGD", "norm": "Linf", "eps": 8 / 255, "steps": 20, "step_size": None}}
ROWS = {
    "NTK": {"clean": Score(543, 1000, 1.5), "PGD-20": Score(0, 1000, 2.5), "worst case": Score(0, 1000, 4.0)},
    "[early] | stop": {
        "clean": Score(500, 1000, 1.0),
        "PGD-20": Score(123, 1000, 2.0),
        "worst case": Score(12, 1000, 3.0),
    },
}
REPORT = Report(ROWS, ATTACKS, 1000)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 1), (543, 1000), (7, 31)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_interval_is_that_of_scipy(successes, n, confidence):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_impossible_proportions_are_refused(unchecked):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="successes must be at most n, got 4 of 3"):
        wilson_interval(4, 3)
    with pytest.raises(TypeError, match="successes must be an integer, got 0"):
        wilson_interval(0.5, 3)
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match="confidence must be"):
            wilson_interval(1, 3, confidence)


def test_table_shows_every_number_with_its_interval():
    lines = str(REPORT).splitlines()
    head = next(line for line in lines if "model" in line)
    assert [head.index(c) for c in ("clean", "PGD-20", "worst case")] == sorted(
        head.index(c) for c in ("clean", "PGD-20", "worst case")
    )
    low, high = scipy.stats.binomtest(543, 1000).proportion_ci(method="wilson")
    row = next(line for line in lines if "NTK" in line)
    assert f"0.543 [{low:.3f}, {high:.3f}]" in row
    assert row.count("0.000 [0.000, 0.004]") == 2
    assert any("[early] | stop" in line for line in lines)
    assert "Accuracy on 1000 images with 95% intervals; Linf eps = 0.03137" in str(REPORT)


def test_plain_text_has_no_terminal_codes_and_a_terminal_gets_the_same_table():
    assert "\x1b" not in str(REPORT)
    screen = io.StringIO()
    rich.console.Console(width=200, force_terminal=True, color_system="standard", file=screen).print(REPORT)
    shown = rich.text.Text.from_ansi(screen.getvalue()).plain
    assert "\x1b" in screen.getvalue()
    assert "0.543 [0.512, 0.574]" in shown
    assert "[early] | stop" in shown


def test_markdown_has_a_row_for_each_model():
    lines = REPORT.to_markdown().splitlines()
    assert lines[0] == "| model | clean | PGD-20 | worst case |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[2].startswith("| NTK | 0.543 [0.512, 0.574] | ")
    assert lines[3].startswith(r"| [early] \| stop | ")


def test_json_holds_what_is_needed_and_comes_back(tmp_path):
    path = tmp_path / "report.json"
    REPORT.to_json(path)
    values = json.loads(path.read_text())
    assert values["n"] == 1000
    assert values["attacks"]["PGD-20"] == ATTACKS["PGD-20"]
    cell = values["rows"]["NTK"]["clean"]
    assert (cell["correct"], cell["accuracy"], cell["seconds"]) == (543, 0.543, 1.5)
    assert cell["interval"] == pytest.approx([0.512, 0.574], abs=1e-3)
    assert Report.from_json(path) == REPORT
    assert str(Report.from_json(path)) == str(REPORT)


def test_confidence_survives_json():
    rows = {"NTK": {column: Score(5, 10, 1.0, 0.5) for column in ("clean", "worst case")}}
    report = Report(rows, {}, 10, 0.5)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_damaged_json_is_named():
    values = REPORT.to_dict()
    del values["confidence"]
    with pytest.raises(ValueError, match="'confidence' is missing"):
        Report.from_dict(values)


def test_unknown_cells_are_refused():
    with pytest.raises(ValueError, match=r"model must be one of 'NTK', .* got 'CNN'"):
        REPORT.cell("CNN")
    with pytest.raises(ValueError, match=r"column must be one of 'clean', .* got 'FGSM'"):
        REPORT.cell("NTK", "FGSM")


def test_a_narrow_terminal_gets_every_number_too():
    screen = io.StringIO()
    rich.console.Console(width=60, file=screen).print(REPORT)
    shown = screen.getvalue()
    assert max(len(line) for line in shown.splitlines()) <= 60
    assert "…" not in shown
    assert "0.543" in shown
    assert "0.51-0.57" in shown
