"""Features of a kernel against linear algebra by other routes, and of a linear kernel against exact worst cases."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ntkadv.architectures import mlp
from ntkadv.architectures.base import Architecture, Kernels
from ntkadv.attacks import PGD, Linf
from ntkadv.data import Dataset, targets
from ntkadv.dynamics import TrainingDynamics
from ntkadv.features import Eigenfeatures, FeatureRobustness, decorrelation, feature_robustness

IMAGE, CLASSES, N = (3, 2, 1), 3, 20
RNG = np.random.default_rng(0)
# Far enough from black and white for the ball to be all that bounds a perturbation.
X, X_TEST = (RNG.uniform(0.3, 0.7, (n, *IMAGE)).astype(np.float32) for n in (N, 40))
Y, Y_TEST = (
    (2 * (x[:, 0, 0, 0] > 0.5) - (x[:, 1, 1, 0] > 0.5) * (x[:, 0, 0, 0] > 0.5)).astype(np.int32) for x in (X, X_TEST)
)
EPS = 0.04
MARGIN = PGD(Linf(EPS), steps=20, loss="margin")


@dataclasses.dataclass(frozen=True)
class LinearKernel(Architecture):
    """The kernel of a linear model, whose features are linear functions."""

    def _init(self, key, input_shape):
        raise NotImplementedError

    _apply = _init

    def _kernels(self, x1, x2):
        kernel = x1.reshape(len(x1), -1) @ x2.reshape(len(x2), -1).T
        return Kernels(kernel, kernel)

    def _diagonal(self, x):
        diagonal = jnp.sum(x.reshape(len(x), -1) ** 2, axis=1)
        return Kernels(diagonal, diagonal)

    def pair_bytes(self, input_shape):
        return 64


def training(arch, **settings):
    return TrainingDynamics(arch, X, targets(Y, CLASSES), progress=False, **settings)


@pytest.fixture(scope="module")
def dynamics():
    arch = mlp(depth=2, num_classes=CLASSES)
    return training(arch.normalized(X))


@pytest.fixture(scope="module")
def features(dynamics):
    return Eigenfeatures(dynamics)


@pytest.fixture(scope="module")
def linear():
    return Eigenfeatures(training(LinearKernel(CLASSES)))


def test_features_are_eigenfunctions(features, dynamics):
    gram = np.asarray(dynamics.gram, np.float64)
    cross = np.asarray(dynamics.arch.ntk(X_TEST, X), np.float64)
    assert len(features) == N
    assert (np.diff(features.eigenvalues) < 0).all()
    np.testing.assert_allclose(features.eigenvalues, np.linalg.svd(gram, compute_uv=False), rtol=1e-5)
    values = features.values(X_TEST)
    # K(x, X) = sum_k lambda_k phi_k(x) v_k^T
    np.testing.assert_allclose((values * features.eigenvalues) @ features.vectors.T, cross, atol=1e-5)
    np.testing.assert_allclose(features.values(X), features.vectors, atol=2e-4)
    by_predictor = np.asarray(features.functions(0, N)(X_TEST))
    np.testing.assert_allclose(by_predictor, values, atol=2e-3)


def test_all_features_together_are_the_interpolant(features, dynamics):
    exact = np.asarray(dynamics.arch.ntk(X_TEST, X), np.float64)
    exact = exact @ np.linalg.solve(np.asarray(dynamics.gram, np.float64), dynamics.targets)
    np.testing.assert_allclose(features.top(N)(X_TEST), exact, atol=1e-4)
    parts = [features.predictor(a, b)(X_TEST) for a, b in ((0, 1), (1, 7), (7, N))]
    np.testing.assert_allclose(np.sum(parts, axis=0), exact, atol=1e-4)
    each = features.values(X_TEST)[:, 4:5] * features.weights[4]
    np.testing.assert_allclose(features.feature(4)(X_TEST), each, atol=1e-4)
    np.testing.assert_allclose(features.energy.sum(), 1, rtol=1e-6)


def test_features_at_a_time_are_those_of_gradient_flow(features, dynamics):
    gram = np.asarray(dynamics.gram, np.float64)
    for time in (0.05, 2.0):
        learnt = np.linalg.solve(gram, (np.eye(N) - scipy.linalg.expm(-time * gram)) @ dynamics.targets)
        exact = np.asarray(dynamics.arch.ntk(X_TEST, X), np.float64) @ learnt
        np.testing.assert_allclose(features.top(N, time=time)(X_TEST), exact, atol=1e-5)


def test_what_gradient_flow_has_learnt_of_a_feature_is_known(features, dynamics):
    gram = np.asarray(dynamics.gram, np.float64)
    outputs = dynamics.targets - scipy.linalg.expm(-0.4 * gram) @ dynamics.targets
    singles = [(k, k + 1) for k in range(N)]
    expected = 1 - np.exp(-0.4 * features.eigenvalues)
    np.testing.assert_allclose(features.learnt(outputs, singles), expected, rtol=1e-4, atol=1e-6)
    band = np.sum((expected * features.energy)[3:9]) / np.sum(features.energy[3:9])
    np.testing.assert_allclose(features.learnt(outputs, [(3, 9)]), band, rtol=1e-4)
    np.testing.assert_allclose(features.learnt(0.3 * dynamics.targets, [(0, 2), (0, N)]), 0.3, rtol=1e-6)


def test_of_features_without_targets_nothing_is_learnt():
    features = Eigenfeatures(training(LinearKernel(CLASSES)))
    features.weights = np.zeros_like(features.weights)
    assert np.isnan(features.learnt(features.dynamics.targets, [(0, 1)])).all()


def test_small_eigenvalues_let_features_vary_more(features, linear):
    moved = np.clip(X_TEST + RNG.choice([-0.1, 0.1], X_TEST.shape), 0, 1).astype(np.float32)
    for each in (features, linear):
        pairs = ((X_TEST, X_TEST), (X_TEST, moved), (moved, moved))
        own, cross, other = (np.asarray(each.dynamics.arch.ntk(*pair), np.float64).diagonal() for pair in pairs)
        change = np.abs(each.values(X_TEST) - each.values(moved)) * np.sqrt(each.eigenvalues)
        room = np.sqrt(own - 2 * cross + other)
        assert (np.linalg.norm(change, axis=1) <= room * (1 + 1e-3)).all()
        if each is linear:  # whose features are all there are
            np.testing.assert_allclose(np.linalg.norm(change, axis=1), room, rtol=1e-3)


def test_modes_below_the_noise_floor_are_no_features(linear):
    assert len(linear) == np.prod(IMAGE)


def slopes(linear, start, stop):
    """Outputs of a range are (x - 1/2) times this matrix (pixels, c), by least squares on the training images."""
    pixels = (X - 0.5).reshape(N, -1).astype(np.float64)
    projection = linear.vectors[:, start:stop] @ linear.vectors[:, start:stop].T
    return np.linalg.lstsq(pixels, projection @ linear.dynamics.targets, rcond=None)[0]


def test_usefulness_of_linear_features_is_exact_under_attack(linear, key):
    ranges = [(k, k + 1) for k in range(6)] + [(0, 2), (2, 6), (0, 6)]
    data = (X_TEST, Y_TEST)
    measured = feature_robustness(linear, ranges, data, MARGIN, key=key, batch_size=16, progress=False)
    pixels = (X_TEST - 0.5).reshape(len(X_TEST), -1).astype(np.float64)
    wanted = np.eye(CLASSES)[Y_TEST] - 1 / CLASSES
    for i, (start, stop) in enumerate(ranges):
        slope = slopes(linear, start, stop)
        outputs = pixels @ slope
        scale = np.sqrt((wanted**2).sum(axis=1).mean() * (outputs**2).sum(axis=1).mean())
        products = (wanted * outputs).sum(axis=1)
        worst = products - EPS * np.abs(wanted @ slope.T).sum(axis=1)
        for name, terms in (("usefulness", products), ("robust_usefulness", worst)):
            assert getattr(measured, name)[i] == pytest.approx(terms.mean() / scale, abs=1e-4)
            error = terms.std() / np.sqrt(len(terms)) / scale
            assert getattr(measured, f"{name}_error")[i] == pytest.approx(error, abs=1e-4)
        np.testing.assert_array_equal(measured.correct[i], outputs.argmax(axis=1) == Y_TEST)
        if stop == start + 1:
            # One feature can only be turned round: right is what stays right at both ends of what the ball allows.
            direction = np.linalg.svd(slope)[0][:, 0]
            middle, reach = pixels @ direction, EPS * np.abs(direction).sum()
            ends = [np.outer(middle + sign * reach, direction @ slope).argmax(axis=1) == Y_TEST for sign in (-1, 1)]
            np.testing.assert_array_equal(measured.correct_attacked[i], ends[0] & ends[1])
    assert (measured.robust_accuracy <= measured.accuracy).all()
    np.testing.assert_array_equal(measured.ranges, ranges)
    np.testing.assert_allclose(measured.energy[-1], linear.energy.sum(), rtol=1e-6)
    assert (measured.energy[6], *measured.eigenvalues[6]) == (linear.energy[:2].sum(), *linear.eigenvalues[:2])


def test_the_whole_network_is_more_useful_than_its_features(features, key):
    data = Dataset.from_arrays(name="made", x_train=X, y_train=Y, x_test=X_TEST, y_test=Y_TEST)
    ranges = [(k, k + 1) for k in range(4)] + [(0, N)]
    measured = feature_robustness(features, ranges, data, MARGIN, key=key, progress=False)
    assert measured.usefulness[-1] > measured.usefulness[:-1].max() + 0.1
    assert (measured.robust_usefulness < measured.usefulness).all()
    low, high = measured.intervals(attacked=True)
    assert ((low <= measured.robust_accuracy) & (measured.robust_accuracy <= high)).all()


def test_the_loss_of_the_correlation_is_minus_the_product_with_the_target():
    logits = RNG.normal(size=(7, CLASSES)).astype(np.float32)
    labels = RNG.integers(0, CLASSES, 7)
    expected = -np.sum(targets(labels, CLASSES) * logits, axis=1)
    np.testing.assert_allclose(decorrelation(jnp.asarray(logits), jnp.asarray(labels)), expected, atol=1e-6)


def test_results_survive_json(linear, key):
    measured = feature_robustness(linear, [(0, 1), (1, 4)], (X_TEST, Y_TEST), MARGIN, key=key, progress=False)
    again = FeatureRobustness.from_dict(json.loads(json.dumps(measured.to_dict())))
    for name, value in vars(measured).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)
    assert (again.attack, again.norm, again.eps) == (MARGIN.name, "Linf", EPS)
    with pytest.raises(ValueError, match="'eps' is missing"):
        FeatureRobustness.from_dict({k: v for k, v in measured.to_dict().items() if k != "eps"})


def test_what_users_do_wrong_is_named(linear, unchecked):
    key = jax.random.key(0)

    def measure(ranges=((0, 1),), labels=Y_TEST, attack=MARGIN, **settings):
        return feature_robustness(linear, ranges, (X_TEST, labels), attack, **{"key": key, **settings})

    cases = [
        (TypeError, "dynamics must be TrainingDynamics, got ndarray", lambda: Eigenfeatures(X)),
        (ValueError, "must be training without attacks", lambda: Eigenfeatures(
            training(LinearKernel(CLASSES), attack_strength=0.1, ark=np.ones(N)))),
        (ValueError, r"start < stop <= 6, the number of features, got \(0, 7\)", lambda: linear.top(7)),
        (ValueError, r"got \(2, 2\)", lambda: linear.predictor(2, 2)),
        (ValueError, "start must be at least 0", lambda: linear.functions(-1, 2)),
        (ValueError, "time must be positive, got 0", lambda: linear.top(2, time=0.0)),
        (ValueError, r"outputs must have shape \(20, 3\), got \(20,\)", lambda: linear.learnt(X[:, 0, 0, 0], [(0, 1)])),
        (ValueError, "outputs must be finite", lambda: linear.learnt(np.full((N, 3), np.nan), [(0, 1)])),
        (ValueError, "at least one pair", lambda: measure(ranges=[])),
        (TypeError, "attack must be one attack, got list", lambda: measure(attack=[MARGIN])),
        (ValueError, "labels must lie in 0 .. 2", lambda: measure(labels=Y_TEST + 3)),
        (TypeError, "key must be a random key", lambda: measure(key=0)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
