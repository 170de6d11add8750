"""Data sets: splits and label noise are what they say, own arrays are checked, bad input is named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkadv.data import Dataset, load_dataset, targets


@pytest.fixture
def mnist_root(tmp_path):
    """Folder with a mnist.npz of 30 training and 10 test images."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    labels = np.arange(40) % 10
    np.savez(tmp_path / "mnist.npz", x_train=pixels[:30], y_train=labels[:30], x_test=pixels[30:], y_test=labels[30:])
    return tmp_path


@given(st.integers(0, 2**32), st.integers(1, 700), st.integers(0, 400), st.integers(1, 600))
def test_digits_are_split_into_disjoint_parts(seed, n_train, n_val, n_test):
    data = load_dataset("digits", n_train=n_train + 50, n_val=n_val, n_test=n_test, seed=seed)
    parts = [{image.tobytes() for image in x} for x in (data.x_train, data.x_val, data.x_test)]
    assert [len(part) for part in parts] == [n_train + 50, n_val, n_test]
    assert len(set.union(*parts)) == n_train + 50 + n_val + n_test


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_dataset("digits", n_val=100)
    assert len(data.x_train) + 100 + len(data.x_test) == 1797
    published = {(image.tobytes(), int(y)) for image, y in zip(*load_digits(return_X_y=True), strict=True)}
    for x, y in ((data.x_train, data.y_train), (data.x_val, data.y_val), (data.x_test, data.y_test)):
        flat = (x.astype(np.float64) * 16).reshape(-1, 64)
        assert {(image.tobytes(), int(label)) for image, label in zip(flat, y, strict=True)} <= published


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_same_seed_same_images_and_more_of_them_keeps_the_first(name, mnist_root):
    few = load_dataset(name, n_train=12, n_val=5, n_test=6, seed=3, root=mnist_root)
    many = load_dataset(name, n_train=24, n_val=5, n_test=6, seed=3, root=mnist_root)
    other = load_dataset(name, n_train=12, n_val=5, n_test=6, seed=4, root=mnist_root)
    np.testing.assert_array_equal(few.x_train, many.x_train[:12])
    np.testing.assert_array_equal(few.x_val, many.x_val)
    np.testing.assert_array_equal(few.x_test, many.x_test)
    assert not np.array_equal(few.x_train, other.x_train)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_train": 31}, "asks for 31 images, .* has 30"),
        ({"n_train": 20, "n_val": 11}, "asks for 31 images, .* has 30"),
        ({"n_val": 30}, "has 30"),
        ({"n_test": 11}, "n_test asks for 11 images, .* has 10"),
    ],
)
def test_asking_for_more_images_than_there_are_says_how_many_there_are(sizes, message, mnist_root):
    with pytest.raises(ValueError, match=message):
        load_dataset("mnist", root=mnist_root, **sizes)


@pytest.mark.parametrize("sizes", [{"n_test": 1797}, {"n_train": 1500, "n_val": 100}, {"n_train": 1000, "n_test": 800}])
def test_asking_for_more_digits_than_there_are_is_refused(sizes):
    with pytest.raises(ValueError, match=r"there are 1797|has 1438|has 997"):
        load_dataset("digits", **sizes)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 1000))
def test_label_noise_falsifies_exactly_its_share_of_the_training_labels_alone(share, seed):
    clean = load_dataset("digits", n_train=200, n_val=50, n_test=50, seed=seed)
    noisy = load_dataset("digits", n_train=200, n_val=50, n_test=50, seed=seed, label_noise=share)
    assert (clean.y_train != noisy.y_train).sum() == round(share * 200)
    for part in ("x_train", "x_val", "y_val", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(clean, part), getattr(noisy, part))


def test_label_noise_reaches_all_other_classes():
    clean = load_dataset("digits", n_train=1400, n_test=100)
    noisy = load_dataset("digits", n_train=1400, n_test=100, label_noise=0.99)
    moved = (noisy.y_train - clean.y_train) % 10
    assert set(np.unique(moved)) == set(range(10))
    assert np.bincount(moved)[1:].min() > 110  # 154 expected in each, standard deviation 12


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "imagenet"}, ValueError, "name must be one of digits, mnist"),
        ({"n_train": 0}, ValueError, "n_train must be at least 1, got 0"),
        ({"n_val": -1}, ValueError, "n_val must be at least 0"),
        ({"n_test": 0}, ValueError, "n_test must be at least 1"),
        ({"n_train": 10.0}, TypeError, "n_train must be an integer"),
        ({"n_train": True}, TypeError, "n_train must be an integer"),
        ({"n_val": None}, TypeError, "n_val must be an integer"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"label_noise": 1.0}, ValueError, "label_noise must be less than 1"),
        ({"label_noise": -0.1}, ValueError, "label_noise must be finite and not negative"),
        ({"label_noise": float("nan")}, ValueError, "label_noise must be finite"),
        ({"label_noise": "0.1"}, TypeError, "label_noise must be a number"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message, unchecked):
    with pytest.raises(error, match=message):
        load_dataset(**({"name": "digits"} | arguments))


