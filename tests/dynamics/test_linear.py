"""The theory of coupled outputs against the flow integrated by SciPy, gradient descent by hand, and exact cases."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from ntkadv.dynamics import LinearDynamics, attack_rates, closed_form_gap, training_coefficients

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them

N, C, M = 5, 3, 4
TIMES = [0.0, 0.05, 0.7, 3.0]


def problem(seed=0):
    """A random kernel of images, outputs mixed, split in training and test; targets and untrained outputs."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=((N + M) * C, 40)) / np.sqrt(20)
    kernel = (features @ features.T).reshape(N + M, C, N + M, C).transpose(0, 2, 1, 3)
    return kernel[:N, :N], kernel[N:, :N], rng.normal(size=(N, C)), rng.normal(size=(N + M, C))


def positive_blocks(seed, scale=1.0):
    root = np.random.default_rng(seed).normal(size=(N, C, C)) * np.sqrt(scale / C)
    return root @ root.transpose(0, 2, 1)


def rates(kind, seed=3):
    """The exponential of ARK times eta, and itself one of SciPy."""
    ark = positive_blocks(seed)
    eta = {
        "number": np.asarray(0.4),
        "sample": np.random.default_rng(seed).random(N),
        "matrix": positive_blocks(seed + 1, 0.5),
    }[kind]
    full = eta if eta.ndim == 3 else np.broadcast_to(eta, (N,))[:, None, None] * np.eye(C)
    return ark, eta, np.stack([scipy.linalg.expm(a @ e) for a, e in zip(ark, full, strict=True)])


def by_scipy(theta, cross, targets, start, blocks_at):
    """The outputs of the flow f' = -Theta E (f - y), at training and at test images."""
    whole = np.concatenate([theta, cross])

    def slope(t, flat):
        f = flat.reshape(N + M, C)
        return -np.einsum("mnij,njk,nk->mi", whole, blocks_at(t), f[:N] - targets).ravel()

    solution = scipy.integrate.solve_ivp(
        slope, (0, max(TIMES)), start.ravel(), t_eval=TIMES, method="DOP853", rtol=1e-12, atol=1e-13
    )
    return solution.y.T.reshape(len(TIMES), N + M, C)


@pytest.mark.parametrize("kind", ["number", "sample", "matrix"])
def test_closed_form_and_flow_solve_the_equation_of_motion(kind, x64):
    theta, cross, targets, start = problem()
    ark, eta, exact = rates(kind)
    blocks = np.asarray(attack_rates(ark, eta))
    np.testing.assert_allclose(blocks, exact, rtol=1e-10, atol=1e-10)
    is_symmetric = np.allclose(blocks, blocks.transpose(0, 2, 1))
    assert is_symmetric == (kind != "matrix")
    reference = by_scipy(theta, cross, targets, start, lambda t: exact)
    model = LinearDynamics(theta, targets, start=start[:N], rates=blocks)
    for u in (model.coefficients(TIMES), model.flow(TIMES, rtol=1e-11)):
        np.testing.assert_allclose(model.fitted(u), reference[:, :N], atol=1e-8)
        np.testing.assert_allclose(model.predict(u, cross, start[N:]), reference[:, N:], atol=1e-8)


@pytest.mark.parametrize("kind", ["common", "different"])
def test_with_rates_that_vary_the_flow_is_exact_and_the_closed_form_only_if_they_vary_together(kind, x64):
    theta, cross, targets, start = problem(1)
    ark, eta, _ = rates("sample")
    phases = np.arange(N, dtype=float)

    def varying(t):
        if kind == "common":  # E(t) = g(t) E(0)
            return (1.5 + jnp.sin(3 * t)) * attack_rates(ark, eta)
        return attack_rates(ark, eta * (1 + jnp.sin(3 * t + phases)))

    reference = by_scipy(theta, cross, targets, start, lambda t: np.asarray(varying(t)))
    model = LinearDynamics(theta, targets, start=start[:N], rates=varying)
    assert not model.constant
    true = model.flow(TIMES, rtol=1e-11)
    np.testing.assert_allclose(model.fitted(true), reference[:, :N], atol=1e-8)
    np.testing.assert_allclose(model.predict(true, cross, start[N:]), reference[:, N:], atol=1e-8)
    closed = model.coefficients(TIMES)
    # The closed form itself, by SciPy: exp(-Theta Xi) r, Xi integrated.
    flat = theta.transpose(0, 2, 1, 3).reshape(N * C, N * C)
    for time, fitted in zip(TIMES, model.fitted(closed), strict=True):
        grid, weights = np.polynomial.legendre.leggauss(60)
        nodes = time * (grid + 1) / 2
        xi = sum(w * time / 2 * np.asarray(varying(t)) for w, t in zip(weights, nodes, strict=True))
        left = scipy.linalg.expm(-flat @ scipy.linalg.block_diag(*xi)) @ (targets - start[:N]).ravel()
        np.testing.assert_allclose(fitted, targets - left.reshape(N, C), atol=1e-8)
    gap = np.max(np.abs(model.fitted(closed) - reference[:, :N]))
    assert gap < 1e-8 if kind == "common" else gap > 1e-3


