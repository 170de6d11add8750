"""The data set that everything else takes, and the regression targets made of its labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ntkadv._checks import require_images, require_int, require_labels, require_same_length
from ntkadv._typing import AnyArray


def targets(labels: Int[AnyArray, " n"], num_classes: int) -> Float[np.ndarray, "n {num_classes}"]:
    r"""Centred one-hot targets for regression on classes.

    .. math:: y_{ik} = \mathbb{1}[k = \mathrm{label}_i] - 1/c

    Every row sums to zero, and the largest entry is at the label. The result is float32.

    Raises:
        ValueError: there are fewer than two classes, or a label is not one of 0, ..., num_classes - 1.
        TypeError: the labels are no integers.
    """
    require_int("num_classes", num_classes, minimum=2)
    require_labels("labels", labels, num_classes)
    one_hot = np.asarray(labels)[:, None] == np.arange(num_classes)
    return one_hot.astype(np.float32) - np.float32(1 / num_classes)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Dataset:
    """Images and labels in three parts: for training, for validation (may be empty) and for testing.

    Pixels are float32 in [0, 1] with axes (image, height, width, channel); labels are int32 in 0, ..., num_classes - 1.
    Arrays of other kinds are converted by `Dataset.from_arrays`; here they are refused.

    Raises:
        ValueError: a pixel is NaN, infinite or outside [0, 1]; a label is not a class; shapes do not fit; the training
            or the test part is empty; the training labels are all the same. Repeated images are allowed.
        TypeError: an array has another dtype.
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
        require_int("num_classes", self.num_classes, minimum=2)
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names must hold {self.num_classes} names, one a class, got {len(self.class_names)}; "
                "add or drop some."
            )
        for part, x, y in self._parts():
            if x.dtype != np.float32 or y.dtype != np.int32:
                raise TypeError(
                    f"x_{part} must be float32 and y_{part} int32, got {x.dtype} and {y.dtype}; "
                    "use Dataset.from_arrays, which converts."
                )
            if part != "val" or len(x):
                require_images(f"x_{part}", x)
            require_labels(f"y_{part}", y, self.num_classes)
            require_same_length(**{f"x_{part}": x, f"y_{part}": y})
            if x.shape[1:] != self.x_train.shape[1:]:
                raise ValueError(
                    f"x_{part} must have images like those of x_train, "
                    f"got {x.shape[1:]} beside {self.x_train.shape[1:]}; resize them."
                )
        if (self.y_train == self.y_train[0]).all():
            raise ValueError(
                f"y_train must hold two classes at least, "
                f"got class {self.y_train[0]} in all {len(self.y_train)} images; take more images or another seed."
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
            TypeError: pixels are neither uint8 nor floats, or labels are no integers.
        """
        if (x_val is None) != (y_val is None):
            given, missing = ("y_val", "x_val") if x_val is None else ("x_val", "y_val")
            raise ValueError(f"{given} was given without {missing}; give both or neither.")
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
        raise TypeError(f"{name} must be uint8 in 0..255 or float in [0, 1], got dtype {x.dtype}; convert it.")
    return x.astype(np.float32)


def _labels(name: str, array: AnyArray) -> np.ndarray:
    y = np.asarray(array)
    require_labels(name, y, np.iinfo(np.int32).max)
    return y.astype(np.int32)
