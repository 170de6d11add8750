"""The training loop against loops by hand in NumPy; and what it does when it goes wrong, or is misused."""

import json
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_problems import (
    CLASSES,
    IMAGE,
    data,
    equal_bits,
    host,
    linear,
    linear_gradients,
    linear_params,
    smooth_mlp,
    tanh_gradients,
    tanh_network,
    tanh_params,
)

from ntkadv.architectures import import_neural_tangents, mlp
from ntkadv.training import AttackFlowTraining, DivergenceError, Method, PGDTraining, StandardTraining, train

QUIET = {"progress": False}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_full_batch_descent_on_a_linear_model_is_that_of_numpy(reduction, x64, key):
    problem, start, rate = data(), linear_params(), 0.05
    params, losses = host(start), []
    for _ in range(30):
        gradients, each = linear_gradients(params, problem.x_train.astype(float), problem.targets_train)
        losses.append(each.mean())
        scale = 1 if reduction == "sum" else 1 / len(each)
        params = {name: params[name] - rate * scale * gradients[name].sum(0) for name in params}
    method = StandardTraining(reduction=reduction)
    done = train(linear, problem, method=method, steps=30, key=key, optimizer=rate, params=start,
                 record_at=range(30), **QUIET)  # fmt: skip
    for name in params:
        np.testing.assert_allclose(done.params[name], params[name], rtol=1e-7)
    # Targets are float32 in both.
    np.testing.assert_allclose(done.history["loss"], losses, rtol=1e-7)
    np.testing.assert_allclose(done.times, rate * np.arange(30))
    assert done.step == 30
    np.testing.assert_array_equal(
        done.predictor(jnp.asarray(problem.x_test, float)), linear(done.params, problem.x_test.astype(float))
    )


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_full_batch_descent_on_a_network_is_backpropagation_by_hand_with_momentum_too(momentum, x64, key):
    problem, start, rate = data(), tanh_params(), 0.02
    params, speed = host(start), None
    for _ in range(40):
        gradients, _ = tanh_gradients(params, problem.x_train.astype(float), problem.targets_train)
        kept = 0 if speed is None else momentum or 0
        speed = gradients if speed is None else {name: gradients[name] + kept * speed[name] for name in gradients}
        params = {name: params[name] - rate * speed[name] for name in params}
    optimizer = rate if momentum is None else optax.sgd(rate, momentum=momentum)
    done = train(tanh_network, problem, method=StandardTraining(reduction="sum"), steps=40, key=key,
                 optimizer=optimizer, params=start, **QUIET)  # fmt: skip
    for name in params:
        np.testing.assert_allclose(done.params[name], params[name], rtol=1e-6, atol=1e-9)


def test_cross_entropy_is_descended_by_its_own_gradient(x64, key):
    problem, start, rate = data(), linear_params(), 0.3
    params, flat = host(start), problem.x_train.reshape(len(problem.x_train), -1).astype(float)
    hot = np.eye(CLASSES)[problem.y_train]
    for _ in range(20):
        logits = flat @ params["w"] + params["b"]
        chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -np.log(chance[hot > 0]).mean()
        error = (chance - hot) / len(flat)
        params = {"w": params["w"] - rate * flat.T @ error, "b": params["b"] - rate * error.sum(0)}
    done = train(linear, problem, method=StandardTraining(loss="cross_entropy"), steps=20, key=key, optimizer=rate,
                 params=start, record_at=[19], **QUIET)  # fmt: skip
    np.testing.assert_allclose(done.params["w"], params["w"], rtol=1e-10, atol=1e-12)
    assert done.history["loss"][0] == pytest.approx(loss, rel=1e-12)


@dataclass(frozen=True)
class Watched(Method):
    """Keeps the places of the images of every step, and the gradient of every step, in its own state."""

    def start(self, problem):
        return jnp.zeros((200, 4), jnp.int32), jnp.int32(0)

    def images(self, f, params, batch):
        return batch.x

    def update(self, f, optimizer, state, batch):
        after, metrics = super().update(f, optimizer, state, batch)
        places, step = state.method
        return after._replace(method=(places.at[step].set(batch.places.astype(jnp.int32)), step + 1)), metrics


