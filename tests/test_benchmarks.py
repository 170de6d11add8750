import json
import os
import subprocess
import sys
import time
import types
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


def test_growth_exponent_of_a_cube_is_three(script):
    sizes = [10, 20, 70]
    assert script("measure").growth_exponent(sizes, [0.3 * n**3 for n in sizes]) == pytest.approx(3)
    assert script("measure").growth_exponent([10], [1.0]) is None


def test_a_side_that_raises_shows_its_traceback(script):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        script("measure").in_child(divmod, 1, 0, limit=60)


def test_a_side_that_dies_is_reported_with_its_exit_code(script):
    assert "exit code 3" in script("measure").in_child(os._exit, 3, limit=60).reason


def test_a_side_that_takes_too_long_is_stopped(script):
    assert "stopped after 1 s" in script("measure").in_child(time.sleep, 600, limit=1).reason


def test_a_repetition_that_would_pass_the_budget_is_not_begun_but_the_first_always_is(script):
    result, timing = script("measure").timed(lambda x: x + 1, jnp.ones(3), repeats=5, budget=0)
    np.testing.assert_array_equal(result, [2, 2, 2])
    assert timing["repeats"] == 1
    assert script("measure").timed(lambda x: x + 1, jnp.ones(3), repeats=5)[1]["repeats"] == 5


def test_compilations_are_counted_once_for_each_program_and_only_inside(script):
    with script("measure").Compilations() as compilations:
        double = jax.jit(lambda x: 2 * x)
        x = jnp.ones(5)
        before = compilations.snapshot()
        double(x)
        assert compilations.since(before).programs == 1
        double(x)
        assert compilations.since(before).programs == 1
    double(jnp.ones(6))
    assert compilations.since(before).programs == 1


def test_the_command_on_record_names_no_folder(script, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/here/speed.py", "--root", "/secret", "--quick", "--output=/hidden", "--seed", "1"]
    )
    assert script("measure").command_line() == "python benchmarks/speed.py --quick --seed 1"


class TestStepComparison:
    def compare(self, script, monkeypatch, gradients, seconds=1.0, **settings):
        speed = script("speed")

        def answer(function, problem, n, side, *arguments, limit):
            assert function is script("sides").step
            return {"compile_s": 0.0, "min_s": seconds, "peak_mib": 1.0, "gradient": np.array(gradients[side])}

        monkeypatch.setattr(speed, "in_child", answer)
        problem = types.SimpleNamespace(n_train=1000)
        return speed.compare_steps(speed.Settings(**settings), problem, script("rich.console").Console(quiet=True))

    def test_sides_that_differ_do_not_agree(self, script, monkeypatch):
        equal = {"straightforward": [1.0, 2.0], "eigh": [1.0, 2.0], "krylov": [1.0, 2.0]}
        assert self.compare(script, monkeypatch, equal, sizes=(100,))["agree"]
        assert not self.compare(script, monkeypatch, {**equal, "krylov": [1.0, 2.001]}, sizes=(100,))["agree"]
        assert not self.compare(script, monkeypatch, {**equal, "eigh": [np.nan, 2.0]}, sizes=(100,))["agree"]

    def test_what_would_pass_the_budget_is_not_run(self, script, monkeypatch):
        equal = {"straightforward": [1.0], "eigh": [1.0], "krylov": [1.0]}
        rows = self.compare(script, monkeypatch, equal, sizes=(100, 1000), budget=100.0)["rows"]
        assert rows[0]["eigh"]["times_faster"] == 1
        assert all("budget" in rows[1][side]["not_run"] for side in equal)


def test_the_digits_take_the_place_of_images_that_are_not_to_be_had(script, monkeypatch, tmp_path):
    sides = script("sides")

    def only_digits(name, **arguments):
        if name != "digits":
            raise na.DatasetNotFoundError(name)
        return na.load_dataset(name, **arguments)

    monkeypatch.setattr(sides, "load_dataset", only_digits)
    asked = {"dataset": "cifar10", "root": None, "n_train": 120, "n_val": 10, "n_test": 10, "seed": 0, "eps": 0.1}
    made = sides.prepare(sides.Problem(**asked, folder=tmp_path), 5)
    assert made["problem"].dataset == "digits"
    assert "digits" in made["data"]
    assert made["problem"].kernel("theta", 100).shape == (100, 100)
    assert made["problem"].kernel("cross", 100).shape == (5, 100)


class Coarse:
    """The kernel of an MLP, but in float32 with the digits of TF32 or so."""

    def __init__(self, arch):
        self.arch = arch

    def ntk(self, x1, x2):
        kernel = self.arch.ntk(x1, x2)
        return kernel.astype(jnp.bfloat16).astype(kernel.dtype) if kernel.dtype == jnp.float32 else kernel


