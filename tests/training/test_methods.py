"""Methods of training: the attack flow against solvers and exact answers, each update against one by hand."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from training_problems import CLASSES, IMAGE, data, linear, linear_params, smooth_mlp

from ntkadv.attacks import PGD, Linf
from ntkadv.attacks.threat_model import sample_keys
from ntkadv.kernels import empirical_ark
from ntkadv.training import AttackFlowTraining, Batch, PGDTraining, StandardTraining, attack_flow, train


def problem(n=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((n, *IMAGE)), rng.normal(size=(n, CLASSES))


def strengths(kind, n=3):
    rng = np.random.default_rng(7)
    root = rng.normal(size=(n, CLASSES, CLASSES))
    skew = root - root.transpose(0, 2, 1)
    return {
        "number": np.asarray(0.8),
        "sample": rng.random(n),
        "matrix": root @ root.transpose(0, 2, 1) / 12 + 0.1 * skew,
    }[kind]


def by_scipy(f, image, target, eta):
    """One image by SciPy, the gradient a Jacobian, row by row."""
    jacobian = jax.jit(jax.jacobian(lambda z: f(z.reshape(1, *IMAGE))[0]))
    value = jax.jit(lambda z: f(z.reshape(1, *IMAGE))[0])
    slope = lambda _, z: np.asarray(jacobian(z)).T @ eta @ (np.asarray(value(z)) - target)  # noqa: E731
    return scipy.integrate.solve_ivp(slope, (0, 1), image.ravel(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]


@pytest.mark.parametrize("kind", ["number", "sample", "matrix"])
def test_the_attack_flow_is_that_of_scipy(kind, x64):
    arch, params = smooth_mlp(depth=2)
    f = lambda x: arch.apply(params, x)  # noqa: E731
    x, targets = problem()
    eta = 0.3 * strengths(kind)
    full = eta if eta.ndim == 3 else np.broadcast_to(eta, (3,))[:, None, None] * np.eye(CLASSES)
    exact = np.stack([by_scipy(f, *row) for row in zip(x, targets, full, strict=True)]).reshape(x.shape)
    strength = jnp.asarray(eta)
    found = {
        steps: np.asarray(attack_flow(f, jnp.asarray(x), jnp.asarray(targets), strength, steps=steps))
        for steps in (8, 16, 32)
    }
    assert np.abs(exact - x).max() > 0.1
    np.testing.assert_allclose(found[32], exact, atol=1e-6)
    errors = [np.abs(found[steps] - exact).max() for steps in (8, 16, 32)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert (np.abs(orders - 4) < 0.6).all(), (errors, orders)


def test_the_attack_flow_is_that_of_diffrax(x64):
    arch, params = smooth_mlp(seed=3)
    x, targets = (jnp.asarray(array) for array in problem(seed=2))

    def slope(_, z, __):
        def total(z):
            return jnp.sum((arch.apply(params, z) - targets) ** 2) / 2

        return 0.3 * jax.grad(total)(z)

    exact = diffrax.diffeqsolve(
        diffrax.ODETerm(slope), diffrax.Dopri8(), 0.0, 1.0, None, x,
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-11),
    ).ys[-1]  # fmt: skip
    found = attack_flow(lambda x: arch.apply(params, x), x, targets, 0.3, steps=40)
    np.testing.assert_allclose(found, exact, atol=1e-7)


@pytest.mark.parametrize("kind", ["number", "sample", "matrix"])
def test_on_a_model_linear_in_its_images_the_residual_grows_by_the_exponential_of_the_ark(kind, x64):
    params = linear_params()
    x, targets = problem(seed=1)
    eta = 0.3 * strengths(kind)
    found = attack_flow(lambda x: linear(params, x), jnp.asarray(x), jnp.asarray(targets), jnp.asarray(eta), steps=60)
    full = eta if eta.ndim == 3 else np.broadcast_to(eta, (3,))[:, None, None] * np.eye(CLASSES)
    w = np.asarray(params["w"])
    ark = w.T @ w
    np.testing.assert_allclose(empirical_ark(linear, params, x), np.broadcast_to(ark, (3, CLASSES, CLASSES)))
    before = np.asarray(linear(params, jnp.asarray(x))) - targets
    expected = np.stack([scipy.linalg.expm(ark @ e) @ r for e, r in zip(full, before, strict=True)])
    np.testing.assert_allclose(linear(params, found) - targets, expected, rtol=1e-6, atol=1e-8)


def batch_of(x, targets, labels, time=0.0, keys=None):
    n = len(x)
    keys = sample_keys(jax.random.key(0), n) if keys is None else keys
    return Batch(x, labels, targets, jnp.arange(n), keys, jnp.asarray(time, x.dtype), 1.0)


def test_a_strength_that_varies_is_that_of_the_time_of_the_step(x64, key):
    """The trained network against steps by hand, with the strength of each step given as a number."""
    arch, start = smooth_mlp()
    held, rate = data(), 0.05
    shares = jnp.asarray([1.0, 0.5, 0.0, 2.0, 1.0, 0.3])

    def strength(t):
        return (0.2 + 3 * t) * shares

    done = train(arch, held, method=AttackFlowTraining(strength, reduction="sum", steps=3), steps=6, key=key,
                 optimizer=rate, params=start, progress=False)  # fmt: skip
    x, targets = jnp.asarray(held.x_train, float), jnp.asarray(held.targets_train, float)
    params = start
    for step in range(6):
        f = lambda z, params=params: arch.apply(params, z)  # noqa: E731
        moved = attack_flow(f, x, targets, strength(step * rate), steps=3)
        gradient = jax.grad(lambda p, z=moved: jnp.sum((arch.apply(p, z) - targets) ** 2) / 2)(params)
        params = jax.tree.map(lambda a, b: a - rate * b, params, gradient)
    for ours, theirs in zip(jax.tree.leaves(done.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    constant = train(arch, held, method=AttackFlowTraining(0.2, reduction="sum", steps=3), steps=6, key=key,
                     optimizer=rate, params=start, progress=False)  # fmt: skip
    assert np.abs(constant.params[1]["w"] - done.params[1]["w"]).max() > 1e-3


def test_strengths_follow_their_images_into_batches(x64):
    arch, params = smooth_mlp()
    held = data()
    x, targets = jnp.asarray(held.x_train, float), jnp.asarray(held.targets_train, float)
    each = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    whole = AttackFlowTraining(each).images(arch.apply, params, batch_of(x, targets, held.y_train))
    places = jnp.asarray([4, 1, 3])
    part = Batch(x[places], held.y_train[places], targets[places], places, sample_keys(jax.random.key(0), 3),
                 jnp.asarray(0.0), 0.5)  # fmt: skip
    np.testing.assert_allclose(
        AttackFlowTraining(each).images(arch.apply, params, part), np.asarray(whole)[[4, 1, 3]], rtol=1e-12
    )
    np.testing.assert_array_equal(whole[0], x[0])
    size = np.asarray(jnp.abs(whole - x).max((1, 2, 3)))
    assert (size[1:] > 1e-3).all()


def test_training_by_pgd_is_the_attack_then_a_step(key):
    """By the attack's own call outside the loop, then a gradient by JAX and a step by hand."""
    held, rate = data(n=8), 0.3
    arch, start = smooth_mlp()
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start)
    attack = PGD(Linf(0.1), steps=4, keep_best=False)
    method = PGDTraining(attack)
    seen = []
    done = train(arch, held, method=method, steps=3, key=key, optimizer=rate, params=start, record_at=[0, 1, 2, 3],
                 record=lambda params: seen.append(params) or {}, progress=False)  # fmt: skip
    x, targets = jnp.asarray(held.x_train), jnp.asarray(held.targets_train)
    step_key = jax.random.split(jax.random.split(key)[1])[1]
    for step in range(3):
        attack_key = jax.random.split(jax.random.fold_in(step_key, step))[0]
        f = lambda z, params=seen[step]: arch.apply(params, z)  # noqa: E731
        moved = attack(f, x, held.y_train, key=attack_key)
        assert np.abs(moved - x).max() <= 0.1 + 1e-6
        loss, gradient = jax.value_and_grad(
            lambda p, z=moved: jnp.mean(jnp.sum((arch.apply(p, z) - targets) ** 2, 1)) / 2
        )(seen[step])
        after = jax.tree.map(lambda a, b: a - jnp.float32(rate) * b, seen[step], gradient)
        for ours, theirs in zip(jax.tree.leaves(seen[step + 1]), jax.tree.leaves(after), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-5)
        assert done.history["loss"][step] == pytest.approx(float(loss), rel=1e-4)
    assert done.history["loss"][0] > float(jnp.mean(jnp.sum((arch.apply(start, x) - targets) ** 2, 1)) / 2)


