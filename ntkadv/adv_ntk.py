r"""Adv-NTK: adversarial training of an infinitely wide network (Fu & Wang, ICLR 2024, arXiv 2310.06112, Section 5).

In the theory an adversarially trained infinitely wide network is, whatever the attacks were,

    f(x) = Theta(x, X) Theta^-1 (I - exp(-Theta diag(xi))) Y

with one number xi_i >= 0 for each training sample: the time for which it was trained, stretched by the attacks on it.
Adv-NTK forgets where xi came from and learns it, by descent on the loss at attacked validation images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
import warnings
from collections.abc import Callable
from os import PathLike
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from tqdm.auto import tqdm

from ntkadv._checks import require_int, require_key
from ntkadv._typing import AnyArray
from ntkadv.architectures.base import Architecture
from ntkadv.attacks.base import Attack
from ntkadv.data import Dataset, targets
from ntkadv.dynamics.phi import Method, solve
from ntkadv.kernels.gram import gram as compute_gram
from ntkadv.parametrization import PARAMETRIZATIONS, Parametrization
from ntkadv.predictors import KernelPredictor
from ntkadv.runs import load_checkpoint, save_checkpoint

__all__ = ["AdvNTKFit", "fit_adv_ntk"]


@dataclasses.dataclass(frozen=True)
class AdvNTKFit:
    """An infinitely wide network, adversarially trained.

    Attributes:
        predictor: the network: logits = predictor(x).
        xi: the regularization, one number for each training sample, `(n,)` in float64.
        history: one dictionary for each step: `step`, `loss` (mean of 1/2 |f(x') - y|^2 over the attacked batch),
            `robust_accuracy` on that batch, `held_out` (robust accuracy on the held-out images, None where it was not
            measured), `xi_norm`, `gradient_norm`, `products` (of the kernel matrix with a block, in the forward solve),
            and `seconds`.
        step: after how many steps `xi` was reached: the last, or the best on the held-out images.
    """

    predictor: KernelPredictor
    xi: np.ndarray
    history: list[dict[str, Any]]
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a fit depends on besides its arrays; a checkpoint of other settings is refused."""

    attack: str
    learning_rate: float
    batch_size: int
    parametrization: str
    initial: float
    held_out: int
    held_out_every: int
    method: Method
    tol: float
    arrays: str


class _State(NamedTuple):
    """Where a fit is; `method` is what solves, once Krylov has failed the eigendecomposition."""

    weights: np.ndarray
    step: int
    method: Method
    best: np.ndarray
    best_step: int
    best_accuracy: float
    history: list[dict[str, Any]]


def fit_adv_ntk(
    arch: Architecture,
    data: Dataset,
    *,
    attack: Attack,
    key: Key[Array, ""],
    steps: int = 50,
    learning_rate: float = 0.1,
    batch_size: int = 128,
    gram: Float[AnyArray, "n n"] | None = None,
    parametrization: Literal["projected", "absolute", "squared"] = "projected",
    initial: float | None = None,
    held_out: float = 0.0,
    held_out_every: int = 5,
    patience: int | None = None,
    method: Method = "krylov",
    tol: float = 1e-10,
    checkpoint: str | PathLike[str] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> AdvNTKFit:
    r"""Train an infinitely wide network adversarially, by descent on the regularization `xi`.

    Each step draws a batch (x, y) of the validation images, attacks it with the present network, and goes

        w <- w - learning_rate * g / |g|,    g = d/dw mean 1/2 |f(x') - y|^2,    xi = xi(w)

    The kernel is computed in float32, everything on `xi` in float64. The attack does not enter the gradient. The first
    attack meets a network that is 0 everywhere when `initial` is 0, so it is noise only, as in the publication.

    Nothing is compiled after the first step. The peak of memory is the kernel matrix in float64, the Krylov basis
    (n x 48c numbers, twice) and the working memory of the attack on one batch.

    Args:
        arch: whose infinite-width NTK.
        data: `x_train` makes the kernel; batches come from `x_val`, which must not be empty.
        attack: the attack of each step; published: `PGD(Linf(rho), steps=10, step_size=rho / 5)`.
        key: random key of the batches and attacks.
        steps: number of steps.
        learning_rate: length of each step in w. It has the unit of `xi`, time, so its scale goes with 1/kernel: on a
            kernel normalised to mean diagonal 1 (`arch.normalized`) it means the same for every architecture.
        batch_size: validation images in each step; all of them if there are fewer.
        gram: the NTK matrix over `x_train`; computed if None.
        parametrization: `"projected"`, xi = w with negative entries cut off after each step; `"absolute"`, xi = |w|,
            the published one, which folds entries that cross zero back; `"squared"`, xi = w^2.
        initial: xi at the start, the same for all samples; by default 0, and for `"squared"`, whose gradient vanishes
            at 0, `learning_rate / sqrt(n)`.
        held_out: share of the validation images kept out of the batches. Every `held_out_every` steps the robust
            accuracy on them is measured, and the best `xi` is the result. 0 takes the last, and so does a fit too short
            for one measurement.
        held_out_every: see `held_out`.
        patience: stop after that many such measurements in a row without a better one. None never stops early.
        method: how the linear algebra is done, see `ntkadv.dynamics.solve`. Where Krylov's stopping test fails, the fit
            says so and goes on with the eigendecomposition.
        tol: relative tolerance of that solve.
        checkpoint: a file that holds the state after each step. A fit that was stopped goes on from there, to the same
            result bit for bit; a finished one can be continued with more steps.
        on_step: called with each entry of the history.
        progress: show a progress bar.

    Returns:
        An `AdvNTKFit`.

    Raises:
        ValueError: an argument is out of range, there are no validation images, `gram` does not fit or is not finite,
            or `checkpoint` belongs to another fit.
        FloatingPointError: the gradient is not finite, or it vanishes.
    """
    require_key("key", key)
    require_int("steps", steps, minimum=0)
    require_int("batch_size", batch_size, minimum=1)
    require_int("held_out_every", held_out_every, minimum=1)
    if patience is not None:
        require_int("patience", patience, minimum=1)
    _require_fit(data, learning_rate, parametrization, initial, held_out)
    theta = compute_gram(arch, data.x_train, progress=progress) if gram is None else np.asarray(gram)
    n = len(data.x_train)
    if theta.shape != (n, n):
        raise ValueError(f"gram must be the NTK over x_train, of shape ({n}, {n}), got {theta.shape}")
    if not np.all(np.isfinite(theta)):
        raise ValueError("gram must be finite, but has entries that are NaN or infinite; check x_train")

    ways = PARAMETRIZATIONS[parametrization]
    begin = (learning_rate / n**0.5 if parametrization == "squared" else 0.0) if initial is None else float(initial)
    count = round(held_out * len(data.x_val))
    order = np.random.default_rng(0).permutation(len(data.x_val))
    watched, pool = order[:count], order[count:]
    settings = _Settings(
        attack=repr(attack),
        learning_rate=learning_rate,
        batch_size=min(batch_size, len(pool)),
        parametrization=parametrization,
        initial=begin,
        held_out=count,
        held_out_every=held_out_every,
        method=method,
        tol=tol,
        arrays=_fingerprint(theta, data, key),
    )
    fit = _Fit(arch, data, theta, attack, ways, settings, watched, pool, key)
    state = _restore(checkpoint, settings) or fit.start()
    bar = tqdm(total=steps, initial=min(state.step, steps), desc="Adv-NTK", disable=not progress, leave=False)
    with bar:
        while state.step < steps and not _is_exhausted(state, held_out_every, patience):
            state = fit.advance(state)
            if checkpoint is not None:
                _save(checkpoint, settings, state)
            if on_step is not None:
                on_step(state.history[-1])
            bar.set_postfix(robust=f"{state.history[-1]['robust_accuracy']:.3f}", refresh=False)
            bar.update()
    is_measured = state.best_step > 0  # not where the fit ended before the first measurement
    weights, step = (state.best, state.best_step) if is_measured else (state.weights, state.step)
    xi = np.asarray(ways.xi(weights))
    return AdvNTKFit(fit.predictor_at(xi, state.method), xi, state.history, step)


class _Fit:
    """The constants of a fit, on the device, and the one step."""

    def __init__(
        self,
        arch: Architecture,
        data: Dataset,
        theta: np.ndarray,
        attack: Attack,
        ways: Parametrization,
        settings: _Settings,
        watched: np.ndarray,
        pool: np.ndarray,
        key: Array,
    ) -> None:
        self.data, self.attack, self.ways, self.settings, self.key = data, attack, ways, settings, key
        self.watched, self.pool = watched, pool
        with jax.enable_x64(True):
            self.theta = jnp.asarray(theta, jnp.float64)
            self.targets = jnp.asarray(data.targets_train, jnp.float64)
        self.predictor = KernelPredictor(arch, data.x_train, np.zeros(data.targets_train.shape, np.float32))

    def start(self) -> _State:
        weights = self.ways.start(np.full(len(self.data.x_train), self.settings.initial))
        return _State(weights, 0, self.settings.method, weights, 0, -1.0, [])

    def predictor_at(self, xi: np.ndarray, method: Method) -> KernelPredictor:
        coefficients, _, _, converged = self._solve(xi, method)
        return self._with(coefficients if bool(converged) else self._solve(xi, "eigh")[0])

    def _solve(self, xi: np.ndarray, method: Method) -> tuple[Array, Any, Array, Array]:
        with jax.enable_x64(True):
            return _forward(method, self.settings.tol, self.theta, jnp.asarray(xi), self.targets)

    def advance(self, state: _State) -> _State:
        began = time.perf_counter()
        attack_key, batch_key = jax.random.split(jax.random.fold_in(self.key, state.step))
        places = self.pool[
            np.asarray(jax.random.choice(batch_key, len(self.pool), (self.settings.batch_size,), replace=False))
        ]
        images, labels = self.data.x_val[places], self.data.y_val[places]
        method = state.method
        found = self._loss_and_gradient(method, state.weights, images, labels, attack_key)
        if found is None:
            method = "eigh"
            warnings.warn(
                f"the Krylov solve of Adv-NTK did not reach tol={self.settings.tol:g}: xi has become too large for it. "
                "The fit goes on with an eigendecomposition in each step; a smaller learning_rate avoids that",
                RuntimeWarning,
                stacklevel=3,
            )
            found = self._loss_and_gradient(method, state.weights, images, labels, attack_key)
            assert found is not None
        loss, accuracy, gradient, products = found
        norm = float(np.linalg.norm(gradient))
        if not (np.isfinite(norm) and norm > 0):
            raise FloatingPointError(
                f"the gradient of step {state.step + 1} has the norm {norm}: the loss does not depend on xi any more. "
                "A smaller learning_rate keeps xi where it does; parametrization 'squared' needs initial > 0"
            )
        weights = self.ways.project(state.weights - self.settings.learning_rate * gradient / norm)
        step = state.step + 1
        watched = self._held_out_accuracy(method, weights, step)
        entry = {
            "step": step,
            "loss": loss,
            "robust_accuracy": accuracy,
            "held_out": watched,
            "xi_norm": float(np.linalg.norm(self.ways.xi(weights))),
            "gradient_norm": norm,
            "products": products,
            "seconds": time.perf_counter() - began,
        }
        following = state._replace(weights=weights, step=step, method=method, history=[*state.history, entry])
        if watched is not None and watched > state.best_accuracy:
            return following._replace(best=weights, best_step=step, best_accuracy=watched)
        return following

    def _loss_and_gradient(
        self, method: Method, weights: np.ndarray, images: np.ndarray, labels: np.ndarray, key: Array
    ) -> tuple[float, float, np.ndarray, int] | None:
        """Loss, accuracy, gradient in w, products with the kernel; None where Krylov does not reach the tolerance."""
        coefficients, pullback, products, converged = self._solve(self.ways.xi(weights), method)
        if not bool(converged):
            return None
        predictor = self._with(coefficients)
        attacked = self.attack(predictor, images, labels, key=key)
        cross = _cross_kernel(predictor, attacked)
        y = targets(labels, self.data.num_classes)
        with jax.enable_x64(True):
            loss, accuracy, gradient = _backward(pullback, cross, coefficients, jnp.asarray(y), jnp.asarray(labels))
        if method == "krylov" and np.isnan(np.asarray(gradient)).any():  # the adjoint's space did not converge
            return None
        gradient = self.ways.pull_back(weights, np.asarray(gradient))
        return float(loss), float(accuracy), gradient, int(products)

    def _held_out_accuracy(self, method: Method, weights: np.ndarray, step: int) -> float | None:
        if not len(self.watched) or step % self.settings.held_out_every:
            return None
        predictor = self.predictor_at(self.ways.xi(weights), method)
        images, labels = self.data.x_val[self.watched], self.data.y_val[self.watched]
        # The same key each time: the measurements differ by the network only.
        attacked = self.attack(predictor, images, labels, key=self.key, batch_size=self.settings.batch_size)
        return float(np.mean(np.argmax(np.asarray(predictor(attacked)), axis=1) == labels))

    def _with(self, coefficients: Array) -> KernelPredictor:
        return eqx.tree_at(lambda p: p.coefficients, self.predictor, jnp.asarray(coefficients, jnp.float32))


@eqx.filter_jit
def _forward(
    method: Method, tol: float, theta: Float[Array, "n n"], xi: Float[Array, " n"], y: Float[Array, "n c"]
) -> tuple[Array, Any, Array, Array]:
    def coefficients(xi: Array) -> tuple[Array, tuple[Array, Array]]:
        solution = solve(theta, xi, y, method=method, tol=tol, fallback=False)
        return solution.coefficients, (solution.products, solution.converged)

    value, pullback, (products, converged) = jax.vjp(coefficients, xi, has_aux=True)
    return value, pullback, products, converged


@eqx.filter_jit
def _cross_kernel(predictor: KernelPredictor, x: Float[Array, "b h w c"]) -> Float[Array, "b n"]:
    return predictor.arch.ntk(x, predictor.x_train)


@jax.jit
def _backward(
    pullback: Any, cross: Float[Array, "b n"], u: Float[Array, "n c"], y: Float[Array, "b c"], labels: Int[Array, " b"]
) -> tuple[Array, Array, Array]:
    """Loss and accuracy on the attacked batch, and the gradient in xi."""
    cross, y = cross.astype(u.dtype), y.astype(u.dtype)
    logits = jnp.matmul(cross, u, precision="highest")
    residual = logits - y
    loss = jnp.sum(residual**2) / (2 * len(y))
    outer = jnp.matmul(cross.T, residual, precision="highest") / len(y)
    return loss, jnp.mean(jnp.argmax(logits, axis=1).astype(labels.dtype) == labels), pullback(outer)[0]


def _is_exhausted(state: _State, every: int, patience: int | None) -> bool:
    return patience is not None and state.best_step > 0 and state.step >= state.best_step + every * patience


def _require_fit(
    data: Dataset, learning_rate: float, parametrization: str, initial: float | None, held_out: float
) -> None:
    if len(data.x_val) == 0:
        raise ValueError("data has no validation images, from which Adv-NTK learns: load it with n_val > 0")
    if not (np.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(f"parametrization must be one of {sorted(PARAMETRIZATIONS)}, got {parametrization!r}")
    if initial is not None and not (np.isfinite(initial) and initial >= 0):
        raise ValueError(f"initial must be zero or more and finite, got {initial}")
    if initial == 0 and parametrization == "squared":
        raise ValueError("initial must be above 0 for the parametrization 'squared', whose gradient vanishes at 0")
    if not 0 <= held_out < 1 or round(held_out * len(data.x_val)) >= len(data.x_val):
        raise ValueError(f"held_out must be a share of the validation images that leaves some of them, got {held_out}")


def _fingerprint(theta: np.ndarray, data: Dataset, key: Array) -> str:
    digest = hashlib.sha256(np.asarray(jax.random.key_data(key)).tobytes())
    for array in (theta, data.y_train, data.x_val, data.y_val):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _save(path: str | PathLike[str], settings: _Settings, state: _State) -> None:
    meta = {**state._asdict(), "settings": dataclasses.asdict(settings)}
    arrays = {name: meta.pop(name) for name in ("weights", "best")}
    save_checkpoint(path, arrays, meta)


def _restore(path: str | PathLike[str] | None, settings: _Settings) -> _State | None:
    found = None if path is None else load_checkpoint(path)
    if found is None:
        return None
    arrays, meta = found
    saved = meta.pop("settings")
    differing = [name for name, value in dataclasses.asdict(settings).items() if saved.get(name) != value]
    if differing:
        raise ValueError(
            f"checkpoint {path} belongs to another fit; it differs in {', '.join(differing)}. Name another file, or "
            "remove that one"
        )
    return _State(**arrays, **meta)
