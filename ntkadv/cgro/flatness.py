r"""Flatness of the loss landscape in the input, and the robust generalization gap, for any predictor.

    local flatness(delta)  = (1/N) sum_train max_{|xi|_inf <= delta} |grad_x L(f(x_i + xi), y_i)|_1
    loss change(delta)     = (1/N) sum_train max_{|xi|_inf <= delta} [L(f(x_i + xi), y_i) - L(f(x_i), y_i)]
    global flatness(delta) = the first, on the distribution: measured on test images

The theorem bounds the robust generalization gap by N^(-1/(d + 2)) times the global flatness. How the maximum of a
gradient norm is found is not stated; here it is gradient ascent on |grad_x L|_1, which differentiates twice, from the
clean image, from random points and from the end of a PGD on the loss, and the best of all points on the way. It is a
lower bound on the maximum, and so is the loss change. ReLU networks have no second derivative but at their kinks: what
ascent follows there is the curvature of the loss in the logits.

Source: Li & Li, ICML 2025, arXiv 2306.01271, as reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float, Int, Key
from tqdm.auto import tqdm

from ntkadv._checks import (
    require_finite,
    require_images,
    require_int,
    require_key,
    require_labels,
    require_nonnegative,
    require_same_length,
)
from ntkadv._convolutions import canonical_convolutions
from ntkadv._typing import AnyArray
from ntkadv.attacks.losses import Loss, get_loss
from ntkadv.attacks.model import Model, num_classes_of
from ntkadv.attacks.threat_model import Linf, fold_in_each, sample_keys

__all__ = ["Flatness", "FlatnessCurves", "RankCorrelation", "flatness_curves", "largest_gradient", "rank_correlation"]


@dataclass(frozen=True)
class Flatness:
    """How the maxima over the ball are searched for.

    Args:
        steps: gradient steps from each start.
        restarts: random starts, besides the clean image and the end of a PGD on the loss.
        step_size: length of a step in units of the radius, at first; it falls linearly to a tenth.
        loss: `"cross_entropy"`, by default, or another loss of the package.
        box: keep pixels in [0, 1], as attacks do. False searches the whole ball, as the definition has it.
    """

    _: KW_ONLY
    steps: int = 10
    restarts: int = 1
    step_size: float = 0.25
    loss: str | Loss = "cross_entropy"
    box: bool = True

    def __post_init__(self):
        require_int("steps", self.steps, minimum=1)
        require_int("restarts", self.restarts, minimum=0)
        require_nonnegative("step_size", self.step_size, strict=True)
        get_loss(self.loss)


class Maxima(NamedTuple):
    """The largest values found in the balls around images, perhaps with a leading axis of radii.

    Attributes:
        gradient: of |grad_x L|_1, one an image.
        loss: of L, one an image.
        clean_gradient: |grad_x L|_1 at the image.
        clean_loss: L at the image.
        wrong: whether any point on the way is misclassified, the image itself included.
        clean_wrong: whether the image is.
    """

    gradient: Float[AnyArray, "*R b"]
    loss: Float[AnyArray, "*R b"]
    clean_gradient: Float[AnyArray, "*R b"]
    clean_loss: Float[AnyArray, "*R b"]
    wrong: Bool[AnyArray, "*R b"]
    clean_wrong: Bool[AnyArray, "*R b"]


def largest_gradient(
    model: Model,
    x: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    keys: Key[Array, " b"],
    eps: Float[Array, ""] | float,
    settings: Flatness,
) -> Maxima:
    r"""Search the balls of one batch for the largest :math:`|\nabla_x L|_1` and the largest loss; inside `jax.jit`.

    Ascent is by signs, on the l_inf ball:
    :math:`x \leftarrow \mathrm{project}(x + s\, \mathrm{sign} \nabla_x |\nabla_x L(f(x), y)|_1)`.
    """
    loss = get_loss(settings.loss)
    step_sizes = settings.step_size * eps * jnp.linspace(1, 0.1, settings.steps, dtype=x.dtype)

    def project(points: Array) -> Array:
        points = x + jnp.clip(points - x, -eps, eps)
        return jnp.clip(points, 0, 1) if settings.box else points

    def losses_at(points: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = model(points)
        losses = loss(logits, labels)
        return jnp.sum(losses), (losses, jnp.argmax(logits, axis=1).astype(labels.dtype) != labels)

    def gradient_at(points: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        gradient, (losses, wrong) = jax.grad(losses_at, has_aux=True)(points)
        norms = jnp.sum(jnp.abs(gradient), axis=(1, 2, 3))
        return jnp.sum(norms), (norms, losses, wrong)

    def seen(best: tuple[Array, Array, Array], now: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        return jnp.maximum(best[0], now[0]), jnp.maximum(best[1], now[1]), best[2] | now[2]

    def climb(gradient_of, carry, size):
        points, best = carry
        gradient, now = gradient_of(points)
        return (project(points + size * jnp.sign(gradient)), seen(best, now)), None

    def on_the_norm(points: Array):
        return jax.grad(gradient_at, has_aux=True)(points)

    def on_the_loss(points: Array):
        gradient, (losses, wrong) = jax.grad(losses_at, has_aux=True)(points)
        return gradient, (jnp.sum(jnp.abs(gradient), axis=(1, 2, 3)), losses, wrong)

    clean = gradient_at(x)[1]
    (end, best), _ = jax.lax.scan(partial(climb, on_the_loss), (x, clean), step_sizes)
    draws = [
        jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, -1, 1))(fold_in_each(keys, jnp.uint32(i)))
        for i in range(settings.restarts)
    ]
    starts = jnp.stack([x, end, *(project(x + eps * draw) for draw in draws)])

    def restart(best, start):
        (points, best), _ = jax.lax.scan(partial(climb, on_the_norm), (start, best), step_sizes)
        return seen(best, gradient_at(points)[1]), None

    best, _ = jax.lax.scan(restart, best, starts)
    return Maxima(best[0], best[1], clean[0], clean[1], best[2], clean[2])


@dataclass(frozen=True, eq=False)
class FlatnessCurves:
    """Flatness and gaps of one predictor over radii, `(R,)` each.

    Attributes:
        radii: of the balls.
        local_flatness: mean over training images of the largest gradient norm.
        global_flatness: the same over test images.
        train_loss_change, test_loss_change: mean of the largest loss less the loss at the image.
        train_clean, test_clean: accuracies, the same at all radii.
        train_robust, test_robust: share of images with no misclassified point found; an upper bound, by a short search:
            where accuracies matter, take the attacks.
        train_robust_loss, test_robust_loss: mean of the largest loss.
    """

    radii: np.ndarray
    local_flatness: np.ndarray
    global_flatness: np.ndarray
    train_loss_change: np.ndarray
    test_loss_change: np.ndarray
    train_clean: np.ndarray
    test_clean: np.ndarray
    train_robust: np.ndarray
    test_robust: np.ndarray
    train_robust_loss: np.ndarray
    test_robust_loss: np.ndarray

    @property
    def robust_gap(self) -> np.ndarray:
        """Robust generalization gap in accuracy: on training less on test images."""
        return self.train_robust - self.test_robust

    @property
    def robust_loss_gap(self) -> np.ndarray:
        """Robust generalization gap in the loss, which the theorem bounds: on test less on training images."""
        return self.test_robust_loss - self.train_robust_loss


def flatness_curves(
    model: Model,
    train: tuple[Float[AnyArray, "n h w c"], Int[AnyArray, " n"]],
    test: tuple[Float[AnyArray, "m h w c"], Int[AnyArray, " m"]],
    radii: Sequence[float | int] | Float[np.ndarray, " R"],
    *,
    key: Key[Array, ""],
    settings: Flatness | None = None,
    batch_size: int = 128,
    progress: bool = True,
) -> FlatnessCurves:
    """Measure flatness, loss change and the robust generalization gap over radii.

    One compiled program serves all radii and batches; the last batch is filled up. What is found in a smaller ball lies
    in a larger one, so each curve of maxima is made to rise.

    Args:
        model: a function from images to logits, twice differentiable almost everywhere.
        train: training images and labels.
        test: test images and labels.
        radii: of the l_inf balls, rising; 0 gives the values at the images.
        key: a random key.
        settings: how to search.
        batch_size: images at a time.
        progress: show a bar.

    Raises:
        TypeError, ValueError: an argument is out of range, or a loss or gradient is not finite.
    """
    require_key("key", key)
    require_int("batch_size", batch_size, minimum=1)
    radii = np.asarray(radii, float)
    if radii.ndim != 1 or not radii.size or (np.diff(radii) <= 0).any() or radii[0] < 0:
        raise ValueError(f"radii must be rising numbers from 0 on, got {radii.tolist()}.")
    Linf(float(radii[-1]))
    settings = settings or Flatness()
    for name, (x, labels) in (("train", train), ("test", test)):
        require_images(f"{name} images", x)
        require_same_length(**{f"{name}_images": x, f"{name}_labels": labels})
        require_labels(f"{name} labels", labels, num_classes_of(model, x))
    batch_size = min(batch_size, max(len(train[0]), len(test[0])))
    parts: dict[str, Maxima] = {}
    with tqdm(total=len(radii) * 2, desc="flatness", disable=not progress, leave=False) as bar:
        for name, (x, labels) in (("train", train), ("test", test)):
            rows = []
            for radius in radii.tolist():
                rows.append(_over_batches(model, x, labels, key, radius, settings, batch_size))
                bar.update()
            stacked = Maxima(*(np.stack(values) for values in zip(*rows, strict=True)))
            require_finite(f"the largest gradients ({name})", stacked.gradient)
            require_finite(f"the largest losses ({name})", stacked.loss)
            rising = [np.maximum.accumulate(stacked.gradient, axis=0), np.maximum.accumulate(stacked.loss, axis=0)]
            wrong = np.logical_or.accumulate(stacked.wrong, axis=0)
            parts[name] = stacked._replace(gradient=rising[0], loss=rising[1], wrong=wrong)
    first, second = parts["train"], parts["test"]
    return FlatnessCurves(
        radii, np.mean(first.gradient, axis=1), np.mean(second.gradient, axis=1),
        np.mean(first.loss - first.clean_loss, axis=1), np.mean(second.loss - second.clean_loss, axis=1),
        1 - np.mean(first.clean_wrong, axis=1), 1 - np.mean(second.clean_wrong, axis=1),
        1 - np.mean(first.wrong, axis=1), 1 - np.mean(second.wrong, axis=1),
        np.mean(first.loss, axis=1), np.mean(second.loss, axis=1),
    )  # fmt: skip


class RankCorrelation(NamedTuple):
    """Spearman's rank correlation, and the p-value of no correlation at all."""

    rho: float
    p: float
    n: int


