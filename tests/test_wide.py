"""Wide networks against their predictions: consistent where they must be, nearer with width, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ntkadv as na
from ntkadv.training import AttackFlowTraining, PGDTraining, StandardTraining
from ntkadv.wide import WideNetwork, distance, meeting_time

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

CLASSES = 3
STRENGTH = 0.05


@pytest.fixture(scope="module")
def digits():
    """A few digits of three classes."""
    whole = na.load_dataset("digits", n_train=200, n_val=0, n_test=60, seed=0)
    few = {}
    for part, n in (("train", 9), ("test", 6)):
        x, y = getattr(whole, f"x_{part}"), getattr(whole, f"y_{part}")
        chosen = np.concatenate([np.flatnonzero(y == k)[: n // CLASSES] for k in range(CLASSES)])
        few |= {f"x_{part}": x[chosen], f"y_{part}": y[chosen]}
    return na.Dataset.from_arrays(name="few digits", **few, num_classes=CLASSES)


def architecture(digits, width, activation=None):
    arch = na.architectures.mlp(
        depth=1, width=width, num_classes=CLASSES, activation=activation or na.architectures.Relu()
    )
    return arch.normalized(digits.x_train)


def network(digits, width=32, seed=0, **settings):
    return WideNetwork(architecture(digits, width), digits, key=jax.random.key(seed), progress=False, **settings)


@pytest.fixture(scope="module")
def small(digits):
    return network(digits)


def test_all_start_at_the_outputs_before_training(small):
    for strength in (0.0, STRENGTH):
        for predicted in (small.theory([0.0], strength), small.infinite_width([0.0], strength)):
            np.testing.assert_allclose(predicted.train[0], small.start_train, atol=1e-6)
            np.testing.assert_allclose(predicted.test[0], small.start_test, atol=1e-6)
    run = small.train(AttackFlowTraining(STRENGTH, reduction="sum"), [0.0, 0.1], learning_rate=0.05)
    np.testing.assert_allclose(run.outputs.train[0], small.start_train, atol=1e-6)
    np.testing.assert_allclose(run.outputs.test[0], small.start_test, atol=1e-6)
    np.testing.assert_allclose(run.outputs.times, [0.0, 0.1])


def test_kernels_are_those_at_the_start(small):
    f, x = small.arch.apply, jnp.asarray(small.data.x_train)
    jacobian = jax.jacobian(lambda p: f(p, x))(small.params)
    rows = np.concatenate([np.asarray(leaf).reshape(9, CLASSES, -1) for leaf in jax.tree.leaves(jacobian)], axis=2)
    np.testing.assert_allclose(small.ntk, np.einsum("njp,mkp->nmjk", rows, rows), rtol=1e-4, atol=1e-5)
    gradient = np.asarray(jax.vmap(jax.jacobian(lambda z: f(small.params, z[None])[0]))(x)).reshape(9, CLASSES, -1)
    np.testing.assert_allclose(small.ark, np.einsum("njp,nkp->njk", gradient, gradient), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learning_rate", [None, 0.05])
def test_the_theory_is_the_linear_recursion_or_flow_by_hand(small, learning_rate):
    """Small explicit steps in float64, of u' = E (Y - f), with E the exponential of the ARK."""
    values, vectors = np.linalg.eigh(small.ark.astype(float))
    rates = np.einsum("nij,nj,nkj->nik", vectors, np.exp(STRENGTH * values), vectors)
    step = learning_rate or 1e-4
    residual = small.data.targets_train - small.start_train.astype(float)
    for _ in range(round(0.4 / step)):
        residual = residual - step * np.einsum("mnij,njk,nk->mi", small.ntk.astype(float), rates, residual)
    found = small.theory([0.4], STRENGTH, learning_rate=learning_rate).train[0]
    tolerance = 1e-5 if learning_rate else 2e-3
    np.testing.assert_allclose(small.data.targets_train - found, residual, atol=tolerance)


