"""Linearised networks: against finite differences, networks that are linear already, and training step by step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from training_problems import CLASSES, IMAGE, data, linear, linear_params, small_cnn, smooth_mlp

from ntkadv.kernels import empirical_ark, empirical_ntk
from ntkadv.training import AttackFlowTraining, StandardTraining, attack_flow, linearize, train


def images(held, part="x_train"):
    return jnp.asarray(getattr(held, part), float)


def test_value_and_derivative_are_those_of_the_network_at_the_origin(x64):
    arch, origin = smooth_mlp(depth=2)
    model = linearize(arch, origin)
    x = images(data())
    flat, unravel = ravel_pytree(origin)
    np.testing.assert_array_equal(model.apply(origin, x), arch.apply(origin, x))
    rng = np.random.default_rng(0)
    direction = rng.normal(size=flat.shape)
    up, down = (arch.apply(unravel(flat + s * 1e-5 * direction), x) for s in (1, -1))
    slope = np.asarray(up - down) / 2e-5
    for length in (1.0, 7.0):  # far from the origin it is a line still
        change = model.apply(unravel(flat + length * direction), x) - arch.apply(origin, x)
        np.testing.assert_allclose(change, length * slope, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(empirical_ntk(arch.apply, origin, x), _kernel(model, origin, x), rtol=1e-9, atol=1e-12)


def _kernel(model, params, x):
    """NTK of the linearised network somewhere, by its own Jacobian."""
    flat, unravel = ravel_pytree(params)
    jacobian = jax.jacobian(lambda p: model.apply(unravel(p), x))(flat + 0.3)
    return np.einsum("njp,mkp->nmjk", jacobian, jacobian)


def test_of_a_network_linear_in_its_parameters_it_is_that_network(x64):
    model = linearize(linear, linear_params())
    elsewhere, x = linear_params(seed=5), images(data())
    np.testing.assert_allclose(model.apply(elsewhere, x), linear(elsewhere, x), rtol=1e-12)


@pytest.mark.parametrize("kind", ["number", "sample", "none"])
def test_the_closed_form_is_training_step_by_step(kind, x64, key):
    """Gradient descent in parameters, on images moved by the linearised attack, against u computed from the kernel."""
    arch, origin = smooth_mlp(width=16)
    held = data()
    x, targets = images(held), np.asarray(held.targets_train, float)
    model = linearize(arch, origin)
    strength = {"number": 0.02, "sample": np.linspace(0, 0.04, 6), "none": 0.0}[kind]
    dynamics = model.dynamics(x, targets, strength=strength)
    rate = 0.5 * dynamics.max_learning_rate
    # The theory's attack by hand: residuals times exp(ARK eta S), by the exponential series.
    ark = empirical_ark(arch.apply, origin, x) * np.broadcast_to(strength, (6,))[:, None, None]
    rates = np.stack([np.linalg.multi_dot([v, np.diag(np.exp(w)), v.T]) for w, v in map(np.linalg.eigh, ark)])
    params = origin

    @jax.jit
    def step(params):
        outputs, pull = jax.vjp(lambda p: model.apply(p, x), params)
        (gradient,) = pull(jnp.einsum("nij,nj->ni", rates, outputs - targets))
        return jax.tree.map(lambda a, b: a - rate * b, params, gradient)

    seen, at = [], [0, 1, 5, 60, 200]
    test = images(held, "x_test")
    for number in range(201):
        if number in at:
            seen.append((model.apply(params, x), model.apply(params, test)))
        params = step(params)
    u = dynamics.coefficients(np.multiply(at, rate), learning_rate=rate)
    np.testing.assert_allclose(dynamics.fitted(u), np.stack([pair[0] for pair in seen]), atol=1e-7)
    np.testing.assert_allclose(model.outputs(test, x, u), np.stack([pair[1] for pair in seen]), atol=1e-7)
    # Without attacks this is the loop too.
    if kind == "none":
        done = train(model.apply, held, method=StandardTraining(reduction="sum"), steps=200, key=key, optimizer=rate,
                     params=origin, progress=False)  # fmt: skip
        np.testing.assert_allclose(model.apply(done.params, test), seen[-1][1], atol=1e-6)
    assert np.abs(seen[-1][0] - targets).max() < 0.5 * np.abs(seen[0][0] - targets).max()


def test_under_the_true_attack_the_closed_form_is_exact_where_the_model_is_linear_in_images_for_a_fixed_slope(x64, key):
    """One step: there the linearised attack is the true one, exp(ARK eta S) of the residual."""
    origin, held = linear_params(), data()
    model = linearize(linear, origin)
    x, targets = images(held), np.asarray(held.targets_train, float)
    moved = attack_flow(lambda z: linear(origin, z), x, jnp.asarray(targets), 0.2, steps=50)
    rates = model.dynamics(x, targets, strength=0.2).rates(0.0)
    before = np.asarray(linear(origin, x)) - targets
    np.testing.assert_allclose(
        linear(origin, moved) - targets, np.einsum("nij,nj->ni", rates, before), rtol=1e-7, atol=1e-9
    )


def test_with_a_bias_only_the_linear_attack_is_the_true_attack_for_good(x64, key):
    """Weights that do not train: input gradients and kernel stay, the flow is the theory's, all along the training."""
    weights, held = jnp.asarray(linear_params()["w"]), data()

    def f(params, x):
        return linear({"w": weights, "b": params["b"]}, x)

    origin = {"b": jnp.asarray([0.3, -0.2, 0.1])}
    model = linearize(f, origin)
    x, targets = images(held), np.asarray(held.targets_train, float)
    each = tuple(np.linspace(0.1, 0.6, 6).tolist())
    dynamics = model.dynamics(x, targets, strength=np.asarray(each))
    rate, steps = 0.4 * dynamics.max_learning_rate, 25
    done = train(f, held, method=AttackFlowTraining(each, reduction="sum", steps=40), steps=steps, key=key,
                 optimizer=rate, params=origin, record=lambda p: {"outputs": f(p, images(held, "x_test"))},
                 progress=False)  # fmt: skip
    u = dynamics.coefficients(done.times, learning_rate=rate)
    np.testing.assert_allclose(
        model.outputs(images(held, "x_test"), x, u), done.history["outputs"], rtol=1e-6, atol=1e-7
    )


