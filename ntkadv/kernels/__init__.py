"""Kernel matrices: of an architecture at infinite width, of a finite network at its parameters, and how they move."""

from ntkadv.kernels.empirical import (
    empirical_ark,
    empirical_nngp,
    empirical_ntk,
    empirical_ntk_diagonal,
    ntk_product,
)
from ntkadv.kernels.gram import gram, memory_estimate
from ntkadv.kernels.measures import (
    cosine_distance,
    effective_rank,
    kernel_spectrum,
    polar,
    relative_distance,
    target_alignment,
    top_share,
)
from ntkadv.kernels.movement import KernelMovement, kernel_movement

__all__ = [
    "KernelMovement",
    "cosine_distance",
    "effective_rank",
    "empirical_ark",
    "empirical_nngp",
    "empirical_ntk",
    "empirical_ntk_diagonal",
    "gram",
    "kernel_movement",
    "kernel_spectrum",
    "memory_estimate",
    "ntk_product",
    "polar",
    "relative_distance",
    "target_alignment",
    "top_share",
]
