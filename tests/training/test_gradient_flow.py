"""Training as an integrated flow, against small steps and the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_problems import data, linear, linear_params, smooth_mlp

from ntkadv.attacks import PGD, Linf
from ntkadv.training import (
    AttackFlowTraining,
    PGDTraining,
    StandardTraining,
    attack_flow,
    gradient_flow,
    linearize,
    train,
)

TIMES = [0.3, 0.0, 0.1]


@pytest.mark.slow
@pytest.mark.parametrize("attacked", [False, True])
def test_the_flow_is_descent_by_tiny_steps_to_first_order(attacked, x64, key):
    arch, start = smooth_mlp()
    held = data()
    method = AttackFlowTraining(0.05, reduction="sum") if attacked else StandardTraining(reduction="sum")
    found = gradient_flow(arch, start, held, TIMES, method=method)
    errors = []
    for steps in (150, 300, 600):
        done = train(arch, held, method=method, steps=steps, key=key, optimizer=0.3 / steps, params=start,
                     record=lambda params: {"w": params[-1]["w"]}, record_at=[0, steps // 3, steps],
                     progress=False)  # fmt: skip
        flow = np.asarray(found[-1]["w"])[[1, 2, 0]]
        np.testing.assert_array_equal(flow[0], start[-1]["w"])
        errors.append(np.abs(done.history["w"] - flow).max())
    moved = np.abs(np.asarray(found[-1]["w"][0]) - start[-1]["w"]).max()
    assert errors[-1] < 0.02 * moved
    # Euler's method: half the step, half the error.
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.1)


@pytest.mark.slow
def test_the_flow_of_a_linearised_network_is_its_closed_form(x64):
    arch, origin = smooth_mlp(width=16)
    held = data()
    model = linearize(arch, origin)
    x, test = (jnp.asarray(part, float) for part in (held.x_train, held.x_test))
    times = np.array([0.02, 0.5, 2.0])
    params = gradient_flow(model.apply, origin, held, times, rtol=1e-9, atol=1e-11)
    dynamics = model.dynamics(x, np.asarray(held.targets_train, float))
    expected = model.outputs(test, x, dynamics.coefficients(times))
    for number, row in enumerate(expected):
        at = jax.tree.map(lambda leaf, number=number: leaf[number], params)
        np.testing.assert_allclose(model.apply(at, test), row, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_with_a_strength_that_varies_it_is_the_linear_flow_where_the_attack_is_linear(x64):
    """Only a bias trains, so the attack stays exp(ARK eta(t)): the flow, not the closed form, is the truth."""
    weights, held = jnp.asarray(linear_params()["w"]), data()

    def f(params, x):
        return linear({"w": weights, "b": params["b"]}, x)

    origin = {"b": jnp.asarray([0.3, -0.2, 0.1])}
    phases = jnp.arange(6.0)

    def strength(t):
        return 0.4 * (1 + jnp.sin(9 * t + phases))

    times = [0.05, 0.2]
    params = gradient_flow(f, origin, held, times, method=AttackFlowTraining(strength, steps=30), rtol=1e-9, atol=1e-11)
    model = linearize(f, origin)
    x, test = (jnp.asarray(part, float) for part in (held.x_train, held.x_test))
    dynamics = model.dynamics(x, np.asarray(held.targets_train, float), strength=strength)
    real = np.stack([f({"b": b}, test) for b in params["b"]])
    np.testing.assert_allclose(model.outputs(test, x, dynamics.flow(times)), real, rtol=1e-6, atol=1e-7)
    closed = model.outputs(test, x, dynamics.coefficients(times))
    assert np.abs(closed - real).max() > 1e-4


def test_each_time_is_given_once_asked_for_and_the_start_needs_no_solver(x64):
    arch, start = smooth_mlp()
    twice = gradient_flow(arch, start, data(), [0.1, 0.1, 0.05])
    np.testing.assert_array_equal(twice[-1]["w"][0], twice[-1]["w"][1])
    only = gradient_flow(arch, start, data(), [0.0])
    np.testing.assert_array_equal(only[-1]["w"][0], start[-1]["w"])
    assert only[-1]["w"].shape == (1, *start[-1]["w"].shape)


def test_what_has_no_flow_is_named(unchecked):
    arch, start = smooth_mlp()
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start)
    for method in (PGDTraining(PGD(Linf(0.1))), StandardTraining(loss="cross_entropy"), "standard"):
        with pytest.raises(TypeError, match="method must be StandardTraining or AttackFlowTraining"):
            gradient_flow(arch, start, data(), [1.0], method=method)
    for times, message in (([np.inf], "times must be finite"), ([-1.0], "times must not be negative")):
        with pytest.raises(ValueError, match=message):
            gradient_flow(arch, start, data(), times)
    with pytest.raises(ValueError, match="strength must be a number, or hold one for each of 6"):
        gradient_flow(arch, start, data(), [1.0], method=AttackFlowTraining((0.1, 0.2)))
    with pytest.raises(RuntimeError, match="within 3 steps; allow more with max_steps"):
        gradient_flow(arch, start, data(), [1.0], max_steps=3)


def test_the_attack_is_followed_not_differentiated(x64):
    """The slope at the start is that of the loss at attacked images held fixed."""
    arch, start = smooth_mlp()
    held = data()
    x, targets = (jnp.asarray(part, float) for part in (held.x_train, held.targets_train))
    moved = attack_flow(lambda z: arch.apply(start, z), x, targets, 0.1)
    gradient = jax.grad(lambda p: jnp.sum((arch.apply(p, moved) - targets) ** 2) / 2)(start)
    short = 1e-5
    after = gradient_flow(arch, start, held, [short], method=AttackFlowTraining(0.1), rtol=1e-12, atol=1e-14)
    change = jax.tree.map(lambda a, b: (a[0] - b) / short, after, start)
    for ours, theirs in zip(jax.tree.leaves(change), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(-ours, theirs, rtol=1e-3, atol=1e-4)
