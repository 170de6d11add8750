"""Learning rates against their formulas, descent against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntkadv.training import piecewise, sgd, triangular


@pytest.mark.parametrize(
    ("peak", "steps", "rise"), [(0.2, 10, 0.5), (5e-8, 11_700, 0.5), (0.4, 100, 0.4), (1.0, 7, 0.3)]
)
def test_a_triangle_rises_and_falls_linearly(peak, steps, rise):
    rate, top = triangular(peak, steps, rise=rise), round(rise * steps)
    at = np.unique([0, 1, top // 2, top - 1, top, top + 1, (top + steps) // 2, steps - 1, steps])
    np.testing.assert_allclose([rate(step) for step in at], np.interp(at, [0, top, steps], [0, peak, 0]),
                               rtol=1e-4, atol=1e-6 * peak)  # fmt: skip
    assert rate(top) == pytest.approx(peak)


def test_a_piecewise_rate_falls_at_its_shares():
    rate = piecewise(0.1, 200, drops=(0.5, 0.75), factor=0.1)
    assert [float(rate(step)) for step in (0, 99, 101, 149, 151, 400)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    # 100 updates at the first rate: those numbered 0 to 99.
    assert float(rate(100)) == pytest.approx(0.01)
    assert float(piecewise(0.3, 5, drops=())(4)) == pytest.approx(0.3)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_descent_is_that_of_pytorch(nesterov, decay, x64):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, pull = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    weights = torch.tensor(start, requires_grad=True)
    theirs = torch.optim.SGD([weights], lr=0.1, momentum=0.9, weight_decay=decay, nesterov=nesterov)
    ours = sgd(0.1, momentum=0.9, weight_decay=decay, nesterov=nesterov)
    params = jnp.asarray(start)
    state = ours.init(params)
    slope = jax.grad(lambda w: jnp.sum(jnp.sin(w) * pull))
    for _ in range(5):
        theirs.zero_grad()
        (torch.sin(weights) * torch.tensor(pull)).sum().backward()
        theirs.step()
        updates, state = ours.update(slope(params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, weights.detach(), rtol=1e-12)


def test_without_momentum_it_is_plain_descent_with_a_rate_that_may_vary(x64):
    rule, params = sgd(triangular(0.5, 4), momentum=0.0, weight_decay=0.1), jnp.asarray([2.0, -1.0])
    state = rule.init(params)
    expected = np.asarray(params)
    for rate in (0.0, 0.25, 0.5, 0.25):
        updates, state = rule.update(jnp.asarray([1.0, 3.0]), state, params)
        params = optax.apply_updates(params, updates)
        expected = expected - rate * (np.array([1.0, 3.0]) + 0.1 * expected)
        np.testing.assert_allclose(params, expected, rtol=1e-6)


def test_wrong_settings_are_named(unchecked):
    cases = [
        (ValueError, "peak must be finite and positive", lambda: triangular(0.0, 10)),
        (ValueError, "steps must be at least 2", lambda: triangular(0.1, 1)),
        (ValueError, "rise must be between 0 and 1", lambda: triangular(0.1, 10, rise=1.0)),
        (ValueError, "rate must be finite and positive", lambda: piecewise(-0.1, 10)),
        (ValueError, "steps must be at least 1", lambda: piecewise(0.1, 0)),
        (ValueError, "drops must be shares of the run", lambda: piecewise(0.1, 200, drops=(100, 150))),
        (ValueError, "factor must be", lambda: piecewise(0.1, 10, factor=0.0)),
        (ValueError, "momentum must be at least 0 and below 1", lambda: sgd(0.1, momentum=1.0)),
        (ValueError, "weight_decay must", lambda: sgd(0.1, weight_decay=-1e-4)),
    ]
    for error, message, make in cases:
        with pytest.raises(error, match=message):
            make()
