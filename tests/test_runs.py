"""Run directories: what was written is read back, a killed run goes on, another configuration is not mixed in."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkadv.runs import Run, arrays_of, environment, load_checkpoint, save_checkpoint, tree_of


@dataclass(frozen=True)
class Attack:
    eps: float = 8 / 255
    steps: int = 10


@dataclass(frozen=True)
class Config:
    depth: int = 5
    times: tuple[float, ...] = (1e-3, float("inf"))
    attack: Attack = Attack()
    out: Path = Path("somewhere")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "config", [Config(), {"depth": 5, "weights": np.arange(3), 1: None}], ids=["dataclass", "dict"]
)
def test_same_configuration_opens_the_run_again(config, tmp_path):
    Run(tmp_path / "a" / "b", config).log(step=1)
    again = Run(tmp_path / "a" / "b", config)
    again.log(step=2)
    assert again.metrics() == [{"step": 1}, {"step": 2}]
    assert len((again.path / "environment.jsonl").read_text().splitlines()) == 2


def test_other_configuration_is_refused_naming_every_difference_and_touches_nothing(tmp_path):
    run = Run(tmp_path, Config())
    run.save("gram", k=np.eye(2))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(ValueError, match=r"overwrite=True") as caught:
        Run(tmp_path, replace(Config(), depth=3, attack=Attack(steps=20)))
    message = str(caught.value)
    assert "depth: the directory has 5, asked for is 3" in message
    assert "attack.steps: the directory has 10, asked for is 20" in message
    assert "attack.eps" not in message
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_overwrite_throws_away_what_the_other_configuration_made(tmp_path):
    run = Run(tmp_path, Config())
    run.log(step=1)
    run.save("gram", k=np.eye(2))
    (tmp_path / "notes.txt").write_text("mine")
    fresh = Run(tmp_path, Config(depth=3), overwrite=True)
    assert fresh.metrics() == []
    with pytest.raises(FileNotFoundError):
        fresh.load("gram")
    assert json.loads((tmp_path / "config.json").read_text())["depth"] == 3
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"depth": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        Run(tmp_path, Config())


def test_path_below_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"run directory .*file/run cannot be used"):
        Run(tmp_path / "file" / "run", Config())


def test_unwritable_directory_is_refused_at_once(tmp_path, monkeypatch):
    """Root may write everywhere, so the refusal is feigned."""

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"cannot be used .*Permission denied.*choose one"):
        Run(tmp_path / "run", Config())


@pytest.mark.parametrize("config", [3, {"model": object()}, {"f": len}])
def test_configuration_that_is_no_json_is_refused(config, tmp_path):
    with pytest.raises(TypeError, match="config"):
        Run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_arrays_are_read_back_as_they_were(tmp_path):
    run = Run(tmp_path, {})
    arrays = {
        "gram": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32),
        "file": np.arange(5, dtype=np.int32),
        "name": np.array(["a", "bc"]),
        "empty": np.zeros((0, 3)),
        "scalar": np.array(2.5),
        "transposed": np.arange(6).reshape(2, 3).T,
    }
    run.save("all", **arrays, jax=jnp.arange(3))
    loaded = run.load("all")
    assert loaded.keys() == {*arrays, "jax"}
    for key, array in arrays.items():
        assert loaded[key].dtype == array.dtype
        np.testing.assert_array_equal(loaded[key], array)
    np.testing.assert_array_equal(loaded["jax"], [0, 1, 2])


def test_numpy_reads_the_arrays_without_this_package(tmp_path):
    path = Run(tmp_path, {}).save("x", a=np.arange(3))
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["a"], [0, 1, 2])


@pytest.mark.parametrize("array", [np.array([object()]), jnp.zeros(2, jnp.bfloat16)], ids=["objects", "bfloat16"])
def test_arrays_that_could_not_be_read_back_are_refused_and_keep_the_old_file(array, tmp_path):
    run = Run(tmp_path, {})
    run.save("x", a=np.arange(3))
    with pytest.raises(TypeError, match="a must hold numbers"):
        run.save("x", a=array)
    np.testing.assert_array_equal(run.load("x")["a"], [0, 1, 2])
    assert files(tmp_path / "arrays") == {"x.npz"}


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a b"])
def test_names_that_leave_the_directory_are_refused(name, tmp_path):
    run = Run(tmp_path / "run", {})
    for write in (run.save, run.load, run.checkpoint, lambda name: run.save_json(name, {})):
        with pytest.raises(ValueError, match="name must be a plain file name"):
            write(name)


def test_cached_computes_once_and_survives_a_restart(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"a": np.arange(3) * len(calls), "b": jnp.ones(2)}

    first = Run(tmp_path, {}).cached("x", make)
    second = Run(tmp_path, {}).cached("x", make)
    assert len(calls) == 1
    assert all(isinstance(array, np.ndarray) for array in (*first.values(), *second.values()))
    for key, array in first.items():
        np.testing.assert_array_equal(second[key], array)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b.replace(b"\x07", b"\x08")])
def test_damaged_cache_is_computed_again_with_a_warning(damage, tmp_path):
    run = Run(tmp_path, {})
    path = run.save("x", a=np.full(50, 7, np.int8))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"x\.npz is damaged"):
        run.load("x")
    with pytest.warns(RuntimeWarning, match=r"x\.npz is damaged.*computed again"):
        again = run.cached("x", lambda: {"a": np.full(50, 7, np.int8)})
    np.testing.assert_array_equal(run.load("x")["a"], again["a"])


@pytest.mark.filterwarnings("ignore:the checkpoint:RuntimeWarning")
def test_no_changed_byte_passes_unnoticed(tmp_path):
    """Every byte in turn; the few that may change are those nothing depends on, such as the date in the archive."""
    path = tmp_path / "c.npz"
    save_checkpoint(path, {"a": np.arange(20)}, {"step": 3})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        payload = sum(member.file_size for member in archive.infolist())
    refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes((content[place] ^ 0x55,)) + content[place + 1 :])
        loaded = load_checkpoint(path)
        if loaded is None:
            refused += 1
            continue
        arrays, meta = loaded
        np.testing.assert_array_equal(arrays["a"], np.arange(20))
        assert meta == {"step": 3}
    assert refused >= payload


def killed(script, folder):
    """Run a script on a run directory in a process of its own, and see it die in the middle."""
    program = f"import os, numpy as np\nfrom ntkadv.runs import *\nrun = Run({str(folder)!r}, {{}})\n{script}"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9


def test_run_killed_while_it_saves_keeps_the_former_file_and_goes_on(tmp_path):
    killed("run.save('x', a=np.ones(3))\nos.replace = lambda *_: os._exit(9)\nrun.save('x', a=np.zeros(3))", tmp_path)
    assert any(name.endswith(".tmp") for name in files(tmp_path))
    run = Run(tmp_path, {})
    np.testing.assert_array_equal(run.load("x")["a"], np.ones(3))
    killed("os.replace = lambda *_: os._exit(9)\nrun.cached('y', lambda: {'a': np.zeros(3)})", tmp_path)
    np.testing.assert_array_equal(Run(tmp_path, {}).cached("y", lambda: {"a": np.full(3, 2.0)})["a"], np.full(3, 2.0))


def test_run_killed_outright_keeps_its_metrics(tmp_path):
    killed("run.log(step=1)\nrun.log(step=2)\nos._exit(9)", tmp_path)
    assert Run(tmp_path, {}).metrics() == [{"step": 1}, {"step": 2}]


def test_torn_last_line_of_metrics_is_dropped(tmp_path):
    Run(tmp_path, {}).log(step=1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run = Run(tmp_path, {})
    run.log(step=2)
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_failed_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    run = Run(tmp_path, {})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        run.save("x", a=np.ones(3))
    assert not files(tmp_path / "arrays")


def test_json_holds_arrays_and_what_is_not_finite(tmp_path):
    run = Run(tmp_path, {})
    path = run.save_json(
        "results",
        {
            "accuracy": np.float32(0.5),
            "curve": jnp.array([1.0, jnp.nan, jnp.inf]),
            "times": (-np.inf, 1),
            "n": np.int64(3),
            "ok": np.bool_(True),
            "attack": Attack(steps=3),
            3: None,
        },
    )
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "accuracy": 0.5,
        "curve": [1.0, "nan", "inf"],
        "times": ["-inf", 1],
        "n": 3,
        "ok": True,
        "attack": {"type": "Attack", "eps": 8 / 255, "steps": 3},
        "3": None,
    }


def test_json_of_something_else_names_the_place(tmp_path):
    with pytest.raises(TypeError, match=r"results\.a\[1\] is a object"):
        Run(tmp_path, {}).save_json("results", {"a": [1, object()]})
    assert not (tmp_path / "results.json").exists()


def test_same_figure_gives_the_same_bytes(tmp_path):
    def draw():
        fig, ax = plt.subplots(figsize=(3, 2))
        ax.plot([0, 1], [1, 0], label="line")
        ax.legend()
        return fig

    run = Run(tmp_path, {})
    png, pdf = run.figure(draw(), "curve")
    before = png.read_bytes(), pdf.read_bytes()
    run.figure(draw(), "curve")
    plt.close("all")
    assert before == (png.read_bytes(), pdf.read_bytes())
    assert plt.imread(png).shape[:2] == (400, 600)
    assert pdf.read_bytes().startswith(b"%PDF")


@settings(max_examples=30)
@given(
    st.dictionaries(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), st.integers(0, 5)),
    st.dictionaries(st.text(), st.one_of(st.integers(), st.floats(), st.text(), st.none())),
)
def test_checkpoint_is_read_back_as_it_was(tmp_path_factory, sizes, meta):
    path = tmp_path_factory.getbasetemp() / "checkpoint.npz"
    save_checkpoint(path, {key: np.arange(n) for key, n in sizes.items()}, meta)
    arrays, held = load_checkpoint(path)
    assert {key: len(array) for key, array in arrays.items()} == sizes
    np.testing.assert_equal(held, meta)


def test_checkpoint_keeps_paths_of_parameters_as_names(tmp_path):
    path = Run(tmp_path, {}).checkpoint("fit")
    save_checkpoint(path, {"layers/0/w": np.ones(2), "file": np.zeros(1)}, {"step": 3})
    assert set(load_checkpoint(path)[0]) == {"layers/0/w", "file"}


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "none.npz") is None


def test_damaged_checkpoint_is_none_with_a_warning(tmp_path):
    path = tmp_path / "c.npz"
    save_checkpoint(path, {"a": np.arange(3)}, {})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.warns(RuntimeWarning, match=r"c\.npz is not used"):
        assert load_checkpoint(path) is None


def test_array_file_without_meta_is_no_checkpoint(tmp_path):
    np.savez(tmp_path / "c.npz", a=np.arange(3))
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert load_checkpoint(tmp_path / "c.npz") is None


def test_environment_names_versions_and_device():
    import jax
    import scipy

    found = environment()
    assert (found["jax"], found["numpy"], found["scipy"]) == (jax.__version__, np.__version__, scipy.__version__)
    assert found["python"] == sys.version.split()[0]
    assert found["platform"] == jax.devices()[0].platform
    assert found["date"].endswith("+00:00")
    json.dumps(found)


def test_the_leaves_of_a_tree_go_into_a_file_and_back(tmp_path):
    tree = {"w": jnp.arange(3.0), "rest": [np.int32(4), (jnp.ones((2, 2)), None)]}
    run = Run(tmp_path, {})
    run.save("tree", **arrays_of(tree), other=np.zeros(2))
    like = jax.tree.map(jnp.zeros_like, tree)
    back = tree_of(run.load("tree"), like)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("like", [[0, 0], [0, 0, 0, 0], []])
def test_arrays_of_another_tree_are_refused(like):
    with pytest.raises(ValueError, match="another tree"):
        tree_of(arrays_of([1, 2, 3]), like)
