"""Files of data sets: each published format is read as it was written, and a damaged or hostile file is named."""

import gzip
import hashlib
import io
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pooch
import pytest
import scipy.io

from ntkadv.data import DatasetNotFoundError, load_dataset
from ntkadv.data.sources import SOURCES

N_TRAIN, N_TEST = 30, 10
SHAPES = {"mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3), "svhn": (32, 32, 3)}
IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def images(name):
    """Random images, every class present: pixels and labels for training, pixels and labels for testing."""
    rng = np.random.default_rng(7)
    x = rng.integers(0, 256, (N_TRAIN + N_TEST, *SHAPES[name]), np.uint8)
    y = (np.arange(N_TRAIN + N_TEST) % 10).astype(np.uint8)
    return x[:N_TRAIN], y[:N_TRAIN], x[N_TRAIN:], y[N_TRAIN:]


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(IDX_FILES, arrays, strict=True):
        (folder / name).write_bytes(gzip.compress(idx(array.squeeze(-1) if array.ndim == 4 else array)))


def cifar_batch(x, y):
    return np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)], axis=1).tobytes()


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def cifar_members(arrays):
    x_train, y_train, x_test, y_test = arrays
    folder = "cifar-10-batches-bin"
    batches = zip(np.split(x_train, 5), np.split(y_train, 5), strict=True)
    members = {f"{folder}/data_batch_{i}.bin": cifar_batch(*batch) for i, batch in enumerate(batches, 1)}
    return members | {f"{folder}/test_batch.bin": cifar_batch(x_test, y_test)}


def write_svhn(folder, arrays):
    x_train, y_train, x_test, y_test = arrays
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        digits = np.where(y == 0, 10, y)[:, None]
        scipy.io.savemat(folder / f"{part}_32x32.mat", {"X": x.transpose(1, 2, 3, 0), "y": digits}, do_compression=True)


def write_npz(path, arrays):
    np.savez_compressed(path, **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays, strict=True)))


def write_published(folder, name, arrays):
    if name == "cifar10":
        write_tar(folder / "cifar-10-binary.tar.gz", cifar_members(arrays))
    elif name == "svhn":
        write_svhn(folder, arrays)
    else:
        write_idx(folder / name, arrays)


def assert_same_images(data, arrays):
    """The same images with the same labels, in any order."""
    x_train, y_train, x_test, y_test = arrays
    for x, y, x_file, y_file in (
        (data.x_train, data.y_train, x_train, y_train),
        (data.x_test, data.y_test, x_test, y_test),
    ):
        got = {
            (np.round(image * 255).astype(np.uint8).tobytes(), int(label)) for image, label in zip(x, y, strict=True)
        }
        assert got == {(image.tobytes(), int(label)) for image, label in zip(x_file, y_file, strict=True)}


@pytest.fixture
def offline(monkeypatch):
    def refuse(url, **_):
        raise ConnectionError(f"no route to {url}")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    monkeypatch.delenv("NTKADV_DATA", raising=False)


@pytest.mark.parametrize("name", SHAPES)
def test_published_files_are_read_as_they_were_written(name, tmp_path, offline):
    arrays = images(name)
    write_published(tmp_path, name, arrays)
    data = load_dataset(name, root=tmp_path)
    assert_same_images(data, arrays)
    assert data.image_shape == SHAPES[name]
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype == np.int32


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("grey_channel", [True, False])
def test_npz_is_read_as_it_was_written(name, grey_channel, tmp_path, offline):
    arrays = images(name)
    kept = arrays if grey_channel else [a.squeeze(-1) if a.shape[-1] == 1 else a for a in arrays]
    write_npz(tmp_path / f"{name}.npz", kept)
    assert_same_images(load_dataset(name, root=tmp_path), arrays)


def test_environment_variable_names_the_folder_and_root_goes_before_it(tmp_path, offline, monkeypatch):
    named, given = tmp_path / "named", tmp_path / "given"
    arrays = images("mnist")
    for folder, part in ((named, arrays), (given, [255 - a if a.ndim == 4 else a for a in arrays])):
        folder.mkdir()
        write_npz(folder / "mnist.npz", part)
    monkeypatch.setenv("NTKADV_DATA", str(named))
    from_named, from_given = load_dataset("mnist"), load_dataset("mnist", root=given)
    np.testing.assert_allclose(from_given.x_train, 1 - from_named.x_train, atol=1e-6)


