"""Runs that were stopped, killed or broken go on to the same bits; checkpoints of other runs are refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from residual_problems import images, tiny_resnet
from training_problems import CLASSES, IMAGE, data, equal_bits, small_cnn

import ntkadv.runs
from ntkadv.architectures import mlp
from ntkadv.attacks import PGD, Linf
from ntkadv.training import (
    APARTTraining,
    AttackFlowTraining,
    CropFlip,
    CURETraining,
    PGDTraining,
    StandardTraining,
    sgd,
    train,
    triangular,
)

QUIET = {"progress": False}


class Stop(KeyboardInterrupt):
    """As if by Ctrl-C."""


METHODS = {
    "standard": StandardTraining(),
    "flow": AttackFlowTraining(lambda t: 0.1 + 0.05 * t, reduction="sum"),
    "pgd": PGDTraining(PGD(Linf(0.1), steps=3), loss="cross_entropy"),
}


@pytest.mark.loose_promotion  # optax.adam mixes dtypes
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(method, key, tmp_path):
    problem, arch = data(n=8), small_cnn()
    settings = {
        "method": METHODS[method], "steps": 23, "key": key, "batch_size": 4, "optimizer": optax.adam(1e-2),
        "record_at": range(0, 24, 3), **QUIET,
    }  # fmt: skip

    def record(params):
        return {"outputs": arch.apply(params, problem.x_test), "size": jnp.sum(params[0]["w"] ** 2)}

    whole = train(arch, problem, record=record, metrics=tmp_path / "whole.jsonl", **settings)
    files = {"checkpoint": tmp_path / "run.npz", "metrics": tmp_path / "run.jsonl"}
    for calls in (4, 2):

        def stopped(params, calls=calls, seen=[]):  # noqa: B006
            seen.append(1)
            if len(seen) == calls:
                raise Stop
            return record(params)

        with pytest.raises(Stop):
            train(arch, problem, record=stopped, **files, **settings)
    # What came after the checkpoint, and half a line, as a kill leaves them.
    with open(files["metrics"], "a") as file:
        file.write('{"step": 22, "time": 0, "loss": 1}\n{"st')
    done = train(arch, problem, record=record, **files, **settings)
    assert equal_bits(done.state, whole.state)
    assert equal_bits(done.history, whole.history)
    np.testing.assert_array_equal(done.steps, whole.steps)
    assert files["metrics"].read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = train(arch, problem, record=record, **files, **settings)
    assert equal_bits(again.state, whole.state)


ROBUST = {
    "apart": APARTTraining(Linf(0.1), alpha=0.02, alpha_start=0.1, start_scale=0.5, scalar_rate=1e-3, scalar_decay=1.0),
    "cure": CURETraining(Linf(0.1), steps=2, revision_rate=0.5, revision_decay=0.9, momentum=0.9),
}


def robust_settings(method):
    """All at once: batch norm, crops, momentum, a rate that varies, averages, the best network, a method's state."""
    return {
        "network": tiny_resnet(dtype=jnp.float32, stages=1), "data": images(n=8), "method": ROBUST[method], "epochs": 5,
        "batch_size": 3, "augmentation": CropFlip(padding=1), "optimizer": sgd(triangular(0.05, 10), weight_decay=1e-3),
        "average": 0.7, "record_at": range(11), "keep_best": "score", "key": jax.random.key(4), **QUIET,
    }  # fmt: skip


def score(model):
    """A number that goes up and down."""
    return {"score": np.sin(300 * np.float64(model.head.bias[0])), "averages": model.norm.running.mean}


@pytest.mark.parametrize("method", ROBUST)
def test_the_whole_of_a_robust_run_goes_on_to_the_same_bits(method, tmp_path):
    settings = robust_settings(method)
    whole = train(**settings, record=score)
    best = int(np.argmax(whole.history["score"]))
    for calls in (min(best + 2, 8), 2):
        seen = []

        def stopped(model, calls=calls, seen=seen):
            seen.append(1)
            if len(seen) == calls:
                raise Stop
            return score(model)

        with pytest.raises(Stop):
            train(**settings, record=stopped, checkpoint=tmp_path / "run.npz")
    done = train(**settings, record=score, checkpoint=tmp_path / "run.npz")
    for part in ("state", "history", "params", "statistics"):
        assert equal_bits(getattr(done, part), getattr(whole, part))
    assert (
        (done.best.step, done.best.value) == (whole.best.step, whole.best.value) == (best, whole.history["score"][best])
    )
    assert equal_bits(done.best, whole.best)
    assert equal_bits(done.best_predictor, whole.best_predictor)
    # Stopped again when it is finished, it stays as it is.
    again = train(**settings, record=score, checkpoint=tmp_path / "run.npz")
    assert equal_bits(again.state, whole.state)
    assert equal_bits(again.best, whole.best)


