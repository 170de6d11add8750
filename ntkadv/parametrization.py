"""Ways to write the regularization xi >= 0 by unconstrained weights w, one for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["PARAMETRIZATIONS", "Parametrization"]

Map = Callable[[np.ndarray], np.ndarray]


class Parametrization(NamedTuple):
    """xi as a function of weights w, both `(n,)`.

    Attributes:
        xi: the regularization at w.
        slope: d xi / d w at w.
        start: weights at which xi has given values.
        project: what is done to w after each step.
    """

    xi: Map
    slope: Map
    start: Map
    project: Map

    def pull_back(self, weights: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Turn a gradient in xi into the one in w."""
        return gradient * self.slope(weights)


def _same(weights: np.ndarray) -> np.ndarray:
    return weights


PARAMETRIZATIONS: dict[str, Parametrization] = {
    "projected": Parametrization(_same, np.ones_like, _same, lambda w: np.maximum(w, 0)),
    # At 0 the slope is +1, as JAX has it for |w|: with 0, as in PyTorch, a fit that starts at 0 stays there.
    "absolute": Parametrization(np.abs, lambda w: np.where(w < 0, -1.0, 1.0), _same, _same),
    "squared": Parametrization(np.square, lambda w: 2 * w, np.sqrt, _same),
}
