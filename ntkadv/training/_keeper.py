"""What a training run leaves behind: its history, its checkpoint, its file of metrics; and what it gives in the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array

from ntkadv.kernels.empirical import Params
from ntkadv.runs import append_line, arrays_of, load_checkpoint, rewrite_lines, save_checkpoint, tree_of
from ntkadv.training._identity import identity_of
from ntkadv.training._steps import Steps
from ntkadv.training.method import TrainState
from ntkadv.training.network import Trainable

__all__ = ["Best", "DivergenceError", "Keeper", "Place", "Record", "TrainedNetwork"]

Record: TypeAlias = Callable[[Any], Mapping[str, Any]]


class Place(NamedTuple):
    """Where a run is: its state before an update, and the number of that."""

    state: TrainState
    step: int


class Best(NamedTuple):
    """The best network of a run.

    Attributes:
        step: When it was.
        value: How good it was, by what it was chosen by.
        params, statistics: Its parameters, and what it keeps besides them.
    """

    step: int
    value: float
    params: Params
    statistics: Any


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
        network: The network, without its parameters.
        params: Its parameters in the end: those that were trained, or their averages where these were asked for.
        statistics: What it keeps besides them: running averages of batch norm.
        state: All that is needed to go on.
        step: Number of updates made.
        steps: Steps at which something was recorded, ascending.
        history: What was recorded, one row a step: always `"loss"`, and what `record` gave.
        time_step: Training time that one step takes.
        best: The best network that was recorded, where one was asked for.
    """

    network: Trainable
    params: Params
    statistics: Any
    state: TrainState
    step: int
    steps: np.ndarray
    history: dict[str, np.ndarray]
    time_step: float
    best: Best | None = None

    @property
    def times(self) -> np.ndarray:
        """Training times at which something was recorded."""
        return self.steps * self.time_step

    @property
    def predictor(self) -> Callable[[Array], Array]:
        """The network as a function of images, a pytree: what attacks take."""
        return self.network.predictor(self.params, self.statistics)

    @property
    def best_predictor(self) -> Callable[[Array], Array]:
        """The best network that was recorded, as `predictor`.

        Raises:
            ValueError: none was asked for.
        """
        if self.best is None:
            raise ValueError("no best network was kept; name what to keep it by: train(..., keep_best='name').")
        return self.network.predictor(self.best.params, self.best.statistics)