def test_batches_hold_no_image_twice_and_all_images_alike(key):
    problem = data(n=10)
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), linear_params())
    done = train(linear, problem, method=Watched(), steps=200, key=key, batch_size=4, params=start, **QUIET)
    places = np.asarray(done.state.method[0])
    assert all(len(set(row)) == 4 for row in places)
    counts = np.bincount(places.ravel(), minlength=10)
    assert counts.sum() == 800
    # Binomial with 200 draws of 4/10: a standard deviation of 6.9.
    assert np.abs(counts - 80).max() < 28
    pairs = np.zeros((10, 10))
    for row in places:
        pairs[np.ix_(row, row)] += 1
    together = pairs[np.triu_indices(10, 1)]
    # A pair is drawn together with probability 4/10 * 3/9.
    assert together.mean() == pytest.approx(200 * 4 * 3 / 90, rel=1e-12)
    assert np.abs(together - together.mean()).max() < 5 * np.sqrt(together.mean())


def test_the_gradient_of_a_batch_is_unbiased_and_each_step_is_that_of_its_images(x64, key):
    problem, start, rate = data(n=10), linear_params(), 1.0
    exact, _ = linear_gradients(host(start), problem.x_train.astype(float), problem.targets_train)
    one = optax.sgd(rate)
    for reduction, scale in (("sum", 10 / 4), ("mean", 1 / 4)):
        changes = []
        for seed in range(200):
            done = train(linear, problem, method=Watched(reduction=reduction), steps=1, key=jax.random.key(seed),
                         optimizer=one, batch_size=4, params=start, record_at=(), **QUIET)  # fmt: skip
            rows = np.asarray(done.state.method[0])[0]
            changes.append(-(np.asarray(done.params["w"]) - np.asarray(start["w"])))
            np.testing.assert_allclose(changes[-1], scale * exact["w"][rows].sum(0), rtol=1e-7, atol=1e-9)
        mean, error = np.mean(changes, 0), np.std(changes, 0) / np.sqrt(len(changes))
        full = exact["w"].sum(0) if reduction == "sum" else exact["w"].mean(0)
        assert (np.abs(mean - full) < 4.5 * error).all()


def diverging(record_at, tmp_path, key):
    problem, arch = data(), mlp(depth=1, width=16, num_classes=CLASSES)
    settings = {"steps": 400, "key": key, "optimizer": 100.0, "record_at": record_at, **QUIET}
    settings["checkpoint"] = tmp_path / "run.npz"
    with pytest.raises(DivergenceError, match="lower the learning rate") as caught:
        train(arch, problem, metrics=tmp_path / "run.jsonl", **settings)
    return problem, arch, settings, caught.value


@pytest.mark.parametrize("record_at", [(), range(401), (0, 3, 200)])
def test_divergence_is_named_and_the_last_good_network_kept(record_at, tmp_path, key):
    problem, arch, settings, error = diverging(record_at, tmp_path, key)
    last = error.last
    assert f"not finite at step {error.step}" in str(error)
    assert f"of step {error.step - 1}, is in {tmp_path / 'run.npz'}" in str(error)
    assert last.step == error.step - 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.params))
    assert np.isfinite(arch.apply(last.params, problem.x_train)).all()
    assert np.isfinite(last.history.get("loss", np.zeros(1))).all()
    # The step is right: by a loop of our own, the loss at it is not finite, and that before it is.
    params = arch.init(jax.random.split(key)[0], IMAGE)
    x, y = jnp.asarray(problem.x_train), jnp.asarray(problem.targets_train)

    @jax.jit
    def value(params):
        return jnp.mean(jnp.sum((arch.apply(params, x) - y) ** 2, axis=1) / 2)

    descend = jax.jit(lambda p: jax.tree.map(lambda a, b: a - 100 * b, p, jax.grad(value)(p)))
    for _ in range(last.step):
        params = descend(params)
    assert np.isfinite(value(params))
    assert not np.isfinite(value(descend(params)))
    # Nothing is lost: the checkpoint holds that network, and the run can be read back.
    kept = train(arch, problem, **(settings | {"steps": last.step, "record_at": ()}))
    assert equal_bits(kept.params, last.params)
    recorded = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in recorded] == last.steps.tolist() == [s for s in record_at if s <= last.step]


