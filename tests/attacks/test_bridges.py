"""Predictors in JAX as models of other libraries, against JAX itself and against what is known."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_models import CLASSES, IMAGE, Linear, images, labels_of, linear, smooth

from ntkadv.architectures import mlp
from ntkadv.attacks import PGD, Linf
from ntkadv.attacks.bridges import foolbox_model, torch_module
from ntkadv.predictors import KernelPredictor

pytestmark = pytest.mark.slow  # minutes of compilation; `make test-slow` and CI run them


def kernel_machine():
    coefficients = np.random.default_rng(6).normal(size=(30, CLASSES)).astype(np.float32)
    return KernelPredictor(mlp(depth=2, num_classes=CLASSES), images(30, seed=5), coefficients)


MODELS = {
    "network": smooth(),
    "kernel": kernel_machine(),
    "function": jax.tree_util.Partial(lambda m, x: m(x), smooth()),
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def tensor(torch, x, layout):
    return torch.as_tensor(x.transpose(0, 3, 1, 2) if layout == "NCHW" else x)


def to_nhwc(t, layout):
    return np.asarray(t.permute(0, 2, 3, 1) if layout == "NCHW" else t)


@pytest.mark.parametrize(
    ("name", "layout"), [("network", "NCHW"), ("network", "NHWC"), ("kernel", "NCHW"), ("function", "NCHW")]
)
def test_logits_and_gradients_are_those_of_jax(torch, name, layout):
    model, n = MODELS[name], 5
    x = images(n)
    cotangent = np.random.default_rng(3).normal(size=(n, CLASSES)).astype(np.float32)
    logits, pull = jax.vjp(model, jnp.asarray(x))
    z = tensor(torch, x, layout).clone().requires_grad_()
    ours = torch_module(model, layout=layout)(z)
    ours.backward(torch.as_tensor(cotangent))
    scale = float(jnp.max(jnp.abs(logits)))
    np.testing.assert_allclose(ours.detach(), logits, rtol=1e-6, atol=1e-6 * scale)
    gradient = pull(jnp.asarray(cotangent))[0]
    np.testing.assert_allclose(to_nhwc(z.grad, layout), gradient, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.loose_promotion
def test_gradient_is_that_of_finite_differences_in_float64(torch, x64):
    model = jax.tree.map(lambda a: a.astype(jnp.float64), smooth())
    z = torch.as_tensor(images(3).astype(np.float64).transpose(0, 3, 1, 2)).requires_grad_()
    module = torch_module(model)
    assert module(z).dtype == torch.float64
    assert torch.autograd.gradcheck(module, (z,), eps=1e-6, atol=1e-7, rtol=1e-6)


def test_gradient_flows_through_what_is_before_and_behind(torch):
    model = smooth()
    x = images(4)
    labels = labels_of(model, x)

    def loss(scale):
        logits = model(jnp.asarray(x) * scale)
        return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(4), labels])

    scale = torch.tensor(0.7, requires_grad=True)
    logits = torch_module(model)(tensor(torch, x, "NCHW") * scale)
    torch.nn.functional.cross_entropy(logits, torch.as_tensor(labels, dtype=torch.long), reduction="sum").backward()
    np.testing.assert_allclose(scale.grad, jax.grad(loss)(0.7), rtol=1e-5)


def test_float64_images_get_float64_gradients_though_jax_computes_in_float32(torch):
    z = tensor(torch, images(2), "NCHW").double().requires_grad_()
    logits = torch_module(smooth())(z)
    logits.sum().backward()
    assert (logits.dtype, z.grad.dtype) == (torch.float32, torch.float64)
    expected = jax.grad(lambda x: jnp.sum(smooth()(x)))(jnp.asarray(images(2)))
    np.testing.assert_allclose(to_nhwc(z.grad, "NCHW"), expected, atol=1e-5)


@pytest.mark.slow
def test_programs_are_few_however_many_batch_sizes(torch):
    sizes = []

    def model(x):
        sizes.append(len(x))
        return smooth()(x)

    module = torch_module(model, batch_size=7)
    x = images(17)
    expected = np.asarray(smooth()(jnp.asarray(x)))
    for _ in range(2):
        for n in range(1, 18):
            z = tensor(torch, x[:n], "NCHW").requires_grad_()
            logits = module(z)
            logits.sum().backward()
            np.testing.assert_allclose(logits.detach(), expected[:n], atol=1e-5)
    assert sorted(set(sizes)) == [1, 2, 4, 7]
    assert len(sizes) == 8, "a forward and a backward program for each size"


def test_images_are_shared_and_not_copied(torch):
    module = torch_module(smooth(), device="cpu")
    z = torch.rand(4, 2, 3, 4)
    assert module.program._to_jax(z).unsafe_buffer_pointer() == z.data_ptr()


def test_an_image_in_the_wrong_memory_order_is_read_right(torch):
    x = images(4)
    module = torch_module(smooth())
    view = torch.as_tensor(x).permute(0, 3, 1, 2)
    assert not view.is_contiguous()
    np.testing.assert_allclose(module(view), smooth()(jnp.asarray(x)), atol=1e-5)
    np.testing.assert_allclose(module(view[1:]), smooth()(jnp.asarray(x[1:])), atol=1e-5)


def test_images_overwritten_before_the_backward_pass_are_noticed(torch):
    z = tensor(torch, images(4), "NCHW").clone().requires_grad_()
    inside = z * 1
    logits = torch_module(smooth())(inside)
    inside += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_the_module_is_one_without_parameters_and_modes(torch):
    module = torch_module(smooth())
    z = tensor(torch, images(3), "NCHW")
    before = module(z)
    assert isinstance(module, torch.nn.Module)
    assert list(module.parameters()) == []
    assert module.to("cpu").eval().train().float() is module
    torch.testing.assert_close(module(z), before, rtol=0, atol=0)
    assert module(z[:0]).shape == (0, CLASSES)
    with torch.no_grad():
        assert not module(z.requires_grad_()).requires_grad


def test_a_second_derivative_is_refused(torch):
    z = tensor(torch, images(2), "NCHW").clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch_module(smooth())(z).square().sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        gradient.sum().backward()


def test_what_users_do_wrong_is_named(torch, unchecked):
    module = torch_module(kernel_machine())
    x = tensor(torch, images(2), "NCHW")
    with pytest.raises(TypeError, match=r"x must be a float tensor, got torch\.uint8; divide"):
        module((x * 255).to(torch.uint8))
    with pytest.raises(ValueError, match=r"four axes, NCHW, got shape \(2, 3, 4\); pass one image as x\[None\]"):
        module(x[0])
    with pytest.raises(ValueError, match=r"(?s)\(b, 3, 4, 2\).*shape \(2, 3, 4, 2\) was taken as NCHW"):
        module(tensor(torch, images(2), "NHWC"))
    with pytest.raises(TypeError, match=r"x must be a tensor, got ndarray"):
        module(images(2))
    with pytest.raises(ValueError, match=r"must return logits .* got"):
        torch_module(lambda x: x)(x)
    with pytest.raises(ValueError, match="layout must be 'NCHW' or 'NHWC', got 'CHWN'"):
        torch_module(smooth(), layout="CHWN")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        torch_module(smooth(), batch_size=0)
    with pytest.raises(TypeError, match=r"device must be a device of JAX or its platform, got 0; use"):
        torch_module(smooth(), device=0)
    for bridge in (torch_module, foolbox_model):
        with pytest.raises(TypeError, match="f must be a function from images to logits, got NoneType"):
            bridge(None)
    with pytest.raises(ValueError, match="bounds must be the smallest and the largest pixel"):
        foolbox_model(smooth(), bounds=(1, 0))


@pytest.mark.parametrize(("library", "bridge"), [("torch", torch_module), ("foolbox", foolbox_model)])
def test_a_missing_library_is_named_with_its_extra(library, bridge, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"needs {library}; install it with: pip install 'ntkadv\[bridges\]'"):
        bridge(smooth())


@pytest.mark.loose_promotion
def test_foolbox_breaks_the_samples_that_pgd_breaks(key):
    foolbox = pytest.importorskip("foolbox")
    model = kernel_machine()
    x = images(12)
    labels = labels_of(model, x, flipped=1)
    threat, steps = Linf(0.05), 7
    attack = foolbox.attacks.LinfPGD(abs_stepsize=threat.eps / 3, steps=steps, random_start=False)
    wrapped = foolbox_model(model)
    _, points, success = attack(wrapped, jnp.asarray(x), jnp.asarray(labels), epsilons=threat.eps)
    ours = PGD(
        threat, steps=steps, step_size=threat.eps / 3, loss="cross_entropy", random_start=False, keep_best=False
    ).run(model, x, labels, key=key)
    np.testing.assert_allclose(points, ours.points, atol=1e-5)
    np.testing.assert_array_equal(success, ours.is_wrong)
    assert 0 < ours.is_wrong.sum() < 12, "the case is too easy or too hard to tell anything"


@pytest.mark.loose_promotion
def test_a_model_is_compiled_once_for_foolbox(key):
    foolbox = pytest.importorskip("foolbox")
    traces = []

    class Counted(eqx.Module):
        inner: eqx.Module

        def __call__(self, x):
            traces.append(x.shape)
            return self.inner(x)

    model = foolbox_model(Counted(smooth()))
    x = images(4)
    labels = jnp.asarray(labels_of(smooth(), x))
    for steps in (2, 3):
        attack = foolbox.attacks.LinfPGD(steps=steps, random_start=False)
        attack(model, jnp.asarray(x), labels, epsilons=0.01 * steps)
    assert len(traces) == 1


def autoattack(torch, module, eps, attacks):
    library = pytest.importorskip("pyautoattack")
    return library.AutoAttack(module, norm="Linf", eps=eps, version="custom", attacks=attacks, device="cpu", seed=0)


def test_apgd_of_autoattack_finds_the_optimum_of_a_linear_classifier(torch):
    model = linear()
    model = Linear(model.weights / 10)
    x = images(6)
    labels = labels_of(model, x)
    difference = np.asarray(model.weights[:, 1] - model.weights[:, 0]).reshape(IMAGE)
    direction = np.where(labels == 0, 1, -1)[:, None, None, None] * np.sign(difference)
    optimum = np.clip(x + 0.1 * direction, 0, 1)
    apgd = autoattack(torch, torch_module(model), 0.1, ["apgd-ce"]).apgd
    apgd.n_restarts, apgd.loss = 1, "ce"
    points = apgd.perturb(tensor(torch, x, "NCHW"), torch.as_tensor(labels, dtype=torch.long), best_loss=True)
    np.testing.assert_allclose(to_nhwc(points, "NCHW"), optimum, atol=1e-5)


def test_autoattack_runs_and_breaks_no_fewer_than_one_step(torch, key):
    model = kernel_machine()
    x = images(7)
    labels = labels_of(model, x, flipped=1)
    eps = 0.05
    attack = autoattack(torch, torch_module(model), eps, ["apgd-ce", "fab", "square"])
    attack.apgd.n_restarts, attack.apgd.n_iter = 1, 10
    attack.fab.n_restarts, attack.fab.n_iter = 1, 5
    attack.square.n_queries = 20
    points, _ = attack.run_standard_evaluation(
        tensor(torch, x, "NCHW"), torch.as_tensor(labels, dtype=torch.long), batch_size=4
    )
    points = to_nhwc(points, "NCHW")
    assert np.abs(points - x).max() <= eps + 1e-6
    broken = labels_of(model, points) != labels
    weaker = PGD(Linf(eps), steps=1, loss="cross_entropy").run(model, x, labels, key=key)
    assert (broken >= weaker.is_wrong).all()
    assert broken.any()


def test_robustbench_evaluates_a_predictor(torch):
    pytest.importorskip("robustbench")
    from robustbench.utils import clean_accuracy

    x = images(20)
    labels = labels_of(smooth(), x, flipped=5)
    y = torch.as_tensor(labels, dtype=torch.long)
    assert clean_accuracy(torch_module(smooth()), tensor(torch, x, "NCHW"), y) == 0.75
