r"""Adversarial training of the two-layer CNN on patch data, by full-batch gradient descent, and what is tracked.

    L(W) = (1/N) sum_i [ lambda log(1 + e^{-y_i f(X_i)}) + (1 - lambda) log(1 + e^{-y_i f(X_i')}) ]

Where the attack moves only the signal patch along w*, every filter stays
w_r(0) + (u_r - u_r(0)) w* + sum_ij b_rij X_i[j] over the noise patches, and gradient descent is a recursion in u and b
alone (written for s_i, s_i' the logistic weights of the clean and the attacked sample, divided by N, and a signal moved
to c_i y_i w*):

    u_r   <- u_r   + eta a_r sum_i [lambda s_i alpha act'(alpha y_i u_r) + (1 - lambda) s_i' c_i act'(c_i y_i u_r)]
    b_rij <- b_rij + eta a_r y_i [lambda s_i + (1 - lambda) s_i'] act'(v_rij),      v_r = v_r(0) + b_r G

with G the Gram matrix of the noise patches. d is no longer in it, so that a step takes microseconds. Any other attack
is trained on the filters themselves.

Source: Li & Li, ICML 2025, arXiv 2306.01271, Section 5; the recursion is derived here and tested against autodiff.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ntkadv._checks import require_int, require_nonnegative
from ntkadv.cgro.adversaries import Adversary, _AlongSignal, signal_part
from ntkadv.cgro.network import PatchNetwork
from ntkadv.cgro.patches import PatchData

__all__ = ["Trajectory", "train"]

_HIGHEST = jax.lax.Precision.HIGHEST


class Record(NamedTuple):
    """What is tracked, at one step or with a leading axis of steps."""

    u: Array
    U: Array
    v: Array
    V: Array
    clean: Array
    adversarial: Array
    signal_share: Array
    loss: Array
    test_clean: Array
    test_adversarial: Array


@dataclass(frozen=True, eq=False)
class Trajectory:
    r"""A training run.

    Attributes:
        steps: recorded steps, `(T,)`; the first is 0.
        u: signal components <w_r, w*>, `(T, m)`.
        U: signal parts of the margins before alpha^q, for y = -1 and +1, `(T, 2)`.
        v: noise components <w_r, X_i[j]>, `(T, m, n, k)`.
        V: noise parts of the margins, `(T, n)`.
        clean: margins alpha^q U + V of the training samples, `(T, n)`.
        adversarial: their margins under the attack of the training, `(T, n)`.
        signal_share: share of the squared norm of the gradient that lies along w*, `(T,)`; the noise has the rest.
        loss: the mixed loss, `(T,)`.
        test_clean: margins of the test samples, `(T, n_test)`.
        test_adversarial: their margins under the same attack, `(T, n_test)`.
        filters: at the end, `(m, d)`.
        network: the network.
        alpha: strength of the signal.
        delta: radius of the attack.
    """

    steps: np.ndarray
    u: np.ndarray
    U: np.ndarray
    v: np.ndarray
    V: np.ndarray
    clean: np.ndarray
    adversarial: np.ndarray
    signal_share: np.ndarray
    loss: np.ndarray
    test_clean: np.ndarray
    test_adversarial: np.ndarray
    filters: np.ndarray
    network: PatchNetwork
    alpha: float
    delta: float

    def accuracies(self, at: int = -1) -> dict[str, float]:
        """Shares of positive margins at one record: clean and robust, on training and on test samples."""
        margins = {
            "train_clean": self.clean, "train_robust": self.adversarial,
            "test_clean": self.test_clean, "test_robust": self.test_adversarial,
        }  # fmt: skip
        return {name: float(np.mean(m[at] > 0)) if m.shape[1] else float("nan") for name, m in margins.items()}


class Problem(NamedTuple):
    """What the recursion needs; all but the network are arrays, so that it can be mapped over any of them."""

    y: Float[Array, " n"]
    gram: Float[Array, "nk nk"]
    u0: Float[Array, " m"]
    v0: Float[Array, "m n k"]
    test_y: Float[Array, " t"]
    test_cross: Float[Array, "nk tk"]
    test_v0: Float[Array, "m t k"]
    alpha: Float[Array, ""]
    delta: Float[Array, ""]
    clean_weight: Float[Array, ""]
    learning_rate: Float[Array, ""]


class State(NamedTuple):
    """State of the recursion: signal components and the coefficients of the noise patches."""

    u: Float[Array, " m"]
    b: Float[Array, "m nk"]


def train(
    network: PatchNetwork,
    data: PatchData,
    *,
    filters: Float[Array, "m d"],
    attack: Adversary,
    steps: int,
    learning_rate: float,
    clean_weight: float = 0.5,
    test: PatchData | None = None,
    records: int = 200,
    spacing: Literal["log", "linear"] = "log",
    route: Literal["recursion", "filters"] | None = None,
) -> Trajectory:
    """Train the filters by full-batch gradient descent, the whole run in one compiled loop.

    Args:
        network: the network.
        data: training samples, both classes among them.
        filters: where to start, see `PatchNetwork.init`; they also give the precision.
        attack: what makes the adversarial samples: `FixedLinear`, `SignalLine` or `PatchPGD`.
        steps: gradient steps.
        learning_rate: eta; the loss is the mean over samples.
        clean_weight: lambda, the weight of the clean loss, from 0 (adversarial samples only) to 1 (clean only). That
            lambda goes with the clean term is an inference: the reported range [1/poly(d), 1) excludes exactly what
            would break the theorem in this reading, no clean term to learn the signal from.
        test: samples whose margins are tracked.
        records: about how many times to record.
        spacing: `"log"` records at geometrically growing steps, since phases differ by orders of magnitude.
        route: `"recursion"` in (u, b), for attacks along the signal, or `"filters"`, gradients in the filters; by
            default the recursion where it is exact.

    Raises:
        TypeError, ValueError: an argument is out of range; fewer than two samples, or of one class; delta is not below
            alpha; the data do not have a signal patch alpha y w* beside orthogonal noise; the route does not fit.
        FloatingPointError: the loss is not finite at the end.
    """
    alpha = _checked(network, data, filters, attack, test)
    require_int("steps", steps, minimum=1)
    require_int("records", records, minimum=2)
    require_nonnegative("learning_rate", learning_rate, strict=True)
    require_nonnegative("clean_weight", clean_weight)
    if clean_weight > 1:
        raise ValueError(f"clean_weight must lie in [0, 1], got {clean_weight}; it is the lambda of the mixed loss.")
    along = isinstance(attack, _AlongSignal)
    route = route or ("recursion" if along else "filters")
    if route not in ("recursion", "filters") or (route == "recursion" and not along):
        raise ValueError(
            f"route must be 'filters' for the attack {type(attack).__name__}, got {route!r}; only attacks along the "
            "signal leave the noise patches as they are, which the recursion needs."
        )
    test = PatchData(data.x[:0], data.y[:0], data.position[:0], data.w_star) if test is None else test
    at = record_steps(steps, records, spacing)
    scalars = [jnp.asarray(value, filters.dtype) for value in (alpha, float(attack.delta), clean_weight, learning_rate)]
    if route == "recursion":
        assert isinstance(attack, _AlongSignal)
        problem = problem_of(data, test, filters, *scalars)
        # The radius is in the problem: one program serves all.
        state, record = run_recursion(network, type(attack)(0.0), problem, jnp.asarray(at))
        noise = data.noise.reshape(-1, data.x.shape[2])
        final = filters + (state.u - problem.u0)[:, None] * data.w_star + jnp.matmul(state.b, noise, precision=_HIGHEST)
    else:
        final, record = _run_filters(network, attack, data, test, filters, *scalars[2:], jnp.asarray(at))
    if not np.isfinite(record.loss[-1]):
        raise FloatingPointError(
            f"the loss is {float(record.loss[-1])} after {steps} steps: training diverged; lower learning_rate, now "
            f"{learning_rate:g}."
        )
    arrays = {name: np.asarray(values) for name, values in record._asdict().items()}
    return Trajectory(
        steps=at, **arrays, filters=np.asarray(final), network=network, alpha=alpha, delta=float(attack.delta)
    )


def record_steps(steps: int, records: int, spacing: str) -> Int[np.ndarray, " T"]:
    """Choose the steps at which to record, from 0 to the last."""
    if spacing not in ("log", "linear"):
        raise ValueError(f"spacing must be 'log' or 'linear', got {spacing!r}.")
    count = min(records, steps + 1)
    if spacing == "linear":
        return np.unique(np.linspace(0, steps, count).round().astype(np.int32))
    return np.unique(np.concatenate([[0], np.geomspace(1, steps, count - 1).round()]).astype(np.int32))


def problem_of(
    data: PatchData, test: PatchData, filters: Array, alpha: Array, delta: Array, clean_weight: Array, rate: Array
) -> Problem:
    """Reduce data and filters to the inner products that the recursion works with."""
    noise, other = data.noise, test.noise
    rows, columns = noise.reshape(-1, data.x.shape[2]), other.reshape(-1, data.x.shape[2])
    project = partial(jnp.einsum, "rd,ijd->rij", filters, precision=_HIGHEST)
    return Problem(
        data.y, jnp.matmul(rows, rows.T, precision=_HIGHEST), filters @ data.w_star, project(noise),
        test.y, jnp.matmul(rows, columns.T, precision=_HIGHEST), project(other),
        alpha, delta, clean_weight, rate,
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1))
def run_recursion(
    network: PatchNetwork, attack: _AlongSignal, problem: Problem, at: Int[Array, " T"]
) -> tuple[State, Record]:
    """Run the recursion, and record at the steps `at`; `problem` may be mapped over by `jax.vmap`."""

    def step(_, state: State) -> State:
        gradient = _forces(network, attack, problem, state)[1]
        rate = problem.learning_rate
        return State(state.u - rate * gradient.u, state.b - rate * gradient.b)

    def leap(state: State, count: Array) -> tuple[State, Record]:
        state = jax.lax.fori_loop(0, count, step, state)
        return state, _record(network, attack, problem, state)

    m, n, k = problem.v0.shape
    start = State(problem.u0, jnp.zeros((m, n * k), problem.u0.dtype))
    return jax.lax.scan(leap, start, jnp.diff(at, prepend=0))


class _Margins(NamedTuple):
    v: Array
    V: Array
    clean: Array
    adversarial: Array
    moved: Array


def _margins(network: PatchNetwork, attack: _AlongSignal, problem: Problem, u: Array, v: Array, y: Array) -> _Margins:
    """Margins from their parts: alpha^q U + V, and with the signal moved."""
    moved = attack.sizes(network, u, y, problem.alpha, problem.delta)
    V = network.noise_margins(v, y)
    clean = signal_part(network, u, y, jnp.broadcast_to(problem.alpha, y.shape)) + V
    return _Margins(v, V, clean, signal_part(network, u, y, moved) + V, moved)


def _forces(network: PatchNetwork, attack: _AlongSignal, problem: Problem, state: State) -> tuple[_Margins, State]:
    """Margins, and the gradient as components along w* and coefficients of the noise patches."""
    a = jnp.asarray(network.signs, state.u.dtype)
    v = problem.v0 + jnp.matmul(state.b, problem.gram, precision=_HIGHEST).reshape(problem.v0.shape)
    margins = _margins(network, attack, problem, state.u, v, problem.y)
    y, n = problem.y, len(problem.y)
    clean = problem.clean_weight * jax.nn.sigmoid(-margins.clean) / n
    attacked = (1 - problem.clean_weight) * jax.nn.sigmoid(-margins.adversarial) / n
    along = (y * state.u[:, None], margins.moved)
    pull = clean * problem.alpha * network.slope(problem.alpha * along[0])
    pull = pull + attacked * along[1] * network.slope(along[1] * along[0])
    noise = (y * (clean + attacked))[:, None] * network.slope(v)
    return margins, State(-a * jnp.sum(pull, axis=1), (-a[:, None, None] * noise).reshape(len(a), -1))


def _record(network: PatchNetwork, attack: _AlongSignal, problem: Problem, state: State) -> Record:
    margins, gradient = _forces(network, attack, problem, state)
    noise = jnp.sum(jnp.matmul(gradient.b, problem.gram, precision=_HIGHEST) * gradient.b)
    test_v = jnp.matmul(state.b, problem.test_cross, precision=_HIGHEST).reshape(problem.test_v0.shape)
    test = _margins(network, attack, problem, state.u, problem.test_v0 + test_v, problem.test_y)
    return Record(
        state.u, network.signal_margin(state.u), margins.v, margins.V, margins.clean, margins.adversarial,
        _share(jnp.sum(gradient.u**2), noise), _loss(problem.clean_weight, margins.clean, margins.adversarial),
        test.clean, test.adversarial,
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1))
def _run_filters(
    network: PatchNetwork, attack: Adversary, data: PatchData, test: PatchData, filters: Array, clean_weight: Array,
    rate: Array, at: Int[Array, " T"],
) -> tuple[Array, Record]:  # fmt: skip
    """Gradient descent on the filters themselves, with the gradient of the network written out by hand."""

    def gradient(w: Array) -> tuple[Array, Array]:
        attacked = attack.perturb(network, w, data)
        mixed = clean_weight * network.gradient(w, data.x, data.y)
        return mixed + (1 - clean_weight) * network.gradient(w, attacked, data.y), attacked

    def step(_, w: Array) -> Array:
        return w - rate * gradient(w)[0]

    def leap(w: Array, count: Array) -> tuple[Array, Record]:
        w = jax.lax.fori_loop(0, count, step, w)
        slope, attacked = gradient(w)
        u, v = w @ data.w_star, jnp.einsum("rd,ijd->rij", w, data.noise, precision=_HIGHEST)
        clean, adversarial = network.margins(w, data.x, data.y), network.margins(w, attacked, data.y)
        along = slope @ data.w_star
        across = slope - along[:, None] * data.w_star
        record = Record(
            u, network.signal_margin(u), v, network.noise_margins(v, data.y), clean, adversarial,
            _share(jnp.sum(along**2), jnp.sum(across**2)), _loss(clean_weight, clean, adversarial),
            network.margins(w, test.x, test.y), network.margins(w, attack.perturb(network, w, test), test.y),
        )  # fmt: skip
        return w, record

    return jax.lax.scan(leap, filters, jnp.diff(at, prepend=0))


def _share(signal: Array, noise: Array) -> Array:
    return signal / jnp.maximum(signal + noise, jnp.finfo(signal.dtype).tiny)


def _loss(clean_weight: Array, clean: Array, adversarial: Array) -> Array:
    return jnp.mean(clean_weight * jax.nn.softplus(-clean) + (1 - clean_weight) * jax.nn.softplus(-adversarial))


def _checked(
    network: PatchNetwork, data: PatchData, filters: Array, attack: Adversary, test: PatchData | None
) -> float:
    """Check what a run is given, and find the strength of the signal."""
    n, _, d = data.x.shape
    if n < 2 or not (np.any(data.y > 0) and np.any(data.y < 0)):
        raise ValueError(
            f"data must hold at least two samples, one of each class, got {n} with labels "
            f"{np.unique(np.asarray(data.y)).tolist()}; with one sample there is nothing to tell apart."
        )
    if filters.shape != (network.width, d):
        raise ValueError(f"filters must have shape {(network.width, d)}, got {filters.shape}; use network.init.")
    if not isinstance(attack, Adversary):
        raise TypeError(f"attack must be an adversary such as SignalLine(delta), got {type(attack).__name__}.")
    alphas = np.asarray(data.signal @ data.w_star * data.y)
    alpha = float(np.median(alphas))
    rest = np.abs(np.asarray(data.signal - (alphas * np.asarray(data.y))[:, None] * np.asarray(data.w_star))).max()
    off = max(float(np.abs(alphas - alpha).max()), float(np.abs(np.asarray(data.noise @ data.w_star)).max()), rest)
    if not (alpha > 0 and off <= 1e-4 * alpha):
        raise ValueError(
            f"data must have one patch alpha y w* and noise orthogonal to w* in the others, but are off by {off:.3g} "
            f"(alpha = {alpha:.3g}); draw them from a PatchDistribution."
        )
    if attack.delta >= alpha * (1 - 1e-6):  # alpha is read off the data, up to rounding
        raise ValueError(
            f"delta must be below alpha = {alpha:.6g}, the strength of the signal, got {attack.delta:.6g}; from there "
            "on the attack turns the class of a sample into the other, and no classifier is robust."
        )
    if test is not None and test.x.shape[1:] != data.x.shape[1:]:
        raise ValueError(f"test must have inputs of shape {data.x.shape[1:]}, got {test.x.shape[1:]}.")
    return alpha
