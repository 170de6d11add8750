"""A kernel matrix kept in a file goes on where it was stopped, and only the one that it is."""

import json

import numpy as np
import pytest

from ntkadv.architectures import cnn, mlp
from ntkadv.architectures.base import Architecture
from ntkadv.kernels import gram

IMAGE = (4, 3, 2)
MLP = mlp(depth=2, num_classes=3)


def images(n=7, seed=0):
    return np.random.default_rng(seed).random((n, *IMAGE)).astype("float32")


class Stopped(Exception):  # noqa: N818  (it is no error)
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """Let the computation of tiles stop after so many; count those that were started."""
    original, started = Architecture.kernels, []

    def counted(limit):
        started.clear()

        def compute(*arguments):
            if len(started) == limit:
                raise Stopped
            started.append(None)
            return original(*arguments)

        monkeypatch.setattr(Architecture, "kernels", compute)
        return started

    return counted


@pytest.mark.parametrize("second", [None, images(5, seed=1)])
@pytest.mark.parametrize("stops", [(1,), (2,), (4,), (2, 3, 2)])
def test_a_stopped_matrix_resumed_is_the_uninterrupted_one_bit_for_bit(tmp_path, stop_after, stops, second):
    whole = gram(MLP, images(), second, tile=3, progress=False)
    store = tmp_path / "kernel.npy"
    for limit in stops:
        stop_after(limit)
        with pytest.raises(Stopped):
            gram(MLP, images(), second, tile=3, store=store, progress=False)
    stop_after(None)
    np.testing.assert_array_equal(gram(MLP, images(), second, tile=3, store=store, progress=False), whole)
    np.testing.assert_array_equal(np.load(store), whole)


def test_a_finished_matrix_is_not_computed_again(tmp_path, stop_after):
    store = tmp_path / "kernel.npy"
    whole = np.array(gram(MLP, images(), tile=3, store=store, progress=False))
    started = stop_after(None)
    np.testing.assert_array_equal(gram(MLP, images(), tile=3, store=store, progress=False), whole)
    assert len(started) <= 1  # the look whether it is the same kernel


def test_what_was_done_is_not_done_again(tmp_path, stop_after):
    store = tmp_path / "kernel.npy"
    stop_after(4)
    with pytest.raises(Stopped):
        gram(MLP, images(), tile=3, store=store, progress=False)
    done = json.loads((tmp_path / "kernel.progress.json").read_text())["done"]
    assert done == 3  # the fourth was under way
    started = stop_after(None)
    gram(MLP, images(), tile=3, store=store, progress=False)
    assert len(started) == 6 - done + 1  # the rest, and the look whether it is the same kernel


def test_both_kernels_have_a_file_each(tmp_path, stop_after):
    store = tmp_path / "kernel.npy"
    whole = gram(MLP, images(), kernel="both", tile=3, progress=False)
    stop_after(3)
    with pytest.raises(Stopped):
        gram(MLP, images(), kernel="both", tile=3, store=store, progress=False)
    stop_after(None)
    resumed = gram(MLP, images(), kernel="both", tile=3, store=store, progress=False)
    for name in ("nngp", "ntk"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
        np.testing.assert_array_equal(np.load(tmp_path / f"kernel-{name}.npy"), getattr(whole, name))


OTHERS = {
    "other images": (MLP, images(seed=2), {}),
    "other tiles": (MLP, images(), {"tile": 2}),
    "another kernel": (MLP, images(), {"kernel": "nngp"}),
    "another precision": (MLP, images(), {"dtype": "float64"}),
    "more images": (MLP, images(8), {}),
    "another depth": (mlp(depth=3, num_classes=3), images(), {}),
    "other weights": (mlp(depth=2, num_classes=3, w_std=1.5), images(), {}),
    "convolutions": (cnn(depth=2, num_classes=3), images(), {}),
}


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_the_file_of_another_matrix_is_refused_and_left_alone(tmp_path, stop_after, name, stopped):
    store = tmp_path / "kernel.npy"
    if stopped:
        stop_after(3)
        with pytest.raises(Stopped):
            gram(MLP, images(), tile=3, store=store, progress=False)
        stop_after(None)
    else:
        gram(MLP, images(), tile=3, store=store, progress=False)
    before = store.read_bytes()
    arch, x, options = OTHERS[name]
    with pytest.raises(ValueError, match=r"store: .* holds the matrix of (other|another)"):
        gram(arch, x, store=store, progress=False, **{"tile": 3, **options})
    assert store.read_bytes() == before


def test_a_file_that_nothing_describes_is_refused(tmp_path):
    np.save(tmp_path / "kernel.npy", np.zeros((7, 7)))
    with pytest.raises(ValueError, match="nothing tells what it holds"):
        gram(MLP, images(), store=tmp_path / "kernel.npy", progress=False)
