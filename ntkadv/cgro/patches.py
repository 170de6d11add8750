r"""Patch data: one patch of an input carries the label, the others are noise orthogonal to it.

An input X = (X[1], ..., X[P]) has P patches of d numbers. With a unit vector w* and a label y in {-1, +1},

    X[signal] = alpha y w*,    X[j] ~ N(0, sigma^2 (I - w* w*^T))  for every other patch j.

An attack of radius delta just below alpha all but erases the signal and leaves the noise, by which each training sample
can be told from all others: what is learnt then is the sample, not the class.

Source: Li & Li, ICML 2025, arXiv 2306.01271. The scales of alpha, sigma and delta are those reported for one of its
versions; P, and where the signal is, are not reported, and are arguments here.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ntkadv._checks import require_int, require_key, require_nonnegative
from ntkadv._typing import AnyArray

__all__ = ["PatchData", "PatchDistribution", "PatchImages", "PatchScales", "linear_attack", "to_images"]


@dataclass(frozen=True, kw_only=True)
class PatchScales:
    r"""The sizes of signal, noise and attack as functions of the dimension d of a patch.

    .. math:: \alpha = c_\alpha d^{a} (\ln d)^{b}, \qquad \sigma = c_\sigma d^{-s}, \qquad
              \delta = \alpha \Bigl(1 - \frac{c_\delta}{\sqrt d\, (\ln d)^{p}}\Bigr)

    Args:
        signal_exponent: a; reported as 0.249, up to logarithms.
        signal_log_power: b, those logarithms; 0 because none is reported.
        signal_factor: c_alpha; 1 because none is reported.
        noise_exponent: s; reported as 0.509, so that a noise patch has norm d^-0.009, about 1.
        noise_factor: c_sigma; 1 because none is reported.
        gap_log_power: p, the power of the "polylog"; 1 because it is not reported and 1 is the weakest there is.
        gap_factor: c_delta; 1 because none is reported.

    Source: Li & Li, arXiv 2306.01271, Section 5, as reported.
    """

    signal_exponent: float = 0.249
    signal_log_power: float = 0.0
    signal_factor: float = 1.0
    noise_exponent: float = 0.509
    noise_factor: float = 1.0
    gap_log_power: float = 1.0
    gap_factor: float = 1.0

    def __post_init__(self):
        for name in ("signal_factor", "noise_factor", "gap_factor"):
            require_nonnegative(name, getattr(self, name), strict=True)

    def alpha(self, d: int) -> float:
        """Strength of the signal."""
        return self.signal_factor * d**self.signal_exponent * math.log(d) ** self.signal_log_power

    def sigma(self, d: int) -> float:
        """Give the standard deviation of each number of a noise patch, in the directions orthogonal to w*."""
        return self.noise_factor * d**-self.noise_exponent

    def delta(self, d: int) -> float:
        """Radius of the attack.

        Raises:
            ValueError: d is so small that the radius would not be positive.
        """
        gap = self.gap_factor / (math.sqrt(d) * math.log(d) ** self.gap_log_power) if d > 1 else math.inf
        if gap >= 1:
            raise ValueError(
                f"d = {d} is too small for these scales: delta = alpha (1 - {gap:.3g}) is not positive; take a larger "
                f"d, or a smaller gap_factor (now {self.gap_factor:g})."
            )
        return self.alpha(d) * (1 - gap)


class PatchData(NamedTuple):
    """Samples of a `PatchDistribution`.

    Attributes:
        x: inputs.
        y: labels, -1 or +1, as floats of the dtype of `x`.
        position: which patch of each input carries the signal.
        w_star: the direction of the signal, of norm 1.
    """

    x: Float[Array, "n P d"]
    y: Float[Array, " n"]
    position: Int[Array, " n"]
    w_star: Float[Array, " d"]

    @property
    def labels(self) -> Int[Array, " n"]:
        """Classes 0 (y = -1) and 1 (y = +1), for the rest of the package."""
        return (self.y > 0).astype(jnp.int32)

    @property
    def noise(self) -> Float[Array, "n k d"]:
        """The other patches, k = P - 1 of them, in their order."""
        patches = self.x.shape[1]
        order = jnp.arange(patches - 1, dtype=self.position.dtype)
        places = order + (order >= self.position[:, None]).astype(order.dtype)
        return jnp.take_along_axis(self.x, places[:, :, None], axis=1)

    @property
    def signal(self) -> Float[Array, "n d"]:
        """The patch with the signal."""
        return jnp.take_along_axis(self.x, self.position[:, None, None], axis=1)[:, 0]


@dataclass(frozen=True)
class PatchDistribution:
    r"""The distribution of patch data: alpha y w* in one patch, Gaussian noise orthogonal to w* in the others.

    Args:
        d: numbers in a patch.
        alpha: strength of the signal.
        sigma: standard deviation of the noise.
        num_patches: P, at least two. It is not reported; two is the fewest there can be, one signal and one noise.
        signal_position: which patch carries the signal: a number, or `"random"`, each sample its own. It is not
            reported; the networks here treat all patches alike, so that it changes nothing for them, but it does for
            kernels of fully connected networks. By default the first.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    d: int
    _: KW_ONLY
    alpha: float
    sigma: float
    num_patches: int = 2
    signal_position: int | Literal["random"] = 0

    def __post_init__(self):
        require_int("d", self.d, minimum=2)
        require_int("num_patches", self.num_patches, minimum=2)
        require_nonnegative("alpha", self.alpha, strict=True)
        require_nonnegative("sigma", self.sigma, strict=True)
        if self.signal_position != "random":
            require_int("signal_position", self.signal_position, minimum=0)
            if self.signal_position >= self.num_patches:
                raise ValueError(
                    f"signal_position must be below num_patches = {self.num_patches}, got {self.signal_position}; "
                    "count from 0, or write 'random'."
                )

    @classmethod
    def scaled(cls, d: int, scales: PatchScales | None = None, **settings) -> PatchDistribution:
        """Make the distribution whose alpha and sigma are those of the scales at d; `settings` as the constructor's.

        Raises:
            ValueError: d is too small for the scales; see `PatchScales.delta`.
        """
        require_int("d", d, minimum=2)
        scales = scales or PatchScales()
        scales.delta(d)
        return cls(d, alpha=scales.alpha(d), sigma=scales.sigma(d), **settings)

    @property
    def noise_norm(self) -> float:
        """Root mean square of the norm of a noise patch."""
        return self.sigma * math.sqrt(self.d - 1)

    def direction(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        """Draw a direction w*, uniformly on the sphere."""
        require_key("key", key)
        w = jax.random.normal(key, (self.d,))
        return w / jnp.linalg.norm(w)

    def sample(self, n: int, *, key: Key[Array, ""], w_star: Float[AnyArray, " d"] | None = None) -> PatchData:
        """Draw samples; half the labels are +1, up to one where n is odd, in random order.

        Args:
            n: how many; at least two, so that both classes are there.
            key: a random key.
            w_star: the direction of the signal; by default the first coordinate. The noise being isotropic, networks
                with isotropic initialisation do not depend on it.

        Raises:
            ValueError: n is less than two, or `w_star` is no unit vector of d numbers.
        """
        require_int("n", n, minimum=2)
        require_key("key", key)
        w_star = jnp.eye(1, self.d)[0] if w_star is None else jnp.asarray(w_star)
        if w_star.shape != (self.d,) or not np.isclose(np.linalg.norm(w_star), 1, atol=1e-5):
            raise ValueError(
                f"w_star must be a unit vector of {self.d} numbers, got shape {w_star.shape} and norm "
                f"{np.linalg.norm(w_star):.6g}; divide it by its norm."
            )
        noise_key, label_key, place_key = jax.random.split(key, 3)
        y = jax.random.permutation(label_key, jnp.where(jnp.arange(n) % 2 == 0, 1.0, -1.0).astype(w_star.dtype))
        if self.signal_position == "random":
            position = jax.random.randint(place_key, (n,), 0, self.num_patches, jnp.int32)
        else:
            position = jnp.full(n, self.signal_position, jnp.int32)
        noise = self.sigma * jax.random.normal(noise_key, (n, self.num_patches, self.d), w_star.dtype)
        noise = noise - (noise @ w_star)[..., None] * w_star
        is_signal = jax.nn.one_hot(position, self.num_patches, dtype=bool)[..., None]
        x = jnp.where(is_signal, (self.alpha * y)[:, None, None] * w_star, noise)
        return PatchData(x, y, position, w_star)


def linear_attack(
    data: PatchData,
    delta: float,
    *,
    w: Float[AnyArray, " d"] | None = None,
    where: Literal["signal", "all"] = "signal",
    norm: Literal["l2", "linf"] = "l2",
) -> Float[Array, "n P d"]:
    r"""Perturb inputs so as to lower y sum_j <w, X[j]> the most: the optimal attack on a linear classifier.

    .. math:: X'[\mathrm{signal}] = X[\mathrm{signal}] - \delta\, y\, w / \lVert w \rVert_2

    which for w = w* is (alpha - delta) y w*. In the l_inf norm it is -delta y sign(w). Where all patches may change,
    the l_2 norm is that of the whole input, and the change is spread evenly: it lowers the score by delta sqrt(P) |w|.

    Args:
        data: the samples.
        delta: radius.
        w: the linear classifier, the same on all patches; w* if not given, which is the one of theory.
        where: `"signal"`, as reported; or `"all"` patches.
        norm: `"l2"`, by default, in which the reported formula is optimal; or `"linf"`.

    Raises:
        ValueError: delta is negative, or w is zero.
    """
    require_nonnegative("delta", delta)
    w = data.w_star if w is None else jnp.asarray(w, data.x.dtype)
    if not np.any(np.asarray(w)):
        raise ValueError("w must not be zero: there is nothing to attack.")
    step = jnp.sign(w) if norm == "linf" else w / jnp.linalg.norm(w)
    patches = data.x.shape[1]
    if where == "signal":
        mask = jax.nn.one_hot(data.position, patches, dtype=data.x.dtype)
    else:
        mask = jnp.full(data.x.shape[:2], 1.0 if norm == "linf" else patches**-0.5, data.x.dtype)
    return data.x - delta * data.y[:, None, None] * mask[:, :, None] * step


class PatchImages(NamedTuple):
    """Patch data as images with pixels in [0, 1]: x -> 1/2 + scale x, a patch a row.

    Attributes:
        images: one array of images (n, P, d, 1) for each data set that was given, in float32.
        scale: a length in the data is `scale` times as long in the images, and so is a radius.
    """

    images: tuple[Float[np.ndarray, "_ P d 1"], ...]
    scale: float

    def back(self, images: Float[AnyArray, "n P d 1"]) -> Float[Array, "n P d"]:
        """From images to data."""
        return (jnp.asarray(images)[..., 0] - 0.5) / self.scale


def to_images(*data: PatchData, room: float = 0.0) -> PatchImages:
    """Write patch data as images, by one affine map for all, so that kernels and attacks of the package take them.

    Centred networks (`center=0.5`) see the data times `scale`.

    Args:
        data: data sets of one shape.
        room: how far a number may be moved by an attack without leaving [0, 1], in the units of the data.

    Raises:
        ValueError: no data, or `room` is negative.
    """
    if not data:
        raise ValueError("data must hold at least one data set; pass the training and the test data together.")
    require_nonnegative("room", room)
    largest = max(float(jnp.max(jnp.abs(part.x))) for part in data)
    scale = 0.5 / (largest + room)
    images = tuple(np.clip(0.5 + scale * np.asarray(part.x, np.float32), 0, 1)[..., None] for part in data)
    return PatchImages(images, scale)
