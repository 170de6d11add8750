"""The data set that everything else takes, and the regression targets made of its labels."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ntkadv._typing import AnyArray


def targets(labels: Int[AnyArray, " n"], num_classes: int) -> Float[np.ndarray, "n {num_classes}"]:
    r"""Centred one-hot targets for regression on classes.

    .. math:: y_{ik} = \mathbb{1}[k = \mathrm{label}_i] - 1/c

    Every row sums to zero, and the largest entry is at the label. The result is float32.

    Raises:
        ValueError: there are fewer than two classes, or a label is not one of 0, ..., num_classes - 1.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    classes = np.asarray(labels)
    _require_classes("labels", classes, num_classes)
    one_hot = classes[:, None] == np.arange(num_classes)
    return one_hot.astype(np.float32) - np.float32(1 / num_classes)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Dataset:
    """Images and labels in three parts: for training, for validation (may be empty) and for testing.

    Pixels are float32 in [0, 1] with axes (image, height, width, channel); labels are int32 in 0, ..., num_classes - 1.
    Arrays of other kinds are converted by `Dataset.from_arrays`; here they are refused.

    Raises:
        ValueError: a pixel is NaN, infinite or outside [0, 1]; a label is not a class; shapes or dtypes do not fit; the
            training or the test part is empty; the training labels are all the same. Repeated images are allowed.
    """

    name: str
    x_train: Float[np.ndarray, "n_train h w c"]
    y_train: Int[np.ndarray, " n_train"]
    x_val: Float[np.ndarray, "n_val h w c"]
    y_val: Int[np.ndarray, " n_val"]
    x_test: Float[np.ndarray, "n_test h w c"]
    y_test: Int[np.ndarray, " n_test"]
    num_classes: int
    class_names: tuple[str, ...]

    def __post_init__(self):
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names must hold {self.num_classes} names, one a class, got {len(self.class_names)}"
            )
        for part, x, y in self._parts():
            _require_images(f"x_{part}", x)
            _require_labels(f"y_{part}", y, len(x))
            _require_classes(f"y_{part}", y, self.num_classes)
            if x.shape[1:] != self.x_train.shape[1:]:
                raise ValueError(
                    f"x_{part} has images of shape {x.shape[1:]}, x_train {self.x_train.shape[1:]}: give all the same"
                )
            if len(x) == 0 and part != "val":
                raise ValueError(f"x_{part} is empty: give it at least one image")
        if (self.y_train == self.y_train[0]).all():
            raise ValueError(
                f"y_train holds class {self.y_train[0]} only ({len(self.y_train)} images): "
                "give images of two classes at least, for instance by taking more of them"
            )

    @classmethod
    def from_arrays(
        cls,
        *,
        name: str,
        x_train: AnyArray,
        y_train: AnyArray,
        x_test: AnyArray,
        y_test: AnyArray,
        x_val: AnyArray | None = None,
        y_val: AnyArray | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "Dataset":
        """Make a data set of arrays of one's own.

        Images have axes (image, height, width, channel); where the channel is missing, one is added. Pixels of dtype
        uint8 are divided by 255, floats are taken as they are and must lie in [0, 1]. Without `num_classes` there are
        as many classes as `class_names`, or else as the largest label demands.

        Raises:
            ValueError: as the constructor does.
        """
        if (x_val is None) != (y_val is None):
            given, missing = ("y_val", "x_val") if x_val is None else ("x_val", "y_val")
            raise ValueError(f"{given} was given without {missing}: give both or neither")
        train, test = _images("x_train", x_train), _images("x_test", x_test)
        labels = {"y_train": _labels("y_train", y_train), "y_test": _labels("y_test", y_test)}
        if x_val is None or y_val is None:
            val, labels["y_val"] = train[:0], np.zeros(0, np.int32)
        else:
            val, labels["y_val"] = _images("x_val", x_val), _labels("y_val", y_val)
        if num_classes is None:
            largest = max((int(y.max()) for y in labels.values() if y.size), default=0)
            num_classes = len(class_names) if class_names is not None else max(largest + 1, 2)
        names = tuple(map(str, range(num_classes) if class_names is None else class_names))
        return cls(
            name=name, x_train=train, x_val=val, x_test=test, **labels, num_classes=num_classes, class_names=names
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        _, h, w, c = self.x_train.shape
        return h, w, c

    @property
    def targets_train(self) -> Float[np.ndarray, "n_train num_classes"]:
        """Regression targets of the training part, see `targets`."""
        return targets(self.y_train, self.num_classes)

    @property
    def targets_val(self) -> Float[np.ndarray, "n_val num_classes"]:
        """Regression targets of the validation part, see `targets`."""
        return targets(self.y_val, self.num_classes)

    @property
    def targets_test(self) -> Float[np.ndarray, "n_test num_classes"]:
        """Regression targets of the test part, see `targets`."""
        return targets(self.y_test, self.num_classes)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(x)} {part}" for part, x, _ in self._parts())
        shape = "x".join(map(str, self.image_shape))
        return f"Dataset({self.name}: {sizes}, images {shape}, {self.num_classes} classes)"

    def _parts(self) -> tuple[tuple[str, np.ndarray, np.ndarray], ...]:
        return (
            ("train", self.x_train, self.y_train),
            ("val", self.x_val, self.y_val),
            ("test", self.x_test, self.y_test),
        )


def _images(name: str, array: AnyArray) -> np.ndarray:
    """Float32 images with a channel axis; uint8 is scaled to [0, 1]."""
    x = np.asarray(array)
    if x.ndim == 3:
        x = x[..., None]
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{name} must be uint8 in 0..255 or float in [0, 1], got dtype {x.dtype}: convert it")
    return x.astype(np.float32)


def _labels(name: str, array: AnyArray) -> np.ndarray:
    y = np.asarray(array)
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{name} must hold integer class numbers, got dtype {y.dtype}: convert it, for instance by argmax"
        )
    if y.size and (y.min() < 0 or y.max() > np.iinfo(np.int32).max):
        raise ValueError(f"{name} must hold class numbers from 0 up, got {y.min()}..{y.max()}: renumber the classes")
    return y.astype(np.int32)