def test_files_of_fashion_mnist_are_not_taken_for_mnist(tmp_path, offline, monkeypatch):
    """Both sets give their files the same names; a folder may hold either."""
    write_idx(tmp_path, images("fashion_mnist"))
    sums = [hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in IDX_FILES]
    fashion = SOURCES["fashion_mnist"]
    known = tuple(replace(file, md5=md5) for file, md5 in zip(fashion.files, sums, strict=True))
    monkeypatch.setitem(SOURCES, "fashion_mnist", replace(fashion, files=known))
    with pytest.raises(DatasetNotFoundError):
        load_dataset("mnist", root=tmp_path)
    assert load_dataset("fashion_mnist", root=tmp_path).class_names[0] == "T-shirt/top"


def test_members_outside_the_expected_names_are_neither_read_nor_written(tmp_path, offline):
    folder = tmp_path / "in"
    folder.mkdir()
    arrays = images("cifar10")
    strangers = {
        "../escaped.bin": b"x" * 3073,
        "/escaped.bin": b"x" * 3073,
        "cifar-10-batches-bin/../data_batch_1.bin": b"x",
    }
    write_tar(folder / "cifar-10-binary.tar.gz", strangers | cifar_members(arrays))
    assert_same_images(load_dataset("cifar10", root=folder), arrays)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["cifar-10-binary.tar.gz"]


def test_link_under_an_expected_name_is_refused(tmp_path, offline):
    path = tmp_path / "cifar-10-binary.tar.gz"
    members = cifar_members(images("cifar10"))
    del members["cifar-10-batches-bin/test_batch.bin"]
    write_tar(path, members)
    content = gzip.decompress(path.read_bytes())
    raw = io.BytesIO(content)
    with tarfile.open(fileobj=raw, mode="a:") as archive:
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    path.write_bytes(gzip.compress(raw.getvalue()))
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz.*lacks.*test_batch"):
        load_dataset("cifar10", root=tmp_path)


def test_pickled_arrays_are_refused_and_not_run(tmp_path, offline):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    _, y_train, x_test, y_test = images("mnist")
    np.savez(
        tmp_path / "mnist.npz", x_train=np.array([Payload()], object), y_train=y_train, x_test=x_test, y_test=y_test
    )
    with pytest.raises(ValueError, match=r"mnist\.npz"):
        load_dataset("mnist", root=tmp_path)
    (tmp_path / "mnist.npz").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"mnist\.npz"):
        load_dataset("mnist", root=tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_truncated_file_is_named(name, keep, tmp_path, offline):
    write_published(tmp_path, name, images(name))
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep * len(whole))])
        with pytest.raises(ValueError, match=path.name):
            load_dataset(name, root=tmp_path)
        path.write_bytes(whole)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_truncated_npz_is_named(keep, tmp_path, offline):
    path = tmp_path / "svhn.npz"
    write_npz(path, images("svhn"))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"svhn\.npz"):
        load_dataset("svhn", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((2, 28, 28), np.uint8)) + b"\0", "header announces"),
        (idx(np.zeros((2, 28, 28), np.uint8))[:-1], "header announces"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "header announces"),
        (idx(np.zeros(5, np.uint8)), "no idx file"),
        (b"\0\0\x0d\x03" + b"\0" * 12, "no idx file"),
        (idx(np.zeros((2, 5, 28), np.uint8)), "training images must be"),
    ],
    ids=["longer", "shorter", "absurd sizes", "labels for images", "floats", "other shape"],
)
def test_idx_file_that_is_not_what_its_name_says_is_named(content, message, tmp_path, offline):
    write_idx(tmp_path / "mnist", images("mnist"))
    (tmp_path / "mnist" / IDX_FILES[0]).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=f"{IDX_FILES[0]}.*{message}"):
        load_dataset("mnist", root=tmp_path)


def test_gzip_that_unpacks_without_end_is_refused(tmp_path, offline):
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(gzip.compress(bytes(200_000_001), compresslevel=1))
    with pytest.raises(ValueError, match="unpacks to more than"):
        load_dataset("cifar10", root=tmp_path)


