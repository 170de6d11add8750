"""Epochs, averages, the best network, an early end: against loops by hand."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from residual_problems import batch_of, compiled, entropies, images, resnet, tiny_resnet, with_averages
from training_problems import data, equal_bits, linear, linear_params

from ntkadv.attacks import Linf
from ntkadv.training import (
    CropFlip,
    DivergenceError,
    FGSMTraining,
    Method,
    StandardTraining,
    sgd,
    train,
)

QUIET = {"progress": False}


@dataclass(frozen=True)
class Watched(Method):
    """Keeps what the batch of every step was in its own state."""

    length: int = 40

    def start(self, problem):
        return {"places": jnp.zeros((self.length, 3), jnp.int32), "step": jnp.int32(0),
                "x": jnp.zeros((self.length, 3, *problem.shape[1:]), jnp.float32),
                "key": jnp.zeros((self.length, 3, 2), jnp.uint32)}  # fmt: skip

    def update(self, f, optimizer, state, batch):
        after, metrics = super().update(f, optimizer, state, batch)
        step, seen = state.method["step"], dict(state.method)
        for name, value in (("places", batch.places), ("x", batch.x), ("key", jax.random.key_data(batch.keys))):
            seen[name] = seen[name].at[step].set(value.astype(seen[name].dtype))
        return after._replace(method=seen | {"step": step + 1}), metrics


def single(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def watched(n, epochs, key, **settings):
    done = train(linear, data(n=n), method=Watched(), epochs=epochs, key=key, batch_size=3,
                 params=single(linear_params()), **QUIET, **settings)  # fmt: skip
    return done, {name: np.asarray(value) for name, value in done.state.method.items()}


def test_every_epoch_deals_out_each_image_once_in_a_new_order(key):
    done, seen = watched(12, 10, key)
    assert done.step == 40
    assert done.steps.tolist() == list(range(0, 41, 4))
    orders = seen["places"].reshape(10, 12)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.broadcast_to(np.arange(12), (10, 12)))
    assert len({tuple(order) for order in orders}) == 10
    # Images of the batch are those at its places, and no key is used twice.
    np.testing.assert_array_equal(seen["x"], data(n=12).x_train[seen["places"]])
    assert len({tuple(one) for one in seen["key"].reshape(-1, 2)}) == 120
    # Each image is as often in each place of the order as others: chi squared with 121 degrees of freedom.
    many = np.concatenate([watched(12, 10, jax.random.key(seed))[1]["places"].reshape(10, 12) for seed in range(1, 25)])
    counts = np.stack([np.bincount(column, minlength=12) for column in many.T])
    assert np.sum((counts - 20) ** 2 / 20) < 121 + 4.5 * np.sqrt(242)


def test_images_left_over_wait_for_the_next_epoch(key):
    done, seen = watched(11, 13, key)
    assert done.step == 39
    orders = seen["places"][:39].reshape(13, 9)
    assert all(len(set(order)) == 9 for order in orders)
    assert set(orders.ravel()) == set(range(11))


def test_where_it_is_cut_into_pieces_an_epoch_is_the_same(key, tmp_path):
    whole, _ = watched(12, 10, key, record_at=())
    pieces, _ = watched(12, 10, key, record_at=range(41))
    assert equal_bits(whole.state, pieces.state)
    path = tmp_path / "run.npz"
    settings = {"method": Watched(), "key": key, "batch_size": 3, "params": single(linear_params()), **QUIET}
    for steps in (3, 4, 6, 39, 40):
        done = train(linear, data(n=12), steps=steps, record_at=(), checkpoint=path, **settings)
    assert equal_bits(whole.state, done.state)


def test_augmented_images_are_crops_of_those_at_the_batch_s_places(key):
    _, seen = watched(12, 10, key, augmentation=CropFlip(padding=1))
    x = data(n=12).x_train
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    found = set()
    for made, place in zip(seen["x"].reshape(-1, 3, 3, 1), seen["places"].ravel(), strict=True):
        ways = {
            (row, column, flip)
            for row in range(3) for column in range(3) for flip in (1, -1)
            if np.array_equal(made, padded[place, row : row + 3, column : column + 3][:, ::flip])
        }  # fmt: skip
        assert ways
        found |= ways
    assert len(found) == 18


def test_averages_and_batch_norm_s_are_those_of_a_loop_by_hand(x64, key):
    """Full batches; the network that is recorded and given is the average."""
    held, model = images(), tiny_resnet(stages=1)
    done = train(model, held, method=StandardTraining(loss="cross_entropy"), steps=4, key=key, optimizer=0.1,
                 average=0.6, record=lambda m: {"bias": m.head.bias, "mean": m.norm.running.mean},
                 record_at=range(5), **QUIET)  # fmt: skip
    params, running, _ = model.split()
    batch = batch_of(held)

    @compiled
    def step(params, running):
        def mean(params):
            logits, _, moved = resnet(params, running, batch.x)
            return jnp.mean(entropies(logits, batch.labels)), moved

        (loss, moved), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        return loss, jax.tree.map(lambda a, b: a - 0.1 * b, params, gradient), with_averages(running, moved)

    slow = [np.asarray(leaf) for leaf in jax.tree.leaves((params, running))]
    for number in range(4):
        loss, params, running = step(params, running)
        assert done.history["loss"][number] == pytest.approx(float(loss), rel=1e-8)
        fast = jax.tree.leaves((params, running))
        slow = [0.6 * a + 0.4 * np.asarray(b) for a, b in zip(slow, fast, strict=True)]
    for ours, theirs in zip(jax.tree.leaves((done.params, done.statistics)), slow, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-10)
    for ours, theirs in zip(jax.tree.leaves((done.state.params, done.state.statistics)), fast, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-10)
    np.testing.assert_array_equal(done.history["bias"][-1], done.params.head.bias)
    np.testing.assert_array_equal(done.history["mean"][-1], done.statistics.norm.running.mean)
    np.testing.assert_array_equal(done.history["bias"][0], model.head.bias)
    # The predictor is that network in evaluation.
    expected = resnet(done.params, done.statistics, jnp.asarray(held.x_test, float), training=False)[0]
    np.testing.assert_allclose(done.predictor(jnp.asarray(held.x_test, float)), expected, rtol=1e-9)


def test_the_best_network_is_that_of_the_largest_number(key):
    seen, values = [], [0.1, np.nan, 0.7, 0.3, 0.7, 0.2]

    def record(params):
        seen.append(params)
        return {"score": values[len(seen) - 1]}

    done = train(linear, data(), steps=5, key=key, params=single(linear_params()), record=record, record_at=range(6),
                 keep_best="score", **QUIET)  # fmt: skip
    # Of several that are as good it is the latest.
    assert (done.best.step, done.best.value) == (4, 0.7)
    assert equal_bits(done.best.params, seen[4])
    assert not equal_bits(done.best.params, done.params)
    x = jnp.asarray(data().x_test)
    np.testing.assert_array_equal(done.best_predictor(x), linear(seen[4], x))
    # NaN is never the best, at the beginning neither.
    values[:], seen[:] = [np.nan, -1.0, -2.0, np.nan, -3.0, -4.0], []
    done = train(linear, data(), steps=5, key=key, params=single(linear_params()), record=record, record_at=range(6),
                 keep_best="score", **QUIET)  # fmt: skip
    assert (done.best.step, done.best.value) == (1, -1.0)


def test_where_stop_says_so_training_ends_and_stays_ended(key, tmp_path):
    values = [0.2, 0.5, 0.6, 0.1, 0.0, 0.0]
    seen = []

    def record(params):
        seen.append(params)
        return {"pgd": values[len(seen) - 1]}

    settings = {
        "method": FGSMTraining(Linf(0.1)), "steps": 50, "key": key, "params": single(linear_params()), "batch_size": 3,
        "record": record, "record_at": range(0, 51, 10), "stop": lambda history: np.any(np.diff(history["pgd"]) < -0.2),
        "checkpoint": tmp_path / "run.npz", **QUIET,
    }  # fmt: skip
    done = train(linear, data(), **settings)
    assert (done.step, done.steps.tolist(), len(seen)) == (30, [0, 10, 20, 30], 4)
    again = train(linear, data(), **settings)
    assert equal_bits(again.state, done.state)
    assert (again.step, len(seen)) == (30, 4)
    alone = train(linear, data(), **(settings | {"steps": 30, "stop": None, "checkpoint": None, "record": None,
                                                 "record_at": ()}))  # fmt: skip
    assert equal_bits(alone.params, done.params)


def test_a_loss_that_is_not_finite_is_named_and_the_last_good_network_kept(tmp_path):
    """Batch norm, averages and FGSM; weights that are blown up by a rate that jumps at the fourth step."""
    path = tmp_path / "run.npz"

    def rate(count):
        return jnp.where(count < 3, jnp.float32(0.01), jnp.float32(jnp.inf))

    settings = {
        "network": tiny_resnet(dtype=jnp.float32, stages=1), "data": images(), "method": FGSMTraining(Linf(0.1)),
        "steps": 9, "key": jax.random.key(0), "optimizer": sgd(rate), "average": 0.5, "batch_size": 2,
        "checkpoint": path, **QUIET,
    }  # fmt: skip
    with pytest.raises(DivergenceError, match="The loss is not finite at step 4: lower the learning rate") as caught:
        train(**settings, record_at=())
    last = caught.value.last
    assert (caught.value.step, last.step) == (4, 3)
    assert f"of step 3, is in {path}" in str(caught.value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((last.params, last.statistics)))
    kept = train(**(settings | {"steps": 3}), record_at=())
    assert equal_bits(kept.state, last.state)
    other = train(**(settings | {"steps": 3, "checkpoint": None}), record_at=())
    assert equal_bits(kept.state, other.state)


def test_wrong_settings_are_named(unchecked, key):
    right = {"network": linear, "data": data(), "key": key, "params": single(linear_params()), **QUIET}
    cases = [
        (ValueError, "give either steps or epochs, got steps = 2 and epochs = 3", {"steps": 2, "epochs": 3}),
        (ValueError, "give either steps or epochs, got steps = None and epochs = None", {}),
        (ValueError, "epochs must be at least 0", {"epochs": -1}),
        (TypeError, "epochs must be", {"epochs": 1.5}),
        (ValueError, "batch_size must be at most 6, the number of", {"epochs": 1, "batch_size": 7}),
        (ValueError, "batch_size must be at least 1", {"epochs": 1, "batch_size": 0}),
        (TypeError, "augmentation must be one, such as CropFlip", {"steps": 1, "augmentation": "crop"}),
        (ValueError, "average must be a decay from 0 to below 1", {"steps": 1, "average": 1.0}),
        (ValueError, "average must be a decay", {"steps": 1, "average": -0.1}),
        (ValueError, r"keep_best must name a number that is recorded, got 'pgd'; there are \['loss'\]",
         {"steps": 1, "keep_best": "pgd"}),
        (ValueError, "keep_best must name a number that is recorded, got 'w'",
         {"steps": 1, "keep_best": "w", "record": lambda params: params}),
        (ValueError, r"the network does not take images of shape \(3, 3, 1\): conv",
         {"steps": 1, "network": tiny_resnet(dtype=jnp.float32), "params": None,
          "data": data()}),
        (ValueError, "params are those of another",
         {"steps": 1, "network": tiny_resnet(dtype=jnp.float32), "data": images()}),
    ]  # fmt: skip
    for error, message, change in cases:
        with pytest.raises(error, match=message):
            train(**(right | change))
    with pytest.raises(ValueError, match="no best network was kept; name what to keep it by"):
        _ = train(**right, steps=1).best_predictor