def rank_correlation(
    curves: Sequence[FlatnessCurves] | Mapping[str, Sequence[FlatnessCurves]], radius: float, *, gap: str = "robust_gap"
) -> RankCorrelation:
    """Correlate global flatness with the robust generalization gap, over epochs and models.

    Args:
        curves: one for each epoch; or for each model, one for each of its epochs, which are pooled.
        radius: where to compare, one of the radii of all.
        gap: `"robust_gap"`, in accuracy, or `"robust_loss_gap"`.

    Raises:
        ValueError: there are fewer than three curves, some do not have the radius, `gap` is not known, or one of the
            two is the same in all, so that there are no ranks.
    """
    pooled = [curve for group in curves.values() for curve in group] if isinstance(curves, Mapping) else list(curves)
    if gap not in ("robust_gap", "robust_loss_gap"):
        raise ValueError(f"gap must be 'robust_gap' or 'robust_loss_gap', got {gap!r}.")
    if len(pooled) < 3:
        raise ValueError(f"curves must hold three or more, got {len(pooled)}; measure more epochs or models.")
    places = [np.flatnonzero(np.isclose(curve.radii, radius)) for curve in pooled]
    if not all(len(place) for place in places):
        raise ValueError(f"radius must be one of the radii of every curve, got {radius:g}.")
    flat = np.array([curve.global_flatness[place[0]] for curve, place in zip(pooled, places, strict=True)])
    gaps = np.array([getattr(curve, gap)[place[0]] for curve, place in zip(pooled, places, strict=True)])
    if np.ptp(flat) == 0 or np.ptp(gaps) == 0:
        raise ValueError("global flatness and gap must vary over the curves, but one of them is the same in all.")
    rho, p = np.asarray(scipy.stats.spearmanr(flat, gaps), float)
    return RankCorrelation(float(rho), float(p), len(pooled))


def _over_batches(
    model: Model, x: AnyArray, labels: AnyArray, key: Array, radius: float, settings: Flatness, batch_size: int
) -> Maxima:
    keys = sample_keys(key, len(x))
    found = []
    for i in range(0, len(x), batch_size):
        places = np.arange(i, min(i + batch_size, len(x)))
        filled = np.resize(places, batch_size)
        images = jnp.asarray(np.asarray(x)[filled])
        batch = (images, jnp.asarray(np.asarray(labels)[filled], jnp.int32), keys[filled])
        maxima = _search(model, *batch, jnp.asarray(radius, images.dtype), settings)
        found.append([np.asarray(values)[: len(places)] for values in maxima])
    return Maxima(*(np.concatenate(values) for values in zip(*found, strict=True)))


@eqx.filter_jit
def _search(model: Model, x: Array, labels: Array, keys: Array, eps: Array, settings: Flatness) -> Maxima:
    arrays, rest = eqx.partition(model, eqx.is_array)

    def search(arrays: Any, x: Array, labels: Array, keys: Array, eps: Array) -> Maxima:
        return largest_gradient(eqx.combine(arrays, rest), x, labels, keys, eps, settings)

    return canonical_convolutions(search)(arrays, x, labels, keys, eps)
