"""The data sets known by name: what they hold, where their files lie on this computer, and where to fetch them."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pooch

from ntkadv.data.formats import Images, read_cifar, read_idx, read_npz, read_svhn

ENVIRONMENT_VARIABLE = "NTKADV_DATA"


class DatasetNotFoundError(FileNotFoundError):
    """The files of a data set are not on this computer and could not be fetched."""


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its address and the md5 sum of its content."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """File name, the last part of the address."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """A published data set: image shape, classes, files and how to read them."""

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    files: tuple[RemoteFile, ...]
    read: Callable[[Sequence[Path]], tuple[Images, Images]]


def _idx_files(base: str, *md5: str) -> tuple[RemoteFile, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(RemoteFile(f"{base}/{name}-ubyte.gz", sum_) for name, sum_ in zip(names, md5, strict=True))


DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SOURCES = {
    source.name: source
    for source in (
        Source(
            "mnist",
            (28, 28, 1),
            DIGITS,
            _idx_files(
                "https://storage.googleapis.com/cvdf-datasets/mnist",
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
            read_idx,
        ),
        Source(
            "fashion_mnist",
            (28, 28, 1),
            FASHION,
            _idx_files(
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
            read_idx,
        ),
        Source(
            "cifar10",
            (32, 32, 3),
            OBJECTS,
            (
                RemoteFile(
                    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
                ),
            ),
            read_cifar,
        ),
        Source(
            "svhn",
            (32, 32, 3),
            DIGITS,
            tuple(
                RemoteFile(f"http://ufldl.stanford.edu/housenumbers/{part}_32x32.mat", md5)
                for part, md5 in (
                    ("train", "e26dedcc434d2e4c54c9b2d4a06d8373"),
                    ("test", "eb5a983be6a315427106f1b164d9cef3"),
                )
            ),
            read_svhn,
        ),
    )
}


def read_source(source: Source, root: Path | None, progress: bool) -> tuple[list[Path], Images, Images]:
    """Find the files of a data set, or fetch them, and read them.

    With `root`, only this folder is looked at, and what is missing is fetched into it. Without, the folder named by the
    environment variable NTKADV_DATA and the user's cache are looked at in this order, and the cache is what is filled.
    In a folder, `<name>.npz` comes first, then the original files in `<name>/`, then those in the folder itself.

    Returns:
        The files that were read, the training images and the test images.

    Raises:
        DatasetNotFoundError: no file was found and none could be fetched.
        ValueError: a file is damaged.
    """
    folders = _folders(root)
    for folder in folders:
        npz = folder / f"{source.name}.npz"
        if npz.is_file():
            return [npz], *read_npz([npz])
        for place in (folder / source.name, folder):
            paths = [place / file.name for file in source.files]
            if all(path.is_file() for path in paths) and not _is_of_another(source, paths[0]):
                return paths, *source.read(paths)
    paths = _fetch(source, folders, progress)
    return paths, *source.read(paths)


def _folders(root: Path | None) -> list[Path]:
    if root is not None:
        if root.exists() and not root.is_dir():
            raise ValueError(f"root must be a folder, got the file {root}")
        return [root]
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return [*([Path(named).expanduser()] if named else []), Path(pooch.os_cache("ntkadv"))]


def _is_of_another(source: Source, path: Path) -> bool:
    """Whether a file is known to belong to another data set that gives its files the same names."""
    others = {
        file.md5 for other in SOURCES.values() if other is not source for file in other.files if file.name == path.name
    }
    return bool(others) and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() in others


def _fetch(source: Source, folders: Sequence[Path], progress: bool) -> list[Path]:
    target = folders[-1] / source.name
    paths = []
    for file in source.files:
        try:
            with _quiet_pooch():
                path = pooch.retrieve(
                    file.url, known_hash=f"md5:{file.md5}", fname=file.name, path=target, progressbar=progress
                )
        except (OSError, ValueError) as error:
            looked = "\n".join(
                f"  {folder}: {source.name}.npz, {source.name}/{file.name}, {file.name}"
                + ("" if folder.is_dir() else " (there is no such folder)")
                for folder in folders
            )
            raise DatasetNotFoundError(
                f"{file.name} of {source.name} was not found and could not be fetched "
                f"({type(error).__name__}: {error}).\nLooked for it in\n{looked}\n"
                f"Fetch {file.url} by hand and put it into {target}, or set {ENVIRONMENT_VARIABLE} (or pass root=) "
                f"to a folder with {source.name}.npz or {source.name}/{file.name}"
            ) from error
        paths.append(Path(path))
    return paths


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    """Keep pooch from announcing every download: the progress bar says it."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
