"""Measures of kernels against exact arithmetic, features, known spectra, and their invariances."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from ntkadv.architectures import mlp
from ntkadv.kernels import (
    KernelMovement,
    cosine_distance,
    effective_rank,
    empirical_ark,
    empirical_ntk,
    kernel_movement,
    kernel_spectrum,
    polar,
    relative_distance,
    target_alignment,
    top_share,
)

N, C = 7, 3
FORMS = ["images", "images and outputs", "outputs"]


def features(seed, *, shift=0.0):
    """Jacobians (n, c, p)."""
    return np.random.default_rng(seed).normal(size=(N, C, 30)) + shift


def kernel_of(jacobian, form):
    if form == "images":
        return np.einsum("njp,mjp->nm", jacobian, jacobian) / C
    if form == "images and outputs":
        return np.einsum("njp,mkp->nmjk", jacobian, jacobian)
    return np.einsum("njp,nkp->njk", jacobian, jacobian)


def matrix_of(kernel):
    """The matrix that a kernel is, entry by entry."""
    if kernel.ndim == 2:
        return kernel
    n, c = len(kernel), kernel.shape[-1]
    matrix = np.zeros((n * c, n * c))
    for i, j, a, b in np.ndindex(n, n, c, c):
        if kernel.ndim == 4:
            matrix[i * c + a, j * c + b] = kernel[i, j, a, b]
        elif i == j:
            matrix[i * c + a, i * c + b] = kernel[i, a, b]
    return matrix


def with_spectrum(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    matrix = (q * np.asarray(values, float)) @ q.T
    return (matrix + matrix.T) / 2


def exactly(kernel, reference):
    """One minus the cosine, and the angle, in 60 digits."""
    with mpmath.workdps(60):
        a, b = ([mpmath.mpf(float(entry)) for entry in k.ravel()] for k in (kernel, reference))
        cosine = mpmath.fdot(a, b) / mpmath.sqrt(mpmath.fdot(a, a) * mpmath.fdot(b, b))
        return float(1 - cosine), float(mpmath.acos(cosine))


@pytest.mark.parametrize("form", FORMS)
def test_distances_and_angle_are_those_of_exact_arithmetic(form):
    kernel, reference = (kernel_of(features(seed, shift=0.3), form) for seed in (0, 1))
    distance, angle = exactly(kernel, reference)
    assert cosine_distance(kernel, reference) == pytest.approx(distance, rel=1e-13)
    radius = np.linalg.norm(matrix_of(kernel)) / np.linalg.norm(matrix_of(reference))
    np.testing.assert_allclose(polar(kernel, reference), (radius, angle), rtol=1e-13)
    off = np.linalg.norm(matrix_of(kernel) - matrix_of(reference)) / np.linalg.norm(matrix_of(reference))
    assert relative_distance(kernel, reference) == pytest.approx(off, rel=1e-13)
    assert cosine_distance(3.0 * kernel, reference) == pytest.approx(distance, rel=1e-13)


@pytest.mark.parametrize("size", [1e-2, 1e-8, 1e-16, 1e-24])
def test_nearly_equal_kernels_keep_the_digits_of_their_distance(size):
    reference, other = (kernel_of(features(seed), "images") for seed in (0, 1))
    other -= np.sum(other * reference) / np.sum(reference**2) * reference
    other *= np.linalg.norm(reference) / np.linalg.norm(other)
    kernel = 1.7 * (reference + np.sqrt(2 * size) * other)
    distance, angle = exactly(kernel, reference)
    assert distance == pytest.approx(size, rel=2 * size + 1e-3)
    # The kernels themselves are rounded, which leaves this much of their difference.
    rounding = 1e-15 / np.sqrt(size)
    assert cosine_distance(kernel, reference) == pytest.approx(distance, rel=2 * rounding)
    assert polar(kernel, reference).angle == pytest.approx(angle, rel=rounding)


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_is_at_no_distance_from_itself(form):
    kernel = kernel_of(features(2), form)
    assert cosine_distance(kernel, kernel) == relative_distance(kernel, kernel) == 0
    assert polar(kernel, kernel) == (1, 0)


def test_orthogonal_kernels_are_at_a_right_angle():
    first, second = np.zeros((2, N, N))
    first[:3, :3], second[3:, 3:] = with_spectrum([1, 2, 3]), with_spectrum([1, 1, 1, 5])
    assert polar(first, second).angle == pytest.approx(np.pi / 2, rel=1e-15)
    assert cosine_distance(first, second) == pytest.approx(1, rel=1e-15)
    assert polar(first, -first).angle == pytest.approx(np.pi, rel=1e-15)


@pytest.mark.parametrize("form", FORMS[:2])
def test_the_centered_distance_is_that_of_centered_features(form):
    one, two = features(0, shift=2.0), features(1, shift=2.0)
    kernels = [kernel_of(jacobian, form) for jacobian in (one, two)]
    centered = [kernel_of(jacobian - jacobian.mean(axis=0), form) for jacobian in (one, two)]
    expected = exactly(*centered)[0]
    assert cosine_distance(*kernels, centered=True) == pytest.approx(expected, rel=1e-10)
    # What all images share makes the kernels alike, unless it is taken out.
    assert cosine_distance(*kernels) < 0.1 * expected


def test_distances_are_taken_of_rectangular_kernels_too():
    one, two = features(0), features(1)
    kernel, reference = one[:4, 0] @ one[:, 0].T, two[:4, 0] @ two[:, 0].T
    assert cosine_distance(kernel, reference) == pytest.approx(exactly(kernel, reference)[0], rel=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_the_spectrum_is_that_of_the_matrix(form):
    kernel = kernel_of(features(3), form)
    values = np.linalg.svd(matrix_of(kernel), compute_uv=False)
    np.testing.assert_allclose(kernel_spectrum(kernel), values, rtol=1e-10)
    assert top_share(kernel, 2) == pytest.approx(values[:2].sum() / np.trace(matrix_of(kernel)), rel=1e-12)
    p = values / values.sum()
    assert effective_rank(kernel) == pytest.approx(np.prod(p**-p), rel=1e-12)
    participation = np.trace(matrix_of(kernel)) ** 2 / np.linalg.norm(matrix_of(kernel)) ** 2
    assert effective_rank(kernel, "participation") == pytest.approx(participation, rel=1e-12)
    jacobian = np.linalg.cholesky(matrix_of(kernel))
    stable = (np.linalg.norm(jacobian) / np.linalg.norm(jacobian, 2)) ** 2
    assert effective_rank(kernel, "stable") == pytest.approx(stable, rel=1e-12)


@pytest.mark.parametrize("definition", ["entropy", "participation", "stable"])
def test_the_effective_rank_of_a_projection_is_its_rank(definition):
    for rank in (1, 4, N):
        kernel = with_spectrum([2.5] * rank + [0] * (N - rank))
        assert effective_rank(kernel, definition) == pytest.approx(rank, rel=1e-12)


def test_effective_ranks_have_an_order():
    for seed in range(5):
        kernel = with_spectrum(np.random.default_rng(seed).exponential(size=N) ** 3)
        ranks = [effective_rank(kernel, definition) for definition in ("entropy", "participation", "stable")]
        assert N >= ranks[0] >= ranks[1] >= ranks[2] >= 1


def test_shares_of_the_spectrum_add_up():
    kernel = with_spectrum([8, 4, 2, 1, 0.5, 0.5, 0])
    np.testing.assert_allclose([top_share(kernel, k) for k in (1, 2, 4)], [0.5, 0.75, 15 / 16], rtol=1e-12)
    assert top_share(kernel, N) == top_share(kernel, 100) == 1


def test_the_kernel_of_the_targets_is_aligned_with_them():
    targets = np.random.default_rng(4).normal(size=(N, 2)) + 1
    for centered in (False, True):
        assert target_alignment(targets @ targets.T, targets, centered=centered) == pytest.approx(1, rel=1e-12)
    assert target_alignment(targets @ targets.T + 10, targets, centered=True) == pytest.approx(1, rel=1e-10)
    assert target_alignment(targets @ targets.T + 10, targets) < 0.9
    # The targets as an orthogonal projection see nothing but their own directions of the identity.
    q = np.linalg.qr(targets)[0]
    assert target_alignment(np.eye(N), q) == pytest.approx(np.sqrt(2 / N), rel=1e-12)


@pytest.mark.parametrize("centered", [False, True])
def test_the_alignment_with_targets_is_the_cosine_with_their_kernel(centered):
    jacobian = features(5, shift=0.5)
    targets = np.random.default_rng(6).normal(size=(N, 2))
    kernel = kernel_of(jacobian, "images")
    h = np.eye(N) - centered / N
    expected = 1 - exactly(h @ kernel @ h, h @ targets @ targets.T @ h)[0]
    assert target_alignment(kernel, targets, centered=centered) == pytest.approx(expected, rel=1e-12)
    # With several outputs, what counts is their mean.
    full = kernel_of(jacobian, "images and outputs")
    assert target_alignment(full, targets, centered=centered) == pytest.approx(expected, rel=1e-12)


def test_float32_kernels_are_measured_in_float64():
    kernel, reference = (kernel_of(features(seed), "images and outputs").astype(np.float32) for seed in (0, 1))
    same = [k.astype(np.float64) for k in (kernel, reference)]
    assert cosine_distance(jnp.asarray(kernel), jnp.asarray(reference)) == cosine_distance(*same)
    np.testing.assert_array_equal(kernel_spectrum(jnp.asarray(kernel)), kernel_spectrum(same[0]))


@pytest.mark.parametrize("form", FORMS)
def test_the_movement_is_made_of_the_measures_of_single_kernels(form):
    path = [kernel_of((1 + t) * features(0) + t * features(1), form) for t in (0.0, 0.1, 0.5, 0.5)]
    targets = np.random.default_rng(6).normal(size=(N, 2)) if form != "outputs" else None
    moved = kernel_movement(iter(path), targets, times=[0, 10, 50, 60], top=(1, 4), rank="stable", progress=False)
    np.testing.assert_array_equal(moved.times, [0, 10, 50, 60])
    expected = {
        "relative_distance": [relative_distance(k, path[0]) for k in path],
        "cosine_distance": [cosine_distance(k, path[0]) for k in path],
        "step_distance": [cosine_distance(k, before) for k, before in zip(path, path[:1] + path[:-1], strict=True)],
        "radius": [polar(k, path[0]).radius for k in path],
        "angle": [polar(k, path[0]).angle for k in path],
        "top_share": [[top_share(k, 1), top_share(k, 4)] for k in path],
        "effective_rank": [effective_rank(k, "stable") for k in path],
    }
    if form == "outputs":
        assert moved.centered_distance is moved.alignment is moved.centered_alignment is None
    else:
        expected["centered_distance"] = [cosine_distance(k, path[0], centered=True) for k in path]
        expected["alignment"] = [target_alignment(k, targets) for k in path]
        expected["centered_alignment"] = [target_alignment(k, targets, centered=True) for k in path]
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(moved, name), values, err_msg=name)
    again = KernelMovement.from_dict(json.loads(json.dumps(moved.to_dict())))
    for name, value in vars(moved).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)


def test_kernels_of_a_network_move_as_its_parameters_do(x64):
    """Scaled by s, every layer's weights scale the kernel of a network of depth L without biases by s^(2 L)."""
    arch = mlp(depth=2, width=16, num_classes=C, b_std=0.0)
    params = arch.init(jax.random.key(0), (4,))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    x = np.random.default_rng(7).random((N, 4))
    scaled = [jax.tree.map(lambda leaf, s=s: s * leaf, params) for s in (1.0, 1.1, 2.0)]
    kernels = np.stack([empirical_ntk(arch.apply, p, x) for p in scaled])
    moved = kernel_movement(kernels, x[:, :2], spectrum=False, progress=False)
    np.testing.assert_allclose(moved.radius, [1, 1.1**4, 2**4], rtol=1e-10)
    np.testing.assert_allclose(moved.relative_distance, moved.radius - 1, rtol=1e-10)
    np.testing.assert_allclose(moved.angle, 0, atol=1e-10)
    assert moved.top_share is moved.effective_rank is None
    arks = [empirical_ark(arch.apply, p, x) for p in scaled]
    radius = kernel_movement(arks, progress=False).radius
    np.testing.assert_allclose(radius, [1, 1.1**6, 2**6], rtol=1e-10)


