"""What changes the inputs of patch data in training: once for all, along the signal, or by gradients on every patch.

Each adversary is a frozen dataclass with `perturb(network, filters, data)`. The first two move only the signal patch,
and only along w*: `sizes` says to which multiple of y w*, and that is all that the recursion in `ntkadv.cgro.dynamics`
needs.
"""

from __future__ import annotations

import abc
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntkadv._checks import require_int, require_nonnegative
from ntkadv.cgro.network import PatchNetwork
from ntkadv.cgro.patches import PatchData

__all__ = ["Adversary", "FixedLinear", "PatchPGD", "SignalLine"]


@dataclass(frozen=True)
class Adversary(abc.ABC):
    """A way to perturb patch data.

    Args:
        delta: radius, in the units of the data.
    """

    delta: float | int

    def __post_init__(self):
        require_nonnegative("delta", self.delta)

    @abc.abstractmethod
    def perturb(self, network: PatchNetwork, filters: Float[Array, "m d"], data: PatchData) -> Float[Array, "n P d"]:
        """Perturb inputs against a network; for use inside `jax.jit`."""


class _AlongSignal(Adversary):
    """An adversary that moves the signal patch along w* only."""

    @abc.abstractmethod
    def sizes(
        self, network: PatchNetwork, u: Float[Array, " m"], y: Float[Array, " n"], alpha: Array, delta: Array
    ) -> Float[Array, " n"]:
        """To which multiple of y w* the signal is moved."""

    def perturb(self, network, filters, data):
        """Perturb inputs, see `Adversary.perturb`."""
        u = filters @ data.w_star
        alpha = (data.signal @ data.w_star) * data.y
        delta = jnp.asarray(self.delta, alpha.dtype)
        moved = self.sizes(network, u, data.y, alpha, delta)
        is_signal = jax.nn.one_hot(data.position, data.x.shape[1], dtype=data.x.dtype)
        return data.x + ((moved - alpha) * data.y)[:, None, None] * is_signal[:, :, None] * data.w_star


@dataclass(frozen=True)
class FixedLinear(_AlongSignal):
    """The optimal attack on the linear classifier w*, whatever the network: the signal becomes (alpha - delta) y w*.

    Source: Li & Li, arXiv 2306.01271, an earlier version, as reported.
    """

    def sizes(self, network, u, y, alpha, delta):
        """To alpha - delta."""
        del network, u
        return jnp.broadcast_to(alpha - delta, y.shape)


@dataclass(frozen=True)
class SignalLine(_AlongSignal):
    r"""The worst point of the signal patch along w* for the present network, found exactly.

    At (alpha + s) y w* the signal's part of the margin is (alpha + s)^q U_y, monotone in s while alpha + s > 0, and
    -|alpha + s|^q U_-y beyond. Its minimum over |s| <= delta is at an end, or where the signal vanishes. A network that
    has not learnt the signal yet (U_y < 0) is attacked by making it larger.

    Source: Li & Li, ICML 2025, arXiv 2306.01271, as reported: the perturbation acts on the signal patch only, in the
    direction of w*.
    """

    def sizes(self, network, u, y, alpha, delta):
        """To the worst of alpha - delta, alpha + delta, and 0 where it lies between."""
        alpha = jnp.broadcast_to(alpha, y.shape)
        ends = jnp.stack([alpha - delta, alpha + delta, jnp.where(alpha <= delta, 0, alpha - delta)])
        values = signal_part(network, u, y, ends)
        return jnp.take_along_axis(ends, jnp.argmin(values, axis=0)[None], axis=0)[0]


@dataclass(frozen=True)
class PatchPGD(Adversary):
    """Projected gradient descent on the margin, on all patches; the last point is taken, from the clean one.

    It needs the trained filters and sees the noise, so it is stronger than what the theory allows the attacker.

    Args:
        delta: radius.
        steps: gradient steps.
        step_size: length of a step in the norm; 2.5 delta / steps if not given.
        norm: `"l2"` of the whole input, by default as in the theory; or `"linf"`.
        where: `"all"` patches, or `"signal"`, the whole of the signal patch.
    """

    _: KW_ONLY
    steps: int = 10
    step_size: float | None = None
    norm: Literal["l2", "linf"] = "l2"
    where: Literal["all", "signal"] = "all"

    def __post_init__(self):
        super().__post_init__()
        require_int("steps", self.steps, minimum=1)
        if self.step_size is not None:
            require_nonnegative("step_size", self.step_size, strict=True)
        for name, known in (("norm", ("l2", "linf")), ("where", ("all", "signal"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")

    def perturb(self, network, filters, data):
        """Perturb inputs, see `Adversary.perturb`."""
        size = 2.5 * self.delta / self.steps if self.step_size is None else self.step_size
        mask = jnp.ones((*data.x.shape[:2], 1), data.x.dtype)
        if self.where == "signal":
            mask = jax.nn.one_hot(data.position, data.x.shape[1], dtype=data.x.dtype)[:, :, None]

        def step(offset, _):
            gradient = data.y[:, None, None] * network.input_gradient(filters, data.x + offset) * mask
            if self.norm == "linf":
                return jnp.clip(offset - size * jnp.sign(gradient), -self.delta, self.delta), None
            offset = offset - size * gradient / _positive(_norm(gradient))
            return offset * jnp.minimum(1, self.delta / _positive(_norm(offset))), None

        return data.x + jax.lax.scan(step, jnp.zeros_like(data.x), length=self.steps)[0]


def signal_part(
    network: PatchNetwork, u: Float[Array, " m"], y: Float[Array, " n"], sizes: Float[Array, "*s n"]
) -> Float[Array, "*s n"]:
    """Give the part of the margin that the signal patch has, where it is `sizes` times y w*."""
    at_minus, at_plus = network.signal_margin(u)
    own, other = jnp.where(y > 0, at_plus, at_minus), jnp.where(y > 0, at_minus, at_plus)
    return jnp.where(sizes > 0, own, -other) * jnp.abs(sizes) ** network.power


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x**2, axis=(1, 2), keepdims=True))


def _positive(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)
