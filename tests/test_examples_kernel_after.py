"""The example of the kernel after training runs, small, from data to figures, and goes on where it was stopped."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ntkadv as na
from ntkadv.kernels import empirical_ntk
from ntkadv.training import StandardTraining, linearize


@pytest.fixture(scope="module")
def example(script):
    return script("kernel_after_training")


@pytest.fixture
def small(key):
    """A network, parameters that its training might reach, and images."""
    arch = na.architectures.mlp(depth=1, width=8, num_classes=3)
    init, moved, pixels = jax.random.split(key, 3)
    params = arch.init(init, (4, 4, 1))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(moved, leaf.shape, leaf.dtype), params)
    return arch, params, jax.random.uniform(pixels, (12, 4, 4, 1))


@pytest.mark.slow
@pytest.mark.loose_promotion  # optax
def test_it_leaves_figures_and_numbers_and_goes_on(example, tmp_path, monkeypatch):
    config = example.Config(
        n_train=60, n_test=24, n_kernel=20, depth=1, width=16, attack_steps=2, judge_steps=3, radii=2, epochs=(0, 1, 3),
        batch_size=20, seeds=(0, 1), output=tmp_path,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        example.main(config)
    for figure in ("accuracy_of_kernels", "on_top", "kernel_movement", "kernel_distances", "accuracy_against_eps"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    accuracy = {name: np.array(values) for name, values in results["accuracy"].items()}
    for values in accuracy.values():
        assert values.shape == (2, 3, 2)
        assert (values[..., 1] <= values[..., 0]).all()
    np.testing.assert_array_equal(accuracy["kernel, standard"][:, 0], accuracy["kernel, adversarial"][:, 0])
    np.testing.assert_array_equal(accuracy["network, standard"][:, 0], accuracy["network, adversarial"][:, 0])
    for name in ("full on top", "lazy on top"):
        np.testing.assert_array_equal(accuracy[name][:, 0], accuracy["network, adversarial"][:, -1])
    distances = np.array(results["distances"])
    np.testing.assert_allclose(distances, np.swapaxes(distances, 1, 2), atol=1e-12)
    np.testing.assert_allclose(distances[:, 0, 3], 0, atol=1e-12)
    for seed, moved in enumerate(results["movement"]):
        for i, kind in enumerate(("standard", "adversarial")):
            way = moved[f"{kind} training"]["cosine_distance"]
            np.testing.assert_allclose(distances[seed, 0, 3 * i : 3 * i + 3], way, atol=1e-9)
    curves = na.AccuracyCurves.from_json(tmp_path / "curves-seed1.json")
    # The judge's random numbers depend on the radius, and one radius passes on to the next what it broke.
    row = curves.models.index("network, adversarial")
    assert curves.accuracy[row, 0] == accuracy["network, adversarial"][1, -1, 0]
    assert "more robust than that of standard training" in " ".join(printed.getvalue().split())

    for name in ("train", "empirical_ntk"):
        monkeypatch.setattr(example, name, None)
    monkeypatch.setattr(na, "accuracy_curves", None)
    with contextlib.redirect_stdout(io.StringIO()):
        example.main(config)
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["accuracy"] == results["accuracy"]


def test_a_centred_linearisation_is_zero_at_its_origin_and_linear(example, small):
    arch, params, x = small
    centred = example.Centred(linearize(arch, params))
    np.testing.assert_array_equal(centred.apply(params, x), 0)
    change = jax.tree.map(jnp.ones_like, params)
    once, twice = (
        centred.apply(jax.tree.map(lambda p, d, s=scale: p + s * d, params, change), x) for scale in (0.5, 1.0)
    )
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-4, atol=1e-5)
    assert np.abs(once).max() > 0.1


@pytest.mark.loose_promotion  # optax
def test_a_centred_linearisation_trained_by_steps_is_kernel_regression_with_the_ntk(example, small, key):
    arch, params, x = small
    labels = np.arange(12, dtype=np.int32) % 3
    images = np.asarray(x)
    data = na.Dataset.from_arrays(name="made", x_train=images, y_train=labels, x_test=images, y_test=labels)
    kernel = np.asarray(empirical_ntk(arch.apply, params, x), np.float64).transpose(0, 2, 1, 3).reshape(36, 36)
    values, vectors = np.linalg.eigh(kernel)
    rate, steps = 0.5 / values[-1], 30
    centred = example.Centred(linearize(arch, params))
    trained = example.train(
        centred.apply, data, method=StandardTraining(reduction="sum"), steps=steps, key=key,
        optimizer=example.momentum_sgd(rate, 0.0), params=params, progress=False,
    )  # fmt: skip
    learnt = 1 - (1 - rate * values) ** steps
    expected = (vectors * learnt) @ (vectors.T @ np.asarray(data.targets_train, np.float64).ravel())
    np.testing.assert_allclose(trained.predictor(x), expected.reshape(12, 3), atol=2e-5)


@pytest.mark.loose_promotion  # optax
def test_momentum_sgd_is_that_of_optax(example, key):
    params = {"a": jax.random.normal(key, (5,)), "b": jnp.ones((2, 2))}
    ours, theirs = example.momentum_sgd(0.3, 0.9), optax.sgd(0.3, momentum=0.9)
    states = ours.init(params), theirs.init(params)
    for number in range(3):
        gradients = jax.tree.map(lambda leaf, n=number: leaf * (n - 0.5), params)
        first, ours_state = ours.update(gradients, states[0], params)
        second, theirs_state = theirs.update(gradients, states[1], params)
        states = ours_state, theirs_state
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_verdict_follows_the_seeds(example):
    assert example.answer([1, 1]) == "yes (2 of 2 seeds)"
    assert example.answer([-1, -1, -1]) == "no, the reverse (3 of 3 seeds)"
    assert example.answer([True, False]) == "not clear (yes in 1, the reverse in 0, of 2 seeds)"

    right, wrong = np.ones((1, 2, 2, 50), bool), np.zeros((1, 2, 2, 50), bool)
    names = [f"{what}, {kind}" for what in ("kernel", "network") for kind in ("standard", "adversarial")]
    against = dict.fromkeys([*names, "full on top", "lazy on top", "kernel on top"], right)
    against["kernel, adversarial"] = against["network, adversarial"] = wrong
    lines = example.verdict(example.Config(seeds=(7,)), against)
    assert "than that of standard training: no, the reverse (1 of 1 seeds)" in lines[0]
    assert any("Seed 7: adversarial training collapsed (clean accuracy 0.00)" in line for line in lines)
    assert "lazy) than with all moving (full): not clear" in lines[4]


def test_the_half_way_of_each_kernel_is_found_and_compared(example):
    way = {"standard": [0, 0.1, 0.5, 0.8], "adversarial": [0, 0.5, 0.7, 0.9]}
    distances = np.zeros((1, 9, 9))
    distances[0, 0, :8] = [*way["standard"], *way["adversarial"]]
    distances[0, 3, 7], distances[0, 3, 8] = 0.3, 0.1
    lines = example.moved_where(example.Config(epochs=(0, 2, 5, 9), seeds=(0,)), distances)
    assert "standard training: NTK ends 0.800 (1 - cosine) from where it began, half of that by epoch 5" in lines[0]
    assert "adversarial training: NTK ends 0.900 (1 - cosine) from where it began, half of that by epoch 2" in lines[1]
    assert lines[2].endswith("sooner than that of standard training: yes (1 of 1 seeds)")
    assert lines[3].endswith("other batches 0.100. A different kernel: yes (1 of 1 seeds)")


def test_epochs_that_do_not_ascend_from_zero_are_refused(example):
    with pytest.raises(ValueError, match="epochs must begin with 0 and ascend"):
        example.Config(epochs=(0, 3, 1))
    with pytest.raises(ValueError, match="epochs must begin with 0"):
        example.Config(epochs=(1, 3))
