"""Architectures as objects: their finite networks, their scale, their memory, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.architectures import (
    Conv,
    Dense,
    Erf,
    Flatten,
    Gelu,
    GlobalAvgPool,
    Network,
    Relu,
    Residual,
    Serial,
    cnn,
    mlp,
    resnet,
)

IMAGE = (6, 5, 3)
NETWORKS = {
    "mlp": mlp(depth=2, num_classes=4, width=8),
    "cnn": cnn(depth=2, num_classes=4, width=8, stride=2),
    "cnn pooled": cnn(depth=2, num_classes=4, width=8, pooling="average", activation=Gelu()),
    "resnet": resnet(depth=4, num_classes=4, width=8),
}


def images(n=3):
    return jnp.asarray(np.random.default_rng(0).random((n, *IMAGE)), jnp.float32)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_finite_network_gives_one_row_of_logits_per_image(name, key):
    arch = NETWORKS[name]
    params = arch.init(key, IMAGE)
    logits = jax.jit(arch.apply)(params, images())
    assert (logits.shape, logits.dtype) == ((3, 4), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert arch.output_shape(IMAGE) == (4,)
    again = arch.init(key, IMAGE)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


def test_every_parameter_is_standard_normal(key):
    params = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(mlp(depth=2, num_classes=4).init(key, IMAGE))])
    assert len(params) == 90 * 512 + 512 * 512 + 512 * 4 + 512 + 512 + 4
    assert abs(params.mean()) < 4.5 / np.sqrt(len(params))
    assert abs(params.std() - 1) < 4.5 / np.sqrt(2 * len(params))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_inputs_are_centred_by_the_architecture(name, key):
    shifted = dataclasses.replace(NETWORKS[name], center=0.25)
    params = shifted.init(key, IMAGE)
    np.testing.assert_allclose(
        shifted.apply(params, images() - 0.25), NETWORKS[name].apply(params, images()), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        shifted.ntk(images() - 0.25, images()[:1] - 0.25), NETWORKS[name].ntk(images(), images()[:1]), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["mlp", "cnn pooled"])
def test_a_normalised_network_has_the_mean_ntk_diagonal_one_and_all_else_in_proportion(name, key):
    arch = NETWORKS[name]
    normalized = arch.normalized(images())
    factor = np.mean(arch.diagonal(images()).ntk)
    assert abs(factor - 1) > 0.05
    np.testing.assert_allclose(np.mean(normalized.diagonal(images()).ntk), 1, rtol=1e-5)
    np.testing.assert_allclose(normalized.diagonal(images()).nngp, arch.diagonal(images()).nngp / factor, rtol=1e-5)
    for ours, before in zip(normalized.kernels(images(), images()), arch.kernels(images(), images()), strict=True):
        np.testing.assert_allclose(ours, before / factor, rtol=1e-5)
    params = arch.init(key, IMAGE)
    np.testing.assert_allclose(
        normalized.apply(params, images()), arch.apply(params, images()) / np.sqrt(factor), rtol=1e-4, atol=1e-6
    )


def test_vectors_are_inputs_of_an_mlp(key):
    arch, flat = NETWORKS["mlp"], images().reshape(3, -1)
    np.testing.assert_allclose(arch.ntk(flat, flat), arch.ntk(images(), images()), rtol=1e-6)
    assert arch.apply(arch.init(key, flat.shape[1:]), flat).shape == (3, 4)


def test_architectures_are_equal_and_hashed_by_what_they_are():
    assert mlp(depth=2, num_classes=4) == mlp(depth=2, num_classes=4)
    assert len({mlp(depth=2, num_classes=4), mlp(depth=2, num_classes=4), mlp(depth=3, num_classes=4)}) == 2


def temporary_bytes(arch, shape, n1, n2):
    x1, x2, weights = (jax.ShapeDtypeStruct(s, np.float32) for s in ((n1, *shape), (n2, *shape), (n1, n2)))
    weighted = jax.grad(lambda x1, x2, weights: jnp.sum(weights * arch.ntk(x1, x2)))
    memory = jax.jit(weighted).lower(x1, x2, weights).compile().memory_analysis()
    images_themselves = 4 * (2 * n1 + n2) * int(np.prod(shape))  # centred, and the gradient
    return memory.temp_size_in_bytes - images_themselves


MEASURED = {
    "mlp": (mlp(depth=5, num_classes=3), (4, 4, 3), 64),
    "mlp gelu": (mlp(depth=3, num_classes=3, activation=Gelu()), (4, 4, 3), 64),
    "mlp erf": (mlp(depth=3, num_classes=3, activation=Erf()), (4, 4, 3), 64),
    "cnn": (cnn(depth=5, num_classes=3), (6, 6, 3), 32),
    "cnn pooled": (cnn(depth=3, num_classes=3, pooling="average"), (5, 5, 3), 24),
    "resnet": (resnet(depth=8, num_classes=3), (6, 6, 3), 32),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the coefficients are those of compiled CPU programs")
@pytest.mark.parametrize("name", MEASURED)
def test_pair_bytes_bounds_the_working_memory_of_a_gradient_within_a_factor_two(name):
    arch, shape, n = MEASURED[name]
    measured = temporary_bytes(arch, shape, n, n) / n**2
    assert measured < arch.pair_bytes(shape) < 2 * measured


def test_pair_bytes_follows_strides_through_both_paths_of_a_block():
    block = Residual(Serial(Conv(8, 3, 2), Relu(), Conv(8)), shortcut=Conv(8, 1, 2))
    one = Network(3, Serial(Conv(8), block, Flatten(), Dense(3)))
    two = Network(3, Serial(Conv(8), block, Relu(), Flatten(), Dense(3)))
    assert two.pair_bytes((8, 8, 3)) - one.pair_bytes((8, 8, 3)) == 4 * Relu.residuals * 16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mlp(depth=0, num_classes=3), "depth must be at least 1, got 0"),
        (lambda: cnn(depth=0, num_classes=3), "depth must be at least 1, got 0"),
        (lambda: resnet(depth=5, num_classes=3), "depth must be even and at least 4.*got 5"),
        (lambda: resnet(depth=2, num_classes=3), "depth must be even and at least 4.*got 2"),
        (lambda: cnn(depth=1, num_classes=3, kernel_size=4), "kernel_size must be odd and positive, got 4"),
        (lambda: cnn(depth=1, num_classes=3, stride=0), "stride must be at least 1, got 0"),
        (lambda: mlp(depth=1, num_classes=3, w_std=0.0), "w_std must be positive and finite, got 0"),
        (lambda: mlp(depth=1, num_classes=3, w_std=float("nan")), "w_std must be positive and finite, got nan"),
        (lambda: mlp(depth=1, num_classes=3, b_std=-0.1), "b_std must be zero or more and finite, got -0.1"),
        (lambda: mlp(depth=1, num_classes=3, width=0), "at least one feature, got 0"),
        (lambda: mlp(depth=1, num_classes=0), "at least one feature, got 0"),
        (lambda: mlp(depth=1, num_classes=3, center=float("inf")), "center must be a finite pixel value, got inf"),
        (lambda: Network(0, Dense(1)), "num_classes must be at least 1, got 0"),
        (lambda: Network(1, Dense(1), output_scale=0.0), "output_scale must be positive and finite, got 0"),
        (lambda: Residual(Serial(Dense(4), Relu())), "must end in Dense or Conv, but it ends in Relu"),
    ],
)
def test_settings_out_of_range_are_refused_when_the_network_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_unknown_pooling_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"pooling must be one of \['average', 'flatten'\], got 'max'"):
        cnn(depth=1, num_classes=3, pooling="max")  # pyright: ignore[reportArgumentType]


def test_serial_takes_layers(unchecked):
    with pytest.raises(TypeError, match="one layer or more"):
        Serial()
    with pytest.raises(TypeError, match="one layer or more"):
        Serial(Dense(3), "relu")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("layer", [Serial(Flatten(), Dense(5)), Serial(Conv(8), Relu(), Dense(3))])
def test_a_network_whose_outputs_are_not_the_classes_is_refused(layer, key):
    """Of another number, or an image."""
    arch = Network(3, layer)
    uses = (lambda: arch.ntk(images(), images()), lambda: arch.diagonal(images()), lambda: arch.init(key, IMAGE))
    for use in uses:
        with pytest.raises(ValueError, match="num_classes is 3: end it in Flatten or GlobalAvgPool"):
            use()


@pytest.mark.parametrize("first", [Conv(4), GlobalAvgPool()])
@pytest.mark.parametrize("flatten", [True, False])
def test_image_layers_refuse_vectors(first, flatten, key):
    """Given as vectors, or flattened by a layer before."""
    arch = Network(3, Serial(Flatten(), first, Dense(3)) if flatten else Serial(first, Dense(3)))
    x = images() if flatten else images().reshape(3, -1)
    with pytest.raises(ValueError, match="needs images of shape"):
        arch.ntk(x, x)
    with pytest.raises(ValueError, match="needs images of shape"):
        arch.init(key, x.shape[1:])


@pytest.mark.parametrize("branch", [Conv(8, stride=2), Conv(7)])
def test_paths_of_different_shapes_are_refused(branch, key):
    arch = Network(3, Serial(Conv(8), Residual(branch), Flatten(), Dense(3)))
    with pytest.raises(ValueError, match=r"the branch of Residual gives \(.*\) and the shortcut \(6, 5, 8\)"):
        arch.init(key, IMAGE)
    with pytest.raises(ValueError, match="the branch of Residual gives"):
        arch.ntk(images(), images())


def test_batches_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x1 \(3, 6, 5, 3\) and x2 \(3, 5, 5, 3\)"):
        NETWORKS["mlp"].ntk(images(), images()[:, 1:])


def test_nothing_to_normalise_by_is_refused():
    silent = mlp(depth=1, num_classes=3, b_std=0.0)
    with pytest.raises(ValueError, match=r"mean diagonal 0\.0"):
        silent.normalized(np.full((2, *IMAGE), 0.5, np.float32))
    with pytest.raises(ValueError, match="mean diagonal nan"):
        silent.normalized(np.full((2, *IMAGE), np.nan, np.float32))
