"""The example of CGRO on real images runs, small, from data to figures, and goes on where it was stopped."""

import contextlib
import csv
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkadv as na
from ntkadv.training import Batch


@pytest.fixture(scope="module")
def example(script):
    return script("cgro_real_images")


def run_main(example, config):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        example.main(config)
    return printed.getvalue()


SMALL = {
    "dataset": "digits", "n_train": 24, "n_val": 8, "n_test": 16, "eps": 0.1, "epochs": 3, "batch_size": 12,
    "attack_steps": 1, "judge_steps": 2, "records": 3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.loose_promotion  # optax
def test_width_leaves_tables_and_figures_and_goes_on(example, tmp_path, monkeypatch):
    config = example.Config(**SMALL, widths=(1,), seeds=(0, 1), output=tmp_path)
    printed = run_main(example, config)
    assert "lenet-1-seed-1: train clean" in printed
    for figure in ("width", "epochs"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["seed"], row["when"]) for row in rows] == [(0, "best"), (0, "last"), (1, "best"), (1, "last")]
    for row in rows:
        assert row["train_robust"] <= row["train_clean"]
        assert row["test_robust"] <= row["test_clean"]
        assert row["epoch"] in (0, 2, 3)
    with open(tmp_path / "table.csv", newline="") as file:
        assert [float(row["test_robust"]) for row in csv.DictReader(file)] == [row["test_robust"] for row in rows]
    assert (tmp_path / "table.md").read_text().startswith("| width | parameters | clean test |")
    monkeypatch.setattr(example, "train", None)
    run_main(example, config)
    assert json.loads((tmp_path / "table.json").read_text()) == rows


@pytest.mark.slow
@pytest.mark.loose_promotion  # optax
@pytest.mark.parametrize(("model", "widths"), [("lenet5", (1, 2)), ("resnet9", (1,))])
def test_flatness_leaves_curves_and_correlations(example, tmp_path, model, widths):
    config = example.Config(
        **SMALL, model=model, widths=widths, optimizer="sgd", learning_rate=0.1, flatness=True, n_flat=8,
        flat_steps=2, radii=(0.0, 1.0, 2.0), augment=True, warm_up=1, output=tmp_path,
    )  # fmt: skip
    run_main(example, config)
    for figure in (*(f"flatness-{width}-seed-0" for width in widths), "flatness_against_gap"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    correlations = json.loads((tmp_path / "rank_correlation.json").read_text())
    assert set(correlations) == {"1", "2"}
    assert correlations["1"]["robust_loss_gap"]["n"] == 2 * len(widths)


def test_warm_up_shrinks_the_perturbations_of_pgd(example):
    def f(params, x):
        return jnp.concatenate([x.reshape(len(x), -1) @ params, jnp.zeros((len(x), 1))], axis=1)

    params, x = jnp.array([[1.0], [-2.0]]), jnp.full((3, 1, 2, 1), 0.5)
    attack = na.attacks.PGD(na.attacks.Linf(0.2), steps=9, random_start=False, loss="cross_entropy", keep_best=False)
    keys = jax.random.split(jax.random.key(0), 3)
    direction = np.array([-1.0, 1.0]).reshape(1, 1, 2, 1)
    for time, size in ((0.0, 0.0), (5.0, 0.1), (40.0, 0.2)):
        labels = jnp.zeros(3, jnp.int32)
        batch = Batch(x, labels, jnp.zeros((3, 2)), jnp.arange(3), keys, jnp.asarray(time), 1.0)
        images = example.GrowingPGD(attack, loss="cross_entropy", warm_up=10).images(f, params, batch)
        np.testing.assert_allclose(images, x + size * direction, atol=1e-6)


def test_the_best_epoch_is_among_the_recorded_ones(example):
    assert example.Config(epochs=40, records=6).record_epochs == [0, 8, 16, 24, 32, 40]
    with pytest.raises(ValueError, match="records must be from 2 to epochs"):
        example.Config(epochs=3, records=5)
