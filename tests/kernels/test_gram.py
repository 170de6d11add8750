"""Kernel matrices by tiles are those of the architecture, whatever the tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.architectures import cnn, mlp
from ntkadv.architectures.base import Architecture
from ntkadv.kernels import gram, memory_estimate

IMAGE = (4, 3, 2)
MLP = mlp(depth=2, num_classes=3)
CNN = cnn(depth=1, num_classes=3)


def images(n, seed=0, dtype="float32"):
    return np.random.default_rng(seed).random((n, *IMAGE)).astype(dtype)


def assert_close(matrix, expected, rtol=1e-5):
    assert isinstance(matrix, np.ndarray)
    np.testing.assert_allclose(matrix, expected, rtol=rtol)


@pytest.mark.parametrize(("n", "tile"), [(1, None), (1, 4), (7, 1), (7, 3), (7, 7), (7, 20), (8, 4), (7, None)])
def test_the_matrix_does_not_depend_on_the_tiles(n, tile):
    x = images(n)
    matrix = gram(MLP, x, tile=tile, progress=False)
    assert_close(matrix, MLP.ntk(x, x))
    np.testing.assert_array_equal(matrix, matrix.T)
    assert_close(np.diagonal(matrix), MLP.diagonal(x).ntk, rtol=1e-6)


@pytest.mark.parametrize(("n1", "n2", "tile"), [(1, 5, None), (5, 1, 2), (7, 4, 3), (4, 7, 20), (6, 6, 3)])
def test_the_matrix_between_two_sets_does_not_depend_on_the_tiles(n1, n2, tile):
    x1, x2 = images(n1), images(n2, seed=1)
    assert_close(gram(MLP, x1, x2, tile=tile, progress=False), MLP.ntk(x1, x2))


def test_both_kernels_come_from_one_pass():
    x = images(5)
    kernels = gram(CNN, x, kernel="both", tile=2, progress=False)
    assert_close(kernels.ntk, CNN.ntk(x, x))
    assert_close(kernels.nngp, CNN.nngp(x, x))
    np.testing.assert_array_equal(kernels.nngp, gram(CNN, x, kernel="nngp", tile=2, progress=False))
    np.testing.assert_array_equal(kernels.ntk, gram(CNN, x, tile=2, progress=False))


def test_float64_needs_no_global_flag_and_changes_none():
    x = images(5, dtype="float64")
    matrix = gram(MLP, x, dtype="float64", tile=3, progress=False)
    assert matrix.dtype == np.float64
    assert jnp.asarray(x).dtype == jnp.float32
    with jax.enable_x64(True):
        assert_close(matrix, np.asarray(MLP.ntk(x, x)), rtol=1e-12)
    assert gram(MLP, x, progress=False).dtype == np.float32


def test_the_diagonal_between_equal_images_is_exact():
    """Elsewhere, float32 leaves the angle of nearly equal images uncertain by 1e-3 or so."""
    x = images(6)
    x[3] = x[0]
    x[5] = x[1]
    matrix = gram(MLP, x, tile=4, progress=False)
    with jax.enable_x64(True):
        exact = np.asarray(MLP.diagonal(x.astype(np.float64)).ntk)
    np.testing.assert_allclose(np.diagonal(matrix), exact, rtol=2e-6)
    np.testing.assert_allclose(matrix[3], matrix[0], rtol=1e-6)
    np.testing.assert_allclose(matrix[5], matrix[1], rtol=1e-6)


def test_vectors_make_a_matrix_too():
    x = images(5).reshape(5, -1)
    assert_close(gram(MLP, x, tile=2, progress=False), MLP.ntk(x, x))


def test_the_working_memory_of_a_tile_stays_below_the_estimate():
    x = jax.ShapeDtypeStruct((64, 8, 8, 3), np.float32)
    arch = cnn(depth=3, num_classes=3)
    memory = jax.jit(lambda x1, x2: arch.kernels(x1, x2)).lower(x, x).compile().memory_analysis()
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert used <= memory_estimate(arch, 64, 64, (8, 8, 3), kernels=0, tile=64)


def test_what_cannot_fit_is_refused_before_any_work(monkeypatch):
    def never(*_):
        raise AssertionError("a tile was computed")

    monkeypatch.setattr(Architecture, "kernels", never)
    with pytest.raises(MemoryError, match=r"1000 x 1000 kernel matrix needs about 0\.\d+ GiB.*max_bytes allows 0\.00"):
        gram(MLP, images(1000), max_bytes=1000, progress=False)


def test_a_result_on_disk_does_not_count_as_memory(tmp_path):
    x = images(600)
    limit = 4 * 600 * 600 // 2 + memory_estimate(MLP, 600, 600, IMAGE, kernels=0, tile=30)
    with pytest.raises(MemoryError, match="store="):
        gram(MLP, x, tile=30, max_bytes=limit, progress=False)
    stored = gram(MLP, x[:60], tile=30, max_bytes=limit, store=tmp_path / "k.npy", progress=False)
    assert stored.shape == (60, 60)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_are_refused(value):
    x = images(3)
    x[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="x1"):
        gram(MLP, x, progress=False)
    with pytest.raises(ValueError, match="x2"):
        gram(MLP, images(3), x, progress=False)


@pytest.mark.parametrize(
    ("x1", "options", "message"),
    [
        (images(3), {"kernel": "gp"}, 'kernel must be "ntk", "nngp" or "both", got \'gp\''),
        (images(3), {"tile": 0}, "tile must be at least 1, got 0"),
        (images(3), {"x2": images(3)[:, :2]}, "inputs of one shape"),
        (images(0), {}, "x1 must be a batch of at least one input"),
        (images(1).ravel(), {}, "x1 must be a batch of at least one input"),
        (images(3), {"store": "kernel.npz"}, "store must be the path of a .npy file"),
        (images(3), {"dtype": "float16"}, 'dtype must be "float32" or "float64"'),
    ],
)
def test_arguments_out_of_range_are_refused(x1, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        gram(MLP, x1, progress=False, **options)
