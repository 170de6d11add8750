"""A tiny residual network with batch norm in float64, written out by hand, and descent by hand."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from training_problems import CLASSES

from ntkadv.attacks.threat_model import sample_keys
from ntkadv.data import Dataset
from ntkadv.training import Batch, Problem, TrainState, sgd
from ntkadv.training.network import Forward, trainable
from ntkadv.vision import PreActResNet

SHAPE = (4, 4, 2)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.02
OPTIMIZER = sgd(RATE, momentum=MOMENTUM, weight_decay=DECAY)


def images(n=6, m=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n + m) % CLASSES
    x = rng.random((n + m, *SHAPE)).astype(np.float32)
    return Dataset.from_arrays(
        name="random", x_train=x[:n], y_train=labels[:n], x_test=x[n:], y_test=labels[n:], num_classes=CLASSES
    )


def filled(make, dtype=jnp.float64, seed=0):
    """A network with numbers of NumPy's in all its arrays, batch norms' among them, which needs nothing compiled."""
    rng = np.random.default_rng(seed)

    def numbers(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5
        drawn = scale * rng.normal(size=leaf.shape) if len(leaf.shape) > 1 else 0.4 + 0.6 * rng.random(leaf.shape)
        return jnp.asarray(drawn, dtype)

    return jax.tree.map(numbers, eqx.filter_eval_shape(make, key=jax.random.key(0)))


def tiny_resnet(seed=0, dtype=jnp.float64, stages=2, **options):
    """One block, or two, the second of stride 2."""
    sizes = {"num_classes": CLASSES, "stem": 4, "widths": (4, 6)[:stages], "blocks": (1,) * stages}
    return filled(functools.partial(PreActResNet, **sizes, channels_in=SHAPE[-1], **options), dtype, seed)


def batch_of(held, places=None, step=0):
    """A batch in float64, of the images as they are."""
    n = len(held.x_train)
    places = jnp.arange(n) if places is None else jnp.asarray(places)
    x, labels, targets = (jnp.asarray(part)[places] for part in (held.x_train, held.y_train, held.targets_train))
    keys = sample_keys(jax.random.key(0), len(places))
    return Batch(x.astype(float), labels, targets.astype(float), places, keys, jnp.asarray(0.0), len(places) / n,
                 step=jnp.int32(step))  # fmt: skip


def begun(method, model, held, augmentation=None, optimizer=OPTIMIZER):
    """The network as methods see it, and the state at the beginning, some momentum gathered already."""
    network, params, statistics = trainable(model)
    f = Forward(network, statistics)
    problem = Problem(f, params, held.x_train.shape, augmentation, jax.random.key(5))
    inner = jax.tree.map(lambda leaf: leaf + 0.01 if eqx.is_inexact_array(leaf) else leaf, optimizer.init(params))
    return network, TrainState(params, inner, method.start(problem), statistics)


def compiled(function):
    """Compile without optimisation, which takes a third of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def updater(method, network, augmentation=None, optimizer=OPTIMIZER):
    """The update of a method, compiled: from state and batch to the new state and its metrics."""

    def update(state, batch):
        batch = batch._replace(augmentation=augmentation)
        return method.update(Forward(network, state.statistics), optimizer, state, batch)

    run = compiled(update)
    return lambda state, batch: run(state, batch._replace(augmentation=None))


def speeds(state):
    """What the optimiser's momentum has gathered, a list like the parameters'."""
    return [leaf for leaf in jax.tree.leaves(state.optimizer) if eqx.is_inexact_array(leaf)]


def descended(params, gradients, speeds, rate=RATE, keep=None):
    """Momentum and weight decay, tensor by tensor, in NumPy; the new tensors and speeds."""
    after, gathered = [], []
    for number, (w, g, v) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(gradients), speeds, strict=True)):
        w, g, v = np.asarray(w), np.asarray(g), np.asarray(v)
        v = MOMENTUM * v + g + DECAY * w
        step = rate * v
        after.append(w - (step if keep is None else step * keep[number]))
        gathered.append(v)
    return after, gathered


def convolved(x, weights, stride=1):
    pads = [(weights.shape[0] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(x, weights, (stride,) * 2, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def resnet(params, running, x, *, training=True, shifts=None):
    """The network of `tiny_resnet`: logits, hidden states, and running averages after it, a list."""
    hidden, moved = [], []

    def norm(layer, old, z):
        mean, variance = old.running.mean, old.running.variance
        if training:
            count = z.size // z.shape[-1]
            mean = jnp.sum(z, (0, 1, 2)) / count
            variance = jnp.sum((z - mean) ** 2, (0, 1, 2)) / count
            moved.append(0.9 * old.running.mean + 0.1 * mean)
            moved.append(0.9 * old.running.variance + 0.1 * variance * count / (count - 1))
        return (z - mean) / jnp.sqrt(variance + 1e-5) * layer.scale + layer.offset

    z = convolved((x - 0.5) / 0.25, params.stem.weights)
    for number, (block, old) in enumerate(zip(params.blocks, running.blocks, strict=True)):
        stride = 1 + number
        state = jnp.maximum(norm(block.norms[0], old.norms[0], z), 0)
        hidden.append(state)
        branch = state if shifts is None else state + shifts[number]
        inner = norm(block.norms[1], old.norms[1], convolved(branch, block.convolutions[0].weights, stride))
        side = z if block.shortcut is None else convolved(state, block.shortcut.weights, stride)
        z = convolved(jnp.maximum(inner, 0), block.convolutions[1].weights) + side
    z = jnp.mean(jnp.maximum(norm(params.norm, running.norm, z), 0), (1, 2))
    return z @ params.head.weights + params.head.bias, hidden, moved


def with_averages(running, moved):
    """Running averages like `running`, of a list."""
    return jax.tree.unflatten(jax.tree.structure(running), moved)


def entropies(logits, labels):
    """Cross-entropy of each image."""
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]


def divergences(first, second):
    """KL(p || q) of each image, class by class."""
    p, q = jax.nn.softmax(first), jax.nn.softmax(second)
    return sum(p[:, k] * (jnp.log(p[:, k]) - jnp.log(q[:, k])) for k in range(CLASSES))


def assert_leaves(tree, expected, rtol=1e-7, atol=1e-10):
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(expected)
    assert len(leaves) == len(others)
    for ours, theirs in zip(leaves, others, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)
