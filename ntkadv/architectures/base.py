"""What every architecture can do: be a finite network, and be its infinite-width kernel."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkadv._typing import AnyArray

__all__ = ["Architecture", "Kernels"]


A = TypeVar("A", bound="Architecture")


class Kernels(NamedTuple):
    """The two infinite-width kernels of one network at the same pairs of inputs, as JAX or as NumPy arrays."""

    nngp: Any
    ntk: Any


@dataclasses.dataclass(frozen=True)
class Architecture(abc.ABC):
    """One network, twice: at finite width (`init`, `apply`) and at infinite width (`kernels`).

    Architectures are immutable and hashable, so that they travel through `jax.jit` as static values.

    Attributes:
        num_classes: number of outputs of the network.
        center: pixel value subtracted from the input before anything else; the published setting is 0.5.
        output_scale: factor on the outputs. The kernels are multiplied by its square (see `normalized`).
    """

    num_classes: int
    center: float = dataclasses.field(default=0.5, kw_only=True)
    output_scale: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if not np.isfinite(self.center):
            raise ValueError(f"center must be a finite pixel value, got {self.center}")
        if not (np.isfinite(self.output_scale) and self.output_scale > 0):
            raise ValueError(f"output_scale must be positive and finite, got {self.output_scale}")

    @abc.abstractmethod
    def _init(self, key: Array, input_shape: tuple[int, ...]) -> Any: ...

    @abc.abstractmethod
    def _apply(self, params: Any, x: Array) -> Array: ...

    @abc.abstractmethod
    def _kernels(self, x1: Array, x2: Array) -> Kernels: ...

    @abc.abstractmethod
    def _diagonal(self, x: Array) -> Kernels: ...

    @abc.abstractmethod
    def pair_bytes(self, input_shape: tuple[int, ...]) -> int:
        """Peak working memory, in bytes and per pair of inputs, of a float32 kernel with its input gradient."""

    def init(self, key: Array, input_shape: tuple[int, ...]) -> Any:
        """Draw the parameters of a finite network, all of them N(0, 1) (NTK parametrisation).

        Args:
            key: random key.
            input_shape: shape of one input without the batch, e.g. `(32, 32, 3)`.

        Returns:
            A pytree of float32 arrays.
        """
        return self._init(key, tuple(int(size) for size in input_shape))

    def apply(self, params: Any, x: Float[AnyArray, "b *input"]) -> Float[Array, "b classes"]:
        """Evaluate the finite network: `output_scale * f(params, x - center)`."""
        x = jnp.asarray(x)
        return self._apply(params, self._centred(x)) * jnp.asarray(self.output_scale, x.dtype)

    def kernels(self, x1: Float[AnyArray, "n1 *_"], x2: Float[AnyArray, "n2 *_"]) -> Kernels:
        """Evaluate the NNGP kernel and the NTK at all pairs of two batches.

        Differentiable in both inputs. Where two inputs coincide, and at an input without any variance, the kernel of a
        ReLU network has a kink; the gradient given there is the finite, symmetric one. Features within an angle of 1e-3
        (3e-8 in float64) count as coincident, since rounding leaves nothing of smaller angles.

        Args:
            x1: inputs, `(n1, height, width, channels)` with pixels in [0, 1], or `(n1, features)`.
            x2: inputs, `(n2, ...)`, of the same shape otherwise.

        Returns:
            `Kernels(nngp, ntk)`, each `(n1, n2)`, in the dtype of the inputs.

        Raises:
            ValueError: the two batches hold inputs of different shapes.
        """
        x1, x2 = jnp.asarray(x1), jnp.asarray(x2)
        if x1.shape[1:] != x2.shape[1:] or x1.ndim < 2:
            raise ValueError(f"x1 and x2 must be batches of inputs of one shape, got x1 {x1.shape} and x2 {x2.shape}")
        return _kernels(self, x1, x2)

    def ntk(self, x1: Float[AnyArray, "n1 *_"], x2: Float[AnyArray, "n2 *_"]) -> Float[Array, "n1 n2"]:
        """Evaluate the infinite-width NTK, `(n1, n2)`."""
        return self.kernels(x1, x2).ntk

    def nngp(self, x1: Float[AnyArray, "n1 *_"], x2: Float[AnyArray, "n2 *_"]) -> Float[Array, "n1 n2"]:
        """Evaluate the NNGP kernel: the covariance of the outputs at initialisation, `(n1, n2)`."""
        return self.kernels(x1, x2).nngp

    def diagonal(self, x: Float[AnyArray, "n *input"]) -> Kernels:
        """Evaluate both kernels at the pairs (x_i, x_i), each `(n,)`, free of the rounding that `kernels` has there."""
        return _diagonal(self, jnp.asarray(x))

    def ark(self, x: Float[AnyArray, "n *input"], *, batch_bytes: int = 2**28) -> Float[Array, " n"]:
        """Evaluate the adversarial regularization kernel at infinite width.

            Theta_x(x, x) = d_x f(x) d_x f(x)^T  ->  (sum_i d/dx_i d/dx'_i K_nngp(x, x') at x' = x) * identity

        Every coordinate's mixed derivative is taken exactly, forward over forward (Fu & Wang 2024, Theorem 4.1 and
        Section 4). The cost is one kernel evaluation per input coordinate and sample, unless the architecture knows
        that its ARK does not depend on the input (`ark_is_constant`), when one sample is enough.

        Args:
            x: inputs, `(n, ...)`.
            batch_bytes: working memory that the directions evaluated at once may take.

        Returns:
            One non-negative number per sample, `(n,)`.
        """
        x = self._centred(jnp.asarray(x))
        scale = jnp.asarray(self.output_scale**2, x.dtype)
        if self.ark_is_constant(x.shape[1:]):
            return jnp.broadcast_to(_ark(self, x[:1], batch_bytes) * scale, x.shape[:1])
        return _ark(self, x, batch_bytes) * scale

    def ark_is_constant(self, input_shape: tuple[int, ...]) -> bool:
        """Tell whether the ARK is known to be the same for every input of this shape."""
        return False

    def normalized(self: A, x: Float[AnyArray, "n *input"]) -> A:
        """Rescale the outputs so that the mean of the NTK's diagonal over `x` becomes 1.

        Learning rates and training times then mean the same for every architecture. The kernel is divided by its mean
        diagonal, and so is the NNGP kernel: it is the network that is rescaled.

        Raises:
            ValueError: the mean diagonal over `x` is zero or not finite.
        """
        mean = float(jnp.mean(self.diagonal(x).ntk))
        if not (np.isfinite(mean) and mean > 0):
            raise ValueError(f"the NTK of x has the mean diagonal {mean}: nothing to normalise by; check x for NaN")
        return dataclasses.replace(self, output_scale=self.output_scale / float(np.sqrt(mean)))

    def _centred(self, x: Array) -> Array:
        return x - jnp.asarray(self.center, x.dtype)

    def _scaled(self, kernels: Kernels) -> Kernels:
        if self.output_scale == 1.0:
            return kernels
        return Kernels(*(kernel * jnp.asarray(self.output_scale**2, kernel.dtype) for kernel in kernels))


@functools.partial(jax.jit, static_argnums=0)
def _kernels(arch: Architecture, x1: Array, x2: Array) -> Kernels:
    return arch._scaled(arch._kernels(arch._centred(x1), arch._centred(x2)))


@functools.partial(jax.jit, static_argnums=0)
def _diagonal(arch: Architecture, x: Array) -> Kernels:
    return arch._scaled(arch._diagonal(arch._centred(x)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _ark(arch: Architecture, x: Array, batch_bytes: int) -> Array:
    shape = x.shape[1:]
    size = int(np.prod(shape))
    batch = max(1, min(size, batch_bytes // max(1, arch.pair_bytes(shape))))

    def mixed_derivative(image: Array, coordinate: Array) -> Array:
        direction = jnp.zeros(size, x.dtype).at[coordinate].set(jnp.ones((), x.dtype)).reshape(shape)

        def along_first(x2: Array) -> Array:
            return jax.jvp(lambda x1: arch._kernels(x1[None], x2[None]).nngp[0, 0], (image,), (direction,))[1]

        return jax.jvp(along_first, (image,), (direction,))[1]

    def trace(image: Array) -> Array:
        terms = jax.lax.map(lambda i: mixed_derivative(image, i), jnp.arange(size), batch_size=batch)
        return jnp.sum(terms)

    return jax.lax.map(trace, x)