class Keeper:
    """What a run leaves behind. Nothing is recorded or saved of a network whose loss is not finite."""

    def __init__(
        self,
        run: Steps,
        checkpoint: str | os.PathLike[str] | None,
        metrics: str | os.PathLike[str] | None,
        record: Record | None,
        keep_best: str | None = None,
    ):
        self.run = run
        self.path = None if checkpoint is None else Path(checkpoint)
        self.metrics = None if metrics is None else Path(metrics)
        self.record = record
        self.keep_best = keep_best
        self.best: Best | None = None
        self.identity: dict[str, Any] = {}
        self.steps: list[int] = []
        self.rows: list[dict[str, np.ndarray]] = []
        for path in (self.path, self.metrics):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)

    def resume(self, state: TrainState) -> Place:
        """Take up the run where its checkpoint left it, or else begin.

        Raises:
            ValueError: the checkpoint is that of another run.
        """
        found, step = None, 0
        if self.path is not None:
            self.identity = identity_of(self.run, state) | {"keep_best": self.keep_best}
            found = load_checkpoint(self.path)
        if found is not None:
            arrays, meta = found
            self._require_own(meta.get("identity", {}))
            if meta.get("best") is not None:
                self.best = Best(*meta["best"], *tree_of(arrays, self.run.current(state), "best"))
            state, step = tree_of(arrays, state), int(meta["step"])
            self.steps = [int(number) for number in arrays["steps"]]
            names = [name.removeprefix("history.") for name in arrays if name.startswith("history.")]
            self.rows = [
                {name: np.asarray(arrays[f"history.{name}"][i]) for name in names} for i in range(len(self.steps))
            ]
        if self.metrics is not None:
            rewrite_lines(self.metrics, [self._line(*pair) for pair in zip(self.steps, self.rows, strict=True)])
        return Place(state, step)

    def note(self, here: Place, before: Place) -> None:
        """Record what is asked for at a step.

        Raises:
            DivergenceError: the loss there is not finite.
        """
        loss = self._finite_loss(here, before)
        row = {"loss": np.asarray(loss)}
        own = self.run.method.report(here.state.method)
        current = self.run.current(here.state)
        given = self.record(self.run.network.assembled(*current)) if self.record is not None else {}
        for names in (own, given):
            row |= {name: np.asarray(value) for name, value in names.items()}
        if self.rows and row.keys() != self.rows[0].keys():
            raise ValueError(f"record must give the same names at every step, got {sorted(row)} at step {here.step}.")
        if self.keep_best is not None:
            self._compare(self.keep_best, here.step, row, current)
        self.steps.append(here.step)
        self.rows.append(row)
        if self.metrics is not None:
            append_line(self.metrics, self._line(here.step, row))

    def save(self, here: Place, before: Place) -> None:
        """Write the checkpoint.

        Raises:
            DivergenceError: the loss is not finite any more.
        """
        if here.step not in self.steps and here.step > before.step:
            self._finite_loss(here, before)
        self._write(here)

    def interrupted(self, here: Place) -> None:
        """Save what can be saved after an error, which is the one to be seen."""
        with contextlib.suppress(Exception):
            if self.path is not None and np.isfinite(self.run.loss(*here)):
                self._write(here)

    def diverged(self, here: Place, before: Place, bad: int) -> None:
        """Go back to the last network whose loss was finite, keep it, and raise.

        Args:
            here: Where the last updates began.
            before: Where those before them began.
            bad: Number of the update that would start from a loss that is not finite.
        """
        state, step = here if bad > here.step else before
        if bad <= step:
            raise DivergenceError(
                f"The loss is not finite at step {bad}, before any update: look for NaN or infinite values in the "
                f"parameters to begin with, and in what the network makes of the images.",
                bad,
                self.result(Place(state, step)),
            )
        good = bad - 1
        last = Place(self.run.advance(state, step, good)[0] if good > step else state, good)
        self._write(last)
        kept = f" The last good state, of step {good}, is in {self.path}." if self.path is not None else ""
        raise DivergenceError(
            f"The loss is not finite at step {bad}: lower the learning rate; for full-batch gradient descent on the "
            f"squared loss it must stay below 2 / lambda_max of the NTK, see WideNetwork.max_learning_rate.{kept}",
            bad,
            self.result(last),
        )

    def result(self, here: Place) -> TrainedNetwork:
        """Put together what training gives."""
        state, step = here
        steps = np.asarray(self.steps, int)
        return TrainedNetwork(
            self.run.network,
            *self.run.current(state),
            state,
            step,
            steps,
            self.history,
            self.run.time_step,
            self.best,
        )

    @property
    def history(self) -> dict[str, np.ndarray]:
        """What has been recorded, one row a step."""
        names = self.rows[0] if self.rows else {}
        return {name: np.stack([row[name] for row in self.rows]) for name in names}

    def _compare(self, name: str, step: int, row: Mapping[str, np.ndarray], current: tuple[Any, Any]) -> None:
        """Keep the network if it is the best so far.

        Raises:
            ValueError: what it is to be chosen by is not recorded, or no number.
        """
        if name not in row or row[name].ndim:
            raise ValueError(f"keep_best must name a number that is recorded, got {name!r}; there are {sorted(row)}.")
        value = float(row[name])
        if not np.isnan(value) and (self.best is None or value >= self.best.value):
            self.best = Best(step, value, *current)

    def _finite_loss(self, here: Place, before: Place) -> float:
        loss = self.run.loss(*here)
        if not np.isfinite(loss):
            self.diverged(here, before, here.step)
        return loss

    def _write(self, here: Place) -> None:
        if self.path is None:
            return
        arrays = arrays_of(here.state)
        history = {f"history.{name}": values for name, values in self.history.items()}
        meta: dict[str, Any] = {"step": here.step, "identity": self.identity}
        if self.best is not None:
            meta["best"] = [self.best.step, self.best.value]
            arrays |= arrays_of(self.best[2:], "best")
        save_checkpoint(self.path, {**arrays, **history, "steps": np.asarray(self.steps, int)}, meta)

    def _require_own(self, theirs: Mapping[str, Any]) -> None:
        for name, ours in self.identity.items():
            if theirs.get(name) != ours:
                raise ValueError(
                    f"the checkpoint {self.path} is that of another run: its {name} is {_short(theirs.get(name))}, "
                    f"here it is {_short(ours)}. Give another file, or remove this one."
                )

    def _line(self, step: int, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        numbers = {name: value.item() for name, value in row.items() if value.ndim == 0}
        return {"step": step, "time": step * self.run.time_step, **numbers}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:400]}..."
