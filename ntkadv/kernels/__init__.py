"""Kernel matrices of an architecture."""
