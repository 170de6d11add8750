"""Each example runs, small, from data to figures, and goes on where it was stopped."""

import contextlib
import io
import json
import warnings

import numpy as np
import pytest

import ntkadv as na


@pytest.fixture(scope="module")
def example(script):
    return script("robust_overfitting")


@pytest.fixture(scope="module")
def strong_attacks(script):
    return script("strong_attacks")


@pytest.mark.slow
@pytest.mark.loose_promotion  # optax
def test_strong_attacks_leave_curves_transfer_and_table_and_go_on(strong_attacks, tmp_path, monkeypatch):
    config = strong_attacks.Config(
        n_train=60, n_val=32, n_test=24, depth=1, width=16, radii=3, steps=3, queries=5, fit_steps=3, train_steps=4,
        output=tmp_path,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
        warnings.simplefilter("ignore", na.attacks.EvaluationWarning)
        strong_attacks.main(config)
    for figure in ("accuracy_against_eps", "transfer", "robustness"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    models = ["NTK, t = ∞", "early stopping", "Adv-NTK", "network", "network, PGD"]
    curves = na.AccuracyCurves.from_json(tmp_path / "curves.json")
    assert curves.models == models
    assert (np.diff(curves.accuracy, axis=1) <= 0).all()
    matrix = na.TransferMatrix.from_json(tmp_path / "transfer.json")
    assert matrix.sources == ["none", "random", *models]
    report = na.Report.from_json(tmp_path / "report.json")
    assert report.models == models
    assert "early stopping against Adv-NTK, on the same images" in printed.getvalue()

    monkeypatch.setattr(strong_attacks, "train", None)
    monkeypatch.setattr(na, "gram", None)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", na.attacks.EvaluationWarning)
        strong_attacks.main(config)
    again = na.Report.from_json(tmp_path / "report.json")
    for model in models:
        assert again.cell(model).correct == report.cell(model).correct


def small(example, output, **changes):
    settings = {
        "n_train": 60, "n_val": 32, "n_test": 40, "depth": 1, "attack_steps": 4, "fit_steps": 6, "times": 4,
        "eps": 0.1, "output": output,
    }  # fmt: skip
    return example.Config(**{**settings, **changes})


@pytest.fixture(scope="module")
def whole(example, tmp_path_factory):
    """A run over two seeds, and what it printed."""
    output = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        example.main(small(example, output, seeds=(0, 1)))
    return output, printed.getvalue()


@pytest.mark.slow
def test_robust_overfitting_leaves_table_figures_and_all_that_was_plotted(whole):
    output, printed = whole
    assert "Adv-NTK" in printed
    assert "mean ± standard deviation" in printed
    for seed in (0, 1):
        folder = output / f"seed-{seed}"
        for figure in ("accuracy_over_time", "adv_ntk_progress", "robustness", "images"):
            assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
            assert (folder / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        path = np.load(folder / "arrays" / "time-test.npz")
        assert path["values"].shape == path["clean"].shape == path["robust"].shape == (4,)
        assert json.loads((folder / "config.json").read_text())["seed"] == seed
        report = na.Report.from_json(folder / "report.json")
        assert report.models == ["NTK, t = ∞", "early stopping", "ridge", "Adv-NTK"]
        for model in report.models:
            worst = report.cell(model).accuracy
            assert worst <= min(report.cell(model, column).accuracy for column in report.columns)


@pytest.mark.slow
def test_a_stopped_run_comes_to_the_same_report(example, whole, tmp_path, monkeypatch):
    halves = tmp_path / "halves"

    class StopError(Exception):
        pass

    def stop(*arguments, **settings):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(na, "compare", stop)
        with pytest.raises(StopError):
            example.main(small(example, halves))
    computed_again = []
    with monkeypatch.context() as patch:
        patch.setattr(na, "gram", lambda *arguments, **settings: computed_again.append("gram"))
        patch.setattr(na, "robustness_path", lambda *arguments, **settings: computed_again.append("path"))
        example.main(small(example, halves))
    assert computed_again == []
    one, two = (na.Report.from_json(folder / "seed-0" / "report.json") for folder in (whole[0], halves))
    for model in one.models:
        for column in one.columns:
            assert one.cell(model, column).correct == two.cell(model, column).correct


def test_another_configuration_is_not_mixed_into_a_run(example, tmp_path):
    na.runs.Run(tmp_path / "seed-0", {"eps": 0.2, "seed": 0})
    with pytest.raises(ValueError, match=r"eps: the directory has 0\.2"):
        example.main(small(example, tmp_path))


def test_an_output_folder_that_cannot_be_made_is_refused_before_any_work(example, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="choose one that can be made and written"):
        example.main(small(example, tmp_path / "file" / "runs"))
