import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv import evaluation as evaluation_module
from ntkadv.architectures import mlp
from ntkadv.attacks import FGSM, PGD, Attack, Linf
from ntkadv.attacks.checks import EvaluationWarning, Flag
from ntkadv.attacks.search import Attacked, Cost
from ntkadv.data import Dataset
from ntkadv.evaluation import compare, evaluate
from ntkadv.predictors import KernelPredictor
from ntkadv.runs import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::ntkadv.attacks.checks.EvaluationWarning")

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
    return evaluate(*arguments, **{"key": jax.random.key(0), "check": False, "progress": False, **options})


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
    expected = {"attack": "Shift", "name": "up", "norm": "Linf", "eps": 0.1, "sign": 1}
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
        {"NTK": predictor},
        (x, labels),
        dict(zip(("weak", "strong"), attacks, strict=True)),
        check=False,
        progress=False,
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
    with pytest.raises(ValueError, match="info must be about the models 'a', got 'b'"):
        compare({"a": threshold}, pair, info={"b": {"architecture": "MLP"}})
    with pytest.raises(ValueError, match="name must be one of 'clean', 'worst case', got 'PGD'"):
        quietly(threshold, pair).accuracy("PGD")


def test_passes_through_the_model_are_counted():
    evaluation = quietly(threshold, (IMAGES, LABELS), [PGD(Linf(0.1), steps=3), UP], batch_size=4)
    assert evaluation.costs == {"clean": Cost(0, N), "PGD-3": Cost(3 * N, N), "up": Cost()}
    assert evaluation.scores["worst case"].cost == Cost(3 * N, 2 * N)


def test_log_and_culprits_of_each_attack_are_kept():
    evaluation = quietly(threshold, (IMAGES, LABELS), [UP, DOWN])
    assert evaluation.fell_to["up"].tolist() == ["", "", "up", "", "", ""]
    assert evaluation.fell_to["down"].tolist() == ["", "", "", "down", "down", ""]
    (line,) = evaluation.logs["down"]
    assert (line["attack"], line["attacked"], line["broken"]) == ("down", N, 2)


@dataclasses.dataclass(frozen=True)
class Boaster(Shift):
    """Claims to have broken every sample, and warns."""

    def run(self, model, x, labels, **options):
        warnings.warn("all are broken", EvaluationWarning, stacklevel=2)
        return Attacked(jnp.asarray(x), np.ones(len(x), bool), np.full(len(x), self.name, object), [], Cost())


def test_attacked_images_are_judged_anew_and_the_warnings_of_attacks_are_left_to_the_checks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = quietly(threshold, (IMAGES, LABELS), [Boaster(Linf(0.1))], check=True)
    assert evaluation.accuracy("up") == 1


class Stop(Exception):  # noqa: N818
    pass


@dataclasses.dataclass(frozen=True)
class Stopping(Noise):
    """Stops the evaluation."""

    def run(self, model, x, labels, **options):
        raise Stop


def test_a_stopped_evaluation_goes_on_from_its_state(tmp_path):
    noise = Noise(Linf(0.3))
    with pytest.raises(Stop):
        quietly(threshold, (IMAGES, LABELS), {"a": noise, "b": Stopping(Linf(0.3))}, state=tmp_path / "new" / "state")
    (file,) = (tmp_path / "new" / "state").iterdir()
    attacks = {"a": noise, "b": noise}
    whole, resumed = (
        quietly(threshold, (IMAGES, LABELS), attacks, keep_adversarial=True, state=state)
        for state in (None, tmp_path / "new" / "state")
    )
    assert resumed.logs["a"] == load_checkpoint(file)[1]["log"]
    for name in attacks:
        np.testing.assert_array_equal(resumed.adversarial[name], whole.adversarial[name])
        np.testing.assert_array_equal(resumed.correct[name], whole.correct[name])
        assert resumed.costs[name] == whole.costs[name]


def test_state_of_another_model_is_refused(tmp_path):
    quietly(threshold, (IMAGES, LABELS), [UP], state=tmp_path)
    with pytest.raises(ValueError, match=r"holds another evaluation \(other model\)"):
        quietly(always_one, (IMAGES, LABELS), [UP], state=tmp_path)


def test_names_of_all_kinds_have_states_of_their_own(tmp_path):
    models = dict.fromkeys(("a/b", "a b", "A b", "..", "ξ(t)", "x" * 300), threshold)
    attacks = {"PGD/1": UP, "PGD 1": DOWN}
    state = tmp_path / "state"
    first = compare(models, (IMAGES, LABELS), attacks, progress=False, state=state)
    files = [path.relative_to(state) for path in state.rglob("*.npz")]
    assert len({str(file).lower() for file in files}) == len(models) * len(attacks)
    assert all(re.fullmatch(r"[A-Za-z0-9-]+/[A-Za-z0-9-]+\.npz", str(file)) for file in files)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    again = compare(models, (IMAGES, LABELS), attacks, progress=False, state=state)
    for name in models:
        assert first.evaluations[name].logs == again.evaluations[name].logs


BEFORE, AFTER = Flag("before", "the gradient is zero"), Flag("after", "the losses disagree")


@pytest.fixture
def checks(monkeypatch):
    """Stand-ins for the checks, which record what they were asked."""
    asked = []

    def check_model(model, x, labels, *, batch_size):
        asked.append(("model", len(x), batch_size))
        return [BEFORE]

    def check_outcome(correct, attacks, fell_to):
        asked.append(("outcome", list(correct), list(attacks), list(fell_to)))
        return [AFTER]

    monkeypatch.setattr(evaluation_module, "check_model", check_model)
    monkeypatch.setattr(evaluation_module, "check_outcome", check_outcome)
    return asked


def test_checks_before_and_after_are_warned_of_and_kept(checks):
    with pytest.warns(EvaluationWarning) as caught:
        evaluation = quietly(threshold, (IMAGES, LABELS), [UP, DOWN], batch_size=4, check=True)
    assert [str(warning.message) for warning in caught] == [BEFORE.message, AFTER.message]
    assert evaluation.flags == [BEFORE, AFTER]
    names = ["up", "down"]
    assert checks == [("model", N, 4), ("outcome", names, names, names)]


def test_compare_says_which_model_was_flagged(checks, data):
    with pytest.warns(EvaluationWarning, match="^bad: the losses disagree$"):
        report = compare({"good": threshold, "bad": always_one}, data, [UP], progress=False)
    assert report.flags == {"good": [BEFORE, AFTER], "bad": [BEFORE, AFTER]}
    assert "good: the gradient is zero" in str(report)
    assert report.dataset == "threshold"


def test_without_checks_nothing_is_asked(checks):
    evaluation = quietly(threshold, (IMAGES, LABELS), [UP], check=False)
    assert (evaluation.flags, checks) == ([], [])


def test_probabilities_in_the_place_of_logits_are_flagged():
    def softmax(x):
        return jax.nn.softmax(threshold(x))

    report = compare({"soft": softmax, "hard": threshold}, (IMAGES, LABELS), [UP], progress=False)
    assert [flag.kind for flag in report.flags["soft"]] == ["softmax outputs"]
    assert "hard" not in report.flags


def test_what_is_said_of_a_model_reaches_its_report(data):
    said = {"good": {"architecture": "threshold", "venue": "nowhere"}}
    report = compare({"good": threshold}, data, [UP], progress=False, info=said)
    entry = report.to_dict()["models"]["good"]
    assert (entry["architecture"], entry["venue"], entry["dataset"]) == ("threshold", "nowhere", "threshold")
    assert report.paired("good", "good").p_value == 1
