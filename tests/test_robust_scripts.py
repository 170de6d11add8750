"""The example of robust training and the comparison run, small: from images to tables, and what is there stays."""

import contextlib
import csv
import io
import json

import numpy as np
import pytest


def printed(main, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main(*arguments)
    return " ".join(text.getvalue().split())


@pytest.mark.slow
@pytest.mark.loose_promotion  # optax
def test_the_comparison_run_judges_each_cell_once(script, tmp_path, monkeypatch):
    bench = script("robustness")
    methods = ("early stopping", "PGD-AT", "CURE")
    config = bench.Config(scale="smoke", families=("MLP", "patch CNN"), methods=methods, seeds=(0,), output=tmp_path)
    text = printed(bench.main, config)
    assert "[4/4] patch CNN, PGD-AT, seed 0" in text
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["family"], row["method"]) for row in rows] == [("MLP", m) for m in methods] + [("patch CNN", "PGD-AT")]
    for row in rows:
        assert float(row["clean low"]) <= float(row["clean"]) <= float(row["clean high"])
        assert float(row["AutoAttack"]) <= float(row["PGD-20"]) + 1 / 40
    assert (tmp_path / "table.md").read_text().count("\n") == len(rows) + 2
    assert json.loads((tmp_path / "table.json").read_text())["config"]["dataset"] == "digits"
    assert (tmp_path / "clean_against_robust.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(bench.Bench, "make", lambda *_: pytest.fail("a finished cell was computed again"))
    before = (tmp_path / "table.csv").read_text()
    assert "[1/4]" not in printed(bench.main, config)
    assert (tmp_path / "table.csv").read_text() == before
    with pytest.raises(ValueError, match="eps"):
        bench.main(bench.Config(scale="smoke", eps=0.2, seeds=(0,), output=tmp_path))
    with pytest.raises(ValueError, match="families must be among"):
        bench.main(bench.Config(scale="smoke", families=("VGG",), output=tmp_path / "other"))


def test_intervals_are_wilsons_for_one_seed_and_students_for_several(script):
    bench = script("robustness")
    mean, low, high = bench.interval([(8, 10)])
    assert (mean, round(low, 3), round(high, 3)) == (0.8, 0.490, 0.943)
    mean, low, high = bench.interval([(4, 10), (5, 10), (6, 10)])
    half = 4.302652729911275 * 0.1 / np.sqrt(3)
    np.testing.assert_allclose((mean, low, high), (0.5, 0.5 - half, 0.5 + half))
    assert bench.interval([(10, 10), (10, 10)]) == (1.0, 1.0, 1.0)


def test_every_family_has_its_methods_and_every_scale_its_families(script):
    bench, models = script("robustness"), script("robust_models")
    for scale in bench.SCALES.values():
        assert set(scale.families) <= set(models.FAMILIES)
    assert {"standard", "PGD-AT", "FGSM", "TRADES", "APART", "CURE", "Adv-NTK", "ridge"} <= set(models.FAMILIES["CNN"])


@pytest.mark.slow
@pytest.mark.loose_promotion
def test_robust_training_draws_its_figures_and_goes_on(script, tmp_path, monkeypatch):
    example = script("robust_training")
    config = example.Config(
        dataset="digits", n_train=40, n_test=20, epochs=2, batch_size=20, looks=2, eps=0.1, attack_steps=2,
        methods=("pgd", "fgsm", "apart", "cure"), seeds=(0,), output=tmp_path,
    )  # fmt: skip
    text = printed(example.main, config)
    assert "APART" in text
    for figure in ("collapse", "generator", "apart_scalars", "robust_overfitting", "prominence"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())["methods"]
    assert summary["APART"]["forward"] == summary["APART"]["backward"] == 2
    assert summary["PGD"]["backward"] == 3
    prominence = json.loads((tmp_path / "prominence.json").read_text())
    assert len(prominence["layers"]) == 4
    assert (np.diff(prominence["percentiles_10_50_90"]["before"], axis=1) >= 0).all()
    monkeypatch.setattr(example, "train", lambda *_, **__: pytest.fail("a finished network was trained again"))
    printed(example.main, config)
    with pytest.raises(ValueError, match="methods must be among"):
        example.main(example.Config(methods=("fgsm",), output=tmp_path / "other"))