def test_broken_record_of_cifar_is_refused(tmp_path, offline):
    members = cifar_members(images("cifar10"))
    members["cifar-10-batches-bin/data_batch_3.bin"] += b"\0"
    write_tar(tmp_path / "cifar-10-binary.tar.gz", members)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin"):
        load_dataset("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("y_train", lambda y: y + 1, "labels must be 0 to 9"),
        ("y_test", lambda y: y[:-1], "labels must be 10 integers"),
        ("y_test", lambda y: y.astype(np.float32), "labels must be 10 integers"),
        ("x_train", lambda x: x / 255, "images must be uint8"),
        ("x_train", lambda x: x[:, 1:], "images must be uint8"),
        ("x_test", lambda x: x[:0], "images must be uint8"),
    ],
)
def test_npz_with_wrong_content_is_named(key, change, message, tmp_path, offline):
    arrays = dict(zip(("x_train", "y_train", "x_test", "y_test"), images("mnist"), strict=True))
    arrays[key] = change(arrays[key])
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(ValueError, match=f"mnist.npz.*{message}"):
        load_dataset("mnist", root=tmp_path)


def test_npz_without_an_array_is_named(tmp_path, offline):
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(ValueError, match=r"mnist\.npz.*y_train"):
        load_dataset("mnist", root=tmp_path)


def test_label_of_svhn_outside_1_to_10_is_refused(tmp_path, offline):
    arrays = images("svhn")
    write_svhn(tmp_path, (arrays[0], arrays[1] + 2, *arrays[2:]))
    with pytest.raises(ValueError, match=r"train_32x32\.mat.*labels"):
        load_dataset("svhn", root=tmp_path)


def test_offline_error_says_what_where_and_how(tmp_path, offline, monkeypatch):
    named, cache = tmp_path / "named", tmp_path / "cache"
    monkeypatch.setenv("NTKADV_DATA", str(named))
    monkeypatch.setattr(pooch, "os_cache", lambda _: cache)
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("svhn")
    message = str(caught.value)
    for part in ("train_32x32.mat", str(named), str(cache), "http://ufldl.stanford.edu/housenumbers/", "NTKADV_DATA"):
        assert part in message
    assert isinstance(caught.value, FileNotFoundError)


def test_missing_files_are_fetched_into_the_root_with_their_sums(tmp_path, monkeypatch):
    arrays = images("svhn")
    served = tmp_path / "served"
    served.mkdir()
    write_svhn(served, arrays)
    asked = {}

    def retrieve(url, *, known_hash, fname, path, progressbar):
        asked[url] = known_hash
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes((served / fname).read_bytes())
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    root = tmp_path / "root"
    assert_same_images(load_dataset("svhn", root=root, progress=False), arrays)
    assert {path.name for path in (root / "svhn").iterdir()} == {"train_32x32.mat", "test_32x32.mat"}
    assert set(asked.values()) == {"md5:e26dedcc434d2e4c54c9b2d4a06d8373", "md5:eb5a983be6a315427106f1b164d9cef3"}
    asked.clear()
    load_dataset("svhn", root=root)
    assert not asked


def test_file_with_another_sum_is_not_accepted_from_the_network(tmp_path, monkeypatch):
    def write_something(url, output_file, pooch):
        with open(output_file, "wb") as file:
            file.write(b"an error page")

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *_, **__: write_something)
    with pytest.raises(DatasetNotFoundError, match="hash"):
        load_dataset("svhn", root=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="root must be a folder"):
        load_dataset("mnist", root=tmp_path / "file")


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shape in SHAPES.items() if name != "svhn"])
def test_real_files_hold_what_is_known_of_them(name, shape, data_root):
    if not (data_root / f"{name}.npz").is_file():
        pytest.skip(f"{data_root} has no {name}.npz")
    data = load_dataset(name, n_train=5000, n_val=100, root=data_root)
    assert data.image_shape == shape
    counts = np.bincount(data.y_train, minlength=10)
    assert counts.min() > 350  # ten classes of about equal size
    mean = {"mnist": 0.1307, "fashion_mnist": 0.2860, "cifar10": 0.4734}[name]  # the values in common use
    assert data.x_train.mean() == pytest.approx(mean, abs=0.01)
