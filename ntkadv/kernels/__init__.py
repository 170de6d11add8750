"""Kernel matrices: of an architecture at infinite width, and of a finite network at its parameters."""

from ntkadv.kernels.empirical import (
    empirical_ark,
    empirical_nngp,
    empirical_ntk,
    empirical_ntk_diagonal,
    ntk_product,
)
from ntkadv.kernels.gram import gram, memory_estimate

__all__ = [
    "empirical_ark",
    "empirical_nngp",
    "empirical_ntk",
    "empirical_ntk_diagonal",
    "gram",
    "memory_estimate",
    "ntk_product",
]
