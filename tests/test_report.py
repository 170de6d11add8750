import csv
import io
import json

import numpy as np
import pytest
import rich.console
import rich.text
import scipy.stats

from ntkadv.attacks.checks import Flag
from ntkadv.attacks.search import Cost
from ntkadv.report import Evaluation, Report, Score
from ntkadv.statistics import mcnemar

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


FLAG = Flag("zero gradients", "3 of 9 [images] have a zero gradient; attack a smooth substitute of the model.")


def full_report(**options):
    """Two models, 11 samples each, PGD and AutoAttack."""
    rng = np.random.default_rng(0)
    attacks = {
        "PGD-20": {"attack": "PGD", "norm": "L2", "eps": 0.5},
        "AutoAttack": {"attack": "AutoAttack", "norm": "Linf", "eps": 8 / 255},
    }
    evaluations = {}
    for model, share in (("NTK", 0.8), ("Adv-NTK", 0.3)):
        correct = {"clean": rng.random(11) < share + 0.2, "PGD-20": rng.random(11) < share}
        correct["AutoAttack"] = correct["PGD-20"] & (rng.random(11) < share)
        evaluations[model] = Evaluation(
            correct,
            {"clean": 0.25, "PGD-20": 1.5, "AutoAttack": 2.0},
            costs={"clean": Cost(0, 11), "PGD-20": Cost(220, 11), "AutoAttack": Cost(4000, 50_000)},
            logs={"AutoAttack": [{"attack": "APGD-CE", "broken": 3, "seconds": 0.5}]},
        )
    rows = {model: evaluation.scores for model, evaluation in evaluations.items()}
    return Report(rows, attacks, 11, 0.95, evaluations, **options)


def test_worst_case_costs_what_all_cost_and_nothing_is_known_without_all():
    report = full_report()
    assert report.cell("NTK").cost == Cost(4220, 50_022)
    correct = {"clean": np.array([True]), "PGD": np.array([False])}
    scores = Evaluation(correct, {"clean": 1.0, "PGD": 1.0}, costs={"clean": Cost(0, 1)}).scores
    assert [scores[name].cost for name in ("clean", "PGD", "worst case")] == [Cost(0, 1), None, None]


def test_csv_has_a_line_for_each_model_and_column(tmp_path):
    report = full_report()
    report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        lines = {(line["model"], line["column"]): line for line in csv.DictReader(file)}
    assert list(lines) == [(model, column) for model in report.models for column in report.columns]
    for (model, column), line in lines.items():
        score = report.cell(model, column)
        numbers = [float(line[name]) for name in ("accuracy", "low", "high", "n", "seconds", "gradients", "forwards")]
        assert numbers == [score.accuracy, score.low, score.high, 11, score.seconds, *score.cost]
    assert (lines["NTK", "PGD-20"]["norm"], float(lines["NTK", "PGD-20"]["eps"])) == ("L2", 0.5)
    assert (lines["NTK", "clean"]["norm"], lines["NTK", "clean"]["eps"]) == ("", "")
    assert (lines["NTK", "worst case"]["norm"], lines["NTK", "worst case"]["eps"]) == ("", "")


def test_csv_leaves_unknown_costs_empty_and_gives_the_one_threat_model(tmp_path):
    REPORT.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert (last["model"], last["column"]) == ("[early] | stop", "worst case")
    assert (last["gradients"], last["forwards"]) == ("", "")
    assert (last["norm"], float(last["eps"])) == ("Linf", 8 / 255)


def test_models_are_described_in_the_words_of_robustbench():
    info = {"NTK": {"architecture": "MLP-5", "venue": "ICLR 2024"}}
    models = full_report(dataset="cifar10", info=info).to_dict()["models"]
    answers = full_report().evaluations["NTK"].correct
    assert models["NTK"] == {
        "name": "NTK",
        "dataset": "cifar10",
        "threat_model": "Linf",
        "eps": "8/255",
        "clean_acc": f"{100 * answers['clean'].mean():.2f}",
        "autoattack_acc": f"{100 * answers['AutoAttack'].mean():.2f}",
        "architecture": "MLP-5",
        "venue": "ICLR 2024",
    }
    assert set(models["Adv-NTK"]) == {"name", "dataset", "threat_model", "eps", "clean_acc", "autoattack_acc"}


