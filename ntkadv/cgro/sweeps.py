"""Where clean generalization goes with robust overfitting, over many runs at once: a phase diagram."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm.auto import tqdm

from ntkadv._checks import require_int, require_key, require_nonnegative
from ntkadv.cgro.adversaries import SignalLine
from ntkadv.cgro.dynamics import problem_of, record_steps, run_recursion
from ntkadv.cgro.network import PatchNetwork
from ntkadv.cgro.patches import PatchDistribution

__all__ = ["PhaseDiagram", "is_cgro", "phase_diagram"]

ACCURACIES = ("train_clean", "train_robust", "test_clean", "test_robust")


def is_cgro(accuracies: Mapping[str, np.ndarray | float], *, high: float = 0.95, chance: float = 0.6) -> Any:
    """Whether clean generalization goes with robust overfitting.

    Args:
        accuracies: `train_clean`, `train_robust`, `test_clean` and `test_robust`, numbers or arrays.
        high: what the first three must reach, "1 - o(1)"; the number is a choice.
        chance: what the last must not exceed: 1/2 for two classes, and something for the finite test set.

    Returns:
        A boolean, or an array of them.
    """
    good = [np.asarray(accuracies[name]) >= high for name in ACCURACIES[:3]]
    return np.logical_and.reduce([*good, np.asarray(accuracies["test_robust"]) <= chance])


@dataclass(frozen=True, eq=False)
class PhaseDiagram:
    """Accuracies over a grid of signal strengths and attack radii, averaged over seeds.

    Attributes:
        signals: strengths alpha, `(A,)`.
        ratios: radii as shares of the signal, delta / alpha, `(B,)`.
        accuracies: `train_clean`, `train_robust`, `test_clean`, `test_robust`, each `(A, B)`.
        noise_norm: root mean square norm of a noise patch.
        seeds: number of runs at each point.
    """

    signals: np.ndarray
    ratios: np.ndarray
    accuracies: dict[str, np.ndarray]
    noise_norm: float
    seeds: int

    def holds(self, *, high: float = 0.95, chance: float = 0.6) -> np.ndarray:
        """Where clean generalization goes with robust overfitting, `(A, B)`, see `is_cgro`."""
        return is_cgro(self.accuracies, high=high, chance=chance)


def phase_diagram(
    network: PatchNetwork,
    distribution: PatchDistribution,
    *,
    signals: Sequence[float | int] | Float[np.ndarray, " A"],
    ratios: Sequence[float | int] | Float[np.ndarray, " B"],
    n: int,
    steps: int,
    learning_rate: float,
    init_std: float,
    key: Key[Array, ""],
    n_test: int = 400,
    clean_weight: float = 0.5,
    seeds: int = 2,
    progress: bool = True,
) -> PhaseDiagram:
    """Train a network at every point of a grid, against the worst point along the signal.

    All runs of one signal strength go through one compiled loop. The noise of a seed is the same at all points.

    Args:
        network: the network.
        distribution: the data; its alpha is replaced by each of `signals`.
        signals: strengths of the signal.
        ratios: radii of the attack as shares of the signal, in [0, 1).
        n: training samples.
        steps: gradient steps.
        learning_rate: eta, the same at all points.
        init_std: standard deviation of the filters' entries at the start.
        key: a random key.
        n_test: test samples.
        clean_weight: lambda, the weight of the clean loss.
        seeds: runs at each point, with other data and filters.
        progress: show a bar over the signal strengths.

    Raises:
        ValueError: a ratio is not in [0, 1), a signal is not positive, or a count is too small.
    """
    require_key("key", key)
    require_int("seeds", seeds, minimum=1)
    require_int("n", n, minimum=2)
    require_int("steps", steps, minimum=1)
    for alpha in signals:
        require_nonnegative("signals", float(alpha), strict=True)
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise ValueError(f"ratios must lie in [0, 1), got {ratio:g}; delta must stay below alpha.")
    at = jnp.asarray(record_steps(steps, 2, "linear")[-1:])
    found: dict[str, list[np.ndarray]] = {name: [] for name in ACCURACIES}
    for alpha in tqdm([float(alpha) for alpha in signals], desc="signal strengths", disable=not progress, leave=False):
        here = dataclasses.replace(distribution, alpha=alpha)
        problems = []
        for seed in range(seeds):
            keys = jax.random.split(jax.random.fold_in(key, seed), 3)
            filters = network.init(keys[2], here.d, std=init_std)
            train, test = here.sample(n, key=keys[0]), here.sample(n_test, key=keys[1])
            scalars = [jnp.asarray(value, filters.dtype) for value in (alpha, 0.0, clean_weight, learning_rate)]
            problems.append(problem_of(train, test, filters, *scalars))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
        deltas = jnp.asarray(alpha * np.asarray(ratios, float), stacked.alpha.dtype)

        def run(problem, delta):
            return run_recursion(network, SignalLine(0.0), problem._replace(delta=delta), at)[1]

        record = jax.vmap(lambda delta, stacked=stacked: jax.vmap(lambda p: run(p, delta))(stacked))(deltas)
        margins = (record.clean, record.adversarial, record.test_clean, record.test_adversarial)
        for name, values in zip(ACCURACIES, margins, strict=True):
            found[name].append(np.mean(np.asarray(values) > 0, axis=(1, 2, 3)))
    accuracies = {name: np.stack(rows) for name, rows in found.items()}
    return PhaseDiagram(
        np.asarray(signals, float), np.asarray(ratios, float), accuracies, distribution.noise_norm, seeds
    )
