"""Curves of models whose distance to the decision boundary is known for every sample."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.attacks import PGD, Attack, Linf
from ntkadv.curves import AccuracyCurves, accuracy_curves
from ntkadv.data import Dataset
from ntkadv.evaluation import evaluate
from ntkadv.statistics import wilson_interval

N = 8
IMAGES = np.full((N, 2, 2, 1), 0.5, np.float32)
IMAGES[:, 0, 0, 0] = np.arange(N) / 10
LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 0], np.int32)
DISTANCE = np.array([0.25, 0.15, 0.05, 0.05, 0.15, 0.25, 0.35, -0.45])
"""To the threshold; the last is misclassified as it is."""
ATTACK = PGD(Linf(0.5), steps=3, loss="margin", random_start=False)


def threshold(x):
    """Class 1 from 0.25 of the first pixel on."""
    score = x[:, 0, 0, 0] - 0.25
    return jnp.stack([-score, score], axis=1)


def hardly(x):
    """The same, from 0.95 on: a sample of class 0 is far off."""
    score = x[:, 0, 0, 0] - 0.95
    return jnp.stack([-score, score], axis=1)


def curves_of(models=None, attack=ATTACK, eps=(0.1, 0.2, 0.3), data=(IMAGES, LABELS), **options):
    models = {"a": threshold} if models is None else models
    return accuracy_curves(
        models, data, attack, eps, **{"key": jax.random.key(0), "batch_size": 4, "progress": False, **options}
    )


@pytest.mark.parametrize("batch_size", [4, 256])
def test_samples_break_where_the_ball_reaches_the_boundary(batch_size):
    curves = curves_of(eps=(0.3, 0.1, 0.2, 0.1), batch_size=batch_size)
    assert curves.eps.tolist() == [0, 0.1, 0.2, 0.3]
    np.testing.assert_array_equal(curves.correct[0], curves.eps[:, None] < DISTANCE)
    np.testing.assert_allclose(curves.accuracy[0], [7 / 8, 5 / 8, 3 / 8, 1 / 8])
    low, high = curves.interval
    assert (low[0, 1], high[0, 1]) == wilson_interval(5, 8)


def test_zero_is_the_clean_accuracy_and_need_not_be_asked_for():
    clean = evaluate(threshold, (IMAGES, LABELS), key=jax.random.key(0), check=False, progress=False).correct["clean"]
    for eps in ([0.1], [0, 0.1], np.array([0.1, 0.0])):
        curves = curves_of(eps=eps)
        assert curves.eps.tolist() == [0, 0.1]
        np.testing.assert_array_equal(curves.correct[0, 0], clean)


def test_only_samples_that_are_left_are_attacked():
    curves = curves_of({"a": threshold, "b": hardly})
    assert curves.gradients.tolist() == [[0, 3 * 7, 3 * 5, 3 * 3], [0, 3 * 4, 3 * 4, 3 * 4]]
    assert curves.forwards.tolist() == [[8, 7, 5, 3], [8, 4, 4, 4]]
    assert (curves.seconds > 0).all()


def test_nothing_is_attacked_when_nothing_is_left():
    curves = curves_of(eps=(0.4, 0.5))
    np.testing.assert_allclose(curves.accuracy[0], [7 / 8, 0, 0])
    assert curves.gradients[0].tolist() == [0, 21, 0]


@dataclasses.dataclass(frozen=True)
class WeakWhenLarge(Attack):
    """Moves the first pixel by 0.1 where it may, but not if it may move it by 0.2."""

    def perturb(self, model, x, labels, keys):
        sign = jnp.where(labels == 0, 1.0, -1.0)
        shift = jnp.where(self.threat.eps < 0.2, self.threat.eps, 0.0)
        return self.threat.project(x.at[:, 0, 0, 0].add(shift * sign), x)


def test_a_sample_broken_at_one_radius_is_broken_at_larger_ones():
    curves = curves_of(attack=WeakWhenLarge(Linf(0.0)), eps=(0.1, 0.2))
    np.testing.assert_array_equal(curves.correct[0, 1], DISTANCE > 0.1)
    np.testing.assert_array_equal(curves.correct[0, 2], DISTANCE > 0.1)


@dataclasses.dataclass(frozen=True)
class Noise(Attack):
    """A random allowed point."""

    def perturb(self, model, x, labels, keys):
        return self.threat.random_point(keys, x)


@pytest.mark.slow
def test_random_numbers_of_a_sample_depend_on_the_radius_and_not_on_its_company():
    images = np.full((200, 2, 2, 1), 0.35, np.float32)
    data = (images, np.ones(200, np.int32))
    both, one = (curves_of(attack=Noise(Linf(0.0)), eps=eps, data=data, batch_size=64) for eps in ((0.2, 0.3), (0.3,)))
    broken_at_first = ~both.correct[0, 1]
    assert 20 < broken_at_first.sum() < 180
    np.testing.assert_array_equal(both.correct[0, 2], both.correct[0, 1] & one.correct[0, 1])
    assert (one.correct[0, 1] & broken_at_first).any()


def counting(traces):
    def model(x):
        traces.append(x.shape)
        return threshold(x)

    return model


def test_one_program_serves_all_radii_however_many_samples_are_left():
    one, three = [], []
    curves_of({"a": counting(one)}, eps=[0.1])
    curves = curves_of({"a": counting(three)}, eps=[0.1, 0.2, 0.3])
    assert curves.gradients[0].tolist() == [0, 21, 15, 9]
    # All images at once are asked for the number of classes only.
    assert set(three) == {(4, 2, 2, 1), IMAGES.shape}
    assert len(three) == len(one)


def test_a_stopped_measurement_goes_on_from_its_state(tmp_path):
    models = {"a/b": threshold, "a b": hardly}
    attack = Noise(Linf(0.0))
    curves_of(models, attack, eps=(0.1,), state=tmp_path / "state")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "state").rglob("*.npz")}
    assert len(written) == 2
    whole, resumed = (curves_of(models, attack, eps=(0.1, 0.3), state=state) for state in (None, tmp_path / "state"))
    np.testing.assert_array_equal(resumed.correct, whole.correct)
    np.testing.assert_array_equal(resumed.gradients, whole.gradients)
    assert len(list((tmp_path / "state").rglob("*.npz"))) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_median_radius_is_where_half_of_the_right_samples_are_broken():
    models = {"a": threshold, "never right": lambda x: -hardly(x) * 0 + jnp.array([0.0, 1.0])}
    labels = np.zeros(N, np.int32)
    curves = curves_of({"a": threshold}, eps=(0.1, 0.2, 0.3))
    # 7 right; 5 at 0.1 and 3 at 0.2: 3.5 of them three quarters of the way.
    assert curves.median_eps == {"a": pytest.approx(0.175)}
    assert np.isnan(curves_of(eps=(0.1,)).median_eps["a"])
    wrong = curves_of({"never right": models["never right"]}, eps=(0.1,), data=(IMAGES, labels))
    assert np.isnan(wrong.median_eps["never right"])


def test_curves_come_back_from_json_and_csv_holds_every_point(tmp_path):
    curves = curves_of({"a": threshold, "b": hardly}, confidence=0.9)
    curves.to_json(tmp_path / "curves.json")
    back = AccuracyCurves.from_json(tmp_path / "curves.json")
    for field in dataclasses.fields(AccuracyCurves):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(curves, field.name))
    assert json.loads((tmp_path / "curves.json").read_text())["attack"]["name"] == "PGD-3 margin"
    curves.to_csv(tmp_path / "curves.csv")
    with open(tmp_path / "curves.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 4
    low, high = curves.interval
    assert [float(lines[5][name]) for name in ("eps", "accuracy", "low", "high")] == [
        0.1, curves.accuracy[1, 1], low[1, 1], high[1, 1]
    ]  # fmt: skip
    assert (lines[5]["model"], lines[5]["norm"], lines[5]["n"], lines[5]["gradients"]) == ("b", "Linf", "8", "12")
    (tmp_path / "curves.json").write_text('{"models": []}')
    with pytest.raises(ValueError, match="'eps' is missing"):
        AccuracyCurves.from_json(tmp_path / "curves.json")


def test_split_of_a_data_set_is_used():
    data = Dataset.from_arrays(name="pixels", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[1:5], y_test=LABELS[1:5])
    assert [curves_of(data=data, eps=[0.1], split=split).n for split in ("test", "train")] == [4, 8]


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        ([], r"eps must hold at least one radius, got \[\]"),
        (0.1, r"eps must hold at least one radius, got 0.1; write \[2 / 255"),
        (np.array(0.1), r"eps must hold at least one radius, got array\(0.1\)"),
        ([0.1, -0.1], r"eps\[1\] must be finite and not negative, got -0.1"),
        ([float("nan")], r"eps\[0\] must be finite and not negative, got nan"),
        ([float("inf")], r"eps\[0\] must be finite"),
        ([0.1, 8.0], "write 8 of 255 as 8 / 255"),
    ],
)
def test_radii_that_make_no_sense_are_refused(eps, message, unchecked):
    with pytest.raises(ValueError, match=message):
        curves_of(eps=eps)


def test_what_users_do_wrong_is_named(unchecked):
    with pytest.raises(ValueError, match="models must be a dictionary"):
        curves_of({})
    with pytest.raises(TypeError, match="attack must be one attack, got list"):
        curves_of(attack=[ATTACK])
    with pytest.raises(TypeError, match="key must be a random key"):
        curves_of(key=0)
