"""Exact worst cases against linear programs and duality; bounds against models whose Hessian is known, and attacks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from attack_models import CLASSES, IMAGE, Linear, images, labels_of, linear, smooth
from jaxtyping import Array

from ntkadv.architectures import mlp
from ntkadv.architectures.activations import Erf
from ntkadv.attacks import L1, L2, PGD, Linf
from ntkadv.attacks.apgd import APGD
from ntkadv.attacks.certificates import Certificate, estimate_curvature, first_order_bound, linear_worst_case
from ntkadv.attacks.losses import margin
from ntkadv.predictors import KernelPredictor

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

PIXELS = int(np.prod(IMAGE))
THREATS = [Linf(0.3), L2(0.9), L1(2.5), L2(10.0), L1(100.0), L2(0.0), L1(0.0), Linf(1.0)]
every_threat = pytest.mark.parametrize("threat", THREATS, ids=lambda t: f"{t.norm} {t.eps}")
every_norm = pytest.mark.parametrize("threat", THREATS[:3], ids=["Linf", "L2", "L1"])


class Quadratic(eqx.Module):
    """Scores (0, b_k + g_k d + d H_k d / 2) of d = x - 1/2."""

    constants: Array
    slopes: Array
    hessians: Array

    def __call__(self, x):
        offset = x.reshape(len(x), -1) - 0.5
        bent = jnp.einsum("bi,kij,bj->bk", offset, self.hessians, offset, precision="highest") / 2
        straight = jnp.matmul(offset, self.slopes, precision="highest")
        scores = self.constants + straight + bent
        return jnp.concatenate([jnp.zeros_like(scores[:, :1]), scores], axis=1)


def corner_images(n, seed=0):
    """Images many of whose pixels have no room, or little."""
    return np.clip(1.6 * images(n, seed) - 0.3, 0, 1)


def linear_case(seed=0, classes=CLASSES, n=4):
    rng = np.random.default_rng(seed)
    weights, bias = rng.normal(size=(PIXELS, classes)), rng.normal(size=classes)
    weights[::5] = 0
    weights[1::7] *= 1e-9
    return weights, bias, corner_images(n, seed), rng.integers(0, classes, n)


def margins_of(weights, bias, points, labels):
    logits = np.asarray(points, np.float64).reshape(len(points), -1) @ weights + bias
    rows = np.arange(len(labels))
    right = logits[rows, labels].copy()
    logits[rows, labels] = -np.inf
    return logits.max(axis=1) - right


def lengths(threat, offset):
    order = {"Linf": np.inf, "L2": 2, "L1": 1}[threat.norm]
    return np.linalg.norm(offset.reshape(len(offset), -1), ord=order, axis=1)


def largest_by_program(gradient, pixels, threat):
    """Largest gain of a linear function, by a linear program with d = up - down."""
    bounds = np.concatenate([1 - pixels, pixels])
    if threat.norm == "Linf":
        bounds = np.minimum(bounds, threat.eps)
    total = {"A_ub": np.ones((1, 2 * len(pixels))), "b_ub": [threat.eps]} if threat.norm == "L1" else {}
    found = scipy.optimize.linprog(
        np.concatenate([-gradient, gradient]), bounds=np.stack([0 * bounds, bounds], axis=1), **total
    )
    assert found.success
    return -found.fun


def least_of_dual(gradient, pixels, eps):
    """Least value of the dual for L2, which is an upper bound of the gain at any multiplier."""

    def dual(log_multiplier):
        multiplier = np.exp(log_multiplier)
        best = np.clip(gradient / (2 * multiplier), -pixels, 1 - pixels)
        return multiplier * eps**2 + np.sum(gradient * best - multiplier * best**2)

    # It is convex in the multiplier, so it has one minimum in its logarithm too.
    return scipy.optimize.minimize_scalar(dual, bounds=(-40, 40), method="bounded", options={"xatol": 1e-12}).fun


@every_threat
@pytest.mark.parametrize("seed", range(3))
def test_worst_case_is_that_of_another_solver(threat, seed):
    weights, bias, x, labels = linear_case(seed)
    certificate = linear_worst_case(weights, bias, x, labels, threat)
    for i, y in enumerate(labels):
        pixels = x[i].ravel().astype(np.float64)
        expected = []
        for k in set(range(CLASSES)) - {int(y)}:
            gradient = weights[:, k] - weights[:, y]
            if threat.norm == "L2":
                gain = least_of_dual(gradient, pixels, threat.eps)
            else:
                gain = largest_by_program(gradient, pixels, threat)
            expected.append(pixels @ gradient + bias[k] - bias[y] + gain)
        np.testing.assert_allclose(certificate.upper[i], max(expected), rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(certificate.lower, certificate.upper)


@every_threat
def test_worst_case_is_reached_by_an_allowed_image(threat):
    weights, bias, x, labels = linear_case(n=20)
    certificate = linear_worst_case(weights, bias, x, labels, threat)
    points = certificate.points
    assert (lengths(threat, points - x) <= threat.eps + 1e-12).all()
    assert points.min() >= 0
    assert points.max() <= 1
    np.testing.assert_allclose(margins_of(weights, bias, points, labels), certificate.upper, rtol=1e-12, atol=1e-12)
    if 0 < threat.eps < 1:
        assert ((points > 0) & (points < 1)).any()
        assert (((points == 0) | (points == 1)) & (points != x)).any(), "the box is not active"


def test_tiny_and_zero_gradients_do_no_harm():
    x, labels = corner_images(3), np.zeros(3, int)
    weights = np.zeros((PIXELS, 2))
    weights[0, 1], weights[1, 1], weights[2, 1] = 1e-200, 3.0, 5e-324
    for threat in THREATS:
        certificate = linear_worst_case(weights, np.zeros(2), x, labels, threat)
        gain = 3 * np.minimum(threat.eps, 1 - x.reshape(3, -1)[:, 1].astype(np.float64))
        np.testing.assert_allclose(certificate.upper - 3 * x.reshape(3, -1)[:, 1].astype(np.float64), gain, atol=1e-12)
        still = linear_worst_case(0 * weights, np.array([0.0, -1.0]), x, labels, threat)
        np.testing.assert_array_equal(still.upper, -1)
        np.testing.assert_array_equal(still.points, x)


def test_pgd_reaches_the_exact_worst_case_in_linf(key):
    model, threat = linear(), Linf(0.1)
    x = corner_images(8)
    labels = labels_of(model, x, flipped=2)
    points = PGD(threat, steps=40, step_size=0.05, loss="margin")(model, x, labels, key=key)
    certificate = linear_worst_case(np.asarray(model.weights), np.zeros(2), x, labels, threat)
    reached = margin(model(points), jnp.asarray(labels))
    np.testing.assert_allclose(reached, certificate.upper, atol=1e-5)
    np.testing.assert_allclose(points, certificate.points, atol=1e-5)


@pytest.mark.parametrize("threat", THREATS[1:3], ids=["L2", "L1"])
def test_no_attack_is_beyond_the_exact_worst_case(threat, key):
    weights, bias, x, labels = linear_case(n=30)
    model = Affine(Linear(jnp.asarray(weights, jnp.float32)), jnp.asarray(bias, jnp.float32))
    # The sparse steps of PGD end at the first pixel that is full; those of Auto-PGD become less sparse.
    attack = (APGD if threat.norm == "L1" else PGD)(threat, steps=30, loss="margin")
    attacked = attack.run(model, x, labels, key=key)
    certificate = linear_worst_case(weights, bias, x, labels, threat)
    reached = margins_of(weights, bias, attacked.points, labels)
    assert (reached <= certificate.upper + 1e-5).all()
    assert np.median(certificate.upper - reached) < 0.2, "or the attack is too weak to test anything"
    assert attacked.is_wrong[certificate.is_broken].mean() > 0.8
    assert not attacked.is_wrong[certificate.is_robust].any()


class Affine(eqx.Module):
    linear: Linear
    bias: Array

    def __call__(self, x):
        return self.linear(x) + self.bias


@every_threat
def test_bounds_of_a_linear_model_meet_at_its_worst_case(threat):
    weights, bias, x, labels = linear_case(n=7)
    model = Affine(Linear(jnp.asarray(weights, jnp.float32)), jnp.asarray(bias, jnp.float32))
    exact = linear_worst_case(weights, bias, x, labels, threat)
    bound = first_order_bound(model, x, labels, threat, curvature=0.0, batch_size=3)
    np.testing.assert_allclose(bound.lower, exact.upper, atol=1e-5)
    np.testing.assert_allclose(bound.upper, exact.upper, atol=1e-5)
    np.testing.assert_allclose(bound.points, exact.points, atol=1e-5)


@every_norm
@pytest.mark.parametrize("sign", [-1, 1])
def test_bounds_are_tight_where_the_hessian_is_that_of_a_sphere(threat, sign):
    # Away from the box, all changes of full length gain what the first order says and C R^2 / 2, or lose it.
    curvature, x, labels = 0.7, np.full((1, *IMAGE), 0.5, np.float32), np.zeros(1, int)
    threat = threat.with_eps(min(threat.eps, 0.45))
    slope = np.zeros((PIXELS, 1)) if threat.norm == "L1" else np.random.default_rng(0).normal(size=(PIXELS, 1))
    slope[0] = 2
    hessian = sign * curvature * np.eye(PIXELS)[None]
    model = Quadratic(*(jnp.asarray(a, jnp.float32) for a in (np.array([0.1]), slope, hessian)))
    bound = first_order_bound(model, x, labels, threat, curvature=curvature)
    length = threat.eps * (PIXELS**0.5 if threat.norm == "Linf" else 1)
    gain = {"Linf": np.abs(slope).sum(), "L2": np.linalg.norm(slope), "L1": 2.0}[threat.norm] * threat.eps
    if sign > 0:
        np.testing.assert_allclose(bound.upper, 0.1 + gain + curvature * length**2 / 2, rtol=1e-5)
        reached = margin(model(jnp.asarray(bound.points, jnp.float32)), jnp.asarray(labels))
        np.testing.assert_allclose(reached, bound.upper, rtol=1e-5)
    else:
        reached = margin(model(jnp.asarray(bound.points, jnp.float32)), jnp.asarray(labels))
        np.testing.assert_allclose(reached, 0.1 + gain - curvature * length**2 / 2, rtol=1e-5)
        np.testing.assert_allclose(bound.lower, reached, rtol=1e-5)


def random_quadratic(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hessians = rng.normal(size=(2, PIXELS, PIXELS)) * scale
    hessians = hessians + hessians.transpose(0, 2, 1)
    slopes = rng.normal(size=(PIXELS, 2))
    arrays = (jnp.asarray(a, jnp.float32) for a in (rng.normal(size=2), slopes, hessians))
    return Quadratic(*arrays), np.concatenate([np.zeros((1, PIXELS, PIXELS)), hessians])


def exact_curvature(hessians, labels):
    pairs = hessians[:, None] - hessians[None]
    norms = np.linalg.norm(pairs, ord=2, axis=(2, 3))
    return norms[:, labels].max(axis=0)


def test_bounds_hold_on_a_quadratic_model(key):
    model, hessians = random_quadratic(scale=0.05)
    x, labels = corner_images(12), np.arange(12) % CLASSES
    threat = Linf(0.075)
    curvature = exact_curvature(hessians, labels)
    bound = first_order_bound(model, x, labels, threat, curvature=curvature)
    points = PGD(threat, steps=40, loss="margin")(model, x, labels, key=key)
    reached = np.asarray(margin(model(points), jnp.asarray(labels)))
    clean = np.asarray(margin(model(jnp.asarray(x)), jnp.asarray(labels)))
    nearly = np.asarray(margin(model(jnp.asarray(bound.points, jnp.float32)), jnp.asarray(labels)))
    worst = np.maximum(reached, nearly)
    assert (bound.lower <= worst + 1e-5).all()
    assert (worst <= bound.upper + 1e-5).all()
    assert (clean <= bound.lower + 1e-5).all()
    half = first_order_bound(model, x, labels, threat, curvature=curvature / 2)
    assert (half.upper < bound.upper).all()
    assert (half.lower > bound.lower).all()


def test_longest_change_is_what_the_box_leaves():
    # With no slope and one curvature, the upper bound is the longest change alone.
    x, labels = corner_images(5), np.zeros(5, int)

    def flat(x):
        return jnp.zeros((len(x), 2)) * jnp.sum(x)

    reach = np.maximum(x, 1 - x).reshape(5, -1).astype(np.float64)
    for threat, expected in [
        (Linf(0.3), np.full(5, 0.3**2 * PIXELS)),
        (Linf(0.9), np.sum(np.minimum(reach, 0.9) ** 2, axis=1)),
        (L2(0.4), np.full(5, 0.16)),
        (L2(9.0), np.sum(reach**2, axis=1)),
        (L1(0.5), np.full(5, 0.25)),
        (L1(99.0), np.sum(reach**2, axis=1)),
        (L1(1.5), np.sort(reach, axis=1)[:, -1] ** 2 + (1.5 - np.sort(reach, axis=1)[:, -1]) ** 2),
    ]:
        bound = first_order_bound(flat, x, labels, threat, curvature=2.0)
        np.testing.assert_allclose(bound.upper, expected, rtol=1e-6, err_msg=repr(threat))


def test_power_iteration_finds_the_largest_eigenvalue_of_either_sign(key):
    model, hessians = random_quadratic()
    x, labels = images(6), np.arange(6) % CLASSES
    estimate = estimate_curvature(model, x, labels, L2(0.3), key=key, samples=2, iterations=100, safety=1.0)
    np.testing.assert_allclose(estimate, exact_curvature(hessians, labels), rtol=0.01)
    assert (estimate <= exact_curvature(hessians, labels) * (1 + 1e-5)).all()


def test_curvature_at_the_clean_image_is_that_of_the_dense_hessian(key):
    model = smooth()
    x, labels = images(3), np.array([0, 1, 2])
    estimate = estimate_curvature(model, x, labels, Linf(0.1), key=key, samples=1, iterations=60, safety=1.0)
    hessians = jax.jit(jax.vmap(jax.hessian(lambda z: model(z.reshape(1, *IMAGE))[0])))(jnp.asarray(x.reshape(3, -1)))
    expected = [exact_curvature(np.asarray(h, np.float64), labels[i : i + 1])[0] for i, h in enumerate(hessians)]
    np.testing.assert_allclose(estimate, expected, rtol=0.01)


def test_curvature_grows_with_points_and_safety_and_not_with_batches(key):
    model = smooth()
    x, labels = images(5), np.arange(5) % CLASSES
    few, many, batched = (
        estimate_curvature(model, x, labels, Linf(0.3), key=key, iterations=10, **settings)
        for settings in ({"samples": 1}, {"samples": 6}, {"samples": 6, "batch_size": 2, "safety": 3.0})
    )
    assert (many >= few * (1 - 1e-5)).all()
    assert (many > few * 1.01).any()
    np.testing.assert_allclose(batched, 1.5 * many, rtol=1e-3)


def kernel_machine():
    coefficients = 0.3 * np.random.default_rng(6).normal(size=(40, CLASSES)).astype(np.float32)
    return KernelPredictor(mlp(depth=2, num_classes=CLASSES, activation=Erf()), images(40, seed=5), coefficients)


@pytest.mark.slow
def test_attacks_on_a_kernel_machine_end_between_the_bounds_and_near_the_upper(key):
    model, threat = kernel_machine(), Linf(2e-3)
    x = images(16, seed=3)
    labels = labels_of(model, x, flipped=2)
    curvature = estimate_curvature(model, x, labels, threat, key=key, samples=3)
    bound = first_order_bound(model, x, labels, threat, curvature=curvature)
    attacked = PGD(threat, steps=50, loss="margin").run(model, x, labels, key=key)
    reached = np.asarray(margin(model(attacked.points), jnp.asarray(labels)), np.float64)
    change = reached - np.asarray(margin(model(jnp.asarray(x)), jnp.asarray(labels)), np.float64)
    rounding = 5e-6
    assert (bound.lower <= reached + rounding).all()
    assert (reached <= bound.upper + rounding).all()
    assert (change > 100 * rounding).all(), "the case is too small to tell anything"
    assert (bound.upper - reached <= 0.05 * change + rounding).all()
    assert attacked.is_wrong[bound.is_broken].all()
    assert not attacked.is_wrong[bound.is_robust].any()
    summary = bound.summary()
    assert sum(summary.values()) == 16
    assert summary["broken"] >= 2
    assert summary["robust"] > 0


def test_too_much_curvature_leaves_correct_samples_undecided():
    model = kernel_machine()
    x = images(16, seed=3)
    labels = labels_of(model, x)
    for threat, curvature in [(Linf(2e-3), np.inf), (Linf(0.5), np.full(16, 1e6)), (L1(3.0), np.inf)]:
        bound = first_order_bound(model, x, labels, threat, curvature=curvature)
        assert bound.summary() == {"robust": 0, "broken": 0, "undecided": 16}
    nothing = first_order_bound(model, x, labels, Linf(0.0), curvature=np.inf)
    assert nothing.summary() == {"robust": 16, "broken": 0, "undecided": 0}
    np.testing.assert_array_equal(nothing.points, x)


def test_a_hessian_that_is_not_finite_is_no_bound(key):
    def pointed(x):
        z = x.reshape(len(x), -1)
        return jnp.sqrt(jnp.abs(z - 0.5))[:, :2]

    x = images(3)
    x[1, 0, 0, 0] = 0.5
    estimate = estimate_curvature(pointed, x, np.zeros(3, int), Linf(1e-4), key=key, samples=1)
    assert estimate[1] == np.inf
    assert np.isfinite(estimate[[0, 2]]).all()


def test_a_certificate_counts_each_sample_once():
    certificate = Certificate(np.array([-2.0, -1, 0, 0.1]), np.array([-1.0, 1, 0, 0.2]), np.zeros((4, 1, 1, 1)))
    np.testing.assert_array_equal(certificate.is_robust, [True, False, False, False])
    np.testing.assert_array_equal(certificate.is_broken, [False, False, False, True])
    assert certificate.summary() == {"robust": 1, "broken": 1, "undecided": 2}


def test_what_users_do_wrong_is_named(key, unchecked):
    weights, bias, x, labels = linear_case()
    threat, model = Linf(0.1), smooth()
    with pytest.raises(ValueError, match=rf"weights must have shape \({PIXELS}, num_classes\).* got \(3, 3\)"):
        linear_worst_case(weights[:3], bias, x, labels, threat)
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\).* got \(2,\)"):
        linear_worst_case(weights, bias[:2], x, labels, threat)
    with pytest.raises(TypeError, match=r"threat must be Linf, L2 or L1, .* got 0\.1"):
        linear_worst_case(weights, bias, x, labels, 0.1)
    with pytest.raises(ValueError, match=r"curvature must be one number or one a sample, \(4,\), got shape \(2,\)"):
        first_order_bound(model, x, labels, threat, curvature=np.ones(2))
    with pytest.raises(ValueError, match="curvature must not be negative or NaN"):
        first_order_bound(model, x, labels, threat, curvature=np.nan)
    with pytest.raises(ValueError, match="labels must lie in"):
        first_order_bound(model, x, labels + 3, threat, curvature=1.0)
    with pytest.raises(ValueError, match="x has 4, labels has 3"):
        first_order_bound(model, x, labels[:3], threat, curvature=1.0)
    with pytest.raises(ValueError, match="safety must be finite and positive, got 0"):
        estimate_curvature(model, x, labels, threat, key=key, safety=0)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        estimate_curvature(model, x, labels, threat, key=key, samples=0)
    with pytest.raises(TypeError, match="key must be a random key"):
        estimate_curvature(model, x, labels, threat, key=1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        estimate_curvature(model, x, labels, threat, key=key, batch_size=0)
