"""APART: updates against its equations, written out in NumPy; what its generator does over a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from residual_problems import (
    SHAPE,
    assert_leaves,
    batch_of,
    begun,
    compiled,
    descended,
    entropies,
    images,
    resnet,
    speeds,
    tiny_resnet,
    updater,
    with_averages,
)
from training_problems import CLASSES, data, linear, linear_params

from ntkadv.attacks import L2, Linf
from ntkadv.data import Dataset
from ntkadv.training import APARTTraining, Augmentation, CropFlip, StandardTraining, train, triangular

EPS = 0.06
PADDING = 1


def places_of(drawn):
    """Where each pixel of the image that was made comes from: (row, column) in the original, which may be outside."""
    (row, column), is_flipped = drawn
    height, width, _ = SHAPE
    for i in range(height):
        for j in range(width):
            yield (i, j), (i + row - PADDING, (width - 1 - j if is_flipped else j) + column - PADDING)


def augmented(image, drawn):
    out = np.zeros_like(image)
    for made, (y, x) in places_of(drawn):
        if 0 <= y < SHAPE[0] and 0 <= x < SHAPE[1]:
            out[made] = image[y, x]
    return out


def restored(changed, original, drawn):
    out = original.copy()
    for made, (y, x) in places_of(drawn):
        if 0 <= y < SHAPE[0] and 0 <= x < SHAPE[1]:
            out[y, x] = changed[made]
    return out


@compiled
def slopes(params, statistics, x, shifts, labels):
    """Mean loss and running averages; gradients in parameters, images and hidden states."""

    def mean(params, x, shifts):
        logits, _, moved = resnet(params, statistics, x, shifts=shifts)
        return jnp.mean(entropies(logits, labels)), moved

    return jax.value_and_grad(mean, argnums=(0, 1, 2), has_aux=True)(params, x, shifts)


class ByHand:
    """The algorithm, line by line; the ascent with momentum and weight decay."""

    def __init__(self, state, held, decay, momentum):
        self.params, self.statistics, self.speeds = state.params, state.statistics, speeds(state)
        self.x, self.labels = np.asarray(held.x_train, float), held.y_train
        self.starts = np.array(state.method.starts)
        self.scalars = [np.array(scalar) for scalar in state.method.scalars]
        self.speed = [np.zeros_like(scalar) for scalar in self.scalars]
        self.decay, self.momentum = decay, momentum

    def step(self, rate, places, drawn=None):
        alpha, alpha_start, alpha_hidden = self.scalars
        x, old, labels = self.x[places], self.starts[places], jnp.asarray(self.labels[places])
        omega = old
        if drawn is not None:
            x, omega = (np.stack([augmented(*pair) for pair in zip(z, drawn, strict=True)]) for z in (x, omega))
        first = np.clip(alpha_start * omega, -EPS, EPS)
        zeros = [jnp.zeros((len(x), 4, 4, 4))] * 2
        point = jnp.asarray(np.clip(x + first, 0, 1))
        _, (_, g, g_hidden) = slopes(self.params, self.statistics, point, zeros, labels)
        g = np.asarray(g)
        delta = first + alpha * np.sign(g)
        inside = np.abs(delta) < EPS
        delta = np.clip(delta, -EPS, EPS)
        inside &= (x + delta > 0) & (x + delta < 1)
        shifts = [jnp.asarray(a * np.sign(g)) for a, g in zip(alpha_hidden, g_hidden, strict=True)]
        point = jnp.asarray(np.clip(x + delta, 0, 1))
        (loss, moved), (gradient, after, after_hidden) = slopes(self.params, self.statistics, point, shifts, labels)
        after = np.asarray(after)
        new = np.clip(omega + alpha / (alpha_start + 1e-7) * np.sign(after), -1, 1)
        if drawn is not None:
            new = np.stack([restored(*three) for three in zip(new, old, drawn, strict=True)])
        started = np.abs(alpha_start * omega) < EPS
        ascent = [
            np.sum(after * np.sign(g) * inside),
            np.sum(after * omega * (inside & started)),
            np.array([np.sum(a * np.sign(b)) for a, b in zip(after_hidden, g_hidden, strict=True)]),
        ]
        self.speed = [
            self.momentum * v - g + self.decay * s for v, g, s in zip(self.speed, ascent, self.scalars, strict=True)
        ]
        self.scalars = [s - rate * v for s, v in zip(self.scalars, self.speed, strict=True)]
        self.starts[places] = new
        leaves, self.speeds = descended(self.params, gradient, self.speeds)
        self.params = jax.tree.unflatten(jax.tree.structure(self.params), map(jnp.asarray, leaves))
        self.statistics = with_averages(self.statistics, moved)
        return loss


def check(augmentation, drawn, places):
    held, schedule = images(), triangular(2**-7, 8)
    method = APARTTraining(Linf(EPS), alpha=0.02, alpha_start=0.1, start_scale=0.4, scalar_rate=schedule,
                           scalar_decay=0.5, scalar_momentum=0.8)  # fmt: skip
    network, state = begun(method, tiny_resnet(), held, augmentation)
    scalars = state.method.scalars
    assert scalars.alpha_hidden.tolist() == [0, 0]
    state = state._replace(
        method=state.method._replace(scalars=scalars._replace(alpha_hidden=jnp.asarray([0.05, 0.03])))
    )
    hand = ByHand(state, held, 0.5, 0.8)
    before, update = hand.starts.copy(), updater(method, network, augmentation)
    for number, (rows, draws) in enumerate(zip(places, drawn, strict=True)):
        batch = batch_of(held, rows)
        if augmentation is not None:
            made = np.stack([augmented(*pair) for pair in zip(np.asarray(batch.x), draws, strict=True)])
            corners, flips = (jnp.asarray(part) for part in zip(*draws, strict=True))
            batch = batch._replace(x=jnp.asarray(made), drawn=(corners, flips))
        loss = hand.step(number * 2**-9, rows, draws)
        state, metrics = update(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-8)
        assert_leaves(state.params, jax.tree.leaves(hand.params))
        assert_leaves(state.statistics, hand.statistics)
        assert_leaves(list(state.method.scalars), hand.scalars)
        np.testing.assert_allclose(state.method.starts, hand.starts, rtol=1e-9, atol=1e-12)
        assert_leaves(method.report(state.method), dict(zip(scalars._fields, hand.scalars, strict=True)))
    # All of it moves: scalars of all three kinds, and the starts of the images that were in a batch.
    assert all((np.abs(a - b) > 1e-5).all() for a, b in zip(hand.scalars, (0.02, 0.1, [0.05, 0.03]), strict=True))
    moved = np.abs(hand.starts - before) > 0.05
    return moved.any((1, 2, 3)), moved


def test_updates_are_by_hand(x64):
    seen, _ = check(None, [None] * 3, [np.array([0, 1, 2]), np.array([4, 2, 0]), np.array([2, 1, 4])])
    assert seen.tolist() == [True, True, True, False, True, False]


def test_starts_are_kept_where_images_are_before_they_are_cropped_and_mirrored(x64):
    drawn = [
        [((0, 2), False), ((1, 0), True), ((2, 2), True)],
        [((1, 1), True), ((0, 0), False), ((2, 1), False)],
        [((1, 2), True), ((2, 0), False), ((0, 1), True)],
    ]
    places = [np.array([3, 5, 0]), np.array([1, 0, 5]), np.array([3, 1, 2])]
    seen, moved = check(CropFlip(padding=PADDING), drawn, places)
    assert seen.tolist() == [True, True, True, True, False, True]
    # The last image was in one crop: the row that was cut off by corner (0, 1) has kept its start.
    assert not moved[2][-1].any()
    assert moved[2][:-1].any()


def test_with_scalars_that_are_zero_it_is_training_on_the_stored_starts(x64):
    held = images()
    batch = batch_of(held)
    method = APARTTraining(Linf(EPS), alpha=0.0, alpha_start=0.1, start_scale=0.8, scalar_rate=0.0)
    network, state = begun(method, tiny_resnet(stages=1), held)
    new, _ = updater(method, network)(state, batch)
    offset = np.clip(0.1 * np.asarray(state.method.starts), -EPS, EPS)
    assert np.mean(np.abs(offset) == EPS) > 0.1
    points = np.clip(np.asarray(batch.x) + offset, 0, 1)
    plain = StandardTraining(loss="cross_entropy")
    expected, _ = updater(plain, network)(state, batch._replace(x=jnp.asarray(points)))
    assert_leaves((new.params, new.statistics), (expected.params, expected.statistics), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(new.method.starts, np.clip(state.method.starts, -1, 1))
    assert_leaves(new.method.scalars, state.method.scalars, rtol=0, atol=0)


def test_scalars_settle_at_the_mean_norm_of_the_input_gradient_over_the_decay(x64, key):
    """A linear model of two classes that hardly trains: the signs of its gradients are known, and do not change."""
    rng = np.random.default_rng(0)
    x, labels = 0.3 + 0.4 * rng.random((6, 3, 3, 1)), np.arange(6) % 2
    held = Dataset.from_arrays(name="two", x_train=x, y_train=labels, x_test=x, y_test=labels, num_classes=CLASSES)
    params = linear_params()
    params["b"] = params["b"].at[2].set(-40.0)
    decay = 50.0
    method = APARTTraining(Linf(0.15), scalar_rate=8e-4, scalar_decay=decay, start_scale=0.0)
    done = train(linear, held, method=method, steps=600, key=key, params=params, optimizer=1e-12, progress=False)
    w, b = (np.asarray(params[name]) for name in "wb")
    flat, hot = np.asarray(held.x_train, float).reshape(6, -1), np.eye(CLASSES)[labels]

    def slope(points):
        chance = np.exp(points @ w + b)
        return (chance / chance.sum(1, keepdims=True) - hot) @ w.T

    scalars = done.state.method.scalars
    sign = np.sign(slope(flat))
    np.testing.assert_array_equal(done.state.method.starts.reshape(6, -1), sign)
    norm = np.mean(np.sum(np.abs(slope(flat + float(scalars.alpha + scalars.alpha_start) * sign)), axis=1))
    assert 1e-3 < norm / decay < 0.07
    assert [float(scalars.alpha), float(scalars.alpha_start)] == pytest.approx([norm / decay] * 2, rel=1e-6)


def test_the_published_settings_are_those_of_cifar10_and_scale_with_radius_and_length():
    own, scaled = APARTTraining(Linf(8 / 255)), APARTTraining.scaled(Linf(8 / 255), steps=30 * 390)
    assert (own.alpha, own.alpha_start, own.start_scale) == (1e-4, 1e-4, 1e-3)
    assert (own.scalar_rate, own.scalar_momentum, own.scalar_decay) == (5e-8, 0.9, 400)
    for name in ("alpha", "alpha_start", "start_scale", "scalar_momentum", "scalar_decay"):
        assert getattr(scaled, name) == pytest.approx(getattr(own, name), rel=1e-12)
    rates = [float(scaled.scalar_rate(step)) for step in (0, 2925, 5850, 8775, 11700)]
    assert rates == pytest.approx([0, 2.5e-8, 5e-8, 2.5e-8, 0], rel=1e-5, abs=1e-14)
    # Twice the radius, a tenth of the steps: twice the scalars, and ascent that is ten times as fast in those units.
    other = APARTTraining.scaled(Linf(16 / 255), steps=1170, start_scale=0.5)
    assert (other.alpha, other.alpha_start) == pytest.approx((2e-4, 2e-4))
    assert (other.scalar_decay, other.start_scale) == (pytest.approx(200), 0.5)
    assert float(other.scalar_rate(585)) == pytest.approx(5e-8 * 2 * 10)
    # rate * decay, what the scalars forget in a step, times the steps, is the same.
    forgotten = [m.scalar_rate(n / 2) * m.scalar_decay * n for m, n in ((other, 1170), (scaled, 11700))]
    assert float(forgotten[0]) == pytest.approx(float(forgotten[1]))
    assert (own.name, own.passes) == ("APART", (2, 2))


class Noise(Augmentation):
    """Makes pixels, so it cannot be undone."""

    def draw(self, key):
        return jax.random.normal(key, IMAGE_SHAPE, jnp.float32)

    def apply(self, image, drawn):
        return jnp.clip(image + drawn, 0, 1)


IMAGE_SHAPE = (3, 3, 1)


def test_wrong_settings_are_named(unchecked, key):
    threat = Linf(EPS)
    cases = [
        (ValueError, "threat must have a positive eps, got 0", lambda: APARTTraining(Linf(0.0))),
        (TypeError, "threat must be Linf, whose steps are signs", lambda: APARTTraining(L2(0.5))),
        (TypeError, "threat must be a threat model", lambda: APARTTraining(0.03)),
        (ValueError, "alpha must", lambda: APARTTraining(threat, alpha=-1.0)),
        (ValueError, "alpha_start must", lambda: APARTTraining(threat, alpha_start=float("nan"))),
        (ValueError, "start_scale must", lambda: APARTTraining(threat, start_scale=-1.0)),
        (ValueError, "scalar_decay must", lambda: APARTTraining(threat, scalar_decay=-400.0)),
        (ValueError, "scalar_rate must", lambda: APARTTraining(threat, scalar_rate=-1e-8)),
        (ValueError, "momentum must be at least 0 and below 1", lambda: APARTTraining(threat, scalar_momentum=1.0)),
        (ValueError, "reduction must be 'mean' for APART", lambda: APARTTraining(threat, reduction="sum")),
        (ValueError, "threat must have a positive eps", lambda: APARTTraining.scaled(Linf(0.0), steps=100)),
        (ValueError, "steps must be at least 2", lambda: APARTTraining.scaled(threat, steps=1)),
        (ValueError, "augmentation must be one that can be undone.*Noise cannot: take CropFlip",
         lambda: train(linear, data(), method=APARTTraining(threat), steps=1, key=key, params=linear_params(),
                       augmentation=Noise(), progress=False)),
        (NotImplementedError, "Noise cannot be undone", lambda: Noise().restore(None, None, None)),
    ]  # fmt: skip
    for error, message, make in cases:
        with pytest.raises(error, match=message):
            make()
