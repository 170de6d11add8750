"""Readers of the files that image data sets are published in. Nothing read here is unpickled or unpacked to disk."""

import io
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from gzip import GzipFile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io

_IDX_LIMIT = 1 << 28
_CIFAR_LIMIT = 200_000_000
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_BATCH_LIMIT = 10_000 * _CIFAR_RECORD


class Images(NamedTuple):
    """Pixels, uint8 with axes (image, height, width, channel), and one label an image."""

    pixels: np.ndarray
    labels: np.ndarray


def damaged(path: Path, what: str) -> ValueError:
    """Return the error for a file whose content is not what its name promises."""
    return ValueError(
        f"{path} cannot be used: {what}. Delete it and fetch it again, or put an intact copy in its place"
    )


def read_npz(paths: Sequence[Path]) -> tuple[Images, Images]:
    """Read training and test images from one .npz with x_train, y_train, x_test and y_test, pixels NHW or NHWC.

    Raises:
        ValueError: the file is damaged, lacks one of the four arrays, or holds pickled objects.
    """
    (path,) = paths
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except KeyError as error:
        raise damaged(path, f"it lacks an array ({error.args[0]})") from error
    except (ValueError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise damaged(path, f"it is no .npz file of plain arrays ({error})") from error
    train, test = (arrays[key][..., None] if arrays[key].ndim == 3 else arrays[key] for key in ("x_train", "x_test"))
    return Images(train, arrays["y_train"]), Images(test, arrays["y_test"])


def read_idx(paths: Sequence[Path]) -> tuple[Images, Images]:
    """Read the four gzipped files of MNIST and its kin: training images and labels, test images and labels.

    Raises:
        ValueError: a file is damaged, truncated, longer than its header says, or of another type.
    """
    train_x, train_y, test_x, test_y = (_idx_array(path, ndim) for path, ndim in zip(paths, (3, 1, 3, 1), strict=True))
    return Images(train_x[..., None], train_y), Images(test_x[..., None], test_y)


def read_cifar(paths: Sequence[Path]) -> tuple[Images, Images]:
    """Read CIFAR-10 from the archive of its binary version: five training batches and one test batch.

    Members are picked by their exact names and read in memory; all others are passed over.

    Raises:
        ValueError: the archive is damaged, lacks a batch, or a batch is no series of labels and 32x32x3 pixels.
    """
    (path,) = paths
    wanted = [f"cifar-10-batches-bin/{name}.bin" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    batches: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_gunzip(path, _CIFAR_LIMIT)), mode="r:") as archive:
            for member in archive:
                if member.name not in wanted or not member.isreg():
                    continue
                if member.size == 0 or member.size % _CIFAR_RECORD or member.size > _CIFAR_BATCH_LIMIT:
                    raise damaged(path, f"its member {member.name} has {member.size} bytes")
                content = archive.extractfile(member)
                batches[member.name] = np.frombuffer(content.read() if content else b"", np.uint8)
    except tarfile.TarError as error:
        raise damaged(path, f"it is no intact tar archive ({error})") from error
    missing = [name for name in wanted if name not in batches]
    if missing:
        raise damaged(path, f"it lacks {', '.join(missing)}")
    parts = [_cifar_records(batches[name]) for name in wanted]
    train = Images(*(np.concatenate(arrays) for arrays in zip(*parts[:5], strict=True)))
    return train, parts[5]


def read_svhn(paths: Sequence[Path]) -> tuple[Images, Images]:
    """Read the cropped digits of SVHN from train_32x32.mat and test_32x32.mat; label 10 there is the digit 0.

    Raises:
        ValueError: a file is damaged or does not hold X of shape (32, 32, 3, n) and y of shape (n, 1).
    """
    train, test = map(_svhn_part, paths)
    return train, test


def _gunzip(path: Path, limit: int) -> bytes:
    try:
        with GzipFile(path) as stream:
            content = stream.read(limit + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise damaged(path, f"it is no intact gzip file ({error})") from error
    if len(content) > limit:
        raise damaged(path, f"it unpacks to more than {limit} bytes")
    return content


def _idx_array(path: Path, ndim: int) -> np.ndarray:
    content = _gunzip(path, _IDX_LIMIT)
    start = 4 * (1 + ndim)
    if len(content) < start or content[:4] != bytes((0, 0, 8, ndim)):
        raise damaged(path, f"it is no idx file of bytes with {ndim} axes")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    expected = start + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise damaged(path, f"it unpacks to {len(content)} bytes where its header announces {expected}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar_records(content: np.ndarray) -> Images:
    records = content.reshape(-1, _CIFAR_RECORD)
    return Images(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0])


def _svhn_part(path: Path) -> Images:
    try:
        content = scipy.io.loadmat(path, variable_names=["X", "y"])
        pixels, labels = content["X"], content["y"]
    except Exception as error:  # a damaged .mat makes scipy raise almost anything, down to TypeError and KeyError
        raise damaged(path, f"it is no MATLAB file with X and y ({error})") from error
    if pixels.ndim != 4 or labels.ndim != 2 or labels.shape != (pixels.shape[3], 1):
        raise damaged(path, f"X has shape {pixels.shape} and y {labels.shape}")
    digits = labels[:, 0]
    if not np.isin(digits, np.arange(1, 11)).all():
        raise damaged(path, f"its labels must be 1 to 10, got {digits.min()}..{digits.max()}")
    return Images(pixels.transpose(3, 0, 1, 2), digits % 10)
