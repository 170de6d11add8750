"""ntkadv: the neural tangent kernel theory of adversarial training, in JAX."""
