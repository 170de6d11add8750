"""Checks of arguments. Every message says which argument, what it got, and what to do.

Values are checked only where they are known: inside `jax.jit` an argument is a tracer, and only its shape and type are.
"""

from typing import Any

import jax
import numpy as np
import psutil
from jax.core import Tracer


def _values(array: Any) -> np.ndarray | None:
    """Fetch the entries to the host; None for a tracer."""
    return None if isinstance(array, Tracer) else np.asarray(array)


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(np.shape(array))


def _dtype(name: str, array: Any) -> np.dtype:
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise TypeError(f"{name} must be an array, got {type(array).__name__}; pass a NumPy or JAX array.")
    return dtype


def _first(bad: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))


def _is_floating(dtype: np.dtype) -> bool:
    return bool(jax.numpy.issubdtype(dtype, jax.numpy.floating))


def require_finite(name: str, array: Any) -> None:
    """Require every entry to be finite; the `ValueError` gives place and value of the first that is not."""
    values = _values(array)
    if values is None:
        return
    bad = ~np.isfinite(values)
    if bad.any():
        where = _first(bad)
        raise ValueError(
            f"{name} must be finite, but {name}{list(where)} is {values[where]} ({int(bad.sum())} of {bad.size} "
            f"entries are NaN or infinite); find where they come from before going on."
        )


def require_images(name: str, x: Any) -> None:
    """Require a non-empty float array of images (n, h, w, c), finite, with pixels in [0, 1].

    Raises `TypeError` for anything but a floating array, `ValueError` for the rest.
    """
    dtype = _dtype(name, x)
    if not _is_floating(dtype):
        raise TypeError(
            f"{name} must be a float array with pixels in [0, 1], got {dtype}; "
            f"divide 8-bit images by 255 first: ({name} / 255).astype('float32')."
        )
    shape = _shape(x)
    if len(shape) != 4:
        raise ValueError(
            f"{name} must be images of shape (n, height, width, channels), got shape {shape}; "
            f"add the missing axes, e.g. x[None] for one image or x[..., None] for grey images."
        )
    if 0 in shape:
        raise ValueError(f"{name} is empty: shape {shape}; pass at least one image with at least one pixel.")
    require_finite(name, x)
    values = _values(x)
    if values is None:
        return
    bad = (values < 0) | (values > 1)
    if bad.any():
        where = _first(bad)
        raise ValueError(
            f"{name} must have pixels in [0, 1], but {name}{list(where)} is {values[where]:.6g} (range "
            f"{values.min():.6g} to {values.max():.6g}); rescale to [0, 1], and leave centring to the architecture."
        )


def require_labels(name: str, y: Any, num_classes: int) -> None:
    """Require a vector (n,) of integer labels in 0 .. num_classes - 1.

    Raises `TypeError` for anything but an integer array, `ValueError` for the rest.
    """
    dtype = _dtype(name, y)
    if not jax.numpy.issubdtype(dtype, jax.numpy.integer):
        raise TypeError(f"{name} must be integer labels, got {dtype}; for one-hot rows take {name}.argmax(axis=1).")
    shape = _shape(y)
    if len(shape) != 1:
        raise ValueError(f"{name} must be a vector of labels (n,), got shape {shape}; flatten it, or take the argmax.")
    values = _values(y)
    if values is None:
        return
    bad = (values < 0) | (values >= num_classes)
    if bad.any():
        (where,) = _first(bad)
        raise ValueError(
            f"{name} must lie in 0 .. {num_classes - 1}, but {name}[{where}] is {values[where]}; "
            f"number the classes from 0, or use a model with more than {num_classes} outputs."
        )


def require_same_length(**arrays: Any) -> None:
    """Require the arrays, given by name, to have one length; the `ValueError` lists each."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"{' and '.join(lengths)} must have the same length, but {listed}; pair them up again.")


def require_key(name: str, key: Any) -> None:
    """Require one random key, as made by `jax.random.key`.

    Raises `TypeError` for anything else (an integer seed, an array of raw bits), `ValueError` for an array of keys.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name} must be a random key, got {type(key).__name__}; make one with jax.random.key(seed).")
    if _shape(key) != ():
        raise ValueError(f"{name} must be one random key, got an array of shape {_shape(key)}; pass one of them.")


def require_int(name: str, value: Any, *, minimum: int) -> None:
    """Require an integer (not a bool) of at least `minimum`; `TypeError` or `ValueError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}; pass a whole number of at least {minimum}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}; pass a larger number.")


def require_nonnegative(name: str, value: Any, *, strict: bool = False) -> None:
    """Require a finite number >= 0 (> 0 when `strict`); `TypeError` or `ValueError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}); pass a float.")
    if not np.isfinite(value) or value < 0 or (strict and value == 0):
        raise ValueError(f"{name} must be finite and {'positive' if strict else 'not negative'}, got {value}.")


def require_memory(what: str, need: int, remedy: str, *, max_bytes: int | None = None) -> None:
    """Require `need` bytes to be within `max_bytes`, or within what the machine has available.

    Raises `MemoryError`, before anything is computed, where they are not.
    """
    available = psutil.virtual_memory().available if max_bytes is None else max_bytes
    if need > available:
        limit = "the machine has available" if max_bytes is None else "max_bytes allows"
        raise MemoryError(f"{what} needs about {need / 2**30:.2f} GiB; {limit} {available / 2**30:.2f}. {remedy}")
