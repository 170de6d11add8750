"""Networks of neural-tangents as architectures, and the import of that package on current JAX.

neural-tangents 0.6.5, its last release, imports names that JAX has moved since, and TensorFlow, which only its
experimental part uses. `import_neural_tangents` puts both right for the time of the import. What works then: `stax`
(infinite-width kernels, `init_fn`, `apply_fn`), and empirical kernels by Jacobian contraction and by NTK-vector
products. What does not: structured derivatives, and the automatic choice among the three.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ntkadv.architectures.base import Architecture, Kernels

__all__ = ["StaxNetwork", "from_stax", "import_neural_tangents"]

_MOVED = {
    "jax.core": {
        "jax.extend.core": ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var"),
        "jax._src.core": ("AbstractValue", "ShapedArray", "Value"),
    },
    "jax.interpreters.ad": {
        "jax._src.interpreters.ad": ("reducing_transposes",),
        "jax._src.ad_util": ("zeros_like_p",),
    },
}
"""Where neural-tangents looks for names, and where they are now."""


@functools.cache
def import_neural_tangents() -> types.ModuleType:
    """Import neural-tangents on a JAX that it was not written for, without TensorFlow.

    Names that JAX has moved are put back for the time of the import only. A module that is already imported is returned
    as it is.

    Returns:
        The module `neural_tangents`; its `stax` is an attribute.

    Raises:
        ImportError: the package is not installed, or JAX no longer has a name that it needs.
    """
    if "neural_tangents" not in sys.modules:
        with _names_put_back():
            try:
                importlib.import_module("neural_tangents")
            except ModuleNotFoundError as error:
                if error.name != "neural_tangents":
                    raise
                raise ImportError(
                    "neural-tangents is not installed. Install it without its dependencies, which include TensorFlow: "
                    "pip install --no-deps neural-tangents==0.6.5 && pip install frozendict typing_extensions"
                ) from error
    return sys.modules["neural_tangents"]


@contextlib.contextmanager
def _names_put_back() -> Iterator[None]:
    added: list[tuple[types.ModuleType, str]] = []
    modules: list[str] = []
    try:
        for old, sources in _MOVED.items():
            target = importlib.import_module(old)
            for source, names in sources.items():
                for name in names:
                    if not _has(target, name):
                        setattr(target, name, _find(source, name))
                        added.append((target, name))
        for name, make in (("jax.util", _jax_util), ("neural_tangents.experimental", _experimental)):
            if not _importable(name):
                sys.modules[name] = make()
                modules.append(name)
        yield
    finally:
        for target, name in added:
            delattr(target, name)
        for name in modules:
            sys.modules.pop(name, None)


def _has(module: types.ModuleType, name: str) -> bool:
    try:
        getattr(module, name)
    except AttributeError:
        return False
    return True


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"neural-tangents 0.6.5 needs {name}, which JAX {jax.__version__} has no more in {module}: use a JAX "
            "release between 0.10 and 0.12"
        ) from error


def _importable(name: str) -> bool:
    if name == "neural_tangents.experimental":  # it exists, but it would import TensorFlow
        return False
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _jax_util() -> types.ModuleType:
    module = types.ModuleType("jax.util")
    for name in ("safe_map", "safe_zip"):
        setattr(module, name, _find("jax._src.util", name))
    return module


def _experimental() -> types.ModuleType:
    return types.ModuleType("neural_tangents.experimental", "Stand-in: the real one needs TensorFlow.")


@dataclasses.dataclass(frozen=True)
class StaxNetwork(Architecture):
    """An architecture made of a neural-tangents triple. Build it with `from_stax`."""

    init_fn: Callable[..., Any]
    apply_fn: Callable[..., Any]
    kernel_fn: Callable[..., Any]

    def _init(self, key: Array, input_shape: tuple[int, ...]) -> Any:
        outputs, params = self.init_fn(_raw_key(key), (1, *input_shape))
        if outputs[1:] != (self.num_classes,):
            raise ValueError(f"the network has outputs of shape {outputs[1:]}, but num_classes is {self.num_classes}")
        return params

    def _apply(self, params: Any, x: Array) -> Array:
        with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
            return self.apply_fn(params, x)

    def _kernels(self, x1: Array, x2: Array) -> Kernels:
        return self._evaluate(x1, x2)

    def _diagonal(self, x: Array) -> Kernels:
        kernels = jax.lax.map(lambda image: self._evaluate(image[None], None), x, batch_size=64)
        return Kernels(kernels.nngp[:, 0, 0], kernels.ntk[:, 0, 0])

    def _evaluate(self, x1: Array, x2: Array | None) -> Kernels:
        with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
            kernels = self.kernel_fn(x1, x2, ("nngp", "ntk"))
        return Kernels(kernels.nngp, kernels.ntk)

    def pair_bytes(self, input_shape: tuple[int, ...]) -> int:
        """Measure the working memory of a kernel with its input gradient, by compiling a small one."""
        return _measured_pair_bytes(self, tuple(input_shape))


def from_stax(
    init_fn: Callable[..., Any],
    apply_fn: Callable[..., Any],
    kernel_fn: Callable[..., Any],
    *,
    num_classes: int,
    center: float = 0.5,
) -> StaxNetwork:
    """Take a network of `neural_tangents.stax` as an architecture.

    Args:
        init_fn: first of the triple that `stax.serial(...)` returns.
        apply_fn: second of the triple.
        kernel_fn: third of the triple.
        num_classes: number of outputs.
        center: pixel value subtracted from the input; 0 leaves the input as it is.

    Returns:
        An architecture for use wherever this package's own are used.

    Raises:
        TypeError: one of the three is not callable.
    """
    for name, function in (("init_fn", init_fn), ("apply_fn", apply_fn), ("kernel_fn", kernel_fn)):
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {function!r}; unpack the triple, from_stax(*serial(...))")
    return StaxNetwork(num_classes, init_fn, apply_fn, kernel_fn, center=center)


def _raw_key(key: Array) -> Array:
    """neural-tangents splits keys by unpacking, which typed keys allow too, but draws from old-style keys only."""
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


@functools.lru_cache(maxsize=64)
def _measured_pair_bytes(arch: StaxNetwork, input_shape: tuple[int, ...]) -> int:
    batch = 8
    x = jax.ShapeDtypeStruct((batch, *input_shape), np.float32)

    def summed(x1: Array, x2: Array) -> Array:
        return jnp.sum(arch._kernels(x1, x2).ntk)

    memory = jax.jit(jax.grad(summed)).lower(x, x).compile().memory_analysis()
    return max(64, 0 if memory is None else int(memory.temp_size_in_bytes) // batch**2)
