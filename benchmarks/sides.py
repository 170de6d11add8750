"""The sides of the comparisons of `speed.py`: each function runs in a process of its own and returns plain values."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import straightforward
from measure import finished, peak_memory, timed

from ntkadv.adv_ntk import fit_adv_ntk
from ntkadv.architectures import Network, mlp
from ntkadv.attacks import PGD, Linf
from ntkadv.data import Dataset, DatasetNotFoundError, load_dataset, targets
from ntkadv.dynamics import TrainingDynamics
from ntkadv.dynamics.phi import solve, training_coefficients
from ntkadv.kernels.gram import gram
from ntkadv.predictors import KernelPredictor
from ntkadv.runs import environment

__all__ = ["Problem", "dynamics", "fit", "prepare", "step"]

SIZE_OF_ENTRIES = 0.73 / np.sqrt(2500)
"""Root mean square of the entries of w: what 50 steps of Adv-NTK reach on 2,500 images of CIFAR-10."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The images of all comparisons, of which each takes the first ones, and the folder of their kernels."""

    dataset: str
    root: Path | None
    n_train: int
    n_val: int
    n_test: int
    seed: int
    eps: float
    folder: Path

    def data(self, n_train: int) -> Dataset:
        """Load the first `n_train` of the images."""
        sizes = {"n_train": n_train, "n_val": self.n_val, "n_test": self.n_test}
        return load_dataset(self.dataset, **sizes, seed=self.seed, root=self.root, progress=False)

    @property
    def arch(self) -> Network:
        """The published MLP-5."""
        return mlp(depth=5, num_classes=10, w_std=1.76, b_std=0.18)

    @property
    def attack(self) -> PGD:
        """The published attack of the fit: its last iterate, as a plain loop returns it."""
        return PGD(Linf(self.eps), steps=10, step_size=self.eps / 5, keep_best=False)

    def kernel(self, name: Literal["theta", "cross"], n: int) -> np.ndarray:
        """Kernel of the first `n` images with each other, or of the images of a batch with them."""
        whole = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return np.array(whole[:, :n] if name == "cross" else whole[:n, :n])


def prepare(problem: Problem, batch_size: int) -> dict[str, Any]:
    """Compute the kernels once for all; the digits take the place of a data set that is not to be had."""
    try:
        data = problem.data(problem.n_train)
    except DatasetNotFoundError:
        problem = dataclasses.replace(problem, dataset="digits", n_train=min(problem.n_train, 1000), n_test=256)
        data = problem.data(problem.n_train)
    rng = np.random.default_rng(problem.seed)
    images, labels = data.x_val[:batch_size], data.y_val[:batch_size]
    attacked = np.clip(images + problem.eps * rng.choice([-1, 1], images.shape), 0, 1).astype(np.float32)
    np.save(problem.folder / "theta.npy", gram(problem.arch, data.x_train, progress=False))
    np.save(problem.folder / "cross.npy", gram(problem.arch, attacked, data.x_train, progress=False))
    np.save(problem.folder / "labels.npy", labels)
    return {"problem": problem, "data": repr(data), "environment": environment()}


def step(
    problem: Problem, n: int, side: Literal["straightforward", "eigh", "krylov"], repeats: int, budget: float
) -> dict[str, Any]:
    """Loss and gradient in w of one step of Adv-NTK, the attacked batch being given, in float64."""
    rng = np.random.default_rng(problem.seed)
    w = SIZE_OF_ENTRIES * rng.standard_normal(problem.n_train)[:n]
    y = problem.data(n).targets_train
    y_batch = targets(np.load(problem.folder / "labels.npy"), y.shape[1])
    with jax.enable_x64(True):
        arrays = (w, problem.kernel("theta", n), y, problem.kernel("cross", n), y_batch)
        arguments = [jnp.asarray(array, jnp.float64) for array in arrays]
        before = peak_memory()["peak_mib"]
        function = straightforward.loss_and_gradient if side == "straightforward" else _ours(side)
        (loss, gradient), timing = timed(function, *arguments, repeats=repeats, budget=budget)
        timing |= {**peak_memory(), "peak_before_mib": before}
        if side == "krylov":
            w, theta, y = arguments[:3]
            timing["products"] = int(solve(theta, jnp.abs(w), y).products)
    return {**timing, "loss": float(loss), "gradient": np.asarray(gradient)}


def _ours(method: Literal["eigh", "krylov"]) -> Any:
    def loss(w, theta, y, cross, y_batch):
        u = training_coefficients(theta, jnp.abs(w), y, method=method, fallback=False)
        residual = jnp.matmul(cross, u, precision="highest") - y_batch
        return jnp.sum(residual**2) / (2 * len(y_batch))

    return jax.value_and_grad(loss)


def fit(problem: Problem, n: int, side: Literal["straightforward", "ntkadv"], steps: int, batch: int) -> dict[str, Any]:
    """Fit Adv-NTK, compilation and all, the kernel of the training images being given."""
    data, theta = problem.data(n), problem.kernel("theta", n)
    settings = {"attack": problem.attack, "key": jax.random.key(problem.seed), "batch_size": batch}
    settings |= {"steps": steps, "learning_rate": 0.1}
    before = peak_memory()["peak_mib"]
    extra = {}
    start = time.perf_counter()
    if side == "ntkadv":
        result = fit_adv_ntk(problem.arch, data, gram=theta, parametrization="absolute", progress=False, **settings)
        xi, predictor = result.xi, result.predictor
        extra["later_steps_s"] = float(np.median([entry["seconds"] for entry in result.history[1:]]))
    else:
        xi, u, seconds = straightforward.fit(problem.arch, data, theta, **settings)
        predictor = KernelPredictor(problem.arch, data.x_train, u)
        extra["later_steps_s"] = float(np.median(seconds[1:]))
    jax.block_until_ready(predictor.coefficients)
    extra |= {"fit_s": time.perf_counter() - start, **peak_memory(), "peak_before_mib": before}
    attacked = problem.attack(predictor, data.x_test, data.y_test, key=jax.random.key(problem.seed), batch_size=256)
    robust = float(np.mean(np.argmax(np.asarray(predictor(attacked)), axis=1) == data.y_test))
    return {**extra, "robust_accuracy": robust, "xi": xi}


def dynamics(problem: Problem, n: int, count: int, repeats: int) -> dict[str, Any]:
    """Predictions at `count` times, the last of them 1, of the test images by the closed form."""
    data, theta = problem.data(n), problem.kernel("theta", n)
    times = np.geomspace(1e-4, 1, count) if count > 1 else np.ones(1)
    start = time.perf_counter()
    trained = TrainingDynamics(problem.arch, data.x_train, data.targets_train, gram=theta, progress=False)
    last = np.asarray(trained.predict(data.x_test, times))[-1]
    first_s = time.perf_counter() - start
    seconds = [finished(trained.predict, data.x_test, times)[1] for _ in range(repeats)]
    median, least = float(np.median(seconds)), min(seconds)
    return {"first_s": first_s, "median_s": median, "min_s": least, "repeats": repeats, **peak_memory(), "last": last}
