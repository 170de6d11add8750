"""One number chosen on validation images: the stopping time, the ridge, whatever makes a family of predictors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from tqdm.auto import tqdm

from ntkadv._typing import AnyArray
from ntkadv.attacks.base import Attack
from ntkadv.attacks.model import Model

__all__ = ["RobustnessPath", "robustness_path"]


@dataclasses.dataclass(frozen=True, eq=False)
class RobustnessPath:
    """Accuracy along a family of predictors.

    Attributes:
        values: the parameter, `(T,)`.
        clean: accuracy on the images as they are, `(T,)`.
        robust: accuracy on the attacked images, `(T,)`; each predictor is attacked for itself.
        n: number of images.
    """

    values: np.ndarray
    clean: np.ndarray
    robust: np.ndarray
    n: int

    @property
    def best(self) -> float:
        """The value with the highest robust accuracy; of several, the middle one."""
        places = np.flatnonzero(self.robust == self.robust.max())
        return float(self.values[places[len(places) // 2]])


def robustness_path(
    predictor: Callable[[float], Model],
    values: Sequence[float] | np.ndarray,
    x: Float[AnyArray, "n h w c"],
    labels: Int[AnyArray, " n"],
    *,
    attack: Attack,
    key: Key[Array, ""],
    batch_size: int | None = None,
    progress: bool = True,
) -> RobustnessPath:
    """Measure clean and robust accuracy along a family of predictors, say `dynamics.predictor` over times.

    Args:
        predictor: makes the model for one value.
        values: of the parameter, at least one.
        x: images, `(n, height, width, channels)`.
        labels: their classes.
        attack: made anew against each predictor, with the same key.
        key: random key of the attack.
        batch_size: images attacked at a time.
        progress: show a progress bar.

    Raises:
        ValueError: there are no values, or an argument of the attack is out of range.
    """
    if len(values) == 0:
        raise ValueError("values must hold at least one value of the parameter, got none")
    clean, robust = [], []
    images = jnp.asarray(x)
    for value in tqdm(values, desc="robustness", disable=not progress, leave=False):
        model = predictor(float(value))
        attacked = attack(model, images, labels, key=key, batch_size=batch_size)
        for accuracies, batch in ((clean, images), (robust, attacked)):
            predicted = np.argmax(np.asarray(model(batch)), axis=1)
            accuracies.append(np.mean(predicted == np.asarray(labels)))
    return RobustnessPath(np.asarray(values, float), np.array(clean), np.array(robust), len(x))
