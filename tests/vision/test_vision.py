"""Networks with batch norm: their sizes, what they offer to be perturbed, and what users see of them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ntkadv as na
from ntkadv.data import Dataset
from ntkadv.training import gradient_flow, linearize, train
from ntkadv.vision import LeNet, Pass, PreActResNet, ResNet9, SmallCNN, preact_resnet18, wide_resnet
from ntkadv.vision.layers import BatchNorm, Convolution, Linear, max_pool

TINY = {
    "preact": functools.partial(PreActResNet, num_classes=3, stem=4, widths=(4, 6), blocks=(1, 1), channels_in=2),
    "resnet9": functools.partial(ResNet9, num_classes=3, width=2, channels_in=2),
    "small": functools.partial(SmallCNN, num_classes=3, filters=(3, 4), hidden=5, image=(8, 8, 2), batch_norm=True),
    "lenet": functools.partial(LeNet, num_classes=3, width=1, image=(8, 8, 2)),
}


def tiny(name, dtype=jnp.float32, **options):
    """Numbers of NumPy's in all arrays, so nothing is compiled."""
    rng = np.random.default_rng(0)

    def numbers(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5
        drawn = scale * rng.normal(size=leaf.shape) if len(leaf.shape) > 1 else 0.4 + 0.6 * rng.random(leaf.shape)
        return jnp.asarray(drawn, dtype)

    return jax.tree.map(numbers, eqx.filter_eval_shape(TINY[name], key=jax.random.key(0), **options))


def compiled(function):
    """Compile without optimisation, which takes a third of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def images(n=5, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).random((n, 8, 8, 2)), dtype)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (preact_resnet18, 11_172_170),
        (wide_resnet, 46_160_474),
        (ResNet9, 6_573_130),
        (SmallCNN, 166_406),
        (functools.partial(LeNet, width=16), 3_274_634),
        (functools.partial(LeNet, filters=(6, 16), hidden=(120, 84), image=(28, 28, 1)), 107_786),
    ],
)
def test_parameters_are_as_many_as_published(make, count, key):
    # LeNet-5 by hand: 156 + 2,416 + 94,200 + 10,164 + 850.
    params, statistics = eqx.filter_eval_shape(lambda: make(key=key).split()[:2])
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count
    norms = [leaf for leaf in jax.tree.leaves(params) if len(leaf.shape) == 1]
    assert len(jax.tree.leaves(statistics)) in (0, len(norms) - 1)


def test_parameters_are_counted_without_running_averages():
    model = tiny("preact")
    convolutions = 9 * (2 * 4 + 4 * 4 + 4 * 4 + 4 * 6 + 6 * 6) + 4 * 6
    assert model.num_params == convolutions + 2 * (4 + 4 + 4 + 6 + 6) + 6 * 3 + 3


def test_weights_are_drawn_as_they_should_be(key):
    weights = np.asarray(Convolution(32, 64, key=key).weights)
    n = weights.size
    assert weights.shape == (3, 3, 32, 64)
    assert abs(weights.mean()) < 4.5 * weights.std() / n**0.5
    assert weights.var() == pytest.approx(2 / (9 * 32), rel=4.5 * (2 / n) ** 0.5)
    assert Convolution(2, 3, key=key).bias is None
    layer, bound = Linear(64, 100, key=key), 64**-0.5
    for array in (layer.weights, layer.bias):
        assert 0.9 * bound < np.abs(array).max() <= bound
    norm = BatchNorm(5)
    for array, value in ((norm.scale, 1), (norm.offset, 0), (norm.running.mean, 0), (norm.running.variance, 1)):
        np.testing.assert_array_equal(array, np.full(5, value))


@pytest.mark.parametrize("name", TINY)
def test_derivatives_in_shifts_are_differences_of_hidden_states(name, x64):
    model, x = tiny(name, jnp.float64), images(3, jnp.float64)
    pull = np.random.default_rng(3).normal(size=(3, 3))

    def total(shifts):
        through = Pass(training=True, shifts=shifts)
        return jnp.sum(model.forward(x, through) * pull), through.hidden

    zeros = [jnp.zeros(state.shape) for state in jax.eval_shape(lambda: total(())[1])]
    counts = {"preact": 2, "resnet9": 2, "small": 3, "lenet": 3}
    assert len(zeros) == counts[name]
    slopes, hidden = compiled(jax.grad(total, has_aux=True))(zeros)
    outcome, rng = compiled(total), np.random.default_rng(4)
    for number, slope in enumerate(slopes):
        direction = jnp.asarray(rng.normal(size=slope.shape))
        ahead, back = ([*zeros[:number], s * direction, *zeros[number + 1 :]] for s in (1e-6, -1e-6))
        difference = (outcome(ahead)[0] - outcome(back)[0]) / 2e-6
        assert float(difference) == pytest.approx(float(jnp.vdot(slope, direction)), rel=1e-5, abs=1e-6)
        assert np.abs(slope).max() > 1e-3
        # What is seen is the hidden state without what is added to it.
        np.testing.assert_allclose(outcome(ahead)[1][number], hidden[number], rtol=1e-9, atol=1e-12)


def test_the_shortcut_is_not_perturbed(x64):
    """With the convolutions of a block at zero, its output is its shortcut, whatever is added to the hidden state."""
    model, x = tiny("preact", jnp.float64), images(3, jnp.float64)
    through = Pass()
    model.forward(x, through)
    shifts = [jnp.full_like(state, 5.0) for state in through.hidden]
    forward = eqx.filter_jit(lambda model, shifts: model.forward(x, Pass(shifts=shifts)))
    assert np.abs(forward(model, shifts) - forward(model, [0 * s for s in shifts])).max() > 0.1
    cut = model
    for number in (0, 1):

        def weights(m, number=number):
            return m.blocks[number].convolutions[1].weights

        cut = eqx.tree_at(weights, cut, jnp.zeros_like(weights(cut)))
    np.testing.assert_array_equal(forward(cut, shifts), forward(cut, [0 * s for s in shifts]))


def test_shifts_must_be_as_many_as_hidden_states(unchecked):
    model = tiny("preact")
    with pytest.raises(ValueError, match="as many as the hidden states, got 1, which are too few"):
        model.forward(images(), Pass(shifts=[jnp.zeros((5, 8, 8, 4))]))


@pytest.mark.parametrize("name", TINY)
def test_in_evaluation_each_image_is_on_its_own(name):
    model, x = tiny(name), images()
    call = eqx.filter_jit(model)
    whole = call(x)
    assert whole.shape == (5, 3)
    np.testing.assert_allclose(jnp.concatenate([call(one[None]) for one in x]), whole, rtol=1e-4, atol=1e-5)
    training = eqx.filter_jit(lambda x: model.forward(x, Pass(training=True)))(x)
    if name != "lenet":
        assert np.abs(training - whole).max() > 1e-2


def test_pixels_are_normalised_by_channel(x64):
    x = images(2, jnp.float64)
    moved = tiny("preact", jnp.float64, mean=(0.1, 0.7), std=(0.5, 2.0))
    plain = tiny("preact", jnp.float64, mean=0.0, std=1.0)
    np.testing.assert_allclose(moved(x), plain((x - jnp.array([0.1, 0.7])) / jnp.array([0.5, 2.0])), rtol=1e-10)


def test_as_a_function_it_is_its_evaluation_and_all_that_takes_functions_takes_it(x64):
    model, x = tiny("small", jnp.float64), images(3, jnp.float64)
    f, params = model.as_function()
    np.testing.assert_allclose(jax.jit(f)(params, x), compiled(lambda: model(x))(), rtol=1e-10)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == model.num_params
    # Linearised, and the NTK, against differences of outputs and a Jacobian.
    line = linearize(f, params)
    flat, unravel = ravel_pytree(params)
    outputs = compiled(lambda flat: f(unravel(flat), x))
    direction = np.random.default_rng(5).normal(size=flat.shape)
    ahead, back = (outputs(jnp.asarray(flat + s * direction)) for s in (1e-6, -1e-6))
    there = compiled(lambda flat: line.apply(unravel(flat), x))(jnp.asarray(flat + direction)) - outputs(flat)
    np.testing.assert_allclose(there, (ahead - back) / 2e-6, rtol=1e-5, atol=1e-6)
    jacobian = np.asarray(compiled(jax.jacrev(lambda flat: f(unravel(flat), x)))(flat))
    expected = np.einsum("nip,mjp->nmij", jacobian, jacobian)
    np.testing.assert_allclose(na.kernels.empirical_ntk(f, params, x), expected, rtol=1e-8, atol=1e-10)
    labels = np.arange(3)
    held = Dataset.from_arrays(name="random", x_train=x, y_train=labels, x_test=x, y_test=labels, num_classes=3)
    done = train(f, held, params=params, steps=1, key=jax.random.key(0), optimizer=0.1, progress=False)
    assert float(jnp.abs(done.params.dense[1].bias - params.dense[1].bias).max()) > 0


def test_running_averages_get_no_gradient_and_do_not_carry_one(x64):
    model, x = tiny("preact", jnp.float64), images(3, jnp.float64)
    params, statistics, rest = model.split()

    def moved(params):
        own = eqx.combine(params, statistics, rest)
        through = Pass(training=True)
        own.forward(x, through)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(own.after(through).split()[1]))

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(compiled(jax.grad(moved))(params)))


@pytest.mark.parametrize("name", ["preact", "small"])
def test_half_precision_gives_close_logits_and_keeps_float32_parameters(name):
    x = images()
    whole, half = tiny(name), tiny(name, compute_dtype="bfloat16")
    for training in (False, True):
        ours, theirs = (
            compiled(lambda m=m, training=training: m.forward(x, Pass(training=training)))() for m in (half, whole)
        )
        assert ours.dtype == theirs.dtype == jnp.float32
        assert 0 < np.abs(ours - theirs).max() < 0.06 * np.abs(theirs).max()
    slope = jax.eval_shape(lambda: eqx.filter_grad(lambda m: jnp.sum(m.forward(x, Pass(training=True)) ** 2))(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(slope)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("height", "width", "size"), [(6, 8, 2), (7, 5, 2), (7, 9, 3)])
def test_pooling_is_that_of_xla(height, width, size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 3)), jnp.float32)
    window = (1, size, size, 1)

    def theirs(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")

    found = [
        compiled(jax.value_and_grad(lambda x, f=f: (jnp.sum(jnp.sin(f(x))), f(x)), has_aux=True))(x)
        for f in (lambda x: max_pool(x, size), theirs)
    ]
    (one, slope), (other, their_slope) = ((aux, slope) for (_, aux), slope in found)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(slope, their_slope)


def test_where_several_pixels_are_largest_the_first_has_the_gradient_and_nan_is_not_lost():
    x = jnp.asarray([[0.0, 2, 1, 1], [2, 1, 1, 1]], jnp.float32)[None, :, :, None]
    slope = compiled(jax.grad(lambda x: jnp.sum(max_pool(x))))(x)
    np.testing.assert_array_equal(slope[0, :, :, 0], [[0, 1, 1, 0], [0, 0, 0, 0]])
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert np.isnan(max_pool(x.at[0, *place].set(jnp.nan))).ravel().tolist() == [True, False]


def test_it_is_judged_as_any_other_predictor(key):
    rng = np.random.default_rng(0)
    x, labels = rng.random((30, 8, 8, 2)).astype(np.float32), np.arange(30) % 3
    held = Dataset.from_arrays(name="random", x_train=x[:10], y_train=labels[:10], x_test=x[10:], y_test=labels[10:],
                               num_classes=3)  # fmt: skip
    model = tiny("small")
    threat = na.attacks.Linf(0.1)
    attack = na.attacks.PGD(threat, steps=3, loss="cross_entropy")
    found = na.evaluate(model, held, [attack], key=key, keep_adversarial=True, check=False, progress=False)

    def right(x):
        return np.argmax(np.asarray(model(jnp.asarray(x))), axis=1) == held.y_test

    np.testing.assert_array_equal(found.correct["clean"], right(held.x_test))
    points = found.adversarial[attack.name]
    assert np.abs(points - held.x_test).max() <= 0.1 + 1e-6
    np.testing.assert_array_equal(found.correct[attack.name], right(points))


def test_what_cannot_be_built_is_named(unchecked, key):
    cases = [
        ("num_classes must be at least 2", lambda: ResNet9(num_classes=1, key=key)),
        ("std positive", lambda: ResNet9(std=0.0, key=key)),
        ("mean and std must be finite", lambda: ResNet9(mean=float("nan"), key=key)),
        ("std positive", lambda: ResNet9(std=(0.2, -0.2, 0.2), key=key)),
        ("compute_dtype must be 'float32'", lambda: ResNet9(compute_dtype="int8", key=key)),
        ("width and channels_in must be at least 1", lambda: ResNet9(width=0, key=key)),
        ("width and channels_in must be at least 1", lambda: ResNet9(channels_in=0, key=key)),
        ("widths and blocks must be as many as stages", lambda: PreActResNet(widths=(4,), blocks=(1, 1), key=key)),
        ("widths and blocks must be", lambda: PreActResNet(widths=(), blocks=(), key=key)),
        ("at least 1; got widths", lambda: PreActResNet(widths=(4, 0), blocks=(1, 1), key=key)),
        ("at least 1; got widths", lambda: PreActResNet(stem=0, key=key)),
        ("at least 1; got widths", lambda: preact_resnet18(width=0, key=key)),
        ("depth must be 6 n . 4, such as 16, 28 or 34, got 33", lambda: wide_resnet(33, key=key)),
        ("depth must be 6 n . 4", lambda: wide_resnet(4, key=key)),
        ("factor must be at least 1", lambda: wide_resnet(16, 0, key=key)),
        ("filters and hidden must be at least 1", lambda: LeNet(width=0, key=key)),
        ("filters and hidden must be at least 1", lambda: LeNet(filters=(6, 0), key=key)),
        ("image must be at least 4 pixels high and wide", lambda: LeNet(image=(3, 28, 1), key=key)),
        ("filters and hidden must be at least 1", lambda: SmallCNN(filters=(0, 3), key=key)),
        ("filters and hidden must be at least 1", lambda: SmallCNN(hidden=0, key=key)),
        ("image must be at least 4 pixels", lambda: SmallCNN(image=(28, 3, 1), key=key)),
        ("images must be at least 8 x 8 for ResNet9", lambda: tiny("resnet9")(jnp.ones((1, 7, 8, 2)))),
    ]
    for message, make in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_where_a_function_is_needed_a_network_with_its_parameters_inside_is_refused(unchecked):
    model = tiny("small")
    held = Dataset.from_arrays(name="random", x_train=images(4), y_train=np.arange(4) % 3, x_test=images(4),
                               y_test=np.arange(4) % 3, num_classes=3)  # fmt: skip
    for call in (lambda: linearize(model, model.split()[0]), lambda: gradient_flow(model, None, held, [1.0])):
        with pytest.raises(TypeError, match=r"got a SmallCNN with its parameters inside; take f, params = network\.as"):
            call()