def test_a_strength_that_varies_has_rates_that_vary(x64):
    arch, origin = smooth_mlp()
    held = data()
    x, targets = images(held), np.asarray(held.targets_train, float)
    model = linearize(arch, origin)
    shares = jnp.linspace(0.0, 1.0, 6)
    dynamics = model.dynamics(x, targets, strength=lambda t: 0.05 * (1 + t) * shares)
    assert not dynamics.constant
    for time in (0.0, 2.0):
        fixed = model.dynamics(x, targets, strength=0.05 * (1 + time) * np.asarray(shares))
        np.testing.assert_allclose(dynamics.rates(time), fixed.rates(0.0), rtol=1e-10)


@pytest.mark.slow
def test_outputs_parameters_and_predictor_agree(x64):
    origin = jax.tree.map(lambda leaf: leaf.astype(float), small_cnn().init(jax.random.key(2), IMAGE))
    model = linearize(small_cnn(), origin)
    held = data()
    x, test = images(held), images(held, "x_test")
    u = np.random.default_rng(1).normal(size=(3, 6, CLASSES))
    outputs = model.outputs(test, x, u)
    kernel = empirical_ntk(small_cnn().apply, origin, test, x)
    first = np.asarray(small_cnn().apply(origin, test))
    np.testing.assert_allclose(outputs, first + np.einsum("mnij,tnj->tmi", kernel, u), rtol=1e-9, atol=1e-10)
    for row, coefficients in zip(outputs, u, strict=True):
        predictor = model.predictor(x, coefficients)
        np.testing.assert_allclose(eqx.filter_jit(predictor)(test), row, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(model.apply(model.at(x, coefficients), test), row, rtol=1e-9, atol=1e-10)


def test_what_cannot_be_linearised_is_named(unchecked):
    arch, params = smooth_mlp()
    with pytest.raises(TypeError, match="network must be an architecture or a function"):
        linearize(3, params)
    with pytest.raises(TypeError, match="params must be a pytree of float arrays"):
        linearize(arch, {"w": jnp.ones(3, jnp.int32)})
    with pytest.raises(TypeError, match="params must be a pytree of float arrays"):
        linearize(arch, {})