def test_robustbench_entries_hold_nothing_that_is_not_known():
    assert REPORT.to_dict()["models"]["NTK"] == {
        "name": "NTK",
        "threat_model": "Linf",
        "eps": "8/255",
        "clean_acc": "54.30",
    }
    reduced = full_report()
    reduced.attacks["AutoAttack"]["name"] = "AutoAttack 10 steps"
    assert set(reduced.to_dict()["models"]["NTK"]) == {"name", "clean_acc"}
    rows = {"NTK": {"clean": Score(1, 3, 1.0), "worst case": Score(1, 3, 1.0)}}
    assert Report(rows, {}, 3).to_dict()["models"]["NTK"] == {"name": "NTK", "clean_acc": "33.33"}
    half = {"PGD": {"attack": "PGD", "norm": "L2", "eps": 0.5}}
    assert Report({"NTK": {**rows["NTK"], "PGD": Score(0, 3, 1.0)}}, half, 3).to_dict()["models"]["NTK"]["eps"] == "0.5"


def test_everything_but_images_and_culprits_comes_back_from_json(tmp_path):
    info = {"NTK": {"architecture": "MLP-5"}}
    report = full_report(dataset="cifar10", info=info, flags={"NTK": [FLAG]})
    report.to_json(tmp_path / "report.json")
    back = Report.from_json(tmp_path / "report.json")
    assert back == report
    for model, evaluation in report.evaluations.items():
        held = back.evaluations[model]
        assert (held.seconds, held.costs, held.logs) == (evaluation.seconds, evaluation.costs, evaluation.logs)
        for column, answers in evaluation.correct.items():
            np.testing.assert_array_equal(held.correct[column], answers)
    assert back.evaluations["NTK"].flags == [FLAG]
    assert back.to_dict() == report.to_dict()


@pytest.mark.parametrize("column", ["clean", "AutoAttack", "worst case"])
def test_models_are_compared_sample_by_sample_also_after_json(column):
    report = full_report()
    ours, theirs = (report.evaluations[model].answers[column] for model in ("NTK", "Adv-NTK"))
    expected = mcnemar(ours, theirs)
    assert (expected.only_first, expected.only_second) != (0, 0)
    assert report.paired("NTK", "Adv-NTK", column) == expected
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).paired("NTK", "Adv-NTK", column) == expected


def test_comparison_needs_answers_and_known_names():
    with pytest.raises(ValueError, match="must hold the answers for each sample"):
        REPORT.paired("NTK", "[early] | stop")
    with pytest.raises(ValueError, match="second must be one of 'NTK', 'Adv-NTK', got 'CNN'"):
        full_report().paired("NTK", "CNN")
    with pytest.raises(ValueError, match=r"column must be one of 'clean', .* got 'FGSM'"):
        full_report().paired("NTK", "Adv-NTK", "FGSM")


def test_files_of_earlier_versions_are_read():
    cells = {"clean": (543, 1.5), "PGD-20": (0, 2.5), "worst case": (0, 4.0)}
    earlier = {
        "n": 1000,
        "confidence": 0.95,
        "attacks": ATTACKS,
        "rows": {
            "NTK": {
                column: {"correct": k, "accuracy": k / 1000, "interval": [0.0, 1.0], "seconds": seconds}
                for column, (k, seconds) in cells.items()
            }
        },
    }
    report = Report.from_dict(earlier)
    assert report == Report({"NTK": ROWS["NTK"]}, ATTACKS, 1000)
    assert report.evaluations is None
    assert report.cell("NTK").cost is None


def test_damaged_answers_are_named():
    values = full_report().to_dict()
    cell = values["rows"]["NTK"]["PGD-20"]
    whole = cell["bits"]
    cell["bits"] = whole[:2]
    with pytest.raises(ValueError, match="must be of 11 samples, got 2 hexadecimal digits"):
        Report.from_dict(values)
    cell["bits"] = "0000"
    with pytest.raises(ValueError, match=r"answers of 'NTK' under 'PGD-20' must be \d+ right ones, got 0"):
        Report.from_dict(values)


def test_flags_are_shown_below_the_table_in_every_form():
    report = full_report(flags={"NTK": [FLAG]})
    assert "NTK: 3 of 9 [images] have a zero gradient" in str(report)
    assert report.to_markdown().endswith(f"\n\n- NTK: {FLAG.message}\n")
    assert report.to_dict()["flags"] == {"NTK": [{"kind": FLAG.kind, "message": FLAG.message}]}
    assert "zero gradient" not in str(full_report())
    screen = io.StringIO()
    rich.console.Console(width=60, file=screen).print(report)
    assert max(len(line) for line in screen.getvalue().splitlines()) <= 60
    assert FLAG.message in " ".join(screen.getvalue().split())
