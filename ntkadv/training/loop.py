"""The training loop: any method, any optimiser, any function f(params, x); stopped and resumed bit for bit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key
from tqdm.auto import tqdm

from ntkadv._checks import require_int, require_key, require_memory, require_nonnegative
from ntkadv.architectures.base import Architecture
from ntkadv.data import Dataset
from ntkadv.kernels.empirical import Network, Params, require_params
from ntkadv.training._keeper import DivergenceError, Keeper, Place, Record, TrainedNetwork
from ntkadv.training._steps import Steps
from ntkadv.training.method import Method, TrainState, function_of
from ntkadv.training.standard import StandardTraining

__all__ = ["DivergenceError", "TrainedNetwork", "train"]

_CHUNK_SECONDS = 1.0


def train(
    network: Architecture | Network,
    data: Dataset,
    *,
    method: Method | None = None,
    steps: int,
    key: Key[Array, ""],
    optimizer: float | optax.GradientTransformation = 0.1,
    params: Params | None = None,
    batch_size: int | None = None,
    time_step: float | None = None,
    record: Record | None = None,
    record_at: Sequence[int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    metrics: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TrainedNetwork:
    """Train a network.

    Each step draws `batch_size` images without replacement, or takes all of them, has the method give images for the
    loss, and follows the optimiser. Random numbers depend on `key` and the number of the step alone, so a run that was
    stopped and goes on from its checkpoint ends where it would have ended, bit for bit.

    Args:
        network: An architecture, or any function f(params, x), see `ntkadv.kernels.empirical_ntk`.
        data: The training part is used.
        method: What one update does; `StandardTraining()` by default.
        steps: Number of updates.
        key: A random key: for the parameters, the batches and the attacks.
        optimizer: An optax optimiser, or the learning rate of gradient descent.
        params: Parameters to begin with; those of the architecture drawn by `key` by default.
        batch_size: Images a step; all by default.
        time_step: Training time of a step; the learning rate where that is given, else 1.
        record: A function of the parameters whose numbers and arrays are kept; called at `record_at`.
        record_at: Steps at which to record, 0 being the beginning; by default the first, the last, and 20 between.
        checkpoint: A file (.npz) for the state of the run. Where it exists, the run goes on from there.
        checkpoint_seconds: How often it is written; besides, at the end and when the run is interrupted.
        metrics: A file (.jsonl) that gets a line for each recorded step: step, time, loss, and numbers of `record`.
        progress: Show a bar.

    Raises:
        TypeError, ValueError: an argument is none of these; parameters do not fit the network, or a checkpoint the run;
            the network returns more than outputs, as one with a state does.
        MemoryError: the parameters and what the optimiser keeps do not fit into memory.
        DivergenceError: the loss is no longer finite; the last good network is with the error and in the checkpoint.
    """
    require_key("key", key)
    require_int("steps", steps, minimum=0)
    require_nonnegative("checkpoint_seconds", checkpoint_seconds)
    method = StandardTraining() if method is None else method
    if not isinstance(method, Method):
        raise TypeError(f"method must be a method of training, such as StandardTraining(), got {method!r}.")
    n = len(data.x_train)
    size = n if batch_size is None else batch_size
    require_int("batch_size", size, minimum=1)
    if size > n:
        raise ValueError(f"batch_size must be at most {n}, the number of training images, got {size}.")
    rate, update_rule = _optimizer(optimizer)
    if time_step is not None:
        require_nonnegative("time_step", time_step, strict=True)
    wanted = _wanted(record_at, steps)
    key_init, key_run = jax.random.split(key)
    f, start = _network(network, params, data, key_init, update_rule)
    x, targets = (jnp.asarray(array, _dtype_of(start)) for array in (data.x_train, data.targets_train))
    run = Steps(
        f=f,
        optimizer=update_rule,
        method=method,
        batch_size=size,
        time_step=rate if time_step is None else float(time_step),
        arrays=(x, jnp.asarray(data.y_train), targets),
        key=key_run,
    )
    keeper = Keeper(run, checkpoint, metrics, record)
    here = keeper.resume(TrainState(start, update_rule.init(start), method.start(start, n)))
    if here.step > steps:
        raise ValueError(
            f"the checkpoint {checkpoint} is at step {here.step}, beyond steps = {steps}; ask for more steps."
        )
    # The end of the last updates is known to be good only when others have started from it: we keep their beginning.
    before = here
    bar = tqdm(total=steps, initial=here.step, desc=method.name, disable=not progress, leave=False)
    pause, pace = time.perf_counter(), 1.0
    try:
        while True:
            if here.step in wanted and here.step not in keeper.steps:
                keeper.note(here, before)
            if here.step == steps:
                break
            following = wanted[wanted > here.step]
            goal = min(int(following[0]) if following.size else steps, here.step + max(1, int(pace)))
            begun = time.perf_counter()
            state, reached, loss = run.advance(*here, goal)
            if not np.isfinite(loss):
                keeper.diverged(here, before, reached - 1)
            elapsed = time.perf_counter() - begun
            # The first pace is that of compilation; later chunks take about a second.
            pace = min(4 * pace, (reached - here.step) * _CHUNK_SECONDS / max(elapsed, 1e-9))
            bar.update(reached - here.step)
            before, here = here, Place(state, reached)
            if time.perf_counter() - pause > checkpoint_seconds:
                keeper.save(here, before)
                pause = time.perf_counter()
        keeper.save(here, before)
    except DivergenceError:
        raise
    except BaseException:
        keeper.interrupted(here)
        raise
    finally:
        bar.close()
    return keeper.result(here)


def _optimizer(optimizer: Any) -> tuple[float, optax.GradientTransformation]:
    """Give the training time of a step, and the optimiser.

    Raises:
        TypeError, ValueError: it is neither a positive number nor an optimiser.
    """
    if isinstance(optimizer, Real):
        require_nonnegative("optimizer", optimizer, strict=True)
        return float(optimizer), gradient_descent(float(optimizer))
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer must be a learning rate or an optimiser of optax, got a {type(optimizer).__name__}; write "
            f"optax.adam(1e-3), say."
        )
    return 1.0, optimizer


def _wanted(record_at: Sequence[int] | None, steps: int) -> np.ndarray:
    """Give the steps at which to record, ascending.

    Raises:
        ValueError: they are no whole numbers from 0 to `steps`.
    """
    if record_at is None:
        return np.unique(np.linspace(0, steps, 22).astype(int))
    wanted = np.unique(np.asarray(record_at))
    if np.any(wanted != wanted.astype(int)) or np.any((wanted < 0) | (wanted > steps)):
        raise ValueError(
            f"record_at must be whole numbers between 0 and steps = {steps}, got {wanted[0]} to {wanted[-1]}."
        )
    return wanted.astype(int)


@lru_cache
def gradient_descent(rate: float) -> optax.GradientTransformation:
    """Give the same optimiser for the same rate, so that a program compiled for it is used again."""
    return optax.sgd(rate)


def _network(
    network: Architecture | Network,
    params: Params | None,
    data: Dataset,
    key: Array,
    optimizer: optax.GradientTransformation,
) -> tuple[Network, Params]:
    """Give a function f(params, x) and its parameters, drawn only once they are known to fit: data, network, memory.

    Raises:
        TypeError, ValueError, MemoryError: see `train`.
    """
    shape, f = data.x_train.shape[1:], function_of(network)
    if isinstance(network, Architecture):
        expected = jax.eval_shape(lambda: network.init(key, shape))
        given = expected if params is None else jax.eval_shape(lambda: params)
        if jax.tree.structure(given) != jax.tree.structure(expected) or any(
            one.shape != other.shape
            for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True)
        ):
            raise ValueError(
                "params are those of another architecture: their structure or shapes differ from what this one draws; "
                "pass the architecture that made them."
            )
    elif params is None:
        raise ValueError("params must be given with a function f(params, x); only an architecture draws its own.")
    else:
        given = params
    require_params(given)
    outputs = jax.eval_shape(f, given, jax.ShapeDtypeStruct((2, *shape), _dtype_of(given)))
    if not hasattr(outputs, "shape"):
        raise TypeError(
            f"the network must return one array of outputs, got {jax.tree.structure(outputs)}; a network with a state, "
            f"such as batch norm, is not covered: return its outputs only."
        )
    if outputs.shape != (2, data.num_classes):
        raise ValueError(
            f"the network must return (b, {data.num_classes}) outputs, one for each class, got {outputs.shape} for 2."
        )
    kept = (given, jax.eval_shape(optimizer.init, given))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    # Two places to go back to, the state that changes, gradients and updates.
    require_memory(
        f"Training a network with {size / 2**20:.0f} MiB of parameters and optimiser state", 5 * size,
        "Take a smaller width.",
    )  # fmt: skip
    return f, network.init(key, shape) if params is None and isinstance(network, Architecture) else params


def _dtype_of(params: Params) -> Any:
    """Give the dtype that images come in: float64 where a parameter has it, float32 otherwise."""
    is_double = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
    return jnp.float64 if is_double else jnp.float32
