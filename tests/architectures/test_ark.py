"""The adversarial regularization kernel at infinite width: where it is constant, and its closed form there."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.architectures import Conv, Dense, Erf, Flatten, Network, Relu, Residual, Serial, cnn, mlp, resnet
from ntkadv.architectures.base import _ark

IMAGE = (4, 3, 2)
W, B = 1.3, 0.4
BYTES = 2**28


def images(n=3, dtype="float64"):
    """Three ordinary images; the last one has a pixel without variance."""
    x = np.random.default_rng(0).random((n, *IMAGE)).astype(dtype)
    x[-1, 0, 0] = 0.5
    return jnp.asarray(x)


def by_derivatives(arch, x):
    """Through the mixed derivatives of every image, whatever the architecture knows."""
    return _ark(arch, x - jnp.asarray(arch.center, x.dtype), BYTES)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_ark_of_a_relu_mlp_is_constant_and_has_a_closed_form(depth, x64):
    """w^2 (w^2/2)^depth: d inputs, each with the variance w^2/d of its weights, then one half for each ReLU."""
    arch = mlp(depth=depth, num_classes=3, w_std=W, b_std=B)
    expected = W**2 * (W**2 / 2) ** depth
    np.testing.assert_allclose(by_derivatives(arch, images()), expected, rtol=1e-12)
    np.testing.assert_allclose(arch.ark(images()), expected, rtol=1e-12)


def test_the_ark_of_a_relu_mlp_is_exact_in_float32():
    arch = mlp(depth=3, num_classes=3, w_std=W, b_std=B)
    np.testing.assert_allclose(by_derivatives(arch, images(dtype="float32")), W**2 * (W**2 / 2) ** 3, rtol=1e-5)


CONSTANT = {
    "cnn": cnn(depth=2, num_classes=3, w_std=W, b_std=B),
    "cnn strided": cnn(depth=2, num_classes=3, stride=2, w_std=W, b_std=B),
    "resnet": resnet(depth=4, num_classes=3, w_std=W, b_std=B),
    "shortcut": Network(
        3,
        Serial(
            Conv(4, 3, 1, W, B),
            Residual(Serial(Relu(), Conv(4, 3, 2, W, B)), shortcut=Conv(4, 1, 2, W, B)),
            Relu(),
            Flatten(),
            Dense(3, W, B),
        ),
    ),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_the_ark_of_a_flattened_relu_network_is_constant(name, x64):
    arch = CONSTANT[name]
    assert arch.ark_is_constant(IMAGE)
    every = by_derivatives(arch, images())
    np.testing.assert_allclose(every, every[0], rtol=1e-12)
    np.testing.assert_allclose(arch.ark(images()), every, rtol=1e-12)


def test_windows_of_one_pixel_give_the_closed_form_of_the_mlp_in_any_number_of_pixels(x64):
    """Each of P pixels has the MLP's ARK, in its own channels, and enters the readout with the weight 1/P."""
    arch = cnn(depth=2, num_classes=3, kernel_size=1, w_std=W, b_std=B)
    np.testing.assert_allclose(by_derivatives(arch, images()), W**2 * (W**2 / 2) ** 2, rtol=1e-12)


@pytest.mark.parametrize(
    "arch",
    [
        mlp(depth=2, num_classes=3, w_std=W, b_std=B, activation=Erf()),
        cnn(depth=2, num_classes=3, pooling="average", w_std=W, b_std=B),
    ],
)
def test_the_ark_depends_on_the_image_otherwise(arch, x64):
    assert not arch.ark_is_constant(IMAGE)
    ark = arch.ark(images())
    assert np.ptp(ark) > 1e-3 * np.max(ark)


def test_the_ark_agrees_with_differences_of_the_nngp_kernel(x64):
    arch = mlp(depth=2, num_classes=3, w_std=W, b_std=B, activation=Erf())
    x, step = images(1), 1e-3
    shifts = step * jnp.eye(x.size).reshape(x.size, *IMAGE)
    up, down = arch.nngp(x + shifts, x + shifts), arch.nngp(x + shifts, x - shifts)
    same = arch.nngp(x - shifts, x - shifts)
    trace = (jnp.trace(up) + jnp.trace(same) - 2 * jnp.trace(down)) / (4 * step**2)
    np.testing.assert_allclose(arch.ark(x)[0], trace, rtol=1e-5)


@pytest.mark.parametrize("batch_bytes", [1, 2000, 2**28])
def test_the_ark_does_not_depend_on_the_number_of_directions_at_once(batch_bytes, x64):
    arch = mlp(depth=2, num_classes=3, w_std=W, b_std=B, activation=Erf())
    np.testing.assert_allclose(arch.ark(images(2), batch_bytes=batch_bytes), arch.ark(images(2)), rtol=1e-13)


@pytest.mark.parametrize("activation", [Relu(), Erf()])
def test_the_ark_scales_with_the_square_of_the_outputs(activation, x64):
    arch = mlp(depth=2, num_classes=3, w_std=W, b_std=B, activation=activation)
    scaled = arch.normalized(images())
    factor = scaled.output_scale**2
    assert factor != pytest.approx(1)
    np.testing.assert_allclose(scaled.ark(images()), factor * arch.ark(images()), rtol=1e-13)


@pytest.mark.parametrize("depth", [2, 4])
def test_the_ark_of_an_mlp_on_vectors_is_that_on_images(depth, x64):
    arch = mlp(depth=depth, num_classes=3, activation=Erf())
    x = images()
    np.testing.assert_allclose(arch.ark(x.reshape(len(x), -1)), arch.ark(x), rtol=1e-13)