def test_gradient_descent_is_followed_step_by_step(x64):
    theta, _, targets, start = problem(2)
    _, _, blocks = rates("number")
    model = LinearDynamics(theta, targets, start=start[:N], rates=blocks)
    rate = 0.9 * model.max_learning_rate
    u = np.zeros((N, C))
    seen = [u]
    for _ in range(200):
        fitted = start[:N] + np.einsum("mnij,nj->mi", theta, u)
        u = u + rate * np.einsum("nij,nj->ni", blocks, targets - fitted)
        seen.append(u)
    steps = np.array([0, 1, 2, 7, 50, 199, 200])
    found = model.coefficients(steps * rate, learning_rate=rate)
    np.testing.assert_allclose(found, np.stack(seen)[steps], rtol=1e-8, atol=1e-9)


def test_above_the_largest_learning_rate_descent_diverges_and_below_it_does_not(x64):
    theta, _, targets, _ = problem(4)
    _, _, blocks = rates("matrix")
    model = LinearDynamics(theta, targets, rates=blocks)
    flat = theta.transpose(0, 2, 1, 3).reshape(N * C, N * C) @ scipy.linalg.block_diag(*blocks)
    for factor, grows in ((0.999, False), (1.001, True)):
        power = np.linalg.matrix_power(np.eye(N * C) - factor * model.max_learning_rate * flat, 100_000)
        assert (np.linalg.norm(power) > 1e3) == grows


def test_in_the_end_attacks_make_no_difference(x64):
    theta, _, targets, start = problem(5)
    flat = theta.transpose(0, 2, 1, 3).reshape(N * C, N * C)
    exact = np.linalg.solve(flat, (targets - start[:N]).ravel()).reshape(N, C)
    for blocks in (1.0, *(rates(kind)[2] for kind in ("number", "sample", "matrix"))):
        model = LinearDynamics(theta, targets, start=start[:N], rates=blocks)
        np.testing.assert_allclose(model.coefficients([np.inf])[0], exact, atol=1e-8)
        np.testing.assert_allclose(model.coefficients([1e5])[0], exact, atol=1e-8)


def test_where_outputs_do_not_mix_it_is_the_closed_form_of_each_output(x64):
    rng = np.random.default_rng(6)
    features = rng.normal(size=(N, 9))
    theta, targets, ark = features @ features.T, rng.normal(size=(N, C)), rng.random(N)
    each = np.asarray(attack_rates(ark, 0.7))
    np.testing.assert_allclose(each, np.exp(0.7 * ark))
    apart = LinearDynamics(theta, targets, rates=each)
    together = LinearDynamics(np.einsum("mn,ij->mnij", theta, np.eye(C)), targets, rates=each)
    for time in (0.3, 2.0):
        expected = np.asarray(training_coefficients(theta, time * each, targets, method="eigh"))
        for model in (apart, together):
            np.testing.assert_allclose(model.coefficients([time])[0], expected, atol=1e-9)
            np.testing.assert_allclose(model.flow([time], rtol=1e-11)[0], expected, atol=1e-8)
    gap = closed_form_gap(theta, targets, each, [0.3, 2.0])
    assert np.all(gap < 1e-8)


def test_a_non_scalar_eta_mixes_outputs_of_a_kernel_that_does_not(x64):
    rng = np.random.default_rng(7)
    features = rng.normal(size=(N, 9))
    theta, targets = features @ features.T, rng.normal(size=(N, C))
    blocks = np.asarray(attack_rates(rng.random(N), positive_blocks(8)))
    model = LinearDynamics(theta, targets, rates=blocks)
    flat = np.kron(theta, np.eye(C))
    left = scipy.linalg.expm(-0.3 * flat @ scipy.linalg.block_diag(*blocks)) @ targets.ravel()
    np.testing.assert_allclose(model.fitted(model.coefficients([0.3]))[0], targets - left.reshape(N, C), atol=1e-9)


def test_bad_input_says_what_to_do(unchecked):
    theta, _, targets, _ = problem()
    model = LinearDynamics(theta, targets)
    cases = [
        (lambda: LinearDynamics(theta[:4], targets), "theta must have shape"),
        (lambda: LinearDynamics(theta + np.eye(C)[0], targets), "theta must be symmetric"),
        (lambda: LinearDynamics(theta, targets[:, 0]), "targets must have shape"),
        (lambda: LinearDynamics(theta, targets, start=targets[:2]), "start must have the shape"),
        (lambda: LinearDynamics(theta, targets, rates=np.ones(2)), "rates must be a number"),
        (lambda: LinearDynamics(theta, targets, rates=-1.0), "rates must be positive"),
        (lambda: LinearDynamics(theta * np.nan, targets), "theta must be finite"),
        (lambda: LinearDynamics(-theta, targets).coefficients([1.0]), "not positive semi-definite"),
        (lambda: model.coefficients([-1.0]), "times must not be negative"),
        (lambda: model.flow([np.inf]), "times must be finite"),
        (lambda: model.coefficients([1.0], learning_rate=1e9), "learning_rate must be below"),
        (lambda: attack_rates(np.ones((N, 2)), 1.0), "ark must be"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    varying = LinearDynamics(theta, targets, rates=lambda t: 1 + t)
    with pytest.raises(ValueError, match="times must be finite where rates vary"):
        varying.coefficients([np.inf])
    with pytest.raises(ValueError, match="learning_rate is for rates"):
        varying.coefficients([1.0], learning_rate=1e-3)