def test_a_kernel_that_dies_on_the_way_leaves_the_rest_of_its_path():
    alive = kernel_of(features(0), "images")
    moved = kernel_movement([alive, np.zeros_like(alive), alive], features(1)[:, 0, :2], progress=False)
    for name in ("cosine_distance", "centered_distance", "angle", "effective_rank", "alignment", "centered_alignment"):
        np.testing.assert_array_equal(np.isnan(getattr(moved, name)), [False, True, False], err_msg=name)
    assert np.isnan(moved.top_share).any(axis=1).tolist() == [False, True, False]
    np.testing.assert_array_equal(moved.radius, [1, 0, 1])
    np.testing.assert_array_equal(moved.relative_distance, [0, 1, 0])


def test_what_users_do_wrong_is_named(unchecked):
    kernel = kernel_of(features(0), "images")
    ark = kernel_of(features(0), "outputs")
    targets = np.ones((N, 2))
    move = partial(kernel_movement, progress=False)
    skew = kernel + np.triu(np.ones((N, N)), 1)
    cases = [
        (TypeError, "kernel must be an array of floats, got int", lambda: kernel_spectrum(np.eye(3, dtype=int))),
        (TypeError, "reference must be an array of floats, got list", lambda: cosine_distance(kernel, [[1.0]])),
        (ValueError, r"kernel must have the shape of the other, \(7, 7\)", lambda: polar(kernel[:3], kernel)),
        (ValueError, r"several of them go to kernel_movement", lambda: kernel_spectrum(np.ones((4, 5, 6)))),
        (ValueError, "kernel must be finite", lambda: kernel_spectrum(kernel * np.nan)),
        (ValueError, "it has no direction", lambda: cosine_distance(0 * kernel, kernel)),
        (ValueError, "it has no direction", lambda: relative_distance(kernel, 0 * kernel)),
        (ValueError, "and centred: it has no", lambda: cosine_distance(0 * kernel + 0.3, kernel, centered=True)),
        (ValueError, "relates no two images and cannot", lambda: cosine_distance(ark, ark, centered=True)),
        (ValueError, "kernel must be symmetric, but differs", lambda: kernel_spectrum(skew)),
        (ValueError, "of one set of images with itself", lambda: kernel_spectrum(kernel[:4])),
        (ValueError, "not positive semi-definite", lambda: kernel_spectrum(-kernel)),
        (ValueError, "k must be at least 1", lambda: top_share(kernel, 0)),
        (ValueError, "no mass", lambda: top_share(0 * kernel, 1)),
        (ValueError, "definition must be 'entropy'", lambda: effective_rank(kernel, "numerical")),
        (ValueError, "one row for each of the 7 images, got 6", lambda: target_alignment(kernel, targets[:6])),
        (ValueError, r"targets must have shape \(n, c\)", lambda: target_alignment(kernel, targets[:, 0])),
        (ValueError, "targets must not be all zero", lambda: target_alignment(kernel, 0 * targets)),
        (ValueError, "must not be the same for all", lambda: target_alignment(kernel, targets, centered=True)),
        (ValueError, "it has no alignment", lambda: target_alignment(ark, targets)),
        (ValueError, "at least one kernel, got none", lambda: move([])),
        (ValueError, "times has 1, kernels has 2", lambda: move([kernel, kernel], times=[0])),
        (ValueError, r"kernels\[0\], which the others are held against, is zero", lambda: move([0 * kernel, kernel])),
        (ValueError, r"kernels\[1\] must be finite", lambda: move([kernel, kernel * np.inf])),
        (ValueError, "differ in radius", lambda: KernelMovement.from_dict({
            k: v for k, v in move([kernel]).to_dict().items() if k != "radius"})),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
