"""Training problems with a chosen spectrum, and their answers by dense float64 algebra, none of it ours."""

import numpy as np
import scipy.linalg


def matrix(eigenvalues, seed=0):
    """A symmetric matrix with the given eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    full = (basis * np.asarray(eigenvalues)) @ basis.T
    return (full + full.T) / 2


def kernel_spectrum(n, largest=50.0):
    """A decay like that of the tangent kernel on images."""
    return largest * np.arange(1, n + 1) ** -1.5


def targets(n, c, seed=1):
    """Centred one-hot rows: rank c - 1."""
    labels = np.random.default_rng(seed).integers(0, c, n)
    return np.eye(c)[labels] - 1 / c


def rates(n, seed=2):
    return np.random.default_rng(seed).uniform(0.2, 1.0, n)


def dense_coefficients(theta, xi, y):
    """`int_0^1 D exp(-t Theta D) Y dt` from one matrix exponential, of a block matrix twice the size."""
    n = len(xi)
    block = np.zeros((2 * n, 2 * n))
    block[:n, :n] = -theta * xi
    block[:n, n:] = np.eye(n)
    return xi[:, None] * (scipy.linalg.expm(block)[:n, n:] @ y)


def dense_gradient(theta, xi, y, g, nodes=60):
    """`int_0^1 sum_c r_ic(t) s_ic(1-t) dt` by Gauss-Legendre quadrature over matrix exponentials."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    total = np.zeros_like(xi)
    for t, weight in zip((points + 1) / 2, weights / 2, strict=True):
        forward, backward = scipy.linalg.expm(-t * theta * xi), scipy.linalg.expm(-(1 - t) * theta * xi)
        total += weight * np.sum((forward @ y) * (backward @ g), axis=1)
    return total
