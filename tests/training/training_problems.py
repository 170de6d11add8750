"""Small data sets and networks, and their training by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from ntkadv.architectures import Erf, cnn, mlp
from ntkadv.data import Dataset

IMAGE = (3, 3, 1)
CLASSES = 3


def data(n=6, m=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n + m) % CLASSES
    x = rng.random((n + m, *IMAGE)).astype(np.float32)
    return Dataset.from_arrays(
        name="random", x_train=x[:n], y_train=labels[:n], x_test=x[n:], y_test=labels[n:], num_classes=CLASSES
    )


def doubled(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def smooth_mlp(width=8, depth=1, seed=0):
    """A network that is smooth in its parameters and images, and its parameters in float64."""
    arch = mlp(depth=depth, width=width, num_classes=CLASSES, activation=Erf())
    return arch, doubled(arch.init(jax.random.key(seed), IMAGE))


def small_cnn():
    return cnn(depth=2, width=4, num_classes=CLASSES)


def linear(params, x):
    """A model that is linear in its images, and in its parameters."""
    return jnp.matmul(x.reshape(len(x), -1), params["w"], precision="highest") + params["b"]


def linear_params(seed=0):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(9, CLASSES)) / 3), "b": jnp.asarray(rng.normal(size=CLASSES))}


def linear_gradients(params, x, targets):
    """Gradients of the loss of each image by hand, in NumPy: (n, 9, c), (n, c); and the losses."""
    flat, residual = x.reshape(len(x), -1), None
    residual = flat @ params["w"] + params["b"] - targets
    return {"w": np.einsum("ni,nj->nij", flat, residual), "b": residual}, 0.5 * np.sum(residual**2, axis=1)


def tanh_network(params, x):
    hidden = jnp.tanh(jnp.matmul(x.reshape(len(x), -1), params["first"], precision="highest"))
    return jnp.matmul(hidden, params["second"], precision="highest")


def tanh_params(seed=0, width=5):
    rng = np.random.default_rng(seed)
    return {"first": jnp.asarray(rng.normal(size=(9, width))), "second": jnp.asarray(rng.normal(size=(width, CLASSES)))}


def tanh_gradients(params, x, targets):
    """Backpropagation by hand, of the sum of the squared losses of the images; and the losses."""
    flat = x.reshape(len(x), -1)
    hidden = np.tanh(flat @ params["first"])
    residual = hidden @ params["second"] - targets
    back = (residual @ params["second"].T) * (1 - hidden**2)
    return {"first": flat.T @ back, "second": hidden.T @ residual}, 0.5 * np.sum(residual**2, axis=1)


def host(tree):
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


def equal_bits(first, second):
    ours, theirs = jax.tree.leaves(first), jax.tree.leaves(second)
    return len(ours) == len(theirs) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True)
    )
