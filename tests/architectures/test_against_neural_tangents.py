"""Kernels and their input gradients agree with neural-tangents; so does what `from_stax` makes of its networks."""

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
    from_stax,
    import_neural_tangents,
    mlp,
    resnet,
)

# Minutes of compilation; `make test-slow` and CI run them.
pytestmark = [pytest.mark.loose_promotion, pytest.mark.slow]

W, B = 1.3, 0.4
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def ours_pooled_twice():
    conv = Conv(4, 3, w_std=W, b_std=B)
    return Network(3, Serial(conv, Relu(), GlobalAvgPool(), Dense(8, W, B), Relu(), Dense(3, W, B)))


def ours_with_shortcut():
    branch = Serial(Relu(), Conv(4, 3, 2, W, B), Relu(), Conv(4, 3, 1, W, B))
    block = Residual(branch, shortcut=Conv(4, 1, 2, W, 0.0))
    return Network(3, Serial(Conv(4, 3, w_std=W, b_std=B), block, Flatten(), Dense(3, W, B)))


def ours_dense_on_pixels():
    return Network(3, Serial(Dense(4, W, B), Relu(), Conv(4, 3, w_std=W, b_std=B), Relu(), Flatten(), Dense(3, W, B)))


OURS = {
    "mlp relu": lambda: mlp(depth=3, num_classes=3, w_std=W, b_std=B),
    "mlp erf": lambda: mlp(depth=2, num_classes=3, w_std=W, b_std=B, activation=Erf()),
    "mlp gelu": lambda: mlp(depth=2, num_classes=3, w_std=W, b_std=B, activation=Gelu()),
    "mlp without bias": lambda: mlp(depth=2, num_classes=3, w_std=W, b_std=0.0),
    "cnn 3": lambda: cnn(depth=2, num_classes=3, w_std=W, b_std=B),
    "cnn 1": lambda: cnn(depth=2, num_classes=3, kernel_size=1, w_std=W, b_std=B),
    "cnn 5 gelu": lambda: cnn(depth=2, num_classes=3, kernel_size=5, w_std=W, b_std=B, activation=Gelu()),
    "cnn 3 stride 2": lambda: cnn(depth=2, num_classes=3, stride=2, w_std=W, b_std=B),
    "cnn 5 stride 2 pooled": lambda: cnn(
        depth=2, num_classes=3, kernel_size=5, stride=2, pooling="average", w_std=W, b_std=B
    ),
    "cnn 3 pooled erf": lambda: cnn(depth=2, num_classes=3, pooling="average", w_std=W, b_std=B, activation=Erf()),
    "cnn pooled, then dense": ours_pooled_twice,
    "resnet": lambda: resnet(depth=6, num_classes=3, w_std=W, b_std=B),
    "resnet pooled": lambda: resnet(depth=4, num_classes=3, pooling="average", w_std=W, b_std=B),
    "shortcut": ours_with_shortcut,
    "dense on pixels": ours_dense_on_pixels,
}


def theirs(name):
    """The same networks, said in neural-tangents."""
    import_neural_tangents()
    from neural_tangents import stax

    def conv(size=3, stride=1, b_std=B):
        return stax.Conv(4, (size, size), (stride, stride), "SAME", W_std=W, b_std=b_std)

    def dense(width=8, b_std=B):
        return stax.Dense(width, W_std=W, b_std=b_std)

    relu, erf, gelu = stax.Relu(), stax.Erf(), stax.Gelu()
    flatten, pool = stax.Flatten(), stax.GlobalAvgPool()
    block = stax.serial(
        stax.FanOut(2), stax.parallel(stax.Identity(), stax.serial(relu, conv(), relu, conv())), stax.FanInSum()
    )
    strided = stax.serial(
        stax.FanOut(2), stax.parallel(conv(1, 2, 0.0), stax.serial(relu, conv(3, 2), relu, conv())), stax.FanInSum()
    )
    layers = {
        "mlp relu": (flatten, *[dense(), relu] * 3, dense(3)),
        "mlp erf": (flatten, *[dense(), erf] * 2, dense(3)),
        "mlp gelu": (flatten, *[dense(), gelu] * 2, dense(3)),
        "mlp without bias": (flatten, *[dense(b_std=0.0), relu] * 2, dense(3, 0.0)),
        "cnn 3": (*[conv(), relu] * 2, flatten, dense(3)),
        "cnn 1": (*[conv(1), relu] * 2, flatten, dense(3)),
        "cnn 5 gelu": (*[conv(5), gelu] * 2, flatten, dense(3)),
        "cnn 3 stride 2": (*[conv(3, 2), relu] * 2, flatten, dense(3)),
        "cnn 5 stride 2 pooled": (*[conv(5, 2), relu] * 2, pool, dense(3)),
        "cnn 3 pooled erf": (*[conv(), erf] * 2, pool, dense(3)),
        "cnn pooled, then dense": (conv(), relu, pool, dense(), relu, dense(3)),
        "resnet": (conv(), block, block, relu, flatten, dense(3)),
        "resnet pooled": (conv(), block, relu, pool, dense(3)),
        "shortcut": (conv(), strided, flatten, dense(3)),
        "dense on pixels": (dense(), relu, conv(), relu, flatten, dense(3)),
    }
    return stax.serial(*layers[name])


