"""The models of the comparison run, see robustness.py: how each is made, from images alone, and kept."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import ntkadv as na
from ntkadv.attacks import PGD, Linf
from ntkadv.training import (
    APARTTraining,
    CropFlip,
    CURETraining,
    FGSMTraining,
    Method,
    PGDTraining,
    StandardTraining,
    TRADESTraining,
    accuracy,
    robust_accuracy,
    train,
)

__all__ = ["FAMILIES", "Bench", "Made", "Scale"]

KERNELS = ("NTK, t = ∞", "early stopping", "ridge", "Adv-NTK")
NETWORKS = ("standard", "PGD-AT", "FGSM", "TRADES", "APART", "CURE")
FAMILIES = {
    "MLP": (*KERNELS, *NETWORKS),
    "CNN": (*KERNELS, *NETWORKS),
    "patch CNN": ("PGD-AT",),
    "PreActResNet-18": NETWORKS,
}
"""Families of architectures, and what is made of each."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is computed."""

    dataset: str
    n_train: int
    n_val: int
    n_test: int
    eps: float
    epochs: int
    batch_size: int
    attack_steps: int
    families: tuple[str, ...]
    depth: int
    width: int
    cnn_depth: int
    cnn_width: int
    times: int
    fit_steps: int
    judge_steps: int
    queries: int
    members: tuple[str, ...]
    looks: int
    targets: int = 9
    cnn_stride: int = 1
    crop: int = 0
    evaluation_batch: int = 500


@dataclasses.dataclass(frozen=True)
class Made:
    """A model, or two: the best by validation images, and the last one where that may be another."""

    best: Any
    last: Any
    seconds: float
    size: str
    is_network: bool
    notes: dict[str, Any]


