"""Kernel matrices of an architecture."""

from ntkadv.kernels.gram import gram, memory_estimate

__all__ = ["gram", "memory_estimate"]
