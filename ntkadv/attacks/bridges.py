"""Bridges to the attacks of other libraries: a predictor in JAX as a model of Foolbox or of PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ntkadv._checks import require_int
from ntkadv.attacks.model import Model, in_precision

if TYPE_CHECKING:
    import foolbox
    import torch  # pyright: ignore[reportMissingImports] - optional

Layout = Literal["NCHW", "NHWC"]

_TO_NHWC: dict[str, tuple[int, ...]] = {"NCHW": (0, 2, 3, 1), "NHWC": (0, 1, 2, 3)}


def foolbox_model(f: Model, *, bounds: tuple[float, float] = (0, 1)) -> foolbox.JAXModel:
    """Give a predictor to Foolbox, compiled.

    Foolbox runs its loops in Python; the predictor and its gradient are one program each, whatever the attack, for each
    batch size. Images are NHWC, as everywhere here.

    Args:
        f: A function in JAX from images to logits; the arrays of a pytree are arguments of its program, not constants.
        bounds: Smallest and largest value of a pixel.

    Raises:
        ImportError: Foolbox is not installed.
        TypeError: `f` is not callable.
        ValueError: the bounds are in the wrong order.

    Source: Rauber et al., JOSS 2020, Foolbox Native.
    """
    low, high = bounds
    if not low < high:
        raise ValueError(f"bounds must be the smallest and the largest pixel, got {bounds}; use (0, 1).")
    model = _compiled(f)
    return _imported("foolbox", "foolbox_model").JAXModel(model, bounds=(low, high))


def torch_module(f: Model, *, layout: Layout = "NCHW", device: Any = None, batch_size: int = 256) -> torch.nn.Module:
    """Give a predictor to PyTorch, with gradients: what AutoAttack, RobustBench or torchattacks take for a model.

    The module has no parameters: `.to()`, `.eval()` and `.train()` change nothing. Tensors are shared with JAX, not
    copied, where they are contiguous and begin at a multiple of 64 bytes; logits come back to the device of the images.
    A backward pass computes the logits again, together with their gradient. It gives the gradient with respect to the
    images only, and cannot be differentiated once more.

    Batches are filled up to the next power of two, and those longer than `batch_size` cut into pieces of it, so that
    log2(batch_size) + 2 sizes are compiled at most, however an attack shrinks its batches.

    Args:
        f: A function in JAX from images (b, h, w, c) to logits (b, num_classes) that treats samples independently.
        layout: Axes of the images that the module is given: `"NCHW"`, PyTorch's habit, or `"NHWC"`. Where the two
            cannot be told apart by the model, as in one that flattens, a wrong layout is not noticed.
        device: The `jax.Device` where JAX computes, or a platform such as `"cpu"`; its default one, if not given.
        batch_size: Number of images that `f` is given at once, at most.

    Returns:
        A `torch.nn.Module` from float tensors to logits, in the dtype of the logits of `f`, float32 at least. Images in
        float64 are computed in float32 unless `jax_enable_x64` is set.

    Raises:
        ImportError: PyTorch is not installed.
        TypeError, ValueError: an argument is none of these. The module raises them for anything but a float tensor with
            four axes.
    """
    if layout not in _TO_NHWC:
        raise ValueError(f"layout must be 'NCHW' or 'NHWC', got {layout!r}; name the order of the axes of the images.")
    require_int("batch_size", batch_size, minimum=1)
    _imported("torch", "torch_module")
    return _torch_classes()[0](_Program(f, layout, _device(device), batch_size))


def _imported(library: str, user: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"{user} needs {library}; install it with: pip install 'ntkadv[bridges]'") from error


def _device(device: Any) -> Any:
    if device is None:
        return next(iter(jnp.zeros(()).devices()))
    if isinstance(device, str):
        return jax.devices(device)[0]
    if not isinstance(device, jax.Device):
        raise TypeError(
            f"device must be a device of JAX or its platform, got {device!r}; use jax.devices()[0] or 'cpu'."
        )
    return device


def _compiled(f: Model) -> Callable[..., Any]:
    """Compile a predictor, with the arrays of a pytree as arguments, and give it these arguments."""
    arrays, static = _split(f)
    program = jax.jit(lambda arrays, x: eqx.combine(arrays, static)(x))
    return lambda x: program(arrays, x)


def _split(f: Model) -> tuple[Any, Any]:
    if not callable(f):
        raise TypeError(f"f must be a function from images to logits, got {type(f).__name__}.")
    return eqx.partition(f, eqx.is_array)


class _Program:
    """Logits and gradients of a predictor, from tensors to tensors."""

    def __init__(self, f: Model, layout: str, device: Any, batch_size: int):
        arrays, static = _split(f)
        self.arrays = jax.device_put(arrays, device)
        self.layout, self.device, self.batch_size = layout, device, batch_size

        def logits(arrays: Any, x: Array) -> Array:
            # Axes are moved inside the program, which needs no copy of the images for it.
            return in_precision(eqx.combine(arrays, static), x.dtype)(jnp.transpose(x, _TO_NHWC[layout]))

        def pullback(arrays: Any, x: Array, cotangent: Array) -> Array:
            value, pull = jax.vjp(lambda x: logits(arrays, x), x)
            return pull(cotangent.astype(value.dtype))[0]

        self._logits, self._pullback = jax.jit(logits), jax.jit(pullback)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of one piece of a batch."""
        try:
            logits = self._logits(self.arrays, self._to_jax(x))
        except (TypeError, ValueError) as error:
            error.add_note(f"The tensor of shape {tuple(x.shape)} was taken as {self.layout}: see layout=.")
            raise
        return self._to_torch(logits, x)[: len(x)]

    def pullback(self, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to `x` of the logits times the cotangent."""
        # What fills the batch up has a gradient of its own, and is cut off.
        arguments = self._to_jax(x), self._to_jax(cotangent)
        return self._to_torch(self._pullback(self.arrays, *arguments), x)[: len(x)].to(x.dtype)

    def _to_jax(self, tensor: torch.Tensor) -> Array:
        filled = _filled(tensor.detach(), self.batch_size)
        if filled.device.type != "cpu" and self.device.platform == "cpu":
            filled = filled.cpu()
        return jax.device_put(jax.dlpack.from_dlpack(filled.contiguous()), self.device)

    def _to_torch(self, array: Array, like: torch.Tensor) -> torch.Tensor:
        if like.device.type == "cpu" and self.device.platform != "cpu":
            array = jax.device_put(array, jax.devices("cpu")[0])
        # PyTorch may write to the images as soon as this returns: by then they must have been read.
        shared = jax.block_until_ready(array)
        return _imported("torch", "torch_module").from_dlpack(shared).to(like.device)


def _filled(x: torch.Tensor, limit: int) -> torch.Tensor:
    """Fill a batch up to the next power of two, or to the limit, by its last row, or by zeros where it has none."""
    size = min(1 << max(len(x) - 1, 0).bit_length(), limit)
    if size == len(x):
        return x
    filled = x.new_zeros((size, *x.shape[1:]))
    filled[: len(x)] = x
    filled[len(x) :] = x[-1:] if len(x) else 0
    return filled


@cache
def _torch_classes() -> tuple[type, ...]:
    """Define the classes of PyTorch that need it to be imported."""
    import torch  # pyright: ignore[reportMissingImports] - optional

    class Refuse(torch.autograd.Function):
        """The gradient as it is, which cannot be differentiated."""

        @staticmethod
        def forward(ctx: Any, gradient: torch.Tensor, *depends_on: torch.Tensor) -> torch.Tensor:
            del ctx, depends_on
            return gradient

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            del ctx, cotangents
            raise NotImplementedError(
                "a torch_module can be differentiated once, and this asks for a second derivative; "
                "take it in JAX, where the predictor comes from."
            )

    class Logits(torch.autograd.Function):
        """Logits, with a gradient by `jax.vjp`."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, program: _Program) -> torch.Tensor:
            ctx.save_for_backward(x)
            ctx.program = program
            return program.logits(x)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            (x,) = ctx.saved_tensors
            (cotangent,) = cotangents
            return Refuse.apply(ctx.program.pullback(x, cotangent), x, cotangent), None

    class Predictor(torch.nn.Module):
        """A predictor in JAX, from tensors to logits."""

        def __init__(self, program: _Program):
            super().__init__()
            self.program = program

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Logits (b, num_classes)."""
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"x must be a tensor, got {type(x).__name__}; use torch.as_tensor(x).")
            if not x.is_floating_point():
                raise TypeError(f"x must be a float tensor, got {x.dtype}; divide 8-bit images by 255 first: x / 255.")
            if x.ndim != 4:
                raise ValueError(
                    f"x must be images of four axes, {self.program.layout}, got shape {tuple(x.shape)}; "
                    f"pass one image as x[None]."
                )
            pieces = (x,) if len(x) <= self.program.batch_size else torch.split(x, self.program.batch_size)
            logits: list[Any] = [Logits.apply(piece, self.program) for piece in pieces]
            return logits[0] if len(logits) == 1 else torch.cat(logits)

    return Predictor, Logits, Refuse
