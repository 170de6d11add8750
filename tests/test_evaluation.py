import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.architectures import mlp
from ntkadv.attacks import FGSM, PGD, Attack, Linf
from ntkadv.data import Dataset
from ntkadv.evaluation import compare, evaluate
from ntkadv.predictors import KernelPredictor

N = 6
IMAGES = np.full((N, 2, 2, 1), 0.5, np.float32)
IMAGES[:, 0, 0, 0] = np.arange(N) / 10
LABELS = np.array([0, 0, 0, 1, 1, 1], np.int32)


def threshold(x):
    """Class 1 from 0.25 of the first pixel on: right on all the images."""
    score = x[:, 0, 0, 0] - 0.25
    return jnp.stack([-score, score], axis=1)


def always_one(x):
    return jnp.stack([x[:, 0, 0, 0] * 0, jnp.ones(len(x))], axis=1)


@dataclasses.dataclass(frozen=True)
class Shift(Attack):
    """Adds its eps to the first pixel, or takes it away."""

    sign: int = 1

    @property
    def name(self):
        return "up" if self.sign > 0 else "down"

    def perturb(self, model, x, labels, keys):
        return self.threat.project(x.at[:, 0, 0, 0].add(self.sign * self.threat.eps), x)


@dataclasses.dataclass(frozen=True)
class Noise(Attack):
    """A random allowed point."""

    def perturb(self, model, x, labels, keys):
        return self.threat.random_point(keys, x)


UP, DOWN = Shift(Linf(0.1), 1), Shift(Linf(0.2), -1)


def quietly(*arguments, **options):
    return evaluate(*arguments, **{"key": jax.random.key(0), "progress": False, **options})


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_worst_case_is_right_everywhere(batch_size):
    evaluation = quietly(threshold, (IMAGES, LABELS), [UP, DOWN], batch_size=batch_size)
    assert evaluation.correct["clean"].tolist() == [True] * 6
    assert evaluation.correct["up"].tolist() == [True, True, False, True, True, True]
    assert evaluation.correct["down"].tolist() == [True, True, True, False, False, True]
    assert evaluation.worst_case.tolist() == [True, True, False, False, False, True]
    accuracies = [evaluation.accuracy(name) for name in ("clean", "up", "down", "worst case")]
    np.testing.assert_allclose(accuracies, [1, 5 / 6, 4 / 6, 3 / 6])


def test_an_attack_cannot_repair_a_clean_mistake():
    flipped = np.array([1, 0, 1, 1, 1, 1], np.int32)
    evaluation = quietly(threshold, (IMAGES, flipped), [UP])
    assert evaluation.correct["clean"].tolist() == [False, True, False, True, True, True]
    assert evaluation.correct["up"].tolist() == [False, True, True, True, True, True]
    assert evaluation.worst_case.tolist() == [False, True, False, True, True, True]


def test_without_attacks_the_worst_case_is_the_clean_one():
    evaluation = quietly(always_one, (IMAGES, LABELS))
    assert evaluation.accuracy("worst case") == evaluation.accuracy("clean") == 0.5


def test_adversarial_images_are_kept_on_request():
    evaluation = quietly(threshold, (IMAGES, LABELS), [UP], keep_adversarial=True)
    np.testing.assert_allclose(evaluation.adversarial["up"][:, 0, 0, 0], IMAGES[:, 0, 0, 0] + 0.1, atol=1e-6)
    assert quietly(threshold, (IMAGES, LABELS), [UP]).adversarial is None


def test_random_numbers_of_an_attack_do_not_depend_on_its_company():
    attacks = {"a": Noise(Linf(0.1)), "b": Noise(Linf(0.1))}
    both, one = (
        quietly(threshold, (IMAGES, LABELS), chosen, keep_adversarial=True).adversarial
        for chosen in (attacks, {"b": attacks["b"]})
    )
    np.testing.assert_array_equal(both["b"], one["b"])
    assert np.abs(both["a"] - both["b"]).max() > 0.01


@pytest.fixture(scope="module")
def data():
    return Dataset.from_arrays(
        name="threshold",
        x_train=IMAGES,
        y_train=LABELS,
        x_val=IMAGES[:2],
        y_val=LABELS[:2],
        x_test=IMAGES[1:],
        y_test=LABELS[1:],
    )