@pytest.mark.parametrize("strength", [0.0, STRENGTH])
def test_the_linearisation_trained_by_steps_is_predicted_step_by_step(small, strength):
    """Without attacks exactly; with the true attack, which the closed form only linearises, as far as it is small."""
    method = AttackFlowTraining(strength, reduction="sum") if strength else StandardTraining(reduction="sum")
    rate = 0.2 * small.max_learning_rate(method)
    run = small.train(method, [0.0, 3 * rate, 50 * rate], learning_rate=rate, linearized=True)
    theory = small.theory(run.outputs.times, strength, learning_rate=rate)
    apart = max(
        distance(getattr(run.outputs, part), getattr(theory, part), small.data.targets_train).max()
        for part in ("train", "test")
    )
    assert apart < 1e-4 if strength == 0 else apart < 0.2
    assert distance(run.outputs.train[-1], run.outputs.train[0], small.data.targets_train) > 0.3


def test_in_the_end_attacks_make_no_difference(small):
    for predict in (small.theory, small.infinite_width):
        without, attacked = predict([np.inf]), predict([np.inf], STRENGTH)
        np.testing.assert_allclose(attacked.train, without.train, atol=1e-5)
        np.testing.assert_allclose(attacked.test, without.test, atol=1e-4)
        np.testing.assert_allclose(without.train[0], small.data.targets_train, atol=1e-4)
        early = distance(predict([1.0], 10 * STRENGTH).test, predict([1.0]).test, small.data.targets_train)
        assert early > 1e-2


def test_at_infinite_width_a_relu_network_under_attack_is_one_without_attacks_at_a_later_time(small):
    """Its ARK is one number for all images: adversarial training only makes time go faster."""
    factor = np.exp(STRENGTH * float(small.arch.ark(small.data.x_train)[0]))
    attacked, later = small.infinite_width([0.3], STRENGTH), small.infinite_width([0.3 * factor])
    np.testing.assert_allclose(attacked.train, later.train, atol=1e-6)
    np.testing.assert_allclose(attacked.test, later.test, atol=1e-6)


def test_a_strength_that_does_not_vary_is_the_same_given_as_a_function(small):
    times = [0.1, 0.5]
    for predict in (small.theory, small.infinite_width):
        number = predict(times, STRENGTH)
        for settings in ({}, {"flow": True}):
            function = predict(times, lambda t: jnp.asarray(STRENGTH) + 0 * t, **settings)
            np.testing.assert_allclose(function.train, number.train, atol=1e-6)
            np.testing.assert_allclose(function.test, number.test, atol=1e-5)


def slope_of(widths, values):
    return np.polyfit(np.log(widths), np.log(values), 1)[0]


@pytest.mark.slow
def test_with_width_networks_come_near_their_predictions_like_the_inverse_square_root(digits):
    """The largest distance over time; geometric means over seeds."""
    widths, seeds = [32, 128, 512], range(4)
    method, attack = StandardTraining(reduction="sum"), AttackFlowTraining(0.01, reduction="sum", steps=1)
    rate = 0.3 * min(network(digits, width, seed).max_learning_rate() for width in widths for seed in seeds)
    grid = np.concatenate([[0.0], np.geomspace(2 * rate, 100 * rate, 6)])
    largest = {}
    for width in widths:
        for seed in seeds:
            one = network(digits, width, seed)
            for kind, trained, strength in (("standard", method, 0.0), ("attacked", attack, 0.01)):
                run = one.train(trained, grid, learning_rate=rate)
                predictions = {"own": one.theory(run.outputs.times, strength, learning_rate=rate)}
                if kind == "standard":
                    predictions["infinite"] = one.infinite_width(run.outputs.times)
                for name, predicted in predictions.items():
                    gap = distance(run.outputs.test, predicted.test, digits.targets_train).max()
                    largest.setdefault((kind, name), {}).setdefault(width, []).append(gap)
    for name, by_width in largest.items():
        means = [np.exp(np.mean(np.log(by_width[width]))) for width in widths]
        assert -0.75 < slope_of(widths, means) < -0.25, (name, means)
        assert means[-1] < 0.5 * means[0], (name, means)


def test_a_wider_network_is_nearer_to_its_own_closed_form(digits):
    gaps = []
    for width in (16, 1024):
        one = network(digits, width)
        rate = 0.3 * one.max_learning_rate()
        run = one.train(StandardTraining(reduction="sum"), [0.0, 30 * rate], learning_rate=rate)
        theory = one.theory(run.outputs.times, learning_rate=rate)
        gaps.append(distance(run.outputs.test, theory.test, digits.targets_train).max())
    # Eight times nearer by the theory.
    assert gaps[1] < gaps[0] / 3, gaps


