"""Models whose best attack is known, or that are awkward on purpose."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

IMAGE = (3, 4, 2)
CLASSES = 3


class Linear(eqx.Module):
    weights: Array

    def __call__(self, x):
        return jnp.matmul(x.reshape(len(x), -1), self.weights, precision="highest")


class Smooth(eqx.Module):
    """A small network with two tanh layers."""

    first: Array
    second: Array
    third: Array

    def __call__(self, x):
        hidden = jnp.tanh(jnp.matmul(x.reshape(len(x), -1) - 0.5, self.first, precision="highest"))
        hidden = jnp.tanh(jnp.matmul(hidden, self.second, precision="highest"))
        return jnp.matmul(hidden, self.third, precision="highest")


def linear(classes=2, seed=0):
    return Linear(jax.random.normal(jax.random.key(seed), (int(np.prod(IMAGE)), classes)))


def smooth(seed=0, width=16):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(int(np.prod(IMAGE)), width), (width, width), (width, CLASSES)]
    return Smooth(*(jax.random.normal(k, s) * (2 / s[0] ** 0.5) for k, s in zip(keys, shapes, strict=True)))


def zero(x):
    """Masks every gradient."""
    return jnp.zeros((len(x), CLASSES)) * jnp.sum(x)


def images(n, seed=0, image=IMAGE):
    return np.random.default_rng(seed).random((n, *image)).astype(np.float32)


def labels_of(model, x, flipped=0):
    """The model's own answers, the first `flipped` of them made wrong."""
    logits = np.asarray(model(jnp.asarray(x)))
    labels = logits.argmax(1).astype(np.int32)
    labels[:flipped] = (labels[:flipped] + 1) % logits.shape[1]
    return labels
