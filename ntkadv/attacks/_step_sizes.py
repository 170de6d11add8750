"""How Auto-PGD moves, and when it shortens its steps: one way for balls that are round, one for the l_1 ball."""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ntkadv.attacks.best import select
from ntkadv.attacks.threat_model import L1, Images, ThreatModel, sparse_step


class Where(NamedTuple):
    """Where an ascent is: a point and the one before it, and the gradient at the point."""

    point: Images
    previous: Images
    gradient: Images


class StepSizes(abc.ABC):
    """A rule for the steps of an ascent; its state is a pytree."""

    @abc.abstractmethod
    def plan(self) -> tuple[Bool[np.ndarray, " steps"], Int[np.ndarray, " steps"]]:
        """Say after which iterations steps are looked back upon, and how many there were since the last time."""

    @abc.abstractmethod
    def start(self, x: Images, point: Images, loss: Float[Array, " b"]) -> Any:
        """Give the state of the rule at the first point."""

    @abc.abstractmethod
    def move(self, state: Any, where: Where, x: Images, *, is_first: Bool[Array, ""]) -> Images:
        """Make one step."""

    @abc.abstractmethod
    def look_back(
        self,
        state: Any,
        x: Images,
        best: Images,
        best_loss: Float[Array, " b"],
        improved: Int[Array, " b"],
        window: Int[Array, ""],
    ) -> tuple[Any, Bool[Array, " b"]]:
        """At a checkpoint: the new state, and which samples go on from the best point so far.

        `improved` counts the steps of the window that raised the loss.
        """


def step_sizes(threat: ThreatModel, steps: int, rho: float) -> StepSizes:
    """Choose the rule that fits the threat model."""
    return Sparse(threat, steps) if isinstance(threat, L1) else Halving(threat, steps, rho)


class _Halving(NamedTuple):
    size: Float[Array, " b"]
    was_halved: Bool[Array, " b"]
    best_loss: Float[Array, " b"]


@dataclass(frozen=True)
class Halving(StepSizes):
    r"""Steps of 2 eps with momentum, halved where they no longer help.

    .. math::
        z &= \mathrm{project}\bigl(x_k + \eta\, \mathrm{step}(\nabla \ell(x_k))\bigr) \\
        x_{k+1} &= \mathrm{project}\bigl(x_k + \tfrac34 (z - x_k) + \tfrac14 (x_k - x_{k-1})\bigr)

    At a checkpoint :math:`\eta` is halved, and the best point taken up again, if fewer than a share rho of the steps
    since the last one raised the loss, or if neither the step nor the largest loss changed since then. The first window
    is 22% of the steps long, each one after it by 3% shorter, down to 6%.

    Source: Croce & Hein, ICML 2020, arXiv 2003.01690, Algorithm 1 and Section 3.1.
    """

    threat: ThreatModel
    steps: int
    rho: float

    def plan(self):
        """See `StepSizes.plan`."""
        window, least, less = (max(int(share * self.steps), 1) for share in (0.22, 0.06, 0.03))
        is_checkpoint, windows = np.zeros(self.steps, bool), np.ones(self.steps, np.int32)
        at = window - 1
        while at < self.steps:
            is_checkpoint[at], windows[at] = True, window
            window = max(window - less, least)
            at += window
        return is_checkpoint, windows

    def start(self, x, point, loss):
        """See `StepSizes.start`."""
        del point
        return _Halving(jnp.full(len(x), 2 * self.threat.eps, x.dtype), jnp.ones(len(x), bool), loss)

    def move(self, state, where, x, *, is_first):
        """See `StepSizes.move`."""
        project, size = self.threat.project, state.size[:, None, None, None]
        ahead = project(where.point + size * self.threat.step(where.gradient, where.point), x)
        along = where.point + 0.75 * (ahead - where.point) + 0.25 * (where.point - where.previous)
        return jnp.where(is_first, ahead, project(along, x))

    def look_back(self, state, x, best, best_loss, improved, window):
        """See `StepSizes.look_back`."""
        del x, best
        rarely_better = improved.astype(best_loss.dtype) <= self.rho * window.astype(best_loss.dtype)
        is_stuck = ~state.was_halved & (state.best_loss >= best_loss)
        halve = rarely_better | is_stuck
        return _Halving(jnp.where(halve, state.size / 2, state.size), halve, best_loss), halve


class _Sparse(NamedTuple):
    size: Float[Array, " b"]
    share: Float[Array, " b"]
    changed: Float[Array, " b"]


@dataclass(frozen=True)
class Sparse(StepSizes):
    """Steps of eps along the coordinates of largest gradient, as many as the best point suggests.

    At a checkpoint, every 4% of the steps, the share of coordinates becomes two thirds of those that the best point
    changes. Where that fell by 5% or more, the step is eps again and the best point taken up; elsewhere it shrinks by a
    third, down to eps/10.

    Source: Croce & Hein, ICML 2021, arXiv 2103.01208, Algorithm 1.
    """

    threat: ThreatModel
    steps: int

    def plan(self):
        """See `StepSizes.plan`."""
        window = max(int(0.04 * self.steps), 1)
        return (np.arange(self.steps) + 1) % window == 0, np.full(self.steps, window, np.int32)

    def start(self, x, point, loss):
        """See `StepSizes.start`."""
        del loss
        changed = _number_changed(point, x)
        return _Sparse(jnp.full(len(x), self.threat.eps, x.dtype), changed / (1.5 * x[0].size), changed)

    def move(self, state, where, x, *, is_first):
        """See `StepSizes.move`."""
        del is_first
        step = state.size[:, None, None, None] * sparse_step(where.gradient, state.share)
        return self.threat.project(where.point + step, x)

    def look_back(self, state, x, best, best_loss, improved, window):
        """See `StepSizes.look_back`."""
        del best_loss, improved, window
        changed = _number_changed(best, x)
        is_sparser = changed < 0.95 * state.changed
        size = jnp.where(is_sparser, self.threat.eps, jnp.maximum(state.size / 1.5, self.threat.eps / 10))
        return _Sparse(size.astype(x.dtype), changed / (1.5 * x[0].size), changed), is_sparser


def resume(where: Where, best: Where, back: Bool[Array, " b"]) -> Where:
    """Take up the best point, and the gradient there, where `back` says so."""
    return Where(select(back, best.point, where.point), where.previous, select(back, best.gradient, where.gradient))


def _number_changed(point: Images, x: Images) -> Float[Array, " b"]:
    return jnp.sum(point != x, axis=(1, 2, 3)).astype(x.dtype)