def test_a_learning_rate_above_the_bound_is_refused_and_does_diverge(small):
    for method in (StandardTraining(reduction="sum"), AttackFlowTraining(0.3, reduction="sum")):
        bound = small.max_learning_rate(method)
        values, vectors = np.linalg.eigh(small.ark.astype(float))
        strength = 0.0 if isinstance(method, StandardTraining) else 0.3
        rates = np.einsum("nij,nj,nkj->nik", vectors, np.exp(strength * values), vectors)
        product = np.einsum("mnij,njk->mink", small.ntk.astype(float), rates).reshape(27, 27)
        assert bound == pytest.approx(2 / np.abs(np.linalg.eigvals(product)).max(), rel=1e-4)
        with pytest.raises(ValueError, match=r"too large for the kernel.*diverges from 2 / lambda_max = "):
            small.train(method, [1.0], learning_rate=1.01 * bound)
        mean = dataclasses.replace(method, reduction="mean")
        with pytest.raises(ValueError, match="too large for the kernel"):
            small.train(mean, [1.0], learning_rate=9.1 * bound)
    rate = 1.05 * small.max_learning_rate()
    run = small.train(
        StandardTraining(reduction="sum"), [0.0, 300 * rate], learning_rate=rate, check_rate=False, linearized=True
    )
    assert run.trained.history["loss"][1] > 10 * run.trained.history["loss"][0]
    rate *= 0.99 / 1.05
    run = small.train(StandardTraining(reduction="sum"), [0.0, 300 * rate], learning_rate=rate, linearized=True)
    assert run.trained.history["loss"][1] < run.trained.history["loss"][0]


class Stop(KeyboardInterrupt):
    """As if by Ctrl-C."""


def test_a_folder_keeps_kernels_and_a_stopped_run_goes_on(digits, tmp_path, monkeypatch):
    method, times, rate = StandardTraining(reduction="sum"), [0.0, 0.2, 0.4, 0.6], 0.05
    alone = network(digits).train(method, times, learning_rate=rate, watch={"norm": _norm}, optimizer=optax.sgd(rate))
    first = network(digits, folder=tmp_path / "one")
    calls = []

    def stopping(params):
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return _norm(params)

    settings = {"learning_rate": rate, "optimizer": optax.sgd(rate)}
    with pytest.raises(Stop):
        first.train(method, times, watch={"norm": stopping}, **settings)
    predicted = first.theory(times, STRENGTH), first.infinite_width(times, STRENGTH)

    def never(*arguments, **settings):
        raise AssertionError("computed again")

    for name in ("empirical_ntk", "empirical_ark", "gram"):
        monkeypatch.setattr(f"ntkadv.wide.{name}", never)
    second = network(digits, folder=tmp_path / "one")
    for once, again in zip(
        predicted, (second.theory(times, STRENGTH), second.infinite_width(times, STRENGTH)), strict=True
    ):
        np.testing.assert_array_equal(again.test, once.test)
    counted = []

    def counting(params):
        counted.append(1)
        return _norm(params)

    run = second.train(method, times, watch={"norm": counting}, **settings)
    assert len(counted) == 2
    np.testing.assert_array_equal(run.outputs.test, alone.outputs.test)
    np.testing.assert_array_equal(run.watched["norm"], alone.watched["norm"])
    assert run.watched["norm"].shape == (4,)


def _norm(params):
    return jnp.sum(params[-1]["w"] ** 2)


def test_the_folder_of_another_network_is_refused_and_left_alone(digits, tmp_path):
    kernel = network(digits, folder=tmp_path).ntk
    held = (tmp_path / "ntk.npz").read_bytes()
    swapped = dataclasses.replace(digits, x_train=digits.x_train[::-1] * np.float32(0.5))
    smooth = architecture(digits, 32, na.architectures.Erf())
    others = {
        "parameters": network(digits, seed=1, folder=tmp_path),
        "images": WideNetwork(small_arch(digits), swapped, key=jax.random.key(0), folder=tmp_path, progress=False),
        # Same parameters, another activation.
        "layers": WideNetwork(smooth, digits, key=jax.random.key(0), folder=tmp_path, progress=False),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=rf"ntk\.npz is of another network or of other images: the {name} differ"):
            _ = other.ntk
        assert (tmp_path / "ntk.npz").read_bytes() == held
    np.testing.assert_array_equal(network(digits, folder=tmp_path).ntk, kernel)