def test_divergence_in_the_very_last_update_is_seen(tmp_path, key):
    _, arch, settings, error = diverging((), tmp_path, key)
    settings = settings | {"checkpoint": tmp_path / "other.npz", "steps": error.step}
    with pytest.raises(DivergenceError) as caught:
        train(arch, data(), **settings)
    assert caught.value.step == error.step
    assert equal_bits(caught.value.last.params, error.last.params)


def test_a_network_that_is_not_finite_to_begin_with_is_named_as_such(key):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * jnp.nan, linear_params())
    with pytest.raises(DivergenceError, match="at step 0, before any update: look for NaN"):
        train(linear, data(), params=params, steps=5, key=key, **QUIET)


def test_what_is_recorded_is_kept_and_its_numbers_are_lines_of_json(key, tmp_path):
    problem, arch = data(), mlp(depth=1, width=4, num_classes=CLASSES)

    def record(params):
        outputs = arch.apply(params, problem.x_test)
        return {"outputs": outputs, "accuracy": jnp.mean(jnp.argmax(outputs, 1) == problem.y_test)}

    done = train(arch, problem, steps=7, key=key, optimizer=0.2, record=record, record_at=[7, 0, 4],
                 metrics=tmp_path / "deep" / "run.jsonl", **QUIET)  # fmt: skip
    assert done.steps.tolist() == [0, 4, 7]
    assert done.history["outputs"].shape == (3, 4, CLASSES)
    np.testing.assert_array_equal(done.history["outputs"][2], arch.apply(done.params, problem.x_test))
    residual = np.asarray(arch.apply(done.params, problem.x_train)) - problem.targets_train
    assert done.history["loss"][2] == pytest.approx(np.mean(np.sum(residual**2, 1)) / 2, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "deep" / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 7]
    assert [line["time"] for line in lines] == pytest.approx([0, 0.8, 1.4])
    assert [line["loss"] for line in lines] == pytest.approx(done.history["loss"].tolist())
    assert lines[1].keys() == {"step", "time", "loss", "accuracy"}
    default = train(arch, problem, steps=100, key=key, **QUIET)
    assert (default.steps[0], default.steps[-1], len(default.steps)) == (0, 100, 22)


