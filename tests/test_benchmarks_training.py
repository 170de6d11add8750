"""The benchmarks of training and of wide networks, run small."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkadv as na

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def call(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("attack_steps", [0, 3])
def test_pytorch_trains_the_same_network_in_the_same_way(script, kind, attack_steps):
    """The other side is the same: loss, attack, gradients, momentum; on all images at once, so that batches agree."""
    pytest.importorskip("torch")
    bench = script("training")
    settings = bench.Settings(networks=(f"{kind}-2-8",), image=(6, 6, 2), n_train=12, batch_size=12)
    arch, params = bench.build(f"{kind}-2-8", settings)
    x, labels = bench.images(settings)
    losses = [bench.first_loss(arch, params, x, labels, attack_steps)]
    run, theirs = bench.theirs(settings, arch, params, x, labels, attack_steps, compiled=False)
    assert theirs == pytest.approx(losses[0], rel=1e-4)
    run(3)
    layers = run.__closure__
    weights = next(cell.cell_contents for cell in layers if isinstance(cell.cell_contents, bench_optimizer()))
    moved = [tensor.detach().numpy() for group in weights.param_groups for tensor in group["params"]]
    data = na.Dataset.from_arrays(
        name="random", x_train=x, y_train=labels, x_test=x[:1], y_test=labels[:1], num_classes=10
    )
    method = na.training.StandardTraining(loss="cross_entropy")
    if attack_steps:
        method = na.training.PGDTraining(bench.pgd(attack_steps), loss="cross_entropy")
    done = na.training.train(
        arch, data, method=method, steps=3, key=jax.random.key(0), params=params, progress=False,
        optimizer=bench.optax.sgd(bench.RATE, momentum=bench.MOMENTUM),
    )  # fmt: skip
    expected = bench.torch_layers(arch, done.params, settings.image)
    before = bench.torch_layers(arch, params, settings.image)
    ours = [tensor.numpy() for layer in expected for tensor in layer.tensors]
    start = [tensor.numpy() for layer in before for tensor in layer.tensors]
    for mine, other, first in zip(ours, moved, start, strict=True):
        change = np.abs(mine - first).max()
        assert change > 0
        assert np.abs(mine - other).max() < 0.02 * change


@pytest.mark.slow
@pytest.mark.loose_promotion  # optax
@pytest.mark.parametrize("name", ["standard", "FGSM", "PGD", "TRADES", "APART"])
def test_pytorch_makes_the_same_updates_by_each_method(script, name):
    """The losses of some updates on all images agree, with batch norm; TRADES and APART begin at random."""
    pytest.importorskip("torch")
    bench, theirs = script("training"), script("torch_methods")
    settings = bench.Settings(image=(8, 8, 3), n_train=16, batch_size=16, residual=(4, 6), attack_steps=(3,))
    network, (x, labels) = bench.residual(settings), bench.images(settings)
    ours = bench.our_method(settings, network, name, x, labels)(4, tuple(range(5))).history["loss"]
    make = theirs.run(
        name, network, x, labels, 16, eps=bench.EPS, steps=3, rate=bench.RATE, momentum=bench.MOMENTUM, threads=1
    )
    np.testing.assert_allclose(ours, make(5), rtol=1e-2 if name in bench.RANDOM else 1e-3)
    assert np.ptp(ours) > 1e-3


def bench_optimizer():
    import torch

    return torch.optim.SGD


def test_what_is_asked_for_must_have_a_name_of_the_right_form(script):
    for settings in ({"networks": ("mlp-3",)}, {"networks": ("vit-3-4",)}, {"kernels": ("cnn-3-32",)}):
        with pytest.raises(ValueError, match="networks are called mlp-DEPTH-WIDTH"):
            script("training").Settings(**settings)


def test_rates_are_medians_of_sides_measured_in_turn(script, monkeypatch):
    bench = script("training")
    clock, calls = [0.0], []

    def side(name, cost):
        def run(steps):
            calls.append(name)
            clock[0] += cost * steps

        return run

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    found = bench.in_turn({"fast": side("fast", 0.1), "slow": side("slow", 0.5)}, repeats=3, seconds=2.0)
    assert found["fast"][0] == pytest.approx(10)
    assert found["slow"][0] == pytest.approx(2)
    assert calls[-6:] == ["fast", "slow"] * 3


@pytest.mark.slow
def test_training_and_kernels_are_measured_and_agree(tmp_path):
    pytest.importorskip("torch")
    sizes = ["--networks", "mlp-1-8", "cnn-1-4", "--image", 6, 6, 1, "--n-train", 32, "--batch-size", 8]
    rest = ["--kernels", "mlp-1-8-5", "cnn-1-4-5", "--seconds", 0.05, "--repeats", 1, "--attack-steps", 0, 2]
    rest += ["--residual", 4, "--methods", "FGSM"]
    ended = call("training.py", *sizes, *rest, "--output", tmp_path / "training.json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / "training.json").read_text())
    assert [row["case"] for row in result["training"]] == [
        "mlp-1-8, no attack", "mlp-1-8, PGD-2", "cnn-1-4, no attack", "cnn-1-4, PGD-2"
    ]  # fmt: skip
    for row in result["training"]:
        assert {"ntkadv", "PyTorch"} <= row["sides"].keys()
        assert row["sides"].keys() == row["times_faster"].keys() | {"ntkadv"}
    assert [row["case"] for row in result["methods"]] == ["FGSM"]
    assert all(row["apart"] < 1e-3 for row in result["training"] + result["methods"] + result["ntk"])
    assert [len(row["sides"]) + len(row["not_run"]) for row in result["ntk"]] == [4, 4]
    assert result["environment"]["jax"] == jax.__version__


SMALL = [
    "--cases", "mlp-digits", "cnn-digits", "--widths", 8, 32, 128, "--channels", 16, 32, "--seeds", 0, 1,
    "--n-train", 8, "--n-test", 6, "--depth", 1, "--steps", 30, "--looks", 4, "--rate", 0.2,
]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_over_widths_goes_on_where_time_ended_and_does_nothing_twice(tmp_path):
    places = ["--output", tmp_path, "--run", tmp_path / "run"]

    def result():
        (file,) = tmp_path.glob("wide-*.json")
        return json.loads(file.read_text())

    stopped = call("wide.py", *SMALL, *places, "--time-limit", 0)
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert not result()["complete"]
    ended = call("wide.py", *SMALL, *places)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first = result()
    assert first["complete"]
    networks = first["cases"]["mlp-digits"]["networks"]
    assert [(one["width"], one["seed"]) for one in networks] == [(w, s) for w in (8, 32, 128) for s in (0, 1)]
    assert not any(case["skipped"] for case in first["cases"].values())
    assert networks[0]["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    for network in networks:
        assert len(network["distance"]) == 8
        assert all(0 < value < 10 for values in network["distance"].values() for value in values)
    slopes = first["cases"]["mlp-digits"]["slopes"]
    assert slopes["standard, own closed form, train"]["exponent"] < 0
    assert call("wide.py", *SMALL, *places).returncode == 0
    assert result()["cases"] == first["cases"]


@pytest.mark.slow
def test_a_network_that_cannot_fit_is_noted_and_the_rest_goes_on(script, tmp_path):
    wide = script("wide")
    settings = wide.Settings(cases=("mlp-digits",), n_train=8, n_test=6, depth=2, widths=(10**6,), seeds=(0,))
    case = wide.Case(settings, "mlp-digits", na.runs.Run(tmp_path, {}))
    case.network(10**6, 0)
    (skipped,) = case.record["skipped"]
    assert skipped["reason"].startswith("MemoryError: Training a network with")
    assert case.record["networks"] == []
    case.conclude()
    assert wide.table_of("mlp-digits", case.record).row_count == 0


def test_the_learning_rate_is_a_share_of_what_the_infinite_width_kernel_allows(script, tmp_path):
    wide = script("wide")
    settings = wide.Settings(cases=("mlp-digits",), n_train=8, n_test=6, depth=1, steps=10, looks=3, strength=0.02)
    case = wide.Case(settings, "mlp-digits", na.runs.Run(tmp_path, {}))
    arch = case.build(64)
    kernel = np.asarray(arch.ntk(jnp.asarray(case.data.x_train), jnp.asarray(case.data.x_train)), float)
    attack = np.exp(0.02 * float(arch.ark(case.data.x_train)[0]))
    assert case.rate == pytest.approx(0.3 * 2 / (np.linalg.norm(kernel, 2) * attack), rel=1e-4)
    np.testing.assert_allclose(case.times / case.rate, [1, 3, 10])
