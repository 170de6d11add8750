"""Attacks on any JAX callable from images to logits."""