SCRIPT = """
    import sys, time
    sys.path.insert(0, {folder!r})
    from test_checkpoints import robust_settings, score
    from ntkadv.training import train
    def record(model):
        time.sleep({pause})
        return score(model)
    train(**robust_settings("apart") | dict(epochs=30, record_at=range(61)), record=record, checkpoint={checkpoint!r},
          checkpoint_seconds=0.0, metrics={metrics!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_was_killed_loses_nothing_but_time(kill, tmp_path):
    def script(name, pause):
        paths = {"checkpoint": str(tmp_path / f"{name}.npz"), "metrics": str(tmp_path / f"{name}.jsonl")}
        code = textwrap.dedent(SCRIPT.format(folder=os.path.dirname(__file__), pause=pause, **paths))
        return [sys.executable, "-c", code]

    subprocess.run(script("whole", 0.0), check=True, timeout=240)
    killed = subprocess.Popen(script("killed", 0.1))
    lines = tmp_path / "killed.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and (not lines.exists() or lines.read_text().count("\n") < 8):
        time.sleep(0.02)
    killed.send_signal(kill)
    assert killed.wait() == -kill
    with np.load(tmp_path / "killed.npz") as file:
        assert 0 < len(file["steps"]) < 61
    subprocess.run(script("killed", 0.0), check=True, timeout=240)
    assert lines.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with np.load(tmp_path / "killed.npz") as ours, np.load(tmp_path / "whole.npz") as theirs:
        assert ours.files == theirs.files
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)


def test_a_checkpoint_that_was_half_written_is_never_read(key, tmp_path, monkeypatch):
    """A write that breaks off, at every point, leaves the former checkpoint, or none; and nothing beside it."""
    problem, arch = data(), mlp(depth=1, width=4, num_classes=CLASSES)
    path = tmp_path / "run.npz"
    settings = {"key": key, "record_at": (), **QUIET}
    whole = train(arch, problem, steps=6, **settings)
    write = ntkadv.runs._write_npz
    for kept in (None, 3):
        if kept is not None:
            train(arch, problem, steps=kept, checkpoint=path, **settings)
        held = path.read_bytes() if path.exists() else None
        for cut in (0, 10, 1000):

            def half(file, arrays, cut=cut):
                write(file, arrays)
                file.truncate(cut)
                raise Stop

            monkeypatch.setattr(ntkadv.runs, "_write_npz", half)
            with pytest.raises(Stop):
                train(arch, problem, steps=6, checkpoint=path, **settings)
            monkeypatch.undo()
            assert (path.read_bytes() if path.exists() else None) == held
            assert list(tmp_path.iterdir()) == ([path] if held else [])
    # What a kill leaves, which does not tidy up, is not looked at.
    (tmp_path / ".run.npz.123.tmp").write_bytes(held[:100])
    done = train(arch, problem, steps=6, checkpoint=path, **settings)
    assert equal_bits(done.params, whole.params)


def test_the_checkpoint_of_another_run_is_refused_and_left_alone(key, tmp_path):
    problem, arch = data(), mlp(depth=1, width=4, num_classes=CLASSES)
    path = tmp_path / "run.npz"
    right = {
        "network": arch, "data": problem, "method": StandardTraining(), "steps": 3, "key": key,
        "optimizer": optax.sgd(0.1), "checkpoint": path, **QUIET,
    }  # fmt: skip
    done = train(**right)
    held = path.read_bytes()
    other_start = arch.init(jax.random.key(5), IMAGE)
    relabelled = dataclasses.replace(problem, y_train=problem.y_train[::-1].copy())
    cases = {
        "key": {"key": jax.random.key(1), "params": arch.init(jax.random.split(key)[0], IMAGE)},
        "parameters": {"network": mlp(depth=1, width=5, num_classes=CLASSES)},
        "network": {"network": mlp(depth=1, width=4, num_classes=CLASSES, w_std=1.0)},
        "method": {"method": StandardTraining(loss="cross_entropy")},
        "optimizer": {"optimizer": optax.sgd(0.2)},
        "batch_size": {"batch_size": 3},
        "time_step": {"time_step": 0.5},
        "pixels": {"data": data(seed=1)},
        "labels": {"data": relabelled},
        "start": {"params": other_start},
    }
    for name, change in cases.items():
        with pytest.raises(ValueError, match=rf"run\.npz is that of another run: its {name} is .*, here it is"):
            train(**(right | change))
        assert path.read_bytes() == held
    with pytest.raises(ValueError, match="is at step 3, beyond steps = 2; ask for more steps"):
        train(**(right | {"steps": 2}))
    assert equal_bits(train(**right).params, done.params)


def test_the_checkpoint_of_another_robust_run_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    right = robust_settings("apart") | {"epochs": 1, "checkpoint": path, "record": score, "record_at": (0, 2)}
    done = train(**right)
    held = path.read_bytes()
    cases = {
        "structure": {"network": tiny_resnet(dtype=jnp.float32, stages=1, mean=0.4)},
        "method": {"method": dataclasses.replace(ROBUST["apart"], scalar_decay=2.0)},
        "parameters": {"method": ROBUST["cure"]},
        "optimizer": {"optimizer": sgd(triangular(0.06, 10), weight_decay=1e-3)},
        "augmentation": {"augmentation": CropFlip(padding=2)},
        "average": {"average": 0.8},
        "keep_best": {"keep_best": "loss"},
        "start": {"network": tiny_resnet(seed=1, dtype=jnp.float32, stages=1)},
    }
    for name, change in cases.items():
        with pytest.raises(
            ValueError, match=rf"run\.npz is that of another run: its {name} is .*, here it is"
        ) as caught:
            train(**(right | change))
        assert len(str(caught.value)) < 1500
        assert path.read_bytes() == held
    for change in ({"augmentation": None}, {"average": None}):
        with pytest.raises(ValueError, match="is that of another run: its"):
            train(**(right | change))
    assert equal_bits(train(**right).state, done.state)


def test_strengths_that_are_functions_are_told_apart(key, tmp_path):
    problem, arch = data(), mlp(depth=1, width=4, num_classes=CLASSES)

    def growing(rate):
        return lambda t: rate * t

    settings = {"steps": 1, "key": key, "checkpoint": tmp_path / "run.npz", **QUIET}
    train(arch, problem, method=AttackFlowTraining(growing(0.1)), **settings)
    train(arch, problem, method=AttackFlowTraining(growing(0.1)), **settings)
    for other in (growing(0.2), lambda t: 0.1 * t + 1):
        with pytest.raises(ValueError, match="its method is"):
            train(arch, problem, method=AttackFlowTraining(other), **settings)


def test_a_damaged_checkpoint_is_not_used(key, tmp_path):
    problem, arch = data(), mlp(depth=1, width=4, num_classes=CLASSES)
    path = tmp_path / "run.npz"
    settings = {"steps": 5, "key": key, "checkpoint": path, **QUIET}
    whole = train(arch, problem, **settings)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.warns(RuntimeWarning, match="is not used"):
        again = train(arch, problem, **settings)
    assert equal_bits(again.params, whole.params)
    assert equal_bits(train(arch, problem, **settings).state, whole.state)


def test_an_error_while_recording_loses_no_step(key, tmp_path):
    problem, arch = data(), mlp(depth=1, width=4, num_classes=CLASSES)
    settings = {"steps": 8, "key": key, "record_at": (0, 5), "checkpoint": tmp_path / "run.npz", **QUIET}
    calls = []

    def broken(params):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return {"zero": 0.0}

    with pytest.raises(ZeroDivisionError):
        train(arch, problem, record=broken, **settings)
    with np.load(tmp_path / "run.npz") as held:
        assert held["steps"].tolist() == [0]
        assert json.loads(str(held["__meta__"]))["step"] == 5
    done = train(arch, problem, record=lambda params: {"zero": 0.0}, **settings)
    assert equal_bits(done.params, train(arch, problem, **(settings | {"checkpoint": None})).params)
