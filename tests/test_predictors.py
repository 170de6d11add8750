import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkadv.architectures import cnn, mlp
from ntkadv.architectures.base import Architecture, Kernels
from ntkadv.predictors import KernelPredictor

IMAGE = (4, 4, 2)


@dataclasses.dataclass(frozen=True)
class Polynomial(Architecture):
    """NNGP kernel (<x, x'>/d + 1)^2 and NTK (<x, x'>/d + 1)^3, written down again in float64 by `exact`."""

    def _kernels(self, x1: Any, x2: Any) -> Kernels:
        product = x1.reshape(len(x1), -1) @ x2.reshape(len(x2), -1).T / x1[0].size + 1
        return Kernels(product**2, product**3)

    def _init(self, key: Any, input_shape: Any) -> Any:
        raise NotImplementedError

    _apply = _diagonal = _init

    def pair_bytes(self, input_shape: tuple[int, ...]) -> int:
        return 16


def exact(x, x_train, coefficients, power):
    x, x_train = (np.asarray(a, np.float64).reshape(len(a), -1) - 0.5 for a in (x, x_train))
    return (x @ x_train.T / x.shape[1] + 1) ** power @ np.asarray(coefficients, np.float64)


def arrays(n=37, b=11, image=IMAGE, classes=3):
    rng = np.random.default_rng(0)
    shapes = (b, *image), (n, *image), (n, classes)
    x, x_train, coefficients = (rng.random(shape).astype(np.float32) for shape in shapes)
    return x, x_train, coefficients - np.float32(0.5)


