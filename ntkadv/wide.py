r"""Real wide networks held against the theory.

The theory says of an adversarially trained wide network that it follows its linearisation, that this has a closed form,
and that it ends where training without attacks ends (Fu & Wang, ICLR 2024, arXiv 2310.06112). `WideNetwork` is one
network and everything that is predicted of it:

- the closed form of its own linearisation, with the NTK and the ARK it starts with (`theory`);
- the infinite-width prediction, given its outputs before training (`infinite_width`);
- itself in training, by any method (`train`); and its linearisation trained by the same method (`linearized=True`),
  which is what the closed form becomes where the attack is the true one.

The gap between the first and the third has two parts: that between network and linearisation, which vanishes with the
width, and that between the linearisation under the true attack and the closed form, which does not need to.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from ntkadv._checks import require_key, require_nonnegative
from ntkadv._tables import file_name
from ntkadv._typing import AnyArray
from ntkadv.architectures.base import Architecture
from ntkadv.data import Dataset
from ntkadv.dynamics.closed_form import checked_times
from ntkadv.dynamics.linear import LinearDynamics, Strength, is_attack, rates_under
from ntkadv.kernels.empirical import Params, empirical_ark, empirical_ntk
from ntkadv.kernels.gram import gram
from ntkadv.runs import load_checkpoint, save_checkpoint
from ntkadv.training.attack_flow import AttackFlowTraining
from ntkadv.training.linearize import Linearized, linearize
from ntkadv.training.loop import TrainedNetwork, train
from ntkadv.training.method import Method
from ntkadv.training.standard import StandardTraining

__all__ = ["Outputs", "WideNetwork", "distance", "meeting_time"]


class Outputs(NamedTuple):
    """Outputs of a network over its training.

    Attributes:
        times: Training times.
        train: At the training images, a row a time.
        test: At the test images.
    """

    times: Float[np.ndarray, " t"]
    train: Float[np.ndarray, "t n c"]
    test: Float[np.ndarray, "t m c"]


class WideNetwork:
    """One network at its random start, what is predicted of it, and itself in training.

    Args:
        arch: The architecture, with the width of the network.
        data: Training images, which all of it is about, and test images.
        key: A random key, for the parameters.
        params: Parameters, instead of random ones.
        folder: Where kernels and runs are kept; what is there is not computed again, and a run goes on.
        max_bytes: See `empirical_ntk`.
        progress: Show bars.

    Raises:
        ValueError: the parameters are those of another architecture; the folder is that of another network.
        MemoryError: the parameters do not fit.
    """

    def __init__(
        self,
        arch: Architecture,
        data: Dataset,
        *,
        key: Key[Array, ""],
        params: Params | None = None,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int = 2**30,
        progress: bool = True,
    ):
        require_key("key", key)
        start = train(arch, data, steps=0, key=key, params=params, record_at=(), progress=False)
        self.arch, self.data, self.key = arch, data, key
        self.params = start.params
        self.linear: Linearized = linearize(arch, self.params)
        self.folder = None if folder is None else Path(folder)
        self.max_bytes, self.progress = max_bytes, progress
        self.start_train = np.asarray(arch.apply(self.params, data.x_train))
        self.start_test = np.asarray(arch.apply(self.params, data.x_test))

    @cached_property
    def ntk(self) -> Float[np.ndarray, "n n c c"]:
        """NTK at the start, at the training images."""
        return self._kept("ntk", lambda: self.ntk_at(self.params))

    @cached_property
    def ark(self) -> Float[np.ndarray, "n c c"]:
        """ARK at the start, of the training images."""
        return self._kept("ark", lambda: self.ark_at(self.params))

    @cached_property
    def _infinite(self) -> dict[str, np.ndarray]:
        """The kernels of infinite width, which no random number enters."""
        x, z = self.data.x_train, self.data.x_test
        make: dict[str, Callable[[], Any]] = {
            "own": lambda: gram(self.arch, x, progress=self.progress),
            "cross": lambda: gram(self.arch, z, x, progress=self.progress),
            "ark": lambda: np.asarray(self.arch.ark(x), np.float64),
        }
        return {name: self._kept(f"infinite-{name}", kernel) for name, kernel in make.items()}

    def ntk_at(self, params: Params) -> Float[np.ndarray, "n n c c"]:
        """Compute the NTK at the training images, at any parameters."""
        return empirical_ntk(
            self.arch.apply, params, self.data.x_train, max_bytes=self.max_bytes, progress=self.progress
        )

    def ark_at(self, params: Params) -> Float[np.ndarray, "n c c"]:
        """Compute the ARK of the training images, at any parameters."""
        return empirical_ark(self.arch.apply, params, self.data.x_train, max_bytes=self.max_bytes)

    def dynamics(self, strength: Strength = 0.0) -> LinearDynamics:
        """Give the theory of this network's linearisation, for an attack flow of this strength."""
        return self.linear.dynamics(
            self.data.x_train, self.data.targets_train, strength=strength, ntk=self.ntk,
            ark=self.ark if is_attack(strength) else None,
        )  # fmt: skip

    def infinite_dynamics(self, strength: Strength = 0.0) -> LinearDynamics:
        """Give the theory at infinite width for an attack flow of this strength, from this network's first outputs."""
        kernels = self._infinite
        rates = rates_under(kernels["ark"], strength)
        return LinearDynamics(kernels["own"], self.data.targets_train, start=self.start_train, rates=rates)

    def theory(
        self,
        times: Sequence[float] | Float[np.ndarray, " t"],
        strength: Strength = 0.0,
        *,
        learning_rate: float | None = None,
        flow: bool = False,
    ) -> Outputs:
        """Predict the outputs by the closed form of this network's linearisation.

        Args:
            times: Training times.
            strength: Strength of the attack flow.
            learning_rate: Predict gradient descent with this rate rather than gradient flow, see
                `LinearDynamics.coefficients`.
            flow: Integrate the true linear flow instead; it differs where the strength varies with time.
        """
        dynamics = self.dynamics(strength)
        u = _coefficients(dynamics, times, learning_rate, flow)
        test = self.linear.outputs(self.data.x_test, self.data.x_train, u)
        return Outputs(checked_times(times), dynamics.fitted(u), test)

    def infinite_width(
        self,
        times: Sequence[float] | Float[np.ndarray, " t"],
        strength: Strength = 0.0,
        *,
        learning_rate: float | None = None,
        flow: bool = False,
    ) -> Outputs:
        """Predict the outputs by the infinite-width theory, given this network's outputs before training."""
        dynamics = self.infinite_dynamics(strength)
        u = _coefficients(dynamics, times, learning_rate, flow)
        test = dynamics.predict(u, self._infinite["cross"], self.start_test)
        return Outputs(checked_times(times), dynamics.fitted(u), test)

    def train(
        self,
        method: Method,
        times: Sequence[float] | Float[np.ndarray, " t"],
        *,
        learning_rate: float,
        linearized: bool = False,
        watch: Mapping[str, Callable[[Params], Any]] | None = None,
        label: str | None = None,
        check_rate: bool = True,
        **options: Any,
    ) -> WideRun:
        """Train this network, and see its outputs at the given times.

        Args:
            method: What one update does; with `reduction="sum"`, for time to be that of the theory.
            times: When to look; rounded to whole steps.
            learning_rate: Rate of gradient descent, unless `optimizer` is among the options; and the time of a step.
            linearized: Train the linearisation instead, by the same method.
            watch: More to look at: functions of the parameters (those of the linearisation, if that is trained).
            label: Name of the run's files in the folder; by default that of the method.
            check_rate: Refuse a learning rate at which the theory predicts divergence.
            options: Those of `train`, such as `batch_size` and `optimizer`.

        Raises:
            ValueError: a time is infinite; the learning rate is not below 2 / lambda_max of the NTK under this attack;
                as `train`.
            DivergenceError: as `train`.
        """
        require_nonnegative("learning_rate", learning_rate, strict=True)
        if check_rate and "optimizer" not in options:
            self._check_rate(method, learning_rate)
        grid = checked_times(times)
        if np.any(np.isinf(grid)):
            raise ValueError("times must be finite for training by steps, got inf; theory gives that limit.")
        steps = np.unique(np.round(grid / learning_rate).astype(int))
        f = self.linear.apply if linearized else self.arch.apply

        def record(params: Params) -> dict[str, Any]:
            seen = {"train": f(params, self.data.x_train), "test": f(params, self.data.x_test)}
            return seen | {name: look(params) for name, look in (watch or {}).items()}

        name = file_name((label or method.name) + (", linearised" if linearized else ""))
        files = {} if self.folder is None else {
            "checkpoint": self.folder / f"{name}.npz", "metrics": self.folder / f"{name}.jsonl"
        }  # fmt: skip
        trained = train(
            f, self.data, method=method, steps=int(steps[-1]), key=self.key, params=self.params, record=record,
            record_at=steps.tolist(), progress=self.progress,
            **{"optimizer": learning_rate, "time_step": learning_rate, **files, **options},
        )  # fmt: skip
        history = trained.history
        outputs = Outputs(trained.times, history["train"].astype(np.float64), history["test"].astype(np.float64))
        return WideRun(outputs, trained, {name: history[name] for name in (watch or {})})

    def max_learning_rate(self, method: Method | None = None) -> float:
        """Give the rate from where on full-batch gradient descent diverges by the theory, 2 / lambda_max of Theta E."""
        if isinstance(method, AttackFlowTraining):
            strength = method.at(0.0) if callable(method.strength) else np.asarray(method.strength, np.float64)
            return self.dynamics(strength).max_learning_rate
        return self._standard.max_learning_rate

    @cached_property
    def _standard(self) -> LinearDynamics:
        return self.dynamics()

    def _check_rate(self, method: Method, learning_rate: float) -> None:
        if not isinstance(method, (StandardTraining, AttackFlowTraining)) or method.loss != "squared":
            return
        bound = self.max_learning_rate(method)
        rate = learning_rate * (1 if method.reduction == "sum" else 1 / len(self.data.x_train))
        if rate >= bound:
            raise ValueError(
                f"learning_rate {learning_rate:g} is too large for the kernel: gradient descent on the squared loss "
                f"diverges from 2 / lambda_max = {bound * learning_rate / rate:.4g} on. Take half of that."
            )

    def _kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Read what the folder has, or compute it and put it there."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.npz"
        found = load_checkpoint(path)
        if found is not None:
            differing = [part for part, mark in self._marks.items() if found[1].get(part) != mark]
            if differing:
                raise ValueError(
                    f"{path} is of another network or of other images: the {differing[0]} differ. Give another folder, "
                    f"or remove it."
                )
            return found[0]["kernel"]
        self.folder.mkdir(parents=True, exist_ok=True)
        kernel = make()
        save_checkpoint(path, {"kernel": kernel}, self._marks)
        return kernel

    @cached_property
    def _marks(self) -> dict[str, Any]:
        """What the kernels depend on."""
        arrays = {"parameters": jax.tree.leaves(self.params), "images": [self.data.x_train, self.data.x_test]}
        sums = {
            name: [[*map(int, np.shape(part)), float(np.sum(np.asarray(part), dtype=np.float64))] for part in parts]
            for name, parts in arrays.items()
        }
        return {"layers": repr(self.arch), **sums}


