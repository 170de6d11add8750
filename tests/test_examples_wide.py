"""The examples of wide networks run, small, from data to figures, and go on where they were stopped."""

import contextlib
import io
import json

import numpy as np
import pytest


def run(module, config):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        module.main(config)
    return " ".join(printed.getvalue().split())


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_degeneration_measures_every_distance_and_goes_on(script, tmp_path, monkeypatch):
    example = script("degeneration")
    config = example.Config(
        n_train=8, n_test=6, depth=1, widths=(8, 32), seeds=(0, 1), time=2.0, long_width=16, long_time=60.0,
        strengths=(0.05, 0.2), strength=0.05, output=tmp_path,
    )  # fmt: skip
    printed = run(example, config)
    for figure in (
        "distance_over_time",
        "distance_against_width",
        "degeneration",
        "accuracy_over_time",
        "kernel_movement",
    ):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    found = results(tmp_path)
    # With and without attacks, two predictions each, and one more with; with to without, network and theory; two parts.
    assert len(found["gaps"]) == (2 * 2 + 1 + 2) * 2
    assert {len(rows) for by_width in found["gaps"].values() for rows in by_width.values()} == {2}
    # At the beginning nothing has been predicted yet, in the end the closed forms with and without attacks are one.
    assert max(row[0] for by_width in found["gaps"].values() for rows in by_width.values() for row in rows) < 1e-5
    apart = found["long"]["distance"]["train images"]["own closed form"]
    assert apart[-1] < 0.3 * max(apart)
    assert "kernel" in printed

    monkeypatch.setattr(example.WideNetwork, "ntk_at", None)
    run(example, config)
    again = results(tmp_path)
    assert (again["gaps"], again["long"], again["accuracy"]) == (found["gaps"], found["long"], found["accuracy"])


@pytest.mark.slow
def test_rates_that_vary_are_placed_between_flow_and_closed_form(script, tmp_path):
    example = script("varying_rates")
    config = example.Config(n_train=6, n_test=4, depth=1, widths=(64,), seeds=(0,), time=3.0, output=tmp_path)
    printed = run(example, config)
    assert (tmp_path / "varying_rates.png").read_bytes().startswith(b"\x89PNG")
    found = results(tmp_path)["found"]["64"]
    apart, network, formula = (
        np.array(found[f"{name} train"])[0]
        for name in ("closed form to flow", "network to flow", "network to closed form")
    )
    assert apart.max() > 0.01
    assert (np.abs(network - formula) <= apart + 1e-9).all()
    assert "from 0 (flow) to 1 (closed form)" in printed


@pytest.mark.slow
def test_the_limits_of_the_theory_are_tried_one_by_one(script, tmp_path):
    example = script("where_theory_ends")
    config = example.Config(
        n_train=6, n_test=4, width=16, depth=1, strengths=(0.01, 0.1), rates=(0.5, 30.0), depths=(1,), eps=(0.05,),
        time=1.0, output=tmp_path,
    )  # fmt: skip
    run(example, config)
    assert (tmp_path / "where_theory_ends.png").read_bytes().startswith(b"\x89PNG")
    rows = {(row["sweep"], row["value"]): row for row in results(tmp_path)["cases"]}
    assert np.isfinite(float(rows["attack strength", "0.01"]["to own closed form"]))
    weak, strong = (rows["attack strength", value]["leaves ball at the start"] for value in ("0.01", "0.1"))
    assert weak <= strong
    assert rows["PGD eps", "0.05"]["to own closed form"] == "nan"
    assert float(rows["PGD eps", "0.05"]["to linearisation, same steps"]) > 0
