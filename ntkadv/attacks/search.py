"""How an attack goes over many samples: stages, batches, and a file from which a stopped search goes on."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm.auto import tqdm

from ntkadv._convolutions import canonical_convolutions
from ntkadv.attacks.best import misclassified
from ntkadv.attacks.losses import margin
from ntkadv.attacks.model import Model, in_precision, logits_of, working_dtype
from ntkadv.attacks.threat_model import ThreatModel, fold_in_each, move
from ntkadv.runs import load_checkpoint, save_checkpoint

AS_THEY_ARE = "clean"
"""What misclassified clean samples fell to."""

_SAVE_EVERY = 10.0
"""Seconds between two writings of the state within a stage; after a stage it is always written."""


class Cost(NamedTuple):
    """Passes of single samples through a model: with a gradient, and forward only."""

    gradients: int = 0
    forwards: int = 0

    def times(self, n: int) -> Cost:
        """Cost of n of them."""
        return Cost(self.gradients * n, self.forwards * n)

    def plus(self, other: Cost) -> Cost:
        """Cost of both."""
        return Cost(self.gradients + other.gradients, self.forwards + other.forwards)


@runtime_checkable
class Searching(Protocol):
    """What a search asks of an attack, see `ntkadv.attacks.base.Attack`."""

    @property
    def threat(self) -> ThreatModel:
        """What may be changed."""
        ...

    @property
    def starts_from_correct(self) -> bool:
        """Whether samples that are misclassified as they are stay as they are."""
        ...

    def with_eps(self, eps: float | Array) -> Searching:
        """Give the same attack with another radius."""
        ...

    def attempt(self, model: Model, x: Array, labels: Array, keys: Array, number: Array) -> Array:
        """One stage on one batch."""
        ...

    def cost(self, num_classes: int) -> Cost:
        """Count the passes through the model that one attempt makes for one sample."""
        ...


class Stage(NamedTuple):
    """One compiled part of an attack, run on the samples that it is to be run on.

    Attributes:
        attack: The attack whose `attempt` is called.
        number: Which attempt.
        salt: What is folded into the keys of the samples, one number after the other.
        name: What the log calls it.
    """

    attack: Searching
    number: int
    salt: tuple[int, ...]
    name: str


class Attacked(NamedTuple):
    """What an attack did.

    Attributes:
        points: The attacked images.
        is_wrong: Whether each is misclassified.
        fell_to: The name of what broke each sample, empty where nothing did; `"clean"` where it was misclassified as it
            was and the attack left it alone.
        log: A line for each stage: `attack`, `attempt`, `attacked`, `broken`, `robust_accuracy` after it, `seconds`.
        cost: Passes through the model that the attack is made of, over all samples; for attacks that may end early, at
            most. The few that check its result are not counted.
    """

    points: Float[Array, "n h w c"]
    is_wrong: Bool[np.ndarray, " n"]
    fell_to: np.ndarray
    log: list[dict[str, Any]]
    cost: Cost


class Batch(NamedTuple):
    """Places of the samples of one batch, the last repeated to fill it; the first `size` of them count."""

    places: np.ndarray
    size: int


_SMALLEST = 16
"""Batches are not made smaller than this: compiling costs more than a few samples."""


def batches(places: Int[np.ndarray, " m"], batch_size: int) -> list[Batch]:
    """Cut places into batches; the last one is filled up to a whole batch, or a half of it, a quarter, ...

    So few samples cost little, and only few sizes are ever compiled.
    """
    groups = [places[first : first + batch_size] for first in range(0, len(places), batch_size)]
    return [Batch(np.pad(group, (0, _filled(len(group), batch_size) - len(group)), mode="edge"), len(group))
            for group in groups]  # fmt: skip


def _filled(n: int, batch_size: int) -> int:
    while n <= (half := max(-(-batch_size // 2), _SMALLEST)) < batch_size:
        batch_size = half
    return batch_size


class _State:
    """What a search has found so far, on the host, and in a file if it has one."""

    def __init__(self, x: Array, batch_size: int):
        n = len(x)
        self.points = np.array(x)
        self.is_wrong = np.zeros(n, bool)
        self.margin = np.full(n, -np.inf)
        self.fell_to = np.full(n, -1, np.int32)
        self.todo = np.ones(n, bool)
        """The samples that the current stage is for, as they were when it began."""
        self.stage = 0
        self.batches_done = 0
        self.batch_size = batch_size
        self.log: list[dict[str, Any]] = []
        self.cost = Cost()

    def take(self, places: np.ndarray, stage: int, points: Array, margins: Array, is_wrong: Array) -> None:
        """Keep what is stronger than what was there."""
        found, margin, wrong = (np.asarray(array)[: len(places)] for array in (points, margins, is_wrong))
        stronger = ~self.is_wrong[places] & (wrong | (margin >= self.margin[places]))
        chosen = places[stronger]
        self.points[chosen] = found[stronger]
        self.margin[chosen] = margin[stronger]
        self.is_wrong[chosen] = wrong[stronger]
        self.fell_to[chosen[wrong[stronger]]] = stage

    _ARRAYS = ("points", "is_wrong", "margin", "fell_to", "todo")

    def save(self, path: str | os.PathLike[str], identity: Mapping[str, Any], clean: np.ndarray) -> None:
        """Write all of it, with what tells this search from others."""
        meta = {"stage": self.stage, "batches_done": self.batches_done, "batch_size": self.batch_size}
        arrays = {name: getattr(self, name) for name in self._ARRAYS}
        meta |= {"log": self.log, "cost": list(self.cost), "identity": dict(identity)}
        save_checkpoint(path, {**arrays, "clean": clean}, meta)

    def load(self, path: str | os.PathLike[str], identity: Mapping[str, Any], clean: np.ndarray) -> None:
        """Go on from a file, if there is one.

        Raises:
            ValueError: it is of another search.
        """
        found = load_checkpoint(path)
        if found is None:
            return
        arrays, meta = found
        held = meta.get("identity", {})
        other = [name for name in identity if held.get(name) != identity[name]]
        if not other and not np.allclose(arrays["clean"], clean, rtol=1e-3, atol=1e-5):
            other = ["model"]
        if other:
            raise ValueError(
                f"state_path {os.fspath(path)!r} holds another evaluation (other {', '.join(other)}); "
                f"name another file, or remove it to start anew."
            )
        for name in self._ARRAYS:
            setattr(self, name, arrays[name])
        self.stage, self.log, self.cost = meta["stage"], meta["log"], Cost(*meta["cost"])
        if meta["batch_size"] == self.batch_size:
            self.batches_done = meta["batches_done"]
        else:
            self.todo = self.todo & ~self.is_wrong


def search(
    attack: Searching,
    stages: Sequence[Stage],
    model: Model,
    x: Float[Array, "n h w c"],
    labels: Int[Array, " n"],
    keys: Key[Array, " n"],
    *,
    num_classes: int,
    batch_size: int,
    state_path: str | os.PathLike[str] | None = None,
    judge: bool = True,
    progress: bool = False,
) -> Attacked:
    """Run the stages of an attack one after the other, each on the samples that those before it left unbroken.

    Without `judge` only the points are asked for: where there is one stage, they are not shown to the model again.
    """
    judge = judge or len(stages) > 1
    state = _State(x, batch_size)
    places = np.arange(len(x))
    clean = _clean_logits(model, x, batches(places, batch_size))
    identity = {} if state_path is None else _identity(attack, x, labels, keys)
    if attack.starts_from_correct:
        state.is_wrong = clean.argmax(axis=1) != np.asarray(labels)
        state.todo = ~state.is_wrong
    if state_path is not None:
        state.load(state_path, identity, clean[:64])
    start = saved = time.perf_counter()
    while state.stage < len(stages):
        stage = stages[state.stage]
        chosen = places[state.todo]
        todo = batches(chosen, batch_size)
        stage_keys = _salted(keys, stage.salt)
        for batch in _with_bar(todo, state.batches_done, stage, len(stages), progress):
            at = jnp.asarray(batch.places)
            found = _attempt(*_traced(stage, x.dtype), model, x[at], labels[at], stage_keys[at], judge)
            state.take(batch.places[: batch.size], state.stage, *found)
            state.cost = state.cost.plus(stage.attack.cost(num_classes).times(batch.size))
            state.batches_done += 1
            if state_path is not None and time.perf_counter() - saved > _SAVE_EVERY:
                state.save(state_path, identity, clean[:64])
                saved = time.perf_counter()
        now = time.perf_counter()
        state.log.append(
            {
                "attack": stage.name,
                "attempt": stage.number,
                "attacked": len(chosen),
                "broken": int(np.sum(state.fell_to == state.stage)),
                "robust_accuracy": float(1 - state.is_wrong.mean()),
                "seconds": now - start,
            }
        )
        start = now
        state.stage, state.batches_done, state.todo = state.stage + 1, 0, ~state.is_wrong
        if state_path is not None:
            state.save(state_path, identity, clean[:64])
            saved = time.perf_counter()
    names = np.array([stage.name for stage in stages] + [""], dtype=object)
    fell_to = names[state.fell_to]
    fell_to[state.is_wrong & (state.fell_to < 0)] = AS_THEY_ARE
    return Attacked(jnp.asarray(state.points), state.is_wrong, fell_to, state.log, state.cost)


def _traced(stage: Stage, dtype: Any) -> tuple[Searching, Array, Array]:
    """Split a stage into what is static and what is not: number and radius."""
    template = stage.attack.with_eps(0.0)
    eps = jnp.asarray(stage.attack.threat.eps, working_dtype(dtype))
    return template, jnp.asarray(stage.number, jnp.uint32), eps


@eqx.filter_jit
def _attempt(
    template: Searching, number: Array, eps: Array, model: Model, x: Array, labels: Array, keys: Array, judge: bool
) -> tuple[Array, Array, Array]:
    """Attack one batch, and judge the points in the dtype of `x`."""
    attack = template.with_eps(eps)
    clean = x.astype(eps.dtype)
    wrapped = in_precision(model, x.dtype)
    attempt = canonical_convolutions(lambda *arguments: attack.attempt(wrapped, *arguments))
    points = move(x, attempt(clean, labels, keys, number) - clean)
    if not judge:
        return points, jnp.zeros(len(x)), jnp.zeros(len(x), bool)
    logits = wrapped(points.astype(eps.dtype))
    return points, margin(logits, labels), misclassified(logits, labels)


def _clean_logits(model: Model, x: Array, todo: Sequence[Batch]) -> np.ndarray:
    """Logits at the clean images.

    Raises:
        ValueError: they are not finite.
    """
    logits = np.concatenate([np.asarray(logits_of(model, x[jnp.asarray(b.places)]))[: b.size] for b in todo])
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise ValueError(
            f"model must be finite at the clean images, but its logits at x[{bad[0]}] are not ({bad.size} such of "
            f"{len(x)}); an attack on NaN proves nothing, so look into the model first."
        )
    return logits


_fold_in_each = jax.jit(fold_in_each)


def _salted(keys: Array, salt: tuple[int, ...]) -> Array:
    for number in salt:
        keys = _fold_in_each(keys, jnp.asarray(number, jnp.uint32))
    return keys


def _with_bar(todo: Sequence[Batch], done: int, stage: Stage, stages: int, progress: bool) -> Iterator[Batch]:
    label = stage.name if stages == 1 else f"{stage.name}, attempt {stage.number + 1}"
    yield from tqdm(todo[done:], desc=label, disable=not progress or len(todo) - done < 2, leave=False)


def _identity(attack: Searching, x: Array, labels: Array, keys: Array) -> dict[str, str]:
    """Tell one search from another, but for the model, which is known by its logits."""
    images = np.asarray(x)
    return {
        "attack": repr(attack),
        "images": hashlib.sha256(images.tobytes() + str((images.shape, images.dtype)).encode()).hexdigest(),
        "labels": hashlib.sha256(np.asarray(labels).tobytes()).hexdigest(),
        "key": hashlib.sha256(np.asarray(jax.random.key_data(keys)).tobytes()).hexdigest(),
    }
