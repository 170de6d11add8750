"""Margins and gradients by hand, and attacks, against autodiff and searches in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from patch_problems import NETWORKS, plain_scores, sample, start

from ntkadv import attacks
from ntkadv.cgro import LineAttack, PatchNetwork, PatchPGD, SignalLine, to_images
from ntkadv.cgro.network import responses

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them


@pytest.mark.parametrize("name", NETWORKS)
def test_margins_and_gradients_by_hand_are_those_of_autodiff(name, x64):
    network, data = NETWORKS[name], sample()
    filters = start(network)
    np.testing.assert_allclose(
        network.margins(filters, data.x, data.y),
        data.y * plain_scores(network, filters, data.x),
        rtol=1e-10,
        atol=1e-14,
    )
    expected = jax.grad(lambda w: jnp.mean(jnp.log1p(jnp.exp(-data.y * plain_scores(network, w, data.x)))))(filters)
    np.testing.assert_allclose(network.gradient(filters, data.x, data.y), expected, rtol=1e-10, atol=1e-14)
    expected = jax.grad(lambda x: jnp.sum(plain_scores(network, filters, x)))(data.x)
    np.testing.assert_allclose(network.input_gradient(filters, data.x), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_margin_is_alpha_to_the_q_times_the_signal_plus_the_noise(name, x64):
    network, data = NETWORKS[name], sample()
    filters = start(network)
    u, v = filters @ data.w_star, jnp.einsum("rd,ijd->rij", filters, data.noise)
    at_minus, at_plus = network.signal_margin(u)
    signal = 1.5**network.power * jnp.where(data.y > 0, at_plus, at_minus)
    expected = data.y * plain_scores(network, filters, data.x)
    np.testing.assert_allclose(signal + network.noise_margins(v, data.y), expected, rtol=1e-10, atol=1e-14)
    if name == "cubic":
        assert at_minus == pytest.approx(at_plus)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("delta", [0.5, 1.5, 2.5])
def test_the_line_attack_is_the_worst_of_all_points_of_the_line(name, delta, x64):
    network, data = NETWORKS[name], sample()
    for seed in range(3):
        filters = start(network, seed, std=0.7)
        found = network.margins(filters, SignalLine(delta).perturb(network, filters, data), data.y)
        is_signal = jax.nn.one_hot(data.position, 3)[:, :, None]
        line = np.linspace(-delta, delta, 41)[:, None, None, None] * is_signal * data.w_star
        worst = jnp.min(jnp.stack([network.margins(filters, data.x + change, data.y) for change in line]), axis=0)
        assert (np.asarray(found) <= worst + 1e-12 * jnp.abs(worst)).all()
        at_zero = network.margins(filters, data.x * (1 - is_signal), data.y) if delta >= 1.5 else np.inf
        np.testing.assert_allclose(found, np.minimum(worst, at_zero), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("where", ["all", "signal"])
def test_pgd_stays_in_the_ball_and_lowers_every_margin(norm, where, x64):
    network, data = NETWORKS["cubic"], sample()
    filters = start(network)
    attacked = PatchPGD(0.3, norm=norm, where=where).perturb(network, filters, data)
    change = np.asarray(attacked - data.x)
    size = np.abs(change).max(axis=(1, 2)) if norm == "linf" else np.sqrt((change**2).sum(axis=(1, 2)))
    assert (size <= 0.3 * (1 + 1e-12)).all()
    assert (network.margins(filters, attacked, data.y) < network.margins(filters, data.x, data.y)).all()
    changed = np.any(change != 0, axis=2)
    if where == "signal":
        np.testing.assert_array_equal(changed, jax.nn.one_hot(data.position, 3, dtype=bool))
    else:
        assert changed.all()


def test_pairs_are_symmetric(key):
    opposite = PatchNetwork(width=6).init(key, 9)
    np.testing.assert_array_equal(opposite[:3], -opposite[3:])
    network = PatchNetwork(width=6, pairs="equal")
    equal = network.init(key, 9)
    np.testing.assert_array_equal(equal[:3], equal[3:])
    np.testing.assert_allclose(network.scores(equal, sample().x), 0, atol=1e-9)
    free = PatchNetwork(width=600, pairs="none").init(key, 9, std=0.2)
    assert float(jnp.std(free)) == pytest.approx(0.2, rel=0.05)
    assert float(jnp.std(PatchNetwork(width=600).init(key, 9))) == pytest.approx(1 / 9, rel=0.1)


def test_as_a_model_of_images_the_network_gives_the_same_margins(key):
    network, data = NETWORKS["cubic"], sample()
    filters = network.init(key, 9, std=0.5)
    images = to_images(data)
    logits = network.model(filters, images)(jnp.asarray(images.images[0]))
    assert logits.shape == (8, 2)
    np.testing.assert_allclose(logits[:, 1], network.scores(filters, data.x), rtol=2e-3, atol=1e-5)
    assert responses(filters, data.x).shape == (8, 3, 5)


def test_bad_settings_are_refused(unchecked, key):
    with pytest.raises(ValueError, match="activation must be one of cubic, relu, got 'gelu'"):
        PatchNetwork(activation="gelu")
    with pytest.raises(ValueError, match="power must be at least 2, and 3 for the cubic"):
        PatchNetwork(power=1)
    with pytest.raises(ValueError, match="3 for the cubic activation, got 4"):
        PatchNetwork(activation="cubic", power=4)
    with pytest.raises(ValueError, match="width must be even"):
        PatchNetwork(width=5)
    with pytest.raises(ValueError, match="pairs must be 'opposite'"):
        PatchNetwork(pairs="mirrored")
    with pytest.raises(ValueError, match="norm must be one of l2, linf, got 'l1'"):
        PatchPGD(0.1, norm="l1")
    with pytest.raises(ValueError, match="delta must be finite and not negative"):
        SignalLine(-1.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        PatchPGD(0.1, steps=0)


@pytest.mark.slow
def test_the_line_attack_on_any_model_finds_what_the_exact_one_finds(key):
    data = sample(n=30, position=0)
    network = NETWORKS["cubic"]
    filters = start(network)
    images = to_images(data, room=1.2)
    direction = np.zeros((3, 9))
    direction[0] = np.asarray(data.w_star)
    threat = attacks.L2(1.2 * images.scale)
    attack = LineAttack(threat, direction=tuple(direction.ravel().tolist()), points=9)
    model = network.model(filters, images)
    points = attack(model, images.images[0], np.asarray(data.labels), key=key)
    # The signal's part of the margin is monotone along the line, so that the worst point is an end.
    exact = network.margins(filters, SignalLine(1.2).perturb(network, filters, data), data.y)
    found = network.margins(filters, images.back(points), data.y)
    np.testing.assert_allclose(found, exact, rtol=2e-3, atol=1e-3)
    assert (np.asarray(threat.distance(points, jnp.asarray(images.images[0]))) <= threat.eps).all()
    changed = np.any(np.asarray(points) != images.images[0], axis=(2, 3))
    assert not changed[:, 1:].any()


def test_bad_lines_are_refused(unchecked, key):
    with pytest.raises(ValueError, match="direction must have norm 1, got 2"):
        LineAttack(attacks.L2(0.1), direction=(2.0, 0.0))
    with pytest.raises(ValueError, match="points must be odd"):
        LineAttack(attacks.L2(0.1), direction=(1.0, 0.0), points=8)
    with pytest.raises(ValueError, match=r"threat must be L2\(eps\)"):
        LineAttack(attacks.Linf(0.1), direction=(1.0, 0.0))
    x, y = np.full((2, 3, 1, 1), 0.5, np.float32), np.array([0, 1])
    with pytest.raises(ValueError, match="direction must have 3 numbers"):
        LineAttack(attacks.L2(0.1), direction=(1.0, 0.0))(lambda z: z[:, :2, 0, 0], x, y, key=key)
