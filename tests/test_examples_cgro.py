"""The CGRO examples run, small, from data to figures, and go on where they were stopped."""

import contextlib
import io
import json

import numpy as np
import pytest


def run_main(example, config):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        example.main(config)
    return printed.getvalue()


SMALL = {
    "d": 30, "n_train": 6, "n_test": 40, "width": 4, "init_std": 0.05, "steps": 50, "seeds": (0, 1), "pgd_seeds": (0,),
    "pgd_width": 4, "pgd_steps": 5, "grid": 2, "diagram_steps": 20, "depth": 1, "kernel_seeds": (0,), "fit_steps": 2,
}  # fmt: skip


@pytest.mark.slow
def test_dynamics_leave_phases_and_accuracies(script, tmp_path):
    example = script("cgro_dynamics")
    printed = run_main(example, example.Config(**SMALL, sweeps=False, kernel=False, output=tmp_path))
    assert "seed 1" in printed
    for figure in ("three_phases", "accuracies"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "accuracies.json").read_text())
    assert len(results) == 2
    judged(example, results)


@pytest.mark.slow
def test_dynamics_leave_diagrams_and_kernels_too(script, tmp_path):
    example = script("cgro_dynamics")
    run_main(example, example.Config(**SMALL, counts=True, output=tmp_path))
    for figure in ("diagram", "counts"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "accuracies.json").read_text())
    assert len(results) == 5
    judged(example, results)
    lines = json.loads((tmp_path / "transitions.json").read_text())
    assert {line["varied"] for line in lines} == {
        "as above", "N", "d", "alpha", "sigma", "delta / alpha", "lambda", "width",
    }  # fmt: skip


def judged(example, results):
    for values in results.values():
        assert set(values) == set(example.ACCURACIES)
        for part in ("train", "test"):
            clean, robust = (np.array(values[f"{part}_{kind}"]) for kind in ("clean", "robust"))
            assert (robust <= clean).all()


@pytest.mark.slow
@pytest.mark.loose_promotion  # optax
def test_representation_leaves_table_and_figures_and_goes_on(script, tmp_path, monkeypatch):
    example = script("cgro_representation")
    config = example.Config(
        n_train=40, n_test=12, depth=1, width=8, train_steps=20, steps=2, radii=2, output=tmp_path
    )  # fmt: skip
    printed = run_main(example, config)
    assert "by layer: absolute" in printed
    for figure in ("cgro_classifier", "parameters", "radii"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    everything = table["memorises everything"]
    assert everything["images"] == 40
    assert everything["train"]["worst"] == 1
    for row in table.values():
        assert row["test"]["worst"] <= min(row["test"][kind] for kind in ("clean", "direct", "transferred", "balls"))
    monkeypatch.setattr(example, "train", None)
    monkeypatch.setattr(example.cgro, "judge_cgro_classifier", None)
    run_main(example, config)
    assert json.loads((tmp_path / "table.json").read_text())["rows"] == table
