"""The example of the NTK's features runs, small, from data to figures, and goes on where it was stopped."""

import contextlib
import io
import json

import numpy as np
import pytest

import ntkadv as na
from ntkadv.features import FeatureRobustness


@pytest.fixture(scope="module")
def example(script):
    return script("ntk_features")


@pytest.mark.slow
@pytest.mark.loose_promotion  # optax
def test_features_leave_figures_and_numbers_and_go_on(example, tmp_path, monkeypatch):
    config = example.Config(
        n_train=60, n_test=24, depth=1, width=16, channels=2, steps=3, singles=4, edges=(5, 20), cut=5, train_steps=6,
        output=tmp_path,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        example.main(config)
    for figure in ("features", "learning", "transfer", "gradients", "perturbations"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    measured = json.loads((tmp_path / "features.json").read_text())
    found = {name: FeatureRobustness.from_dict(values) for name, values in measured.items()}
    np.testing.assert_array_equal(found["bands"].ranges, [(0, 5), (5, 20), (20, 60)])
    np.testing.assert_array_equal(found["leading"].ranges, [(0, 5), (0, 20), (0, 60)])
    assert found["bands"].energy.sum() == pytest.approx(1, rel=1e-5)
    learnt = json.loads((tmp_path / "learning.json").read_text())
    shares = np.array(learnt["NTK"]["learnt"])
    assert shares.shape == (40, 3)
    assert (np.diff(shares, axis=0) >= -1e-9).all()
    assert (np.diff(shares, axis=1) <= 1e-9).all()
    matrix = na.TransferMatrix.from_json(tmp_path / "transfer.json")
    kernels = ["NTK, t = ∞", "NTK, t = 0.3", "NTK, top 5", "NTK, beyond 5"]
    assert matrix.sources == ["none", "random", "random signs", *kernels, "MLP", "CNN"]
    assert matrix.targets == ["MLP", "CNN"]
    assert "rank correlation of index and robust usefulness" in " ".join(printed.getvalue().split())

    monkeypatch.setattr(example, "train", None)
    monkeypatch.setattr(example, "feature_robustness", None)
    monkeypatch.setattr(na, "gram", None)
    with contextlib.redirect_stdout(io.StringIO()):
        example.main(config)
    again = na.TransferMatrix.from_json(tmp_path / "transfer.json")
    np.testing.assert_array_equal(again.correct, matrix.correct)


def test_random_signs_are_at_the_corners_of_the_ball(example):
    images = np.full((50, 4, 4, 1), 0.5, np.float32)
    images[:25] = 0
    labels = np.arange(50, dtype=np.int32) % 2
    data = na.Dataset.from_arrays(name="made", x_train=images, y_train=labels, x_test=images, y_test=labels)
    seen = []

    def model(x):
        seen.append(np.asarray(x))
        return np.stack([x.mean(axis=(1, 2, 3)) * 0 + 1, x.mean(axis=(1, 2, 3)) * 0], axis=1)

    correct = np.ones((3, 1, 50), bool)
    before = na.TransferMatrix(["none", "random", "a"], ["m"], correct, {"eps": 0.1, "norm": "Linf", "name": "PGD"})
    after = example.with_random_signs(before, data, {"m": model}, 0.1, example.jax.random.key(0))
    assert after.sources == ["none", "random", "random signs", "a"]
    np.testing.assert_array_equal(after.correct[2, 0], labels == 0)
    np.testing.assert_allclose(np.unique(seen[0][:25]), [0, 0.1], atol=1e-6)
    np.testing.assert_allclose(np.unique(seen[0][25:]), [0.4, 0.6], atol=1e-6)
    assert abs((seen[0][25:] > 0.5).mean() - 0.5) < 0.1
