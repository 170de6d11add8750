"""Training in closed form against matrix exponentials, pseudo-inverses and sampled networks."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from problems import dense_coefficients, kernel_spectrum, matrix, targets

import ntkadv.dynamics._spectral as spectral
from ntkadv.architectures import mlp
from ntkadv.dynamics import RidgeRegression, TrainingDynamics
from ntkadv.dynamics._spectral import spectrum
from ntkadv.kernels.gram import gram

N, M, C = 24, 5, 3
ARCH = mlp(depth=2, width=16, num_classes=C)
X, X_TEST = (np.random.default_rng(seed).uniform(size=(size, 3, 3, 1)) for seed, size in ((0, N), (1, M)))
Y = targets(N, C)
ARK = np.random.default_rng(2).uniform(0.5, 2.0, N)
TIMES = [0.0, 0.01, 0.3, 5.0, 100.0]


@pytest.fixture(scope="module")
def theta():
    return gram(ARCH, X, dtype="float64", progress=False)


@pytest.fixture(scope="module")
def cross():
    return gram(ARCH, X_TEST, X, dtype="float64", progress=False)


def dynamics(theta, **settings):
    return TrainingDynamics(ARCH, X, Y, gram=theta, progress=False, **settings)


@pytest.mark.parametrize("strength", [0.0, 0.7, np.linspace(0, 1, N)], ids=["standard", "common", "per sample"])
def test_predictions_are_those_of_the_matrix_exponential_at_every_time(theta, cross, strength):
    rates = np.exp(ARK * strength)
    predictions = dynamics(theta, ark=ARK, attack_strength=strength).predict(X_TEST, TIMES)
    assert predictions.shape == (len(TIMES), M, C)
    for time, value in zip(TIMES, predictions, strict=True):
        np.testing.assert_allclose(value, cross @ dense_coefficients(theta, time * rates, Y), atol=1e-9)


def test_training_set_predictions_and_residuals_are_those_of_the_matrix_exponential(theta):
    attacked = dynamics(theta, ark=ARK, attack_strength=0.5)
    residuals, outputs = attacked.train_residual(TIMES), attacked.train_predict(TIMES)
    for time, residual, output in zip(TIMES, residuals, outputs, strict=True):
        exact = theta @ dense_coefficients(theta, time * np.exp(0.5 * ARK), Y)
        np.testing.assert_allclose(output, exact, atol=1e-10)
        np.testing.assert_allclose(residual, Y - exact, atol=1e-10)


@pytest.mark.parametrize("strength", [0.0, 1.0], ids=["standard", "attacked"])
def test_training_for_ever_gives_the_same_interpolant_with_and_without_attacks(theta, cross, strength):
    trained = dynamics(theta, ark=ARK, attack_strength=strength)
    interpolant = cross @ np.linalg.pinv(theta) @ Y
    np.testing.assert_allclose(trained.predict(X_TEST, np.inf)[0], interpolant, atol=1e-8)
    np.testing.assert_allclose(trained.predict(X_TEST, [1e12])[0], interpolant, atol=1e-8)
    np.testing.assert_allclose(trained.train_residual(np.inf)[0], 0, atol=1e-12)


def test_attacks_at_a_constant_ark_are_standard_training_for_longer(theta):
    attacked = dynamics(theta, ark=np.full(N, 0.8), attack_strength=1.5)
    longer = dynamics(theta).predict(X_TEST, np.multiply(TIMES, np.exp(0.8 * 1.5)))
    np.testing.assert_allclose(attacked.predict(X_TEST, TIMES), longer, atol=1e-9)


def test_the_ark_of_the_architecture_is_the_default(theta):
    single = X.astype(np.float32)
    given = TrainingDynamics(
        ARCH, single, Y, gram=theta, attack_strength=1e-2, ark=np.asarray(ARCH.ark(single)), progress=False
    )
    default = TrainingDynamics(ARCH, single, Y, gram=theta, attack_strength=1e-2, progress=False)
    np.testing.assert_allclose(default.coefficients(1.0), given.coefficients(1.0), rtol=1e-6)
    assert np.all(default.regularization.rates(0.0) > 1)


def test_gram_matrix_is_computed_where_it_is_not_given(theta, cross):
    value = TrainingDynamics(ARCH, X.astype(np.float32), Y, progress=False).predict(X_TEST.astype(np.float32), 0.3)[0]
    np.testing.assert_allclose(value, cross @ dense_coefficients(theta, np.full(N, 0.3), Y), atol=1e-4)


def test_predictor_agrees_with_predict(theta):
    trained = dynamics(theta)
    np.testing.assert_allclose(
        trained.predictor(2.0)(jnp.asarray(X_TEST, jnp.float32)), trained.predict(X_TEST, 2.0)[0], atol=1e-4
    )


def test_images_and_times_in_small_chunks_give_the_same_predictions(theta, monkeypatch):
    whole = dynamics(theta).predict(X_TEST, TIMES)
    monkeypatch.setattr("ntkadv.dynamics.closed_form._CHUNK_BYTES", 2 * 8 * N)
    monkeypatch.setattr("ntkadv.dynamics._spectral._CHUNK_BYTES", 3 * 8 * N * C)
    np.testing.assert_allclose(dynamics(theta).predict(X_TEST, TIMES), whole, atol=1e-12)


@pytest.mark.parametrize("time", [50.0, 1e9, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_copies_of_an_image_are_averaged_by_how_fast_each_is_trained(dtype, time):
    """One image with two labels is one image with their mean, weighted by the rates D."""
    twice = np.concatenate([X[:1], X])
    labels = np.concatenate([np.array([[1.0, -1.0, 0.0]]), Y])
    ark = np.concatenate([[2.0], ARK])
    rates = np.exp(ark)
    doubled = TrainingDynamics(
        ARCH,
        twice,
        labels,
        gram=gram(ARCH, twice, dtype=dtype, progress=False),
        attack_strength=1.0,
        ark=ark,
        progress=False,
    )
    merged = labels[1:].copy()
    merged[0] = (rates[0] * labels[0] + rates[1] * labels[1]) / (rates[0] + rates[1])
    speeds = np.concatenate([[rates[0] + rates[1]], rates[2:]])
    once = TrainingDynamics(
        ARCH,
        X,
        merged,
        gram=gram(ARCH, X, dtype="float64", progress=False),
        attack_strength=1.0,
        ark=np.log(speeds),
        progress=False,
    )
    tolerance = 2e-3 if dtype == "float32" else 1e-7
    np.testing.assert_allclose(doubled.predict(X_TEST, time), once.predict(X_TEST, time), atol=tolerance)


def test_small_negative_eigenvalues_are_noise_and_are_not_amplified(theta, cross):
    values, vectors = np.linalg.eigh(theta)
    values[0] = -1e-14 * values[-1]
    noisy = dynamics((vectors * values) @ vectors.T)
    direction = vectors[:, 0]
    for time in (1e3, 1e18, np.inf):
        coefficients = noisy.coefficients(time)
        assert np.abs(direction @ coefficients).max() < 1e-3
        assert np.abs(coefficients).max() < 2 * np.abs(Y).sum() / values[1]


def test_covariance_is_that_of_many_networks_trained_one_by_one(theta, cross):
    prior = gram(ARCH, np.concatenate([X, X_TEST]), kernel="nngp", dtype="float64", progress=False)
    samples, rates = 60_000, np.exp(0.5 * ARK)
    initial = np.linalg.cholesky(prior + 1e-12 * np.eye(N + M)) @ np.random.default_rng(3).standard_normal(
        (N + M, samples)
    )
    trained = initial[N:] + cross @ dense_coefficients(theta, 0.2 * rates, Y[:, :1] - initial[:N])
    process = dynamics(theta, ark=ARK, attack_strength=0.5).gp(X_TEST, 0.2, nngp_gram=prior[:N, :N])
    scale = np.sqrt(np.outer(np.diag(process.cov), np.diag(process.cov)))
    np.testing.assert_allclose(np.cov(trained) / scale, process.cov / scale, atol=5 / np.sqrt(samples))
    np.testing.assert_allclose(trained.mean(axis=1), process.mean[:, 0], atol=5 * np.sqrt(scale.max() / samples))


def test_gaussian_process_starts_as_the_prior_and_computes_its_gram_matrix(theta):
    process = dynamics(theta).gp(X_TEST, 0.0)
    np.testing.assert_allclose(process.cov, gram(ARCH, X_TEST, kernel="nngp", dtype="float64", progress=False))
    assert not np.any(process.mean)


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 30.0])
def test_ridge_regression_solves_its_linear_system(theta, cross, ridge):
    regression = RidgeRegression(ARCH, X, Y, gram=theta, progress=False)
    exact = np.linalg.solve(theta + ridge * np.eye(N), Y)
    np.testing.assert_allclose(regression.coefficients(ridge), exact, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(regression.predict(X_TEST, [ridge, 0.5])[0], cross @ exact, atol=1e-8)
    single = jnp.asarray(X_TEST, jnp.float32)
    np.testing.assert_allclose(regression.predictor(ridge)(single), cross @ exact, atol=1e-3)


def test_no_ridge_is_the_interpolant(theta, cross):
    value = RidgeRegression(ARCH, X, Y, gram=theta, progress=False).predict(X_TEST, 0.0)[0]
    np.testing.assert_allclose(value, cross @ np.linalg.pinv(theta) @ Y, atol=1e-8)


def test_ridge_regression_shares_the_decomposition_of_standard_training_only(theta):
    standard, attacked = dynamics(theta), dynamics(theta, ark=ARK, attack_strength=1.0)
    assert standard.ridge().spectrum is standard.spectrum
    own = RidgeRegression(ARCH, X, Y, gram=theta, progress=False)
    np.testing.assert_allclose(attacked.ridge().coefficients(0.1), own.coefficients(0.1), atol=1e-12)


def broken(change):
    theta = matrix(kernel_spectrum(N))
    change(theta)
    return theta


def set_entry(value, i=0, j=0):
    return lambda theta: theta.__setitem__((i, j), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": np.eye(N - 1)}, r"gram must have shape \(24, 24\)"),
        ({"gram": np.eye(N, dtype=int)}, "gram must be a floating matrix"),
        ({"gram": broken(set_entry(np.nan))}, "gram must be finite"),
        ({"gram": broken(set_entry(7.0, 0, 1))}, "gram must be symmetric"),
        ({"targets": Y[:-1]}, "x_train and targets must have the same length"),
        ({"targets": Y[:, 0]}, r"targets must have shape \(n, c\)"),
        ({"targets": np.where(Y > 0, np.nan, Y)}, "targets must be finite"),
        ({"attack_strength": -0.1}, "attack_strength must not be negative"),
        ({"attack_strength": np.nan}, "attack_strength must be finite"),
        ({"attack_strength": np.ones(3)}, r"attack_strength must be a number or have shape \(24,\)"),
        ({"attack_strength": 1e4}, "overflows"),
        ({"attack_strength": lambda t: t}, "attack_strength must be a number or an array"),
        ({"ark": np.ones(3)}, r"ark must have shape \(24,\)"),
        ({"ark": -np.ones(N)}, "ark must not be negative"),
    ],
)
def test_bad_input_is_refused_by_name(unchecked, change, message):
    good = {"gram": matrix(kernel_spectrum(N)), "targets": Y, "ark": ARK, "attack_strength": 0.5}
    settings = good | change
    with pytest.raises(ValueError, match=message):
        TrainingDynamics(ARCH, X, settings.pop("targets"), progress=False, **settings)


def test_an_indefinite_gram_matrix_is_refused_with_its_eigenvalue(theta):
    values, vectors = np.linalg.eigh(theta)
    values[0] = -0.5
    with pytest.raises(ValueError, match=r"not positive semi-definite: its smallest eigenvalue .* is -0.5"):
        dynamics((vectors * values) @ vectors.T).coefficients(1.0)


@pytest.mark.parametrize("times", [[-1.0], [np.nan], [1.0, -np.inf], [], [[1.0]]])
def test_bad_times_are_refused(theta, unchecked, times):
    with pytest.raises(ValueError, match="times must"):
        dynamics(theta).predict(X_TEST, times)


@pytest.mark.parametrize("ridges", [[-1.0], [np.nan], [np.inf], []])
def test_bad_ridges_are_refused(theta, unchecked, ridges):
    with pytest.raises(ValueError, match="ridges must"):
        RidgeRegression(ARCH, X, Y, gram=theta, progress=False).predict(X_TEST, ridges)


def test_no_images_to_predict_are_refused(theta):
    with pytest.raises(ValueError, match="x must hold at least one image"):
        dynamics(theta).predict(X_TEST[:0], 1.0)


@pytest.mark.parametrize("failure", ["wrong", "nan", "error"])
def test_a_failing_accelerator_is_caught_and_replaced_by_the_cpu(theta, monkeypatch, failure):
    right = jnp.linalg.eigh

    def wrong(matrix):
        if failure == "error":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        values, vectors = right(matrix)
        return (values, vectors[::-1]) if failure == "wrong" else (values, vectors * jnp.nan)

    reference = dynamics(theta).coefficients(1.0)
    monkeypatch.setattr(spectral.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(spectral.jnp.linalg, "eigh", wrong)
    with pytest.warns(RuntimeWarning, match="done again on the CPU"):
        value = dynamics(theta).coefficients(1.0)
    np.testing.assert_allclose(value, reference, rtol=1e-12)


def test_a_sound_accelerator_is_believed(theta, monkeypatch):
    reference = dynamics(theta).coefficients(1.0)
    monkeypatch.setattr(spectral.jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(dynamics(theta).coefficients(1.0), reference, atol=1e-10)


def test_too_many_images_are_refused_before_the_decomposition_starts(monkeypatch):
    class Little:
        available = 10_000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(
        MemoryError, match=r"eigendecomposition of a 50 x 50 matrix.*available 0\.00\. Take fewer samples"
    ):
        spectrum(np.eye(50), np.ones(50))
