"""Types shared by the whole package."""

from typing import TypeAlias

import numpy as np
from jaxtyping import Array

AnyArray: TypeAlias = Array | np.ndarray
"""A JAX or a NumPy array: `Float[AnyArray, "n c"]` is a float array of either kind with two axes."""
