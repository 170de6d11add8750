r"""The two-layer convolutional network of the theory, with margins and gradients written out by hand.

    f_W(X) = sum_r a_r sum_j act(<w_r, X[j]>)

The signs a_r are fixed, only the m filters w_r are trained. Both activations are homogeneous, act(c z) = c^q act(z) for
c > 0, so that the margin of a sample of patch data falls into signal and noise,

    y f_W(X) = alpha^q U_y + V,    U_y = y sum_r a_r act(y u_r),    V = y sum_r a_r sum_j act(v_rj),

with u_r = <w_r, w*> and v_rj = <w_r, X[j]> over the noise patches.

Source: Li & Li, ICML 2025, arXiv 2306.01271, Section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ntkadv._checks import require_int, require_key, require_nonnegative
from ntkadv.cgro.patches import PatchImages

__all__ = ["ACTIVATIONS", "PatchNetwork"]

ACTIVATIONS = ("cubic", "relu")
"""`"cubic"` is z^3; `"relu"` is max(z, 0)^q."""

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True, kw_only=True)
class PatchNetwork:
    r"""A two-layer CNN on patches, with fixed signs on top.

    .. math:: f_W(X) = \sum_{r=1}^m a_r \sum_{j=1}^P \mathrm{act}(\langle w_r, X[j] \rangle)

    Args:
        width: m, the number of filters. Sources differ between Theta(N) and O~(N D).
        activation: `"relu"`, max(z, 0)^q with half the signs +1 and half -1; or `"cubic"`, z^3 with all signs +1 (an
            inference: z^3 is odd, so that a filter votes for either class, and the reports show no signs for it).
        power: q, at least 2; 3 for the cubic activation.
        pairs: How filters r and r + m/2, of opposite signs, are related at the start. `"opposite"`, w and -w: the pair
            is the odd function sign(z) |z|^q, as the cubic one is. `"equal"`, w and w: then f is 0 at the start. Both
            are "symmetric", and which is meant is an inference; the first treats the two classes alike. `"none"` draws
            all filters for themselves, as is always done for the cubic activation.

    Raises:
        TypeError, ValueError: an argument is out of range or not known.
    """

    width: int = 10
    activation: Literal["cubic", "relu"] = "relu"
    power: float | int = 3
    pairs: Literal["opposite", "equal", "none"] = "opposite"

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")
        require_int("width", self.width, minimum=1)
        require_nonnegative("power", self.power)
        if self.power < 2 or (self.activation == "cubic" and self.power != 3):
            raise ValueError(
                f"power must be at least 2, and 3 for the cubic activation, got {self.power}; below 2 the gradient of "
                "a filter that does not see a patch yet is not small, and there are no phases."
            )
        if self.pairs not in ("opposite", "equal", "none"):
            raise ValueError(f"pairs must be 'opposite', 'equal' or 'none', got {self.pairs!r}.")
        if self.activation == "relu" and self.width % 2:
            raise ValueError(f"width must be even, half the filters for each sign, got {self.width}; add one.")

    @property
    def signs(self) -> Float[np.ndarray, " m"]:
        """The fixed signs a_r on top: all +1, or the first half +1 and the second -1."""
        signs = np.ones(self.width)
        if self.activation == "relu":
            signs[self.width // 2 :] = -1
        return signs

    def init(self, key: Key[Array, ""], d: int, *, std: float | None = None) -> Float[Array, "m d"]:
        """Draw filters with independent Gaussian entries.

        Args:
            key: a random key.
            d: numbers in a patch.
            std: standard deviation of each entry; 1/d by default. It is not reported. At 1/d a filter has norm d^-1/2,
                well below the 1/alpha at which the first phase ends.
        """
        require_key("key", key)
        require_int("d", d, minimum=1)
        std = 1 / d if std is None else std
        require_nonnegative("std", std, strict=True)
        if self.activation == "cubic" or self.pairs == "none":
            return std * jax.random.normal(key, (self.width, d))
        half = std * jax.random.normal(key, (self.width // 2, d))
        return jnp.concatenate([half, -half if self.pairs == "opposite" else half])

    def act(self, z: Array) -> Array:
        """Activation."""
        return z**3 if self.activation == "cubic" else jnp.maximum(z, 0) ** self.power

    def slope(self, z: Array) -> Array:
        """Differentiate the activation."""
        return 3 * z**2 if self.activation == "cubic" else self.power * jnp.maximum(z, 0) ** (self.power - 1)

    def scores(self, filters: Float[Array, "m d"], x: Float[Array, "n P d"]) -> Float[Array, " n"]:
        """f_W at each input."""
        return jnp.sum(self.act(responses(filters, x)) @ self._signs(filters), axis=1)

    def margins(
        self, filters: Float[Array, "m d"], x: Float[Array, "n P d"], y: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        """Y f_W(X), positive where the sample is classified correctly."""
        return y * self.scores(filters, x)

    def signal_margin(self, u: Float[Array, " m"]) -> Float[Array, "2"]:
        r"""Signal parts of the margins, before alpha^q: :math:`U_y = y \sum_r a_r \mathrm{act}(y u_r)`, y = -1 and +1.

        They are equal for the cubic activation.
        """
        a = self._signs(u)
        return jnp.stack([-self.act(-u) @ a, self.act(u) @ a])

    def noise_margins(self, v: Float[Array, "m n k"], y: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""Noise parts of the margins: :math:`V_i = y_i \sum_r a_r \sum_j \mathrm{act}(v_{rij})`."""
        return y * jnp.einsum("r,rij->i", self._signs(v), self.act(v), precision=_HIGHEST)

    def gradient(
        self, filters: Float[Array, "m d"], x: Float[Array, "n P d"], y: Float[Array, " n"]
    ) -> Float[Array, "m d"]:
        r"""Gradient of the mean logistic loss in the filters.

        .. math:: \nabla_{w_r} \tfrac1n \sum_i \log(1 + e^{-y_i f(X_i)})
                  = -\tfrac1n \sum_i s_i y_i a_r \sum_j \mathrm{act}'(\langle w_r, X_i[j] \rangle) X_i[j],
                  \qquad s_i = \frac{1}{1 + e^{y_i f(X_i)}}
        """
        z = responses(filters, x)
        a = self._signs(filters)
        pull = y * jax.nn.sigmoid(-y * jnp.sum(self.act(z) @ a, axis=1)) / len(y)
        return -a[:, None] * jnp.einsum("i,ijr,ijd->rd", pull, self.slope(z), x, precision=_HIGHEST)

    def input_gradient(self, filters: Float[Array, "m d"], x: Float[Array, "n P d"]) -> Float[Array, "n P d"]:
        r"""Gradient of f_W in the inputs: :math:`\sum_r a_r\, \mathrm{act}'(\langle w_r, X[j] \rangle)\, w_r`."""
        return jnp.matmul(self.slope(responses(filters, x)) * self._signs(filters), filters, precision=_HIGHEST)

    def model(self, filters: Float[Array, "m d"], images: PatchImages) -> eqx.Partial:
        """Give the network as a function from images to two logits (0, f), for the attacks of the package.

        Args:
            filters: the filters.
            images: the map between data and images, see `ntkadv.cgro.patches.to_images`.
        """
        return eqx.Partial(_image_logits, self, filters, jnp.asarray(images.scale, filters.dtype))

    def _signs(self, like: Array) -> Array:
        return jnp.asarray(self.signs, like.dtype)


def responses(filters: Float[Array, "m d"], x: Float[Array, "n P d"]) -> Float[Array, "n P m"]:
    """Responses <w_r, X[j]> of all filters to all patches."""
    return jnp.matmul(x, filters.T, precision=_HIGHEST)


def _image_logits(network: PatchNetwork, filters: Array, scale: Array, x: Array) -> Array:
    score = network.scores(filters, ((x[..., 0] - 0.5) / scale).astype(filters.dtype))
    return jnp.stack([jnp.zeros_like(score), score], axis=1)