@pytest.mark.loose_promotion  # optax.adam mixes dtypes
def test_any_function_is_trained(x64, key):
    """An Equinox module, against its own loop by hand with optax."""
    problem = data()
    module = eqx.nn.MLP(9, CLASSES, 5, 1, activation=jnp.tanh, key=jax.random.key(1), dtype=jnp.float64)
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def f(params, x):
        return jax.vmap(eqx.combine(params, static))(x.reshape(len(x), -1))

    x, y = jnp.asarray(problem.x_train, float), jnp.asarray(problem.targets_train, float)
    ours = train(f, problem, steps=15, key=key, params=params, optimizer=optax.adam(1e-2), **QUIET)
    rule = optax.adam(1e-2)
    state = rule.init(params)
    for _ in range(15):
        gradient = jax.grad(lambda p: jnp.mean(jnp.sum((f(p, x) - y) ** 2, 1)) / 2)(params)
        updates, state = rule.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    for mine, theirs in zip(jax.tree.leaves(ours.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_flax_module_is_trained(key):
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(CLASSES)(nn.tanh(nn.Dense(8)(x.reshape(len(x), -1))))

    model = Model()
    params = model.init(key, jnp.zeros((1, *IMAGE)))
    done = train(model.apply, data(), steps=200, key=key, params=params, optimizer=0.5, **QUIET)
    assert done.history["loss"][-1] < 0.5 * done.history["loss"][0]


@pytest.mark.loose_promotion
def test_a_network_of_neural_tangents_is_trained_as_by_hand(key):
    nt = import_neural_tangents()
    init, apply, _ = nt.stax.serial(nt.stax.Flatten(), nt.stax.Dense(8), nt.stax.Erf(), nt.stax.Dense(CLASSES))
    _, params = init(key, (-1, *IMAGE))
    problem = data()
    done = train(apply, problem, steps=20, key=key, params=params, optimizer=0.1, **QUIET)
    x, y = problem.x_train, problem.targets_train
    descend = jax.grad(lambda p: jnp.mean(jnp.sum((apply(p, x) - y) ** 2, 1)) / 2)
    for _ in range(20):
        params = jax.tree.map(lambda a, b: a - 0.1 * b, params, descend(params))
    for mine, theirs in zip(jax.tree.leaves(done.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_width_that_cannot_fit_is_refused_before_anything_is_allocated(key, monkeypatch):
    arch = mlp(depth=2, width=10**6, num_classes=CLASSES)
    drawn = []
    monkeypatch.setattr(jax.random, "normal", lambda *a, **k: drawn.append(a) or jax.random.uniform(*a, **k))
    with pytest.raises(MemoryError, match=r"Training a network with .* needs about .* Take a smaller width"):
        train(arch, data(), steps=1, key=key, **QUIET)
    assert all(isinstance(a[0], jax.core.Tracer) for a in drawn)


def test_what_users_do_wrong_is_named(unchecked, key, tmp_path):
    problem, arch = data(), mlp(depth=1, width=4, num_classes=CLASSES)
    params = arch.init(key, IMAGE)
    other = mlp(depth=1, width=5, num_classes=CLASSES).init(key, IMAGE)
    right = {"network": arch, "data": problem, "steps": 2, "key": key, **QUIET}

    def stateful(params, x):
        return arch.apply(params, x), {"mean": jnp.mean(x)}

    def two_outputs(params, x):
        return arch.apply(params, x)[:, :2]

    cases = [
        (ValueError, "params are those of another architecture", {"params": other}),
        (ValueError, "params are those of another architecture", {"params": {"w": jnp.ones(3)}}),
        (TypeError, "a function with a state is not covered", {"network": stateful, "params": params}),
        (ValueError, r"must return \(b, 3\) outputs, one for each class, got \(2, 2\)",
         {"network": two_outputs, "params": params}),
        (ValueError, "params must be given with a function", {"network": stateful}),
        (TypeError, "network must be an architecture or a function", {"network": 3}),
        (TypeError, "params must be a pytree of float arrays", {"network": two_outputs, "params": {"w": 1}}),
        (TypeError, "method must be a method of training", {"method": "pgd"}),
        (TypeError, "key must be a random key", {"key": 0}),
        (ValueError, "batch_size must be at most 6", {"batch_size": 7}),
        (ValueError, "optimizer must be finite and positive", {"optimizer": -0.1}),
        (TypeError, "optimizer must be a learning rate or an optimiser", {"optimizer": "adam"}),
        (ValueError, "time_step must be finite and positive", {"time_step": 0.0}),
        (ValueError, "record_at must be whole numbers between 0 and steps = 2", {"record_at": [0, 3]}),
        (ValueError, "record_at must be whole numbers", {"record_at": [0.5]}),
        (ValueError, "steps must be at least 0", {"steps": -1}),
        (ValueError, "strength must be a number, or hold one for each of 6",
         {"method": AttackFlowTraining((1.0, 2.0))}),
        (ValueError, "strength must be a number, or hold one for each of 6",
         {"method": AttackFlowTraining(lambda t: t * jnp.ones(5))}),
    ]  # fmt: skip
    for error, message, change in cases:
        with pytest.raises(error, match=message):
            train(**(right | change))
    settings = [
        (ValueError, "reduction must be", lambda: StandardTraining(reduction="max")),
        (TypeError, "strength must be a number, a tuple", lambda: AttackFlowTraining(np.ones(3))),
        (ValueError, "strength must not be negative", lambda: AttackFlowTraining(-1.0)),
        (ValueError, "steps must be at least 1", lambda: AttackFlowTraining(1.0, steps=0)),
        (TypeError, "attack must be an attack", lambda: PGDTraining("pgd")),
    ]
    for error, message, make in settings:
        with pytest.raises(error, match=message):
            make()
    names = iter("ab")
    with pytest.raises(ValueError, match="record must give the same names at every step"):
        train(**right, record=lambda params: {next(names): 0.0}, record_at=[0, 1])


def test_float64_parameters_are_trained_in_float64_and_others_in_float32(key, x64):
    arch, params = smooth_mlp()
    done = train(arch, data(), steps=2, key=key, params=params, **QUIET)
    assert {leaf.dtype for leaf in jax.tree.leaves(done.params)} == {jnp.dtype("float64")}
    assert done.history["loss"].dtype == np.float64
    single = train(arch, data(), steps=2, key=key, **QUIET)
    assert {leaf.dtype for leaf in jax.tree.leaves(single.params)} == {jnp.dtype("float32")}
