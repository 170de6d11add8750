"""Networks and data of the tests, and what both are by definition."""

import jax
import jax.numpy as jnp

from ntkadv.cgro import PatchDistribution, PatchNetwork

NETWORKS = {
    "cubic": PatchNetwork(width=5, activation="cubic"),
    "relu^2, opposite": PatchNetwork(width=6, power=2),
    "relu^3, equal": PatchNetwork(width=6, pairs="equal"),
    "relu^4, independent": PatchNetwork(width=6, power=4, pairs="none"),
}


def sample(n=8, d=9, *, alpha=1.5, sigma=0.4, patches=3, seed=0, position="random"):
    distribution = PatchDistribution(d, alpha=alpha, sigma=sigma, num_patches=patches, signal_position=position)
    return distribution.sample(n, key=jax.random.key(seed), w_star=distribution.direction(jax.random.key(9)))


def start(network, seed=0, std=0.5):
    """Filters that are in no way symmetric."""
    keys = jax.random.split(jax.random.key(seed))
    return network.init(keys[0], 9, std=std) + std / 2 * jax.random.normal(keys[1], (network.width, 9))


def plain_scores(network, filters, x):
    """f_W by its definition, one filter and one patch after the other."""
    total = 0.0
    for sign, w in zip(network.signs, filters, strict=True):
        for j in range(x.shape[1]):
            z = x[:, j] @ w
            total = total + sign * (z**3 if network.activation == "cubic" else jnp.where(z > 0, z, 0) ** network.power)
    return total


def plain_loss(network, attack, clean_weight, data, filters):
    """The mixed loss by its definition; the attacked samples are constants."""
    attacked = jax.lax.stop_gradient(attack.perturb(network, filters, data))
    clean, adversarial = (
        jnp.mean(jnp.log1p(jnp.exp(-data.y * plain_scores(network, filters, x)))) for x in (data.x, attacked)
    )
    return clean_weight * clean + (1 - clean_weight) * adversarial
