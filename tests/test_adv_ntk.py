"""Adv-NTK: its step against dense linear algebra, its parametrisations, resumption, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.linalg

from ntkadv.adv_ntk import fit_adv_ntk
from ntkadv.architectures import mlp
from ntkadv.attacks import PGD, Linf
from ntkadv.data import load_dataset, targets
from ntkadv.kernels import gram
from ntkadv.parametrization import PARAMETRIZATIONS

KEY = jax.random.key(3)
NO_ATTACK = PGD(Linf(0.0), steps=1)
SMALL = {"attack": PGD(Linf(0.1), steps=3), "key": KEY, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", n_train=40, n_val=24, n_test=30, seed=1)


@pytest.fixture(scope="module")
def arch(data):
    return mlp(depth=2, num_classes=10).normalized(data.x_train)


def dense_loss(theta, cross, xi, y_train, y):
    """Mean of 1/2 |f - y|^2 for f = cross theta^-1 (I - exp(-theta diag xi)) y_train, the definition to the letter."""
    kept = np.eye(len(theta)) - scipy.linalg.expm(-theta * xi[None, :])
    residual = cross @ np.linalg.solve(theta, kept @ y_train) - y
    return 0.5 * np.mean(np.sum(residual**2, axis=1))


def dense_gradient(loss, weights, h=1e-5):
    steps = h * np.eye(len(weights))
    return np.array([(loss(weights + step) - loss(weights - step)) / (2 * h) for step in steps])


@pytest.mark.parametrize(("parametrization", "initial"), [("projected", 0.3), ("absolute", 0.3), ("squared", 0.3)])
def test_a_step_goes_down_the_gradient_of_the_dense_definition(arch, data, parametrization, initial):
    rate = 0.05
    theta = gram(arch, data.x_train, progress=False).astype(float)
    cross = gram(arch, data.x_val, data.x_train, progress=False).astype(float)
    ways = PARAMETRIZATIONS[parametrization]
    start = ways.start(np.full(40, initial))

    def loss(weights):
        return dense_loss(theta, cross, ways.xi(weights), data.targets_train, data.targets_val)

    gradient = dense_gradient(loss, start)
    expected = ways.xi(start - rate * gradient / np.linalg.norm(gradient))
    fit = fit_adv_ntk(
        arch, data, attack=NO_ATTACK, key=KEY, steps=1, learning_rate=rate, batch_size=24, gram=theta.astype("float32"),
        parametrization=parametrization, initial=initial, progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(fit.xi, expected, rtol=1e-4)
    np.testing.assert_allclose(fit.history[0]["loss"], loss(start), rtol=1e-5)
    np.testing.assert_allclose(fit.history[0]["gradient_norm"], np.linalg.norm(gradient), rtol=1e-4)


def test_at_zero_the_first_step_follows_the_exact_gradient_of_the_limit(arch, data):
    """At xi = 0 the coefficients are diag(xi) Y to first order, so the gradient is the sum over classes of Y * G."""
    cross = gram(arch, data.x_val, data.x_train, progress=False).astype(float)
    y = targets(data.y_val, 10)
    gradient = np.sum(data.targets_train * (cross.T @ (-y)) / len(y), axis=1)
    fit = fit_adv_ntk(arch, data, attack=NO_ATTACK, key=KEY, steps=1, batch_size=24, progress=False)
    np.testing.assert_allclose(fit.xi, np.maximum(-0.1 * gradient / np.linalg.norm(gradient), 0), rtol=1e-4, atol=1e-9)


def test_the_predictor_is_the_closed_form_at_xi(arch, data):
    fit = fit_adv_ntk(arch, data, steps=4, **SMALL)
    theta = gram(arch, data.x_train, progress=False).astype(float)
    cross = gram(arch, data.x_test, data.x_train, progress=False).astype(float)
    dense = cross @ np.linalg.solve(theta, (np.eye(40) - scipy.linalg.expm(-theta * fit.xi)) @ data.targets_train)
    np.testing.assert_allclose(np.asarray(fit.predictor(data.x_test)), dense, atol=1e-4)


def test_krylov_and_eigendecomposition_lead_to_the_same_network(arch, data):
    one = fit_adv_ntk(arch, data, steps=3, method="krylov", **SMALL)
    two = fit_adv_ntk(arch, data, steps=3, method="eigh", **SMALL)
    np.testing.assert_allclose(one.xi, two.xi, rtol=1e-3, atol=1e-6)


def test_steps_lower_the_loss_on_attacked_images(arch, data):
    fit = fit_adv_ntk(arch, data, steps=12, learning_rate=0.5, **SMALL)
    losses = [entry["loss"] for entry in fit.history]
    assert losses[0] == pytest.approx(0.45, rel=1e-3)  # the zero network against centred one-hot targets
    assert np.mean(losses[-3:]) < 0.9 * losses[0]


def test_a_stopped_fit_goes_on_to_the_same_result_bit_for_bit(arch, data, tmp_path):
    whole = fit_adv_ntk(arch, data, steps=6, held_out=0.25, held_out_every=2, **SMALL)

    class StopError(Exception):
        pass

    def stop_at_three(entry):
        if entry["step"] == 3:
            raise StopError

    resumable = {**SMALL, "held_out": 0.25, "held_out_every": 2, "checkpoint": tmp_path / "fit.npz"}
    with pytest.raises(StopError):
        fit_adv_ntk(arch, data, steps=6, on_step=stop_at_three, **resumable)
    seen = []
    resumed = fit_adv_ntk(arch, data, steps=6, on_step=lambda entry: seen.append(entry["step"]), **resumable)
    assert seen == [4, 5, 6]
    np.testing.assert_array_equal(resumed.xi, whole.xi)
    assert resumed.step == whole.step
    assert [e["held_out"] for e in resumed.history] == [e["held_out"] for e in whole.history]


def test_a_checkpoint_of_another_fit_is_refused_by_name(arch, data, tmp_path):
    fit_adv_ntk(arch, data, steps=1, checkpoint=tmp_path / "fit.npz", **SMALL)
    with pytest.raises(ValueError, match="differs in learning_rate"):
        fit_adv_ntk(arch, data, steps=2, learning_rate=0.3, checkpoint=tmp_path / "fit.npz", **SMALL)


@pytest.mark.slow
def test_the_best_held_out_step_is_kept_and_patience_ends_the_fit(arch, data):
    fit = fit_adv_ntk(
        arch,
        data,
        steps=40,
        learning_rate=3.0,
        held_out=0.5,
        held_out_every=1,
        patience=3,
        **{**SMALL, "batch_size": 12},
    )
    accuracies = [entry["held_out"] for entry in fit.history]
    assert fit.step == int(np.argmax(accuracies)) + 1
    assert len(accuracies) == min(40, fit.step + 3)


def test_a_fit_too_short_for_a_measurement_keeps_its_last_step(arch, data):
    fit = fit_adv_ntk(arch, data, steps=2, held_out=0.25, held_out_every=5, **SMALL)
    assert fit.step == 2
    assert fit.xi.max() > 0


def test_nothing_is_compiled_after_the_second_step(arch, data):
    compiled, steps = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(len(steps)) if name.endswith("backend_compile_duration") else None
    )
    fit_adv_ntk(arch, data, steps=5, learning_rate=0.01, on_step=steps.append, **{**SMALL, "batch_size": 7})
    assert 0 in compiled, "the first step of a new batch size compiles"
    assert max(compiled) == 0


@pytest.mark.slow
def test_too_large_a_step_falls_back_to_the_eigendecomposition_and_says_so(arch, data):
    small = dataclasses.replace(data, x_train=data.x_train[:40])
    with pytest.warns(RuntimeWarning, match="goes on with an eigendecomposition"):
        fit = fit_adv_ntk(arch, small, steps=2, initial=1e7, learning_rate=1.0, **SMALL)
    assert np.all(np.isfinite(fit.xi))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"steps": -1}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"initial": -1.0}, "initial must be zero or more"),
        ({"parametrization": "squared", "initial": 0.0}, "initial must be above 0"),
        ({"held_out": 1.0}, "held_out must be a share"),
        ({"gram": np.eye(3, dtype="float32")}, "gram must be the NTK over x_train"),
        ({"gram": np.full((40, 40), np.nan, "float32")}, "gram must be finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arch, data, unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        fit_adv_ntk(arch, data, **{**SMALL, "steps": 1, **change})


def test_without_validation_images_there_is_nothing_to_learn_from(arch):
    bare = load_dataset("digits", n_train=20, n_val=0, n_test=10)
    with pytest.raises(ValueError, match="n_val > 0"):
        fit_adv_ntk(arch, bare, steps=1, **SMALL)