def temporary_bytes(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def input_gradient(predictor, x):
    return jax.grad(lambda x: jnp.sum(predictor(x) ** 2))(x)


def tile_budget(predictor, rows, columns):
    """The smallest budget in which a tile of that size fits."""
    return predictor._cost(rows, columns)


POLYNOMIAL = Polynomial(3)
BUDGETS = [2**30, 20_000, 5_000, 2_000]


@pytest.mark.parametrize("max_bytes", BUDGETS)
@pytest.mark.parametrize(("kernel", "power"), [("nngp", 2), ("ntk", 3)])
def test_logits_are_the_kernel_sum_whatever_the_tiles(kernel, power, max_bytes):
    x, x_train, coefficients = arrays()
    predictor = KernelPredictor(POLYNOMIAL, x_train, coefficients, kernel=kernel, max_bytes=max_bytes)
    logits = predictor(x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact(x, x_train, coefficients, power), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("max_bytes", BUDGETS)
def test_input_gradient_matches_the_analytic_one_whatever_the_tiles(max_bytes):
    x, x_train, coefficients = arrays()
    predictor = KernelPredictor(POLYNOMIAL, x_train, coefficients, kernel="nngp", max_bytes=max_bytes)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(predictor(x))))(x)

    flat, train = (np.asarray(a, np.float64).reshape(len(a), -1) - 0.5 for a in (x, x_train))
    slope = 2 * (flat @ train.T / flat.shape[1] + 1) / flat.shape[1]
    expected = (slope * coefficients.astype(np.float64).sum(1)) @ train
    np.testing.assert_allclose(gradient.reshape(len(x), -1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_bytes", BUDGETS)
def test_coefficient_gradient_is_the_kernel_whatever_the_tiles(max_bytes):
    x, x_train, coefficients = arrays()

    def first_logit(coefficients):
        return KernelPredictor(POLYNOMIAL, x_train, coefficients, max_bytes=max_bytes)(x)[0, 0]

    gradient = jax.jit(jax.grad(first_logit))(coefficients)
    np.testing.assert_allclose(gradient[:, 0], exact(x[:1], x_train, np.eye(37), 3)[0], rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, 1:], 0)


@pytest.mark.parametrize("max_bytes", BUDGETS)
def test_vmap_over_coefficients_gives_each_predictor(max_bytes):
    x, x_train, coefficients = arrays()
    stacked = jnp.stack([coefficients, 2 * coefficients, jnp.zeros_like(coefficients)])

    def predict(coefficients):
        return KernelPredictor(POLYNOMIAL, x_train, coefficients, max_bytes=max_bytes)(x)

    expected = [exact(x, x_train, c, 3) for c in stacked]
    np.testing.assert_allclose(jax.vmap(predict)(stacked), expected, rtol=2e-5, atol=4e-5)


def test_what_fits_is_neither_looped_over_nor_computed_twice():
    x, x_train, coefficients = arrays()
    predictor = KernelPredictor(POLYNOMIAL, x_train, coefficients)
    program = str(jax.make_jaxpr(predictor)(x))
    assert "scan" not in program
    assert "remat" not in program
    assert "checkpoint" not in program

    tight = KernelPredictor(POLYNOMIAL, x_train, coefficients, max_bytes=2_000)
    assert "scan" in str(jax.make_jaxpr(tight)(x))


@pytest.mark.parametrize(("make", "n", "b"), [(mlp, 310, 150), (cnn, 61, 40)])
@pytest.mark.parametrize("divisor", [1, 30])
def test_compiled_memory_stays_under_the_budget(make, n, b, divisor):
    arch = make(depth=2, num_classes=3)
    x, x_train, coefficients = arrays(n=n, b=b, image=(4, 4, 1))
    budget = tile_budget(KernelPredictor(arch, x_train, coefficients), b, n) // divisor
    predictor = KernelPredictor(arch, x_train, coefficients, max_bytes=budget)
    assert temporary_bytes(lambda p, x: p(x), predictor, x) <= budget + 4 * x.nbytes
    assert temporary_bytes(input_gradient, predictor, x) <= budget + 4 * x.nbytes


def test_an_unbounded_gradient_would_need_more_than_the_bound_that_is_kept():
    x, x_train, coefficients = arrays(n=310, b=150, image=(4, 4, 1))
    arch = mlp(depth=2, num_classes=3)
    whole = KernelPredictor(arch, x_train, coefficients)
    budget = tile_budget(whole, 150, 310) // 40
    assert temporary_bytes(input_gradient, whole, x) > 10 * (budget + 4 * x.nbytes)


@pytest.mark.parametrize(("kernel", "divisor"), [("ntk", 3), ("nngp", 50)])
def test_tiles_do_not_change_a_real_network(kernel, divisor):
    arch = mlp(depth=3, num_classes=3)
    x, x_train, coefficients = arrays(n=53, b=20)
    matrix = np.asarray(getattr(arch, kernel)(jnp.asarray(x), jnp.asarray(x_train)), np.float64)
    budget = tile_budget(KernelPredictor(arch, x_train, coefficients), 20, 53) // divisor
    predictor = KernelPredictor(arch, x_train, coefficients, kernel=kernel, max_bytes=budget)
    np.testing.assert_allclose(predictor(x), matrix @ coefficients.astype(np.float64), rtol=1e-4, atol=1e-4)


def test_gradient_is_finite_at_a_training_image():
    _, x_train, coefficients = arrays(n=20)
    predictor = KernelPredictor(mlp(depth=3, num_classes=3), x_train, coefficients, max_bytes=40_000)
    assert np.isfinite(jax.jit(input_gradient)(predictor, x_train)).all()


def test_new_coefficients_do_not_compile_again():
    x, x_train, coefficients = arrays()
    traces = []

    @jax.jit
    def call(predictor, x):
        traces.append(None)
        return predictor(x)

    for scale in (1.0, 2.0, 3.0):
        call(KernelPredictor(POLYNOMIAL, x_train, np.float32(scale) * coefficients), x)
    assert len(traces) == 1


def test_wrong_arguments_are_named(unchecked):
    x, x_train, coefficients = arrays()
    with pytest.raises(ValueError, match="36 rows for 37 images"):
        KernelPredictor(POLYNOMIAL, x_train, coefficients[:-1])
    with pytest.raises(ValueError, match=r"x_train must be images .* got shape \(37, 32\)"):
        KernelPredictor(POLYNOMIAL, x_train.reshape(37, -1), coefficients)
    with pytest.raises(ValueError, match=r"x_train must be images .* got shape \(0, 4, 4, 2\)"):
        KernelPredictor(POLYNOMIAL, x_train[:0], coefficients[:0])
    with pytest.raises(ValueError, match=r"coefficients must have shape .* got \(37,\)"):
        KernelPredictor(POLYNOMIAL, x_train, coefficients[:, 0])
    with pytest.raises(ValueError, match="kernel must be 'ntk' or 'nngp', got 'rbf'"):
        KernelPredictor(POLYNOMIAL, x_train, coefficients, kernel="rbf")
    with pytest.raises(ValueError, match=r"max_bytes must be at least .* got 10"):
        KernelPredictor(POLYNOMIAL, x_train, coefficients, max_bytes=10)
    predictor = KernelPredictor(POLYNOMIAL, x_train, coefficients)
    for wrong in (x[0], x[:0], x[..., :1]):
        with pytest.raises(ValueError, match="x must be a non-empty batch of images"):
            predictor(wrong)