def images(n, dtype, seed, shape=(7, 6, 2)):
    return np.random.default_rng(seed).random((n, *shape)).astype(dtype)


def relative_error(value, reference):
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return np.abs(value - reference).max() / np.abs(reference).max()


def values_and_gradients(kernels, x1, x2):
    """Both kernels, and the gradient of a weighted sum of them in x1 and x2."""
    weights = np.random.default_rng(5).normal(size=(2, len(x1), len(x2))).astype("float32").astype(x1.dtype)

    def weighted(x1, x2):
        nngp, ntk = kernels(x1, x2)
        return jnp.sum(weights[0] * nngp) + jnp.sum(weights[1] * ntk), (nngp, ntk)

    gradients, (nngp, ntk) = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(x1, x2)
    return {"nngp": nngp, "ntk": ntk, "gradient in x1": gradients[0], "gradient in x2": gradients[1]}


NEARLY_PARALLEL = "cnn pooled, then dense"
"""Pooled features have cosines of 0.999: rounding in float32 is magnified by 1 / (1 - cosine^2), on both sides."""

SLOW = ("cnn 5 stride 2 pooled", "resnet pooled")  # to compile, on the other side


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in OURS])
def test_kernels_and_input_gradients_agree_with_neural_tangents(name):
    x1, x2 = images(3, "float32", 0), images(4, "float32", 1)
    kernel_fn = theirs(name)[2]

    def reference(x1, x2):
        kernels = kernel_fn(x1 - 0.5, x2 - 0.5, ("nngp", "ntk"))
        return kernels.nngp, kernels.ntk

    with jax.enable_x64(True):
        expected = values_and_gradients(reference, x1.astype("float64"), x2.astype("float64"))
    for dtype, tolerance in TOLERANCE.items():
        with jax.enable_x64(dtype == "float64"):
            got = values_and_gradients(OURS[name]().kernels, x1.astype(dtype), x2.astype(dtype))
        for what, value in got.items():
            assert value.dtype == dtype
            allowed = 20 * tolerance if name == NEARLY_PARALLEL else tolerance
            assert relative_error(value, expected[what]) < allowed, (what, dtype)


@pytest.mark.parametrize("name", ["mlp gelu", "cnn 3 stride 2"])
def test_a_stax_network_is_the_same_architecture(name, key, x64):
    arch, ours = from_stax(*theirs(name), num_classes=3), OURS[name]()
    x1, x2 = images(3, "float64", 0, (5, 6, 2)), images(4, "float64", 1, (5, 6, 2))
    for given, expected in zip(arch.kernels(x1, x2), ours.kernels(x1, x2), strict=True):
        assert relative_error(given, expected) < 1e-10
    for given, expected in zip(arch.diagonal(x1), ours.diagonal(x1), strict=True):
        assert relative_error(given, expected) < 1e-7  # neural-tangents rounds between coincident inputs
    assert arch.apply(arch.init(key, (5, 6, 2)), x1).shape == (3, 3)


@pytest.mark.parametrize("name", ["mlp erf"])
def test_a_stax_network_has_the_same_ark(name, x64):
    shape = (4, 3, 2)
    x = images(2, "float64", 3, shape)
    assert relative_error(from_stax(*theirs(name), num_classes=3).ark(x), OURS[name]().ark(x)) < 1e-8


def test_a_normalised_stax_network_scales_its_kernels_and_outputs(key):
    x = images(3, "float32", 0, (5, 6, 2))
    arch = from_stax(*theirs("mlp relu"), num_classes=3)
    normalized = arch.normalized(x)
    assert np.mean(normalized.diagonal(x).ntk) == pytest.approx(1, rel=1e-5)
    params = arch.init(key, (5, 6, 2))
    ratio = normalized.apply(params, x) / arch.apply(params, x)
    np.testing.assert_allclose(ratio, np.mean(arch.diagonal(x).ntk) ** -0.5, rtol=1e-4)


def test_a_stax_network_measures_its_working_memory():
    arch = from_stax(*theirs("cnn 3"), num_classes=3)
    assert arch.pair_bytes((8, 8, 2)) > 64 * 4 * 5  # 64 pixels in float32, a handful of arrays


def test_from_stax_wants_the_triple_unpacked(unchecked):
    triple = theirs("mlp relu")
    with pytest.raises(TypeError, match="unpack the triple"):
        from_stax(triple[0], triple[1], None, num_classes=3)  # pyright: ignore[reportArgumentType]


def test_a_stax_network_with_other_outputs_than_classes_is_refused(key):
    with pytest.raises(ValueError, match="num_classes is 7"):
        from_stax(*theirs("mlp relu"), num_classes=7).init(key, (5, 6, 2))