def _require_images(name: str, x: np.ndarray) -> None:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have axes (image, height, width, channel), got shape {x.shape}: reshape it")
    if x.dtype != np.float32:
        raise ValueError(f"{name} must be float32, got {x.dtype}: use Dataset.from_arrays, which converts")
    if not x.size:
        return
    low, high = float(x.min()), float(x.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = np.flatnonzero(~np.isfinite(x).all(axis=(1, 2, 3)))
        raise ValueError(
            f"{name} has NaN or infinite pixels in {len(bad)} images, first {bad[0]}: leave those images out"
        )
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must lie in [0, 1], got [{low:g}, {high:g}]: scale the pixels "
            "(uint8 in 0..255 is scaled by Dataset.from_arrays; centring is left to the architecture)"
        )


def _require_labels(name: str, y: np.ndarray, num_images: int) -> None:
    if y.dtype != np.int32:
        raise ValueError(f"{name} must be int32, got {y.dtype}: use Dataset.from_arrays, which converts")
    if y.shape != (num_images,):
        raise ValueError(f"{name} must have shape ({num_images},), one label an image, got {y.shape}")


def _require_classes(name: str, y: np.ndarray, num_classes: int) -> None:
    if y.size and (y.min() < 0 or y.max() >= num_classes):
        wrong = y[(y < 0) | (y >= num_classes)]
        raise ValueError(
            f"{name} must hold classes 0..{num_classes - 1}, got {operator.index(wrong[0])} ({len(wrong)} such): "
            "raise num_classes or renumber the classes"
        )
