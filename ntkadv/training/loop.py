"""The training loop: any method, any optimiser, any function f(params, x); stopped and resumed bit for bit."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
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
from ntkadv.training.augmentation import Augmentation
from ntkadv.training.method import Method, Problem, TrainState
from ntkadv.training.network import Forward, Trainable, trainable
from ntkadv.training.standard import StandardTraining
from ntkadv.vision.base import VisionModel

__all__ = ["DivergenceError", "TrainedNetwork", "train"]

_CHUNK_SECONDS = 1.0


def train(
    network: Architecture | VisionModel | Network,
    data: Dataset,
    *,
    method: Method | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    key: Key[Array, ""],
    optimizer: float | optax.GradientTransformation = 0.1,
    params: Params | None = None,
    batch_size: int | None = None,
    augmentation: Augmentation | None = None,
    average: float | None = None,
    time_step: float | None = None,
    record: Record | None = None,
    record_at: Sequence[int] | None = None,
    keep_best: str | None = None,
    stop: Callable[[Mapping[str, np.ndarray]], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    metrics: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TrainedNetwork:
    """Train a network.

    Each epoch deals out the images in batches, in a new order; those that are left over wait for the next. A step has
    the method give images for the loss, and follows the optimiser. Random numbers depend on `key` and the number of the
    step alone, so a run that was stopped and goes on from its checkpoint ends where it would have ended, bit for bit.

    Args:
        network: An architecture; a network of `ntkadv.vision`; or any function f(params, x), see
            `ntkadv.kernels.empirical_ntk`.
        data: The training part is used.
        method: What one update does; `StandardTraining()` by default.
        steps: Number of updates.
        epochs: Number of passes over the training set, instead of `steps`.
        key: A random key: for the parameters, the batches and the attacks.
        optimizer: An optax optimiser, or the learning rate of gradient descent.
        params: Parameters to begin with, by default those that a network of `ntkadv.vision` has, or those that an
            architecture draws by `key`.
        batch_size: Images a step; all by default.
        augmentation: A random change of every image in every step.
        average: Decay of exponential averages of parameters and batch-norm statistics, such as 0.999: then these are
            the network that is recorded, kept as the best, and given in the end.
        time_step: Training time of a step; the learning rate where that is given, else 1.
        record: A function whose numbers and arrays are kept; called at `record_at` with the parameters, or, where
            the network is one of `ntkadv.vision`, with that. See `robust_accuracy`.
        record_at: Steps at which to record, 0 being the beginning; by default every epoch's end where `epochs` is
            given, else the first, the last, and 20 between.
        keep_best: Name of a recorded number; the network where it was largest, the latest of these, is kept besides the
            last one.
        stop: A function of the history so far; where it says true, training ends early. Called after each record.
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
    steps = _steps(steps, epochs, n // size)
    every_epoch = None if epochs is None else range(0, steps + 1, n // size)
    wanted = _wanted(every_epoch if record_at is None else record_at, steps)
    if augmentation is not None and not isinstance(augmentation, Augmentation):
        raise TypeError(f"augmentation must be one, such as CropFlip(), got {augmentation!r}.")
    if average is not None and not 0 <= average < 1:
        raise ValueError(f"average must be a decay from 0 to below 1, such as 0.999, got {average}.")
    key_init, key_run = jax.random.split(key)
    form, start, statistics = _network(network, params, data, key_init, update_rule)
    x, targets = (jnp.asarray(array, _dtype_of(start)) for array in (data.x_train, data.targets_train))
    run = Steps(
        network=form,
        optimizer=update_rule,
        method=method,
        batch_size=size,
        time_step=rate if time_step is None else float(time_step),
        arrays=(x, jnp.asarray(data.y_train), targets),
        key=key_run,
        augmentation=augmentation,
        average=average,
    )
    keeper = Keeper(run, checkpoint, metrics, record, keep_best)
    problem = Problem(Forward(form, statistics), start, x.shape, augmentation, jax.random.fold_in(key_init, 1))
    begun_with = TrainState(start, update_rule.init(start), method.start(problem), statistics)
    here = keeper.resume(run.start(begun_with))
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
            if here.step in wanted:
                if here.step not in keeper.steps:
                    keeper.note(here, before)
                if stop is not None and bool(stop(keeper.history)):
                    break
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


def _steps(steps: int | None, epochs: int | None, per_epoch: int) -> int:
    """Give the number of updates.

    Raises:
        TypeError, ValueError: neither or both are given, or they are no whole numbers.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"give either steps or epochs, got steps = {steps} and epochs = {epochs}.")
    if steps is not None:
        require_int("steps", steps, minimum=0)
        return steps
    require_int("epochs", epochs, minimum=0)
    assert epochs is not None
    return epochs * per_epoch


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


@functools.lru_cache
def gradient_descent(rate: float) -> optax.GradientTransformation:
    """Give the same optimiser for the same rate, so that a program compiled for it is used again."""
    return optax.sgd(rate)


def _network(
    network: Architecture | VisionModel | Network,
    params: Params | None,
    data: Dataset,
    key: Array,
    optimizer: optax.GradientTransformation,
) -> tuple[Trainable, Params, Any]:
    """Give a network, its parameters and statistics, drawn only once they are known to fit: data, network, memory.

    Raises:
        TypeError, ValueError, MemoryError: see `train`.
    """
    shape = data.x_train.shape[1:]
    form, own, statistics = trainable(network)
    draw = None
    if isinstance(network, Architecture):
        draw = functools.partial(network.init, key, shape)
        own = jax.eval_shape(draw)
    if own is None and params is None:
        raise ValueError("params must be given with a function f(params, x); only an architecture draws its own.")
    given = own if params is None else jax.eval_shape(lambda: params)
    if own is not None and not _alike(given, own):
        raise ValueError(
            "params are those of another architecture: their structure or shapes differ from what this one draws; "
            "pass the architecture that made them."
        )
    require_params(given if params is None else params)
    images = jax.ShapeDtypeStruct((2, *shape), _dtype_of(given))
    try:
        outputs = jax.eval_shape(Forward(form, statistics), given, images)
    except (TypeError, ValueError) as error:
        if not isinstance(network, VisionModel):
            raise
        raise ValueError(f"the network does not take images of shape {shape}: {str(error).splitlines()[0]}") from error
    if not hasattr(outputs, "shape"):
        raise TypeError(
            f"the network must return one array of outputs, got {jax.tree.structure(outputs)}; a function with a state "
            f"is not covered: return its outputs only, or take a network of ntkadv.vision, which has batch norm."
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
    if params is not None:
        return form, params, statistics
    return form, own if draw is None else draw(), statistics


def _alike(one: Params, other: Params) -> bool:
    """Whether two pytrees have the same structure and shapes."""
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        a.shape == b.shape for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def _dtype_of(params: Params) -> Any:
    """Give the dtype that images come in: float64 where a parameter has it, float32 otherwise."""
    is_double = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
    return jnp.float64 if is_double else jnp.float32
