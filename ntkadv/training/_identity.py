"""What tells one training run from another, so that none goes on from the checkpoint of another one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkadv.training._steps import Steps
from ntkadv.training.method import TrainState

__all__ = ["described", "identity_of"]


def identity_of(run: Steps, start: TrainState) -> dict[str, Any]:
    """Describe a run by all that its outcome depends on, alike in every process."""
    leaves, structure = jax.tree.flatten(start)
    x, labels, _ = run.arrays
    return {
        "parameters": [[str(leaf.dtype), *map(int, np.shape(leaf))] for leaf in map(jnp.asarray, leaves)],
        "structure": described(str(structure)),
        "network": described(run.network),
        "method": described(run.method),
        "optimizer": described(run.optimizer),
        "batch_size": run.batch_size,
        "augmentation": described(run.augmentation),
        "average": run.average,
        "time_step": described(run.time_step),
        "images": list(map(int, x.shape)),
        "pixels": float(np.sum(np.asarray(x), dtype=np.float64)),
        "labels": int(np.asarray(labels, np.int64) @ np.arange(1, len(labels) + 1)),
        "key": np.asarray(jax.random.key_data(run.key)).tolist(),
        "start": float(sum(np.sum(np.asarray(leaf), dtype=np.float64) for leaf in jax.tree.leaves(start.params))),
    }


def described(value: Any) -> str:
    """Describe a value alike in every process: without addresses, functions by their names and the numbers in them.

    Two functions of one name are told apart by their constants, defaults, and the variables that they enclose, as the
    learning rate of an optimiser is one.
    """
    text = _described(value, ())
    return text if len(text) <= 300 else f"{text[:200]}... {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _described(value: Any, above: tuple[int, ...]) -> str:
    if id(value) in above:
        return "..."
    inner = functools.partial(_described, above=(*above, id(value)))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # A rate that was computed in another way differs in its last bits; optax turns whole numbers into floats.
        return f"{float(value):.12g}"
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
        return f"{value.dtype}{list(value.shape)} of sum {np.sum(np.asarray(value), dtype=np.float64)}"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"{inner(value.__self__)}.{value.__name__}"
    function = inspect.unwrap(value) if callable(value) else value
    if isinstance(function, types.FunctionType):
        held = [inner(number) for number in _constants(function.__code__)]
        held += [inner(default) for default in (function.__defaults__, function.__kwdefaults__) if default]
        held += [inner(cell.cell_contents) for cell in function.__closure__ or () if _is_filled(cell)]
        return f"{function.__qualname__}({', '.join(held)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {inner(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(inner, value))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{field.name}={inner(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _constants(code: types.CodeType) -> list[Any]:
    """Numbers written in a function, and in those inside it."""
    found: list[Any] = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _constants(constant)
        elif isinstance(constant, (int, float, complex)):
            found.append(constant)
    return found


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
