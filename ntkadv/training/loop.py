"""The training loop: any method, any optimiser, any function f(params, x); stopped and resumed bit for bit."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key
from tqdm.auto import tqdm

from ntkadv._checks import require_int, require_key, require_memory, require_nonnegative
from ntkadv.architectures.base import Architecture
from ntkadv.attacks.threat_model import sample_keys
from ntkadv.data import Dataset
from ntkadv.kernels.empirical import Network, Params
from ntkadv.runs import append_line, load_checkpoint, rewrite_lines, save_checkpoint
from ntkadv.training.method import Batch, Method, TrainState
from ntkadv.training.standard import StandardTraining

__all__ = ["DivergenceError", "TrainedNetwork", "train"]

Record: TypeAlias = Callable[[Params], Mapping[str, Any]]

_CHUNK_SECONDS = 1.0


class DivergenceError(RuntimeError):
    """The loss stopped being finite.

    Attributes:
        step: The step whose loss was not finite.
        last: The network before it, with all that was recorded.
    """

    def __init__(self, message: str, step: int, last: TrainedNetwork):
        super().__init__(message)
        self.step = step
        self.last = last


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """What training gives.

    Attributes:
        f: The network, a function of parameters and images.
        params: Its parameters in the end.
        state: All that is needed to go on.
        step: Number of updates made.
        steps: Steps at which something was recorded, ascending.
        history: What was recorded, one row a step: always `"loss"`, and what `record` gave.
        time_step: Training time that one step takes.
    """

    f: Network
    params: Params
    state: TrainState
    step: int
    steps: np.ndarray
    history: dict[str, np.ndarray]
    time_step: float

    @property
    def times(self) -> np.ndarray:
        """Training times at which something was recorded."""
        return self.steps * self.time_step

    @property
    def predictor(self) -> Callable[[Array], Array]:
        """The network as a function of images, a pytree: what attacks take."""
        return eqx.Partial(self.f, self.params)


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
    if isinstance(optimizer, (int, float)):
        require_nonnegative("optimizer", optimizer, strict=True)
    rate = float(optimizer) if isinstance(optimizer, (int, float)) else 1.0
    update_rule = gradient_descent(rate) if isinstance(optimizer, (int, float)) else optimizer
    key_init, key_run = jax.random.split(key)
    f, start = _network(network, params, data, key_init)
    _require_room(start, update_rule)
    run = _Loop(
        f=f,
        optimizer=update_rule,
        method=method,
        batch_size=size,
        time_step=rate if time_step is None else float(time_step),
        arrays=(jnp.asarray(data.x_train), jnp.asarray(data.y_train), jnp.asarray(data.targets_train)),
        key=key_run,
    )
    state = TrainState(start, update_rule.init(start), method.start(start, n))
    wanted = np.unique(np.linspace(0, steps, 22).astype(int) if record_at is None else np.asarray(record_at, int))
    if wanted.size and (wanted[0] < 0 or wanted[-1] > steps):
        raise ValueError(f"record_at must lie between 0 and steps = {steps}, got {wanted[0]} to {wanted[-1]}.")
    keeper = _Keeper(run, checkpoint, metrics, checkpoint_seconds, record)
    state, step = keeper.resume(state)
    if step > steps:
        raise ValueError(f"the checkpoint {checkpoint} is at step {step}, beyond steps = {steps}; ask for more steps.")
    bar = tqdm(total=steps, initial=step, desc=method.name, disable=not progress, leave=False)
    pause, pace = time.perf_counter(), 1.0
    try:
        while True:
            if step in wanted and step not in keeper.steps:
                keeper.note(state, step)
            if step == steps:
                break
            following = wanted[wanted > step]
            goal = min(int(following[0]) if following.size else steps, step + max(1, int(pace)))
            begun = time.perf_counter()
            advanced, reached, is_finite = run.advance(state, step, goal)
            if not is_finite:
                keeper.diverged(state, step, reached)
            elapsed = time.perf_counter() - begun
            # The first pace is that of compilation; later chunks take about a second.
            pace = min(4 * pace, (reached - step) * _CHUNK_SECONDS / max(elapsed, 1e-9))
            bar.update(reached - step)
            state, step = advanced, reached
            if time.perf_counter() - pause > checkpoint_seconds:
                keeper.save(state, step)
                pause = time.perf_counter()
    except KeyboardInterrupt:
        keeper.save(state, step)
        raise
    finally:
        bar.close()
    keeper.save(state, step)
    return keeper.result(state, step)


@lru_cache
def gradient_descent(rate: float) -> optax.GradientTransformation:
    """Give the same optimiser for the same rate, so that a program compiled for it is used again."""
    return optax.sgd(rate)


@dataclass(frozen=True, eq=False)
class _Loop:
    """The compiled part of a run."""

    f: Network
    optimizer: optax.GradientTransformation
    method: Method
    batch_size: int
    time_step: float
    arrays: tuple[Array, Array, Array]
    key: Array

    def advance(self, state: TrainState, step: int, goal: int) -> tuple[TrainState, int, bool]:
        """Make steps up to `goal`, or to the first whose loss is not finite: the state, the step, whether all were."""
        static = (self.f, self.optimizer, self.method, self.batch_size)
        state, reached, loss = _advance(
            *static, state, jnp.int32(step), jnp.int32(goal), self.arrays, self.key, jnp.float32(self.time_step)
        )
        return state, int(reached), bool(jnp.isfinite(loss))

    def loss(self, state: TrainState, step: int) -> float:
        """Give the loss that the next update would start from."""
        static = (self.f, self.optimizer, self.method, self.batch_size)
        return float(_loss(*static, state, jnp.int32(step), self.arrays, self.key, jnp.float32(self.time_step)))


@eqx.filter_jit
def _advance(f, optimizer, method, batch_size, state, step, goal, arrays, key, time_step):
    def unfinished(carry):
        _, step, loss = carry
        return (step < goal) & jnp.isfinite(loss)

    def body(carry):
        state, step, _ = carry
        batch = _batch(arrays, key, step, batch_size, time_step)
        state, metrics = method.update(f, optimizer, state, batch)
        return state, step + 1, metrics["loss"].astype(jnp.float32)

    return jax.lax.while_loop(unfinished, body, (state, step, jnp.float32(0)))


@eqx.filter_jit
def _loss(f, optimizer, method, batch_size, state, step, arrays, key, time_step):
    batch = _batch(arrays, key, step, batch_size, time_step)
    return method.update(f, optimizer, state, batch)[1]["loss"]


def _batch(arrays: tuple[Array, Array, Array], key: Array, step: Array, size: int, time_step: Any) -> Batch:
    x, labels, targets = arrays
    n = len(x)
    place_key, attack_key = jax.random.split(jax.random.fold_in(key, step))
    keys = sample_keys(attack_key, size)
    time_now = step.astype(x.dtype) * time_step.astype(x.dtype)
    if size == n:
        return Batch(x, labels, targets, jnp.arange(n), keys, time_now, 1.0)
    places = jax.random.choice(place_key, n, (size,), replace=False)
    return Batch(x[places], labels[places], targets[places], places, keys, time_now, size / n)


class _Keeper:
    """What a run leaves behind: its history, its checkpoint, its file of metrics."""

    def __init__(
        self,
        run: _Loop,
        checkpoint: str | os.PathLike[str] | None,
        metrics: str | os.PathLike[str] | None,
        seconds: float,
        record: Record | None,
    ):
        self.run = run
        self.path = None if checkpoint is None else Path(checkpoint)
        self.metrics = None if metrics is None else Path(metrics)
        self.record = record
        self.steps: list[int] = []
        self.rows: list[dict[str, np.ndarray]] = []
        for path in (self.path, self.metrics):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)

    def resume(self, state: TrainState) -> tuple[TrainState, int]:
        """Take up the run where its checkpoint left it.

        Raises:
            ValueError: the checkpoint is that of another run.
        """
        found = None if self.path is None else load_checkpoint(self.path)
        step = 0
        if found is not None:
            arrays, meta = found
            ours = self._identity(state)
            differing = [name for name in ours if meta.get("identity", {}).get(name) != ours[name]]
            if differing:
                name = differing[0]
                raise ValueError(
                    f"the checkpoint {self.path} is that of another run: its {name} is "
                    f"{meta.get('identity', {}).get(name)!r}, here it is {ours[name]!r}. Give another file, or remove "
                    f"this one."
                )
            leaves, structure = jax.tree.flatten(state)
            state = jax.tree.unflatten(structure, [jnp.asarray(arrays[f"leaf{i}"]) for i in range(len(leaves))])
            step = int(meta["step"])
            self.steps = [int(number) for number in arrays["steps"]]
            names = [name.removeprefix("history.") for name in arrays if name.startswith("history.")]
            self.rows = [{name: arrays[f"history.{name}"][i] for name in names} for i in range(len(self.steps))]
        if self.metrics is not None:
            rewrite_lines(self.metrics, [self._line(*pair) for pair in zip(self.steps, self.rows, strict=True)])
        return state, step

    def note(self, state: TrainState, step: int) -> None:
        """Record what is asked for at a step."""
        row = {"loss": np.asarray(self.run.loss(state, step))}
        if self.record is not None:
            row |= {name: np.asarray(value) for name, value in self.record(state.params).items()}
        if self.rows and row.keys() != self.rows[0].keys():
            raise ValueError(f"record must give the same names at every step, got {sorted(row)} at step {step}.")
        self.steps.append(step)
        self.rows.append(row)
        if self.metrics is not None:
            append_line(self.metrics, self._line(step, row))

    def save(self, state: TrainState, step: int) -> None:
        """Write the checkpoint."""
        if self.path is None:
            return
        arrays = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        history = {f"history.{name}": values for name, values in self._history().items()}
        meta = {"step": step, "identity": self._identity(state)}
        save_checkpoint(self.path, {**arrays, **history, "steps": np.asarray(self.steps, int)}, meta)

    def diverged(self, state: TrainState, step: int, reached: int) -> None:
        """Go back to the last network whose loss was finite, keep it, and raise."""
        bad = reached - 1  # the update number `bad` started from a loss that was not finite
        good = max(step, bad - 1)
        last, good, _ = self.run.advance(state, step, good) if good > step else (state, step, True)
        self.save(last, good)
        kept = f" The last good state, of step {good}, is in {self.path}." if self.path is not None else ""
        raise DivergenceError(
            f"The loss is not finite at step {bad}: lower the learning rate; for full-batch gradient descent on the "
            f"squared loss it must stay below 2 / lambda_max of the NTK, see max_learning_rate.{kept}",
            bad,
            self.result(last, good),
        )

    def result(self, state: TrainState, step: int) -> TrainedNetwork:
        """Put together what training gives."""
        steps = np.asarray(self.steps, int)
        return TrainedNetwork(self.run.f, state.params, state, step, steps, self._history(), self.run.time_step)

    def _history(self) -> dict[str, np.ndarray]:
        names = self.rows[0] if self.rows else {}
        return {name: np.stack([row[name] for row in self.rows]) for name in names}

    def _line(self, step: int, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        numbers = {name: value.item() for name, value in row.items() if value.ndim == 0}
        return {"step": step, "time": step * self.run.time_step, **numbers}

    def _identity(self, state: TrainState) -> dict[str, Any]:
        leaves, structure = jax.tree.flatten(state)
        return {
            "parameters": [[str(leaf.dtype), *map(int, np.shape(leaf))] for leaf in map(jnp.asarray, leaves)],
            "structure": str(structure),
            "network": _plain(self.run.f),
            "method": _plain(self.run.method),
            "batch_size": self.run.batch_size,
            "time_step": self.run.time_step,
            "images": list(map(int, self.run.arrays[0].shape)),
            "pixels": float(np.asarray(self.run.arrays[0], np.float64).sum()),
            "labels": int(np.asarray(self.run.arrays[1], np.int64) @ np.arange(1, len(self.run.arrays[1]) + 1)),
            "key": np.asarray(jax.random.key_data(self.run.key)).tolist(),
        }


def _plain(value: Any) -> str:
    """Describe a value alike in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _network(
    network: Architecture | Network, params: Params | None, data: Dataset, key: Array
) -> tuple[Network, Params]:
    """Give a function f(params, x) and its parameters, checked against the data.

    Raises:
        TypeError, ValueError: see `train`.
    """
    shape = data.x_train.shape[1:]
    if isinstance(network, Architecture):
        expected = jax.eval_shape(lambda: network.init(key, shape))
        if params is None:
            _require_memory_of(expected, copies=1)
            params = network.init(key, shape)
        given = jax.eval_shape(lambda: params)
        if jax.tree.structure(given) != jax.tree.structure(expected) or any(
            one.shape != other.shape
            for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True)
        ):
            raise ValueError(
                "params are those of another architecture: their structure or shapes differ from what this one draws; "
                "pass the architecture that made them."
            )
        f: Network = network.apply
    elif not callable(network):
        raise TypeError(f"network must be an architecture or a function f(params, x), got {type(network).__name__}.")
    elif params is None:
        raise ValueError("params must be given with a function f(params, x); only an architecture draws its own.")
    else:
        f = network
    leaves = jax.tree.leaves(params)
    if not leaves or not all(hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise TypeError("params must be a pytree of float arrays; take the rest out, as by equinox.partition.")
    outputs = jax.eval_shape(f, params, jax.ShapeDtypeStruct((2, *shape), data.x_train.dtype))
    if not hasattr(outputs, "shape"):
        raise TypeError(
            f"the network must return one array of outputs, got {jax.tree.structure(outputs)}; a network with a state, "
            f"such as batch norm, is not covered: return its outputs only."
        )
    if outputs.shape != (2, data.num_classes):
        raise ValueError(
            f"the network must return (b, {data.num_classes}) outputs, one for each class, got {outputs.shape} for 2."
        )
    return f, params


def _require_room(params: Params, optimizer: optax.GradientTransformation) -> None:
    """Require memory for parameters, gradients, updates, the state before a chunk, and the optimiser's own."""
    _require_memory_of((params, jax.eval_shape(optimizer.init, params)), copies=4)


def _require_memory_of(tree: Any, *, copies: int) -> None:
    size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    require_memory(
        f"Training a network with {size / 2**20:.0f} MiB of parameters and optimiser state", copies * size,
        "Take a smaller width.",
    )  # fmt: skip