@given(st.integers(2, 12), st.integers(0, 20))
def test_targets_are_centred_and_largest_at_the_label(num_classes, n):
    labels = np.random.default_rng(n).integers(0, num_classes, n)
    y = targets(labels, num_classes)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.sum(axis=1), 0, atol=1e-6)
    np.testing.assert_array_equal(y.argmax(axis=1), labels)
    np.testing.assert_allclose(y.max(axis=1, initial=-1), 1 - 1 / num_classes, rtol=1e-6)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_targets_of_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\. 2"):
        targets(np.array(labels), 3)


def own(**changes):
    x = np.linspace(0, 1, 4 * 5 * 5 * 2, dtype=np.float32).reshape(4, 5, 5, 2)
    y = np.array([0, 1, 2, 1])
    return {"name": "own", "x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2]} | changes


def test_own_arrays_make_a_data_set():
    data = Dataset.from_arrays(**own(x_val=own()["x_train"][:1], y_val=np.array([2])))
    assert (data.num_classes, data.class_names, data.image_shape) == (3, ("0", "1", "2"), (5, 5, 2))
    np.testing.assert_array_equal(data.targets_val, targets(np.array([2]), 3))
    assert repr(data) == "Dataset(own: 4 train, 1 val, 2 test, images 5x5x2, 3 classes)"


def test_bytes_are_scaled_and_a_missing_channel_is_added():
    x = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8)
    data = Dataset.from_arrays(**own(x_train=x, x_test=x[:2]))
    np.testing.assert_allclose(data.x_train, x[..., None] / 255, rtol=1e-6)


def test_repeated_images_are_allowed():
    assert len(Dataset.from_arrays(**own(x_train=np.full((4, 5, 5, 2), 0.5))).x_train) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.full((4, 5, 5, 2), np.nan)}, "x_train must be finite"),
        ({"x_test": np.full((2, 5, 5, 2), np.inf)}, "x_test must be finite"),
        ({"x_train": own()["x_train"] * 255}, r"x_train must have pixels in \[0, 1\], .* 0 to 255"),
        ({"x_train": own()["x_train"] - 0.5}, r"x_train must have pixels in \[0, 1\], .* -0\.5 to 0\.5"),
        ({"x_train": np.zeros((4, 5, 5, 2), np.int64)}, "x_train must be uint8"),
        ({"x_train": np.zeros((4, 50))}, "x_train must be images of shape"),
        ({"x_test": np.zeros((2, 5, 5, 3))}, r"x_test must have images like those of x_train, got \(5, 5, 3\)"),
        ({"y_train": np.array([0, 1, 2])}, "x_train has 4, y_train has 3"),
        ({"y_train": np.array([[0], [1], [2], [1]])}, "y_train must be a vector"),
        ({"y_train": np.array([0.0, 1, 2, 1])}, "y_train must be integer labels"),
        ({"y_train": np.array([0, -1, 2, 1])}, "y_train must lie in 0"),
        ({"y_test": np.array([0, 3]), "num_classes": 3}, r"y_test must lie in 0 \.\. 2, but y_test\[1\] is 3"),
        ({"y_train": np.array([1, 1, 1, 1])}, "y_train must hold two classes at least, got class 1"),
        ({"x_train": np.zeros((0, 5, 5, 2)), "y_train": np.zeros(0, int)}, "x_train is empty"),
        ({"x_test": np.zeros((0, 5, 5, 2)), "y_test": np.zeros(0, int)}, "x_test is empty"),
        ({"x_val": np.zeros((1, 5, 5, 2))}, "x_val was given without y_val"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"class_names": ["a", "b"], "num_classes": 3}, "class_names must hold 3 names"),
    ],
)
def test_bad_arrays_are_named(changes, message, unchecked):
    with pytest.raises((ValueError, TypeError), match=message):
        Dataset.from_arrays(**own(**changes))


def test_constructor_refuses_what_only_from_arrays_converts(unchecked):
    good = Dataset.from_arrays(**own())
    fields = {name: getattr(good, name) for name in Dataset.__dataclass_fields__}
    Dataset(**fields)
    with pytest.raises(TypeError, match="x_train must be float32 and y_train int32, got float64"):
        Dataset(**(fields | {"x_train": good.x_train.astype(np.float64)}))
    with pytest.raises(TypeError, match="x_train must be float32 and y_train int32, got float32 and int64"):
        Dataset(**(fields | {"y_train": good.y_train.astype(np.int64)}))