def test_without_strength_it_is_training_without_attacks(x64, key):
    arch, start = smooth_mlp()
    settings = {"steps": 5, "key": key, "params": start, "progress": False}
    plain = train(arch, data(), method=StandardTraining(reduction="sum"), **settings)
    for strength in (0, 0.0, (0.0,) * 6, lambda t: 0 * t):
        still = train(arch, data(), method=AttackFlowTraining(strength, reduction="sum"), **settings)
        for ours, theirs in zip(jax.tree.leaves(still.params), jax.tree.leaves(plain.params), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_only_the_attack_knows_of_its_own_loss(x64):
    """Under cross-entropy the flow still goes for the squared loss, as documented."""
    arch, params = smooth_mlp()
    held = data()
    batch = batch_of(jnp.asarray(held.x_train, float), jnp.asarray(held.targets_train, float), held.y_train)
    for loss in ("squared", "cross_entropy"):
        moved = AttackFlowTraining(0.3, loss=loss).images(arch.apply, params, batch)
        expected = attack_flow(lambda z: arch.apply(params, z), batch.x, batch.targets, 0.3)
        np.testing.assert_array_equal(moved, expected)


def test_names_tell_methods_apart():
    assert StandardTraining().name == "Standard"
    assert AttackFlowTraining(0.25).name == "attack flow 0.25"
    assert PGDTraining(PGD(Linf(0.1), steps=10)).name == "PGD-10 training"
