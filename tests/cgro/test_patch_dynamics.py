"""Whole runs of the hand-derived recursion against gradient descent by autodiff in float64; bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from patch_problems import NETWORKS, plain_loss, plain_scores, sample, start

from ntkadv.cgro import FixedLinear, PatchPGD, SignalLine, train

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them


@pytest.mark.parametrize(
    ("name", "attack", "route"),
    [
        ("cubic", FixedLinear(1.2), "recursion"),
        ("relu^2, opposite", SignalLine(1.2), "recursion"),
        ("relu^3, equal", SignalLine(1.2), "recursion"),
        ("relu^4, independent", FixedLinear(1.2), "recursion"),
        ("relu^2, opposite", SignalLine(1.2), "filters"),
        ("cubic", PatchPGD(0.7, steps=3), "filters"),
    ],
)
def test_a_run_is_gradient_descent_by_autodiff(name, attack, route, x64):
    network, data, test = NETWORKS[name], sample(), sample(5, seed=1)
    filters = start(network, std=0.3)
    settings = {"filters": filters, "attack": attack, "steps": 4, "learning_rate": 0.3, "clean_weight": 0.4}
    run = train(network, data, test=test, records=5, spacing="linear", route=route, **settings)
    loss_and_gradient = jax.jit(jax.value_and_grad(partial(plain_loss, network, attack, 0.4), argnums=1))
    perturb = jax.jit(partial(attack.perturb, network))
    w = filters
    for step, number in enumerate(run.steps.tolist()):
        assert number == step
        loss, gradient = loss_and_gradient(data, w)
        np.testing.assert_allclose(run.loss[step], loss, rtol=1e-10)
        np.testing.assert_allclose(run.u[step], w @ data.w_star, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(run.v[step], jnp.einsum("rd,ijd->rij", w, data.noise), rtol=1e-10, atol=1e-13)
        along = gradient @ data.w_star
        np.testing.assert_allclose(run.signal_share[step], jnp.sum(along**2) / jnp.sum(gradient**2), rtol=1e-9)
        for samples, clean, adversarial in (
            (data, run.clean, run.adversarial),
            (test, run.test_clean, run.test_adversarial),
        ):
            attacked = perturb(w, samples)
            for margins, x in ((clean, samples.x), (adversarial, attacked)):
                expected = samples.y * plain_scores(network, w, x)
                np.testing.assert_allclose(margins[step], expected, rtol=1e-10, atol=1e-13)
        final, w = w, w - 0.3 * gradient
    np.testing.assert_allclose(run.filters, final, rtol=1e-10, atol=1e-13)
    signal = run.clean - run.V
    U = np.where(np.asarray(data.y) > 0, run.U[:, 1:], run.U[:, :1])
    np.testing.assert_allclose(1.5**network.power * U, signal, rtol=1e-8, atol=1e-13)


def test_bad_runs_are_refused(unchecked, key):
    network, data = NETWORKS["cubic"], sample()
    filters = network.init(key, 9)

    def run(**changes):
        settings = {"filters": filters, "attack": SignalLine(1.0), "steps": 3, "learning_rate": 0.1, **changes}
        return train(settings.pop("network", network), settings.pop("data", data), **settings)

    with pytest.raises(ValueError, match=r"delta must be below alpha = 1\.5, .*, got 1\.5"):
        run(attack=SignalLine(1.5))
    with pytest.raises(ValueError, match="at least two samples, one of each class, got 1"):
        run(data=jax.tree.map(lambda leaf: leaf[:1], data._replace(w_star=data.w_star[None]))._replace(
            w_star=data.w_star))  # fmt: skip
    with pytest.raises(ValueError, match="one of each class"):
        run(data=data._replace(y=jnp.ones(8)))
    with pytest.raises(ValueError, match="orthogonal to w"):
        run(data=data._replace(x=data.x + 0.1))
    with pytest.raises(ValueError, match=r"filters must have shape \(5, 9\), got \(5, 8\)"):
        run(filters=filters[:, :8])
    with pytest.raises(ValueError, match=r"clean_weight must lie in \[0, 1\]"):
        run(clean_weight=1.1)
    with pytest.raises(ValueError, match="learning_rate must be finite and positive"):
        run(learning_rate=0.0)
    with pytest.raises(ValueError, match="route must be 'filters' for the attack PatchPGD"):
        run(attack=PatchPGD(0.1), route="recursion")
    with pytest.raises(ValueError, match="spacing must be 'log' or 'linear'"):
        run(spacing="even")
    with pytest.raises(TypeError, match="attack must be an adversary"):
        run(attack=0.1)
    with pytest.raises(ValueError, match=r"test must have inputs of shape \(3, 9\)"):
        run(test=sample(patches=2))
    with pytest.raises(FloatingPointError, match="training diverged; lower learning_rate, now 1e"):
        run(filters=1e3 * jnp.ones((5, 9)), learning_rate=1e30, steps=20)
