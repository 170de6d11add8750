"""Data sets by name: read, checked, split by seed."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ntkadv._checks import require_int, require_nonnegative
from ntkadv.data.dataset import Dataset
from ntkadv.data.formats import Images, damaged
from ntkadv.data.sources import DIGITS, SOURCES, Source, read_source


def load_dataset(
    name: str,
    *,
    n_train: int | None = None,
    n_val: int = 0,
    n_test: int | None = None,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    label_noise: float = 0.0,
    progress: bool = True,
) -> Dataset:
    """Load images and labels, drawn at random by `seed`.

    Training and validation images are disjoint draws from the published training part, test images are drawn from the
    published test part. The digits have no published parts: theirs are three disjoint draws from the 1797 images, a
    fifth of them for testing unless `n_test` says otherwise. With the same seed, a larger `n_train` adds images to
    those of a smaller one and leaves the validation images as they are.

    The digits come with scikit-learn. The other sets are read from `root` if given, else from the folder named by the
    environment variable NTKADV_DATA, else from the user's cache: either one file `<name>.npz` with uint8 arrays
    x_train, y_train, x_test and y_test, or the files as published (CIFAR-10 in its binary version), there or in a
    folder `<name>`. Files found nowhere are fetched into `root` or the cache, and checked by their sum.

    Args:
        name: "digits", "mnist", "fashion_mnist", "cifar10" or "svhn".
        n_train: number of training images; None takes all that validation leaves.
        n_val: number of validation images.
        n_test: number of test images; None takes all.
        seed: seed of the split and, independently of it, of the label noise.
        root: folder of the files.
        label_noise: share of the training labels, rounded to whole labels, that are replaced by another class, drawn
            uniformly; so exactly this share is wrong. Labels for validation and testing stay as they are.
        progress: show a bar while files are fetched.

    Raises:
        ValueError: an unknown name, more images asked for than there are, a share outside [0, 1), a damaged file.
        TypeError: a number that is not of the right type.
        DatasetNotFoundError: the files are not on this computer and cannot be fetched.
    """
    if name != "digits" and name not in SOURCES:
        raise ValueError(f"name must be one of {', '.join(('digits', *SOURCES))}; got {name!r}.")
    for argument, value, minimum in (
        ("n_train", n_train, 1),
        ("n_val", n_val, 0),
        ("n_test", n_test, 1),
        ("seed", seed, 0),
    ):
        if value is not None or argument in ("n_val", "seed"):
            require_int(argument, value, minimum=minimum)
    require_nonnegative("label_noise", label_noise)
    if label_noise >= 1:
        raise ValueError(f"label_noise must be less than 1, got {label_noise}; give a share of the training labels.")
    generator = np.random.default_rng(seed)
    (noise_generator,) = generator.spawn(1)

    if name == "digits":
        train, test = _digits(n_test, generator)
        scale, class_names = np.float32(16), DIGITS
    else:
        source = SOURCES[name]
        paths, train, test = read_source(source, None if root is None else Path(root), progress)
        _require_intact(source, paths, train, test)
        scale, class_names = np.float32(255), source.class_names

    first, last = _draw(len(train.labels), n_train, n_val, generator, f"the training part of {name}", "n_train + n_val")
    tested, _ = _draw(len(test.labels), n_test, 0, generator, f"the test part of {name}", "n_test")
    y_train = train.labels[first].astype(np.int32)
    return Dataset(
        name=name,
        x_train=train.pixels[first].astype(np.float32) / scale,
        y_train=_with_noise(y_train, label_noise, len(class_names), noise_generator),
        x_val=train.pixels[last].astype(np.float32) / scale,
        y_val=train.labels[last].astype(np.int32),
        x_test=test.pixels[tested].astype(np.float32) / scale,
        y_test=test.labels[tested].astype(np.int32),
        num_classes=len(class_names),
        class_names=class_names,
    )


def _digits(n_test: int | None, generator: np.random.Generator) -> tuple[Images, Images]:
    """Draw the test part of the digits, a fifth by default; the rest is the training part."""
    from sklearn.datasets import load_digits  # slow to import, needed by this set only

    flat, labels = load_digits(return_X_y=True)
    pixels = flat.reshape(-1, 8, 8, 1)
    n = len(labels)
    size = n // 5 if n_test is None else n_test
    if size >= n:
        raise ValueError(f"n_test must leave images of digits for training: there are {n}, got {size}; ask for fewer.")
    order = generator.permutation(n)
    test, rest = order[:size], order[size:]
    return Images(pixels[rest], labels[rest]), Images(pixels[test], labels[test])


def _draw(
    available: int, first: int | None, last: int, generator: np.random.Generator, where: str, argument: str
) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint draws from 0..available-1: `first` from the head of a random order, `last` from its tail."""
    if last >= available if first is None else first + last > available:
        asked = f"{last} and at least 1 more" if first is None else first + last
        raise ValueError(f"{argument} asks for {asked} images, but {where} has {available}; ask for fewer.")
    order = generator.permutation(available)
    return order[: available - last if first is None else first], order[available - last :]


def _with_noise(y: np.ndarray, share: float, num_classes: int, generator: np.random.Generator) -> np.ndarray:
    wrong = generator.choice(len(y), size=round(share * len(y)), replace=False)
    noisy = y.copy()
    noisy[wrong] = (y[wrong] + generator.integers(1, num_classes, size=len(wrong), dtype=np.int32)) % num_classes
    return noisy


def _require_intact(source: Source, paths: Sequence[Path], *parts: Images) -> None:
    """Check what was read against what the data set is known to hold."""
    h, w, c = source.image_shape
    for kind, path, (pixels, labels) in zip(("training", "test"), (paths[0], paths[-1]), parts, strict=True):
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (h, w, c) or len(pixels) == 0:
            wanted = f"uint8 of shape (n, {h}, {w}, {c})"
            raise damaged(path, f"its {kind} images must be {wanted}, got {pixels.dtype} {pixels.shape}")
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(pixels),):
            raise damaged(path, f"its {kind} labels must be {len(pixels)} integers, got {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() >= len(source.class_names):
            raise damaged(
                path,
                f"its {kind} labels must be 0 to {len(source.class_names) - 1}, got {labels.min()}..{labels.max()}",
            )