def test_precision_below_float32_is_refused(script):
    checks = script("checks")
    arch = na.architectures.mlp(depth=2, num_classes=10)
    x = np.asarray(jax.random.uniform(jax.random.key(0), (40, 4, 4, 1)))
    assert checks.check_precision(arch, x)["kernel_error"] < 1e-5
    with pytest.raises(ArithmeticError, match="kernel_error"):
        checks.check_precision(Coarse(arch), x)


def test_a_wrong_decomposition_is_refused(script):
    gram = np.diag(np.arange(1.0, 21.0))
    right = types.SimpleNamespace(spectrum=(np.arange(1.0, 21.0), np.eye(20), 0.0))
    assert script("checks").check_spectrum(gram, right)["residual"] < 1e-14
    swapped = types.SimpleNamespace(spectrum=(np.arange(1.0, 21.0), np.eye(20)[::-1], 0.0))
    with pytest.raises(ArithmeticError, match="wrong"):
        script("checks").check_spectrum(gram, swapped)


@pytest.mark.slow
def test_speed_compares_all_sides_and_they_agree(tmp_path):
    sizes = ["--sizes", 120, 150, "--batch-size", 16, "--fit-size", 120, "--fit-steps", 2, "--dynamics-size", 100]
    rest = ["--times", 5, "--test-images", 20, "--repeats", 1, "--output", tmp_path / "speed.json"]
    ended = call("speed.py", "--dataset", "digits", *sizes, *rest)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / "speed.json").read_text())
    for row in result["step"]["rows"]:
        assert all(row[side]["gradient_difference"] < 1e-8 for side in ("straightforward", "eigh", "krylov"))
    assert result["fit"]["xi_difference"] < 1e-3
    assert result["dynamics"]["agree"]
    assert result["environment"]["jax"] == jax.__version__


@pytest.mark.slow
def test_a_stopped_run_at_published_scale_goes_on_and_does_nothing_twice(tmp_path):
    sizes = ["--n-train", 60, "--n-val", 30, "--n-test", 30, "--depth", 1, "--steps", 3, "--batch-size", 8]
    choice = [
        "--dataset",
        "digits",
        "--architectures",
        "mlp",
        "--eps",
        0.1,
        "--candidates",
        2,
        "--selection-images",
        10,
    ]
    places = ["--output", tmp_path, "--run", tmp_path / "run"]
    everything = (*sizes, *choice, *places)

    def result():
        (file,) = tmp_path.glob("published_scale-*.json")
        return json.loads(file.read_text())

    stopped = call("published_scale.py", *everything, "--time-limit", 0)
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert not result()["complete"]
    ended = call("published_scale.py", *everything)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first = result()
    (at_eps,) = first["architectures"]["mlp"]["eps"].values()
    assert len(at_eps["fit"]["history"]) == 3
    assert at_eps["fit"]["later_compilations"] == 0
    assert [model["images"] for model in at_eps["models"].values()] == [30] * 4
    assert call("published_scale.py", *everything).returncode == 0
    assert result()["architectures"] == first["architectures"]


@pytest.mark.slow
def test_attacks_end_where_those_of_others_end(tmp_path, data_root):
    sizes = ["--network-batches", 8, "--network-steps", 5, "--kernel-train", 60, "--kernel-batch", 4]
    rest = ["--kernel-steps", 2, "--repeats", 1, "--root", data_root, "--output", tmp_path / "attacks.json"]
    ended = call("attacks.py", *sizes, *rest)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "attacks.json").read_text())["comparisons"]
    assert [len(row["sides"]) for row in rows] == [3, 3]
    assert all(row["points_apart"] < 1e-3 for row in rows)


@pytest.mark.slow
def test_autoattack_agrees_with_the_package_of_its_authors(tmp_path, data_root):
    pytest.importorskip("torch")
    pytest.importorskip("pyautoattack")
    sizes = ["--n-test", 40, 30, "--n-train", 1000, 200, "--train-steps", 200, "--steps", 10, "--queries", 50]
    rest = ["--tolerance", 0.1, "--norms", "Linf", "--root", data_root, "--output", tmp_path / "autoattack.json"]
    ended = call("autoattack.py", *sizes, *rest)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "autoattack.json").read_text())["comparisons"]
    assert [row["model"] for row in rows] == ["mnist-cnn", "cifar10-kernel"]
    for row in rows:
        assert row["ntkadv"]["accuracy"]["clean"] == pytest.approx(row["original"]["accuracy"]["clean"], abs=1e-3)
