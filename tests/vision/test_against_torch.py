"""Batch norm and a whole residual network against PyTorch's with the same weights, forwards and backwards."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.vision import Pass, PreActResNet
from ntkadv.vision.layers import BatchNorm

torch = pytest.importorskip("torch")


def drawn(make, seed=0):
    """A module in float64, all its arrays by NumPy."""
    rng = np.random.default_rng(seed)

    def numbers(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jnp.asarray(
            0.4 * rng.normal(size=leaf.shape) if len(leaf.shape) > 1 else 0.4 + 0.6 * rng.random(leaf.shape)
        )

    return jax.tree.map(numbers, eqx.filter_eval_shape(make))


def put(parameter, array):
    """Numbers of ours into one of theirs: images and kernels have channels first there."""
    array = np.asarray(array)
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array
    with torch.no_grad():
        parameter.copy_(torch.tensor(np.ascontiguousarray(array)))


def theirs_as_ours(tensor):
    array = tensor.detach().numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array


def torch_norm(norm):
    layer = torch.nn.BatchNorm2d(norm.scale.size, dtype=torch.float64)
    for parameter, array in ((layer.weight, norm.scale), (layer.bias, norm.offset),
                             (layer.running_mean, norm.running.mean),
                             (layer.running_var, norm.running.variance)):  # fmt: skip
        put(parameter, array)
    return layer


def torch_convolution(convolution):
    size, _, channels_in, channels = convolution.weights.shape
    layer = torch.nn.Conv2d(channels_in, channels, size, stride=convolution.stride, padding=size // 2,
                            bias=False, dtype=torch.float64)  # fmt: skip
    put(layer.weight, convolution.weights)
    return layer


class Block(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.norms = torch.nn.ModuleList(map(torch_norm, block.norms))
        self.convolutions = torch.nn.ModuleList(map(torch_convolution, block.convolutions))
        self.shortcut = None if block.shortcut is None else torch_convolution(block.shortcut)

    def forward(self, x):
        hidden = torch.relu(self.norms[0](x))
        skip = x if self.shortcut is None else self.shortcut(hidden)
        return self.convolutions[1](torch.relu(self.norms[1](self.convolutions[0](hidden)))) + skip


class Network(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.stem = torch_convolution(model.stem)
        self.blocks = torch.nn.ModuleList(map(Block, model.blocks))
        self.norm = torch_norm(model.norm)
        self.head = torch.nn.Linear(*model.head.weights.shape, dtype=torch.float64)
        put(self.head.weight, model.head.weights)
        put(self.head.bias, model.head.bias)

    def forward(self, x):
        z = self.stem((x - 0.5) / 0.25)
        for block in self.blocks:
            z = block(z)
        return self.head(torch.relu(self.norm(z)).mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_that_of_pytorch(training, x64):
    norm = drawn(lambda: BatchNorm(3))
    theirs = torch_norm(norm).train(training)
    x, pull = np.random.default_rng(1).normal(size=(2, 4, 5, 6, 3))
    through = Pass(training=training)

    def total(norm, x):
        through = Pass(training=training)
        return jnp.sum(norm(x, through) * pull)

    image = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    out = theirs(image)
    (out * torch.tensor(pull.transpose(0, 3, 1, 2))).sum().backward()
    np.testing.assert_allclose(norm(jnp.asarray(x), through), out.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-10)
    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(norm, jnp.asarray(x))
    np.testing.assert_allclose(slopes[1], image.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(slopes[0].scale, theirs.weight.grad, rtol=1e-9)
    np.testing.assert_allclose(slopes[0].offset, theirs.bias.grad, rtol=1e-9)
    moved = through.moved(norm.running)
    np.testing.assert_allclose(moved.mean, theirs.running_mean, rtol=1e-12)
    np.testing.assert_allclose(moved.variance, theirs.running_var, rtol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_network_is_that_of_pytorch(training, x64, key):
    sizes = {"num_classes": 3, "stem": 4, "widths": (4, 6), "blocks": (2, 1), "channels_in": 2}
    model = drawn(lambda: PreActResNet(**sizes, key=key))
    theirs = Network(model).train(training)
    rng = np.random.default_rng(2)
    x, pull = rng.random((5, 8, 8, 2)), rng.normal(size=(5, 3))

    arrays, rest = eqx.partition(model, eqx.is_array)

    def total(arrays, x):
        through, own = Pass(training=training), eqx.combine(arrays, rest)
        logits = own.forward(x, through)
        return jnp.sum(logits * pull), (logits, eqx.filter(own.after(through), eqx.is_array))

    ours = jax.jit(
        jax.grad(total, argnums=(0, 1), has_aux=True), compiler_options={"xla_backend_optimization_level": 0}
    )
    (slope, image_slope), (logits, after) = ours(arrays, jnp.asarray(x))
    image = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    out = theirs(image)
    (out * torch.tensor(pull)).sum().backward()
    np.testing.assert_allclose(logits, out.detach(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(image_slope, image.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-7, atol=1e-10)
    pairs = [(slope.stem.weights, theirs.stem), (slope.head.weights, theirs.head)]
    norms = [(model.norm, slope.norm, after.norm, theirs.norm)]
    for old, block, new, other in zip(model.blocks, slope.blocks, after.blocks, theirs.blocks, strict=True):
        pairs += [(c.weights, o) for c, o in zip(block.convolutions, other.convolutions, strict=True)]
        norms += list(zip(old.norms, block.norms, new.norms, other.norms, strict=True))
        if block.shortcut is not None:
            pairs.append((block.shortcut.weights, other.shortcut))
    for found, layer in pairs:
        np.testing.assert_allclose(found, theirs_as_ours(layer.weight.grad), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(slope.head.bias, theirs.head.bias.grad, rtol=1e-9)
    for old, found, new, layer in norms:
        np.testing.assert_allclose(found.scale, layer.weight.grad, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(found.offset, layer.bias.grad, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(new.running.mean, layer.running_mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(new.running.variance, layer.running_var, rtol=1e-9, atol=1e-12)
        assert np.array_equal(old.running.mean, new.running.mean) == (not training)