@pytest.mark.parametrize(("split", "n"), [("test", 5), ("val", 2), ("train", 6)])
def test_split_of_a_data_set_is_used(data, split, n):
    assert len(quietly(always_one, data, split=split).worst_case) == n


def test_compare_puts_every_model_under_the_same_attacks(data):
    report = compare({"good": threshold, "bad": always_one}, data, [UP, DOWN], progress=False, confidence=0.9)
    assert report.models == ["good", "bad"]
    assert report.columns == ["clean", "up", "down", "worst case"]
    assert [report.cell("good", column).correct for column in report.columns] == [5, 4, 3, 2]
    assert [report.cell("bad", column).correct for column in report.columns] == [3, 3, 3, 3]
    assert report.cell("bad").confidence == report.confidence == 0.9
    assert report.n == 5
    expected = {"attack": "Shift", "norm": "Linf", "eps": 0.1, "sign": 1}
    assert report.attacks["up"] == expected
    assert report.evaluations["good"].correct["up"].tolist() == [True, False, True, True, True]


def test_compare_has_a_key_of_its_own_and_repeats_itself(data):
    first, second = (
        compare({"good": threshold}, data, [Noise(Linf(0.2))], progress=False, keep_adversarial=True) for _ in range(2)
    )
    images = [report.evaluations["good"].adversarial["Noise"] for report in (first, second)]
    np.testing.assert_array_equal(*images)


def test_kernel_predictor_loses_accuracy_under_stronger_attacks():
    arch = mlp(depth=2, num_classes=2)
    rng = np.random.default_rng(0)
    x = rng.random((40, 3, 3, 1)).astype(np.float32)
    labels = (x.mean(axis=(1, 2, 3)) > 0.5).astype(np.int32)
    gram = np.asarray(arch.ntk(x, x), np.float64)
    coefficients = np.linalg.solve(gram + 1e-3 * np.eye(40), np.eye(2)[labels] - 0.5).astype(np.float32)
    predictor = KernelPredictor(arch, x, coefficients)
    attacks = [PGD(Linf(eps), steps=5) for eps in (0.01, 0.3)]
    report = compare(
        {"NTK": predictor}, (x, labels), dict(zip(("weak", "strong"), attacks, strict=True)), progress=False
    )
    clean, weak, strong = (report.cell("NTK", column).accuracy for column in ("clean", "weak", "strong"))
    assert clean == 1
    assert clean >= weak > strong


def test_times_are_kept_for_every_column():
    seconds = quietly(threshold, (IMAGES, LABELS), [UP]).seconds
    assert set(seconds) == {"clean", "up"}
    assert min(seconds.values()) > 0


def test_what_users_do_wrong_is_named(data, unchecked):
    pair = (IMAGES, LABELS)
    cases = [
        (ValueError, r"two are called 'PGD-20'", (threshold, pair, [PGD(Linf(0.1)), PGD(Linf(0.2))])),
        (ValueError, r"must not be called 'clean'", (threshold, pair, {"clean": UP})),
        (TypeError, r"attacks must be a list .* write \[FGSM", (threshold, pair, FGSM(Linf(0.1)))),
        (TypeError, r"attacks must hold attacks, got str", (threshold, pair, ["PGD"])),
        (TypeError, r"data must be a Dataset or a pair .* got ndarray", (threshold, IMAGES)),
        (ValueError, r"images has 6, labels has 5", (threshold, (IMAGES, LABELS[1:]))),
        (
            ValueError,
            r"labels must lie in 0 \.\. 1, but labels\[3\] is 7",
            (threshold, (IMAGES, np.array([0, 0, 0, 7, 1, 1]))),
        ),
        (
            ValueError,
            r"logits \(clean\) must be finite, but logits \(clean\)\[0, 0\] is nan",
            (lambda x: threshold(x) * jnp.nan, pair),
        ),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            quietly(*arguments)
    with pytest.raises(ValueError, match="split must be 'test', 'val' or 'train', got 'dev'"):
        quietly(threshold, data, split="dev")
    with pytest.raises(TypeError, match="key must be a random key"):
        quietly(threshold, pair, key=3)
    with pytest.raises(ValueError, match="models must be a dictionary"):
        compare({}, pair)
    with pytest.raises(ValueError, match=r"confidence must be below 1, got 95"):
        compare({"a": threshold}, pair, confidence=95)
    with pytest.raises(ValueError, match="name must be one of 'clean', 'worst case', got 'PGD'"):
        quietly(threshold, pair).accuracy("PGD")