def small_arch(digits):
    return architecture(digits, 32)


def test_other_settings_do_not_take_up_a_run(digits, tmp_path):
    one = network(digits, folder=tmp_path)
    one.train(StandardTraining(reduction="sum"), [0.1], learning_rate=0.05)
    with pytest.raises(ValueError, match="is that of another run"):
        one.train(StandardTraining(reduction="sum"), [0.1], learning_rate=0.025)
    attack = na.attacks.PGD(na.attacks.Linf(0.1), steps=2)
    one.train(PGDTraining(attack, reduction="sum"), [0.1], learning_rate=0.05)
    stronger = na.attacks.PGD(na.attacks.Linf(0.2), steps=2)
    with pytest.raises(ValueError, match="its method is"):
        one.train(PGDTraining(stronger, reduction="sum"), [0.1], learning_rate=0.05)
    one.train(PGDTraining(stronger, reduction="sum"), [0.1], learning_rate=0.05, label="stronger")


def test_what_users_do_wrong_is_named(digits, small, unchecked):
    other = network(digits, width=16).params
    with pytest.raises(ValueError, match="params are those of another architecture"):
        network(digits, params=other)
    with pytest.raises(TypeError, match="key must be a random key"):
        WideNetwork(small.arch, digits, key=0)
    with pytest.raises(MemoryError, match="Take a smaller width"):
        WideNetwork(na.architectures.mlp(depth=2, width=10**6, num_classes=3), digits, key=jax.random.key(0))
    with pytest.raises(ValueError, match="times must be finite for training"):
        small.train(StandardTraining(reduction="sum"), [1.0, np.inf], learning_rate=0.01)
    with pytest.raises(ValueError, match="learning_rate must be finite and positive"):
        small.train(StandardTraining(reduction="sum"), [1.0], learning_rate=0.0)


def test_distance_is_the_root_mean_square_in_units_of_the_targets():
    targets = np.array([[3.0, 4.0], [0.0, 0.0]])  # of root mean square 5 / sqrt(2)
    first = np.zeros((2, 3, 2))
    second = first.copy()
    second[1, 0] = [6.0, 8.0]
    np.testing.assert_allclose(distance(first, second, targets), [0, np.sqrt(100 / 3) / (5 / np.sqrt(2))])
    assert distance(second, second, targets).max() == 0
    np.testing.assert_allclose(distance(first[0], first[0] + 1, targets), np.sqrt(2) / (5 / np.sqrt(2)))


def test_two_trajectories_meet_where_their_distance_last_falls_below_the_threshold(unchecked):
    times = np.geomspace(1, 100, 21)
    # Distances that fall like a line in log time.
    assert meeting_time(times, 1 - np.log10(times) / 2, 0.5) == pytest.approx(10.0)
    assert meeting_time(times, 1 - np.log10(times) / 2, 0.1) == pytest.approx(10**1.8)
    assert meeting_time(np.arange(1.0, 5.0), np.array([0.0, 0.4, 0.0, 0.0]), 0.1) == pytest.approx(2 * 1.5**0.75)
    assert meeting_time(np.array([1.0, 2.0]), np.array([0.05, 0.1]), 0.1) == 0
    assert meeting_time(np.array([1.0, 2.0]), np.array([0.05, 0.2]), 0.1) == np.inf
    assert meeting_time(np.array([0.0, 2.0]), np.array([0.3, 0.0]), 0.1) == pytest.approx(2 * 2 / 3)
    for times, distances, message in (
        ([1, 2], [1], "vectors of one length"),
        ([2, 1], [1, 0], "times must ascend"),
    ):
        with pytest.raises(ValueError, match=message):
            meeting_time(np.array(times, float), np.array(distances, float))