@dataclasses.dataclass(frozen=True, eq=False)
class WideRun:
    """A network that was trained and watched.

    Attributes:
        outputs: Its outputs over time.
        trained: The trained network, with the steps and losses.
        watched: What else was looked at, a row a time.
    """

    outputs: Outputs
    trained: TrainedNetwork
    watched: dict[str, np.ndarray]


def distance(
    first: Float[AnyArray, "*t n c"], second: Float[AnyArray, "*t n c"], targets: Float[AnyArray, "k c"]
) -> Float[np.ndarray, "*t"]:
    r"""Give the root mean square distance of outputs, in units of that of the targets, at each time.

    .. math:: \sqrt{\tfrac1n \sum_i |f(x_i) - g(x_i)|^2} \Big/ \sqrt{\tfrac1k \sum_i |y_i|^2}
    """
    gap = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    unit = np.sqrt(np.mean(np.sum(np.asarray(targets, np.float64) ** 2, axis=1)))
    return np.asarray(np.sqrt(np.mean(np.sum(gap**2, axis=-1), axis=-1)) / unit)


def meeting_time(times: Float[AnyArray, " t"], distances: Float[AnyArray, " t"], threshold: float = 0.1) -> float:
    """Give the time from which on two trajectories stay within `threshold`, between two times by a line in log time.

    Infinite where they are further apart at the last time; 0 where they never are.

    Raises:
        ValueError: the arrays do not match, times do not ascend, or the threshold is not positive.
    """
    times, distances = np.asarray(times, np.float64), np.asarray(distances, np.float64)
    if times.shape != distances.shape or times.ndim != 1 or times.size == 0:
        raise ValueError(f"times and distances must be vectors of one length, got {times.shape}, {distances.shape}.")
    if np.any(np.diff(times) <= 0):
        raise ValueError("times must ascend; sort them, with their distances.")
    require_nonnegative("threshold", threshold, strict=True)
    apart = np.flatnonzero(~(distances <= threshold))
    if apart.size == 0:
        return 0.0
    last = int(apart[-1])
    if last == len(times) - 1:
        return float(np.inf)
    share = (distances[last] - threshold) / (distances[last] - distances[last + 1])
    if times[last] == 0:
        return float(share * times[last + 1])
    return float(times[last] * (times[last + 1] / times[last]) ** share)


def _coefficients(dynamics: LinearDynamics, times: Any, learning_rate: float | None, flow: bool) -> np.ndarray:
    return dynamics.flow(times) if flow else dynamics.coefficients(times, learning_rate=learning_rate)