class Bench:
    """Data, architectures and methods of a run. What does not change from seed to seed is made once."""

    def __init__(self, scale: Scale, run: na.runs.Run, root: Path | None):
        self.scale, self.run, self.root = scale, run, root
        self.threat = Linf(scale.eps)
        self.data = functools.lru_cache(maxsize=1)(self._data)
        self.parts = functools.lru_cache(maxsize=2)(self._parts)
        self.per_epoch = scale.n_train // scale.batch_size
        self.steps = scale.epochs * self.per_epoch
        self.networks = functools.cache(self._network)
        self.rules = {name: self._method(name) for name in NETWORKS}
        self.optimizer = functools.cache(self._optimizer)
        self.augmentation = CropFlip(padding=scale.crop) if scale.crop else None

    def methods(self, family: str) -> tuple[str, ...]:
        """Give what is made of a family."""
        return FAMILIES[family]

    def make(self, family: str, method: str, seed: int) -> Made:
        """Make a model."""
        return self._kernel(family, method, seed) if method in KERNELS else self._trained(family, method, seed)

    def _data(self, seed: int) -> na.Dataset:
        scale = self.scale
        return na.load_dataset(
            scale.dataset, n_train=scale.n_train, n_val=scale.n_val, n_test=scale.n_test, seed=seed, root=self.root
        )

    def _architecture(self, family: str) -> na.architectures.Network:
        scale = self.scale
        if family == "MLP":
            return na.architectures.mlp(depth=scale.depth, width=scale.width, num_classes=10)
        return na.architectures.cnn(
            depth=scale.cnn_depth, width=scale.cnn_width, stride=scale.cnn_stride, num_classes=10
        )

    def _parts(self, family: str, seed: int) -> tuple[na.TrainingDynamics, np.ndarray, float]:
        """Give the dynamics of a family on a seed's images, the Gram matrix, and how long they took."""
        begun, data = time.perf_counter(), self.data(seed)
        arch = self._architecture(family).normalized(data.x_train)
        name = f"{family.lower()}-{seed}-gram"
        found = self.run.cached(
            name, lambda: {"gram": na.gram(arch, data.x_train), "seconds": np.asarray(time.perf_counter() - begun)}
        )
        dynamics = na.TrainingDynamics(arch, data.x_train, data.targets_train, gram=found["gram"])
        return dynamics, found["gram"], float(found["seconds"])

    def _kernel(self, family: str, method: str, seed: int) -> Made:
        """Fit a kernel predictor; the stopping time and the ridge are chosen on validation images under PGD."""
        scale, data, key = self.scale, self.data(seed), jax.random.fold_in(jax.random.key(seed), 3)
        dynamics, gram, base = self.parts(family, seed)
        begun = time.perf_counter()
        smallest, largest = (max(float(dynamics.spectrum.values[i]), 1e-6) for i in (0, -1))
        notes: dict[str, Any] = {}

        def chosen(name: str, predictor: Callable[[float], Any], values: np.ndarray) -> float:
            def search() -> dict[str, np.ndarray]:
                judge = PGD(self.threat, steps=20, loss="margin")
                path = na.robustness_path(
                    predictor, values, data.x_val, data.y_val, attack=judge, key=key, batch_size=scale.evaluation_batch
                )
                return {"best": np.asarray(path.best)}

            return float(self.run.cached(f"{family.lower()}-{seed}-{name}", search)["best"])

        times = np.geomspace(0.3 / largest, 10 / smallest, scale.times)
        if method == KERNELS[0]:
            predictor = dynamics.predictor(np.inf)
        elif method == "ridge":
            notes["ridge"] = chosen(
                "ridge", dynamics.ridge().predictor, np.geomspace(smallest / 10, largest, scale.times)[::-1]
            )
            predictor = dynamics.ridge().predictor(notes["ridge"])
        else:
            notes["time"] = chosen("time", dynamics.predictor, times)
            predictor = dynamics.predictor(notes["time"])
        if method == "Adv-NTK":
            fit = na.fit_adv_ntk(
                dynamics.arch, data, attack=PGD(self.threat, steps=scale.attack_steps, step_size=scale.eps / 5),
                key=key, steps=scale.fit_steps, learning_rate=notes["time"] * np.sqrt(scale.n_train) / 10,
                held_out=0.25, gram=gram, checkpoint=self.run.checkpoint(f"{family.lower()}-{seed}-adv_ntk"),
            )  # fmt: skip
            predictor = fit.predictor
        seconds = base + time.perf_counter() - begun
        return Made(predictor, None, seconds, f"{len(data.x_train)}² kernel", False, notes)

    def _network(self, family: str) -> Any:
        """Give an architecture, or a function from a key to a network."""
        shape = self.data(0).x_train.shape[1:]
        if family == "patch CNN":
            return functools.partial(na.vision.PatchCNN, channels_in=shape[-1], start=0.3)
        if family == "PreActResNet-18":
            return functools.partial(na.vision.preact_resnet18, channels_in=shape[-1])
        return self._architecture(family)

    def _method(self, name: str) -> Method:
        """Set up a method; the attack of training grows over its first half, lest small networks stay constant."""
        threat, steps, warmup = self.threat, self.scale.attack_steps, self.steps // 2
        pgd = PGD(threat, steps=steps, loss="cross_entropy", keep_best=False)
        made: dict[str, Callable[[], Method]] = {
            "standard": lambda: StandardTraining(loss="cross_entropy"),
            "PGD-AT": lambda: PGDTraining(pgd, loss="cross_entropy", warmup=warmup),
            "FGSM": lambda: FGSMTraining(threat, warmup=warmup),
            "TRADES": lambda: TRADESTraining(threat, steps=steps, warmup=warmup),
            "APART": lambda: APARTTraining.scaled(threat, steps=max(2, self.steps)),
            "CURE": lambda: CURETraining(threat, steps=steps, warmup=warmup),
        }
        return made[name]()

    def _optimizer(self, family: str) -> optax.GradientTransformation:
        """Give the optimiser: Adam, at a rate that suits the parametrisation; SGD as published for ResNets.

        The rate rises before it falls: at full rate from the start a network has memorised its images before APART's
        generator has grown, and then it never grows.
        """
        if family == "PreActResNet-18":
            return na.training.sgd(na.training.piecewise(0.1, self.steps), weight_decay=5e-4)
        peak = 3e-3 if family == "patch CNN" else 0.02
        return optax.adam(na.training.triangular(peak, self.steps))

    def _trained(self, family: str, method: str, seed: int) -> Made:
        """Train a network; CURE begins with one that was trained without attacks."""
        begin, seconds = None, 0.0
        if method == "CURE":
            begin, seconds = self._run(family, "standard", seed, None)
        done, own = self._run(family, method, seed, begin)
        size = sum(leaf.size for leaf in jax.tree.leaves(done.params))
        notes = {"best_epoch": done.best.step / self.per_epoch, "validation": done.best.value}
        return Made(done.best_predictor, done.predictor, seconds + own, f"{size:,}", True, notes)

    def _run(self, family: str, method: str, seed: int, begin: Any) -> tuple[Any, float]:
        """Train, or go on; give the run, and the seconds that it took without validation."""
        scale, data = self.scale, self.data(seed)
        key = jax.random.fold_in(jax.random.key(seed), 5)
        network, params = self.networks(family), None
        if isinstance(network, na.architectures.Architecture):
            called = functools.partial(jax.tree_util.Partial, network.apply)
            params = None if begin is None else begin.params
        else:
            network, called = network(key=key) if begin is None else begin.predictor, _as_it_is
        judge, watching = PGD(self.threat, steps=10, loss="cross_entropy"), 0.0

        def record(model: Any) -> dict[str, float]:
            nonlocal watching
            started = time.perf_counter()
            given = called(model)
            values = {
                "clean": accuracy(given, data.x_val, data.y_val),
                "robust": robust_accuracy(given, data.x_val, data.y_val, judge, key=key),
            }
            watching += time.perf_counter() - started
            return values

        # Without attacks the most robust network is one that has learnt nothing.
        chosen_by = "clean" if method == "standard" else "robust"
        looks = np.unique(np.linspace(0, scale.epochs, scale.looks + 1).round().astype(int))[1:]
        started = time.perf_counter()
        done = train(
            network, data, method=self.rules[method], epochs=scale.epochs, key=key, params=params,
            optimizer=self.optimizer(family), batch_size=scale.batch_size, augmentation=self.augmentation,
            record=record, record_at=[int(look) * self.per_epoch for look in looks], keep_best=chosen_by,
            checkpoint=self.run.checkpoint(f"{family}-{method}-{seed}".lower().replace(" ", "_")),
        )  # fmt: skip
        return done, time.perf_counter() - started - watching


def _as_it_is(model: Any) -> Any:
    return model
