"""APART: a perturbation generator with parameters of its own, strengthened step by step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ntkadv._checks import require_int, require_nonnegative
from ntkadv._convolutions import canonical_convolutions
from ntkadv.attacks.losses import Loss, get_loss
from ntkadv.attacks.threat_model import Linf
from ntkadv.training.fgsm import require_threat
from ntkadv.training.method import Batch, Method, Passes, Problem
from ntkadv.training.schedules import sgd, triangular

__all__ = ["APARTState", "APARTTraining", "Scalars"]

_SMALL = 1e-7
_PUBLISHED_STEPS = 30 * (50_000 // 128)


class Scalars(NamedTuple):
    """What the generator learns.

    Attributes:
        alpha: Length of the step on the image.
        alpha_start: Scale of the stored starts.
        alpha_hidden: Length of the step on each hidden state.
    """

    alpha: Float[Array, ""]
    alpha_start: Float[Array, ""]
    alpha_hidden: Float[Array, " blocks"]


class APARTState(NamedTuple):
    """The generator: its scalars, their optimiser's state, and a stored start for each training image."""

    scalars: Scalars
    optimizer: Any
    starts: Float[Array, "n *image"]


@dataclass(frozen=True)
class APARTTraining(Method):
    r"""Adversarial training with a generator that learns (Li, Liu, Dong & Shang, arXiv 2010.08034).

    For images :math:`x` with stored starts :math:`\omega`:

    1. :math:`\delta_0 = \mathrm{clip}(\alpha_\omega \omega, \pm\epsilon)`; gradients of the loss at
       :math:`\mathrm{clip}(x + \delta_0, 0, 1)`: g in the image, :math:`g_l` in each hidden state that the network
       offers (in a residual block on the branch of the convolutions only).
    2. :math:`\delta = \mathrm{clip}(\delta_0 + \alpha\, \mathrm{sign}(g), \pm\epsilon)`, and the loss at
       :math:`x' = \mathrm{clip}(x + \delta, 0, 1)` with :math:`\alpha_l\, \mathrm{sign}(g_l)` added to hidden states,
       which are not projected.
    3. :math:`\omega \leftarrow \mathrm{clip}(\omega + \alpha / (\alpha_\omega + 10^{-7})\, \mathrm{sign}(g'), \pm 1)`,
       g' the input gradient there. Crops and flips are applied to images and starts alike, and undone when starts are
       written back.
    4. Gradient ascent on the scalars, by an optimiser of their own; descent on the weights.

    Two passes forward and two backward. Batch norm takes the batch's statistics in both; running averages move in the
    second only. (The published code moves them in both, cycles the momentum, and under old PyTorch gave the scalars
    the weights' decay, too, which makes them three times as small.)

    The published rate of the scalars, 0 to 5e-8 and back over 12,000 steps, with decay 400, has a memory of thousands
    of steps; for a short run take a larger one. In equilibrium alpha is the mean l_1 norm of the input gradient over
    the decay.

    Args:
        threat: The l_inf ball.
        alpha: :math:`\alpha` to begin with.
        alpha_start: :math:`\alpha_\omega` to begin with.
        start_scale: Standard deviation of the stored starts to begin with.
        scalar_rate: Learning rate of the scalars, or a schedule.
        scalar_momentum: Momentum of their optimiser.
        scalar_decay: Their weight decay.
        loss: See `Method`.
        reduction: Must be `"mean"`: rates and decay are published for that.

    Raises:
        TypeError, ValueError: `threat` is no `Linf` or of radius 0, or another setting is out of range; when training
            begins, the augmentation cannot be undone.
    """

    threat: Linf
    _: KW_ONLY
    alpha: float = 1e-4
    alpha_start: float = 1e-4
    start_scale: float = 1e-3
    scalar_rate: float | optax.Schedule = 5e-8
    scalar_momentum: float = 0.9
    scalar_decay: float = 400.0
    loss: str | Loss = "cross_entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_threat(self.threat)
        if not isinstance(self.threat, Linf):
            raise TypeError(f"threat must be Linf, whose steps are signs, got {self.threat!r}.")
        for name in ("alpha", "alpha_start", "start_scale", "scalar_decay"):
            require_nonnegative(name, getattr(self, name))
        if not callable(self.scalar_rate):
            require_nonnegative("scalar_rate", self.scalar_rate)
        if self.reduction != "mean":
            raise ValueError(f"reduction must be 'mean' for APART, got {self.reduction!r}.")
        self._ascent()

    @classmethod
    def scaled(cls, threat: Linf, *, steps: int, **settings: Any) -> APARTTraining:
        """Carry the published settings, made for eps = 8/255 and 30 epochs of CIFAR-10, over to another radius and run.

        The scalars are measured in eps, and time in the length of the run: then they follow the same equation. At the
        published radius and 11,700 steps nothing changes.

        Args:
            threat: The l_inf ball.
            steps: Length of the run; the scalars' rate rises and falls over it.
            **settings: See `APARTTraining`.

        Raises:
            TypeError, ValueError: as `APARTTraining`.
        """
        require_threat(threat)
        require_int("steps", steps, minimum=2)
        wider, shorter = float(threat.eps) / (8 / 255), _PUBLISHED_STEPS / steps
        default = {
            "alpha": 1e-4 * wider,
            "alpha_start": 1e-4 * wider,
            "scalar_rate": triangular(5e-8 * wider * shorter, steps),
            "scalar_decay": 400 / wider,
        }
        return cls(threat, **(default | settings))

    @property
    def name(self) -> str:
        """Label."""
        return "APART"

    @property
    def passes(self) -> Passes:
        """Two and two."""
        return Passes(2, 2)

    def start(self, problem: Problem) -> APARTState:
        """Draw starts, and begin with small steps on images and none on hidden states.

        Raises:
            ValueError: the augmentation cannot be undone.
        """
        augmentation = problem.augmentation
        if augmentation is not None and not augmentation.invertible:
            raise ValueError(
                f"augmentation must be one that can be undone, since APART keeps a start for each pixel of each image; "
                f"{type(augmentation).__name__} cannot: take CropFlip(), or define restore() for it."
            )
        dtype = jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(problem.params)))
        images = jax.ShapeDtypeStruct((2, *problem.shape[1:]), dtype)
        blocks = len(problem.f.hidden(problem.params, images))
        numbers = (jnp.asarray(self.alpha, dtype), jnp.asarray(self.alpha_start, dtype), jnp.zeros(blocks, dtype))
        scalars = Scalars(*numbers)
        starts = jnp.asarray(self.start_scale, dtype) * jax.random.normal(problem.key, problem.shape, dtype)
        return APARTState(scalars, self._ascent().init(scalars), starts)

    def report(self, state: APARTState) -> dict[str, Array]:
        """Give the scalars."""
        return state.scalars._asdict()

    def update(self, f, optimizer, state, batch) -> tuple[Any, dict[str, Array]]:
        """Make one update."""
        scalars, starts = state.method.scalars, batch.augmented(state.method.starts[batch.places])
        image_sign, hidden_signs = self._signs(f, state.params, scalars, starts, batch)

        def objective(params: Any, scalars: Scalars, nudge: Array) -> tuple[Array, Any]:
            points = self.points(scalars, starts, image_sign, batch.x) + nudge
            shifts = [alpha * sign for alpha, sign in zip(scalars.alpha_hidden, hidden_signs, strict=True)]
            outputs, statistics = f.forward(params, points, shifts)
            mean = jnp.mean(self.losses(outputs, batch))
            return mean, (mean, statistics)

        both = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)

        def gradients_of(*arguments: Any) -> Any:
            (_, aux), gradients = both(*arguments)
            return gradients, aux

        (descent, ascent, slope), (mean, statistics) = canonical_convolutions(gradients_of)(
            state.params, scalars, jnp.zeros_like(batch.x)
        )
        length = scalars.alpha / (scalars.alpha_start + jnp.asarray(_SMALL, starts.dtype))
        moved = jnp.clip(starts + length * jnp.sign(slope), -1, 1)
        kept = batch.restored(moved, state.method.starts[batch.places])
        updates, inner = self._ascent().update(jax.tree.map(jnp.negative, ascent), state.method.optimizer, scalars)
        learnt = jax.tree.map(jnp.add, scalars, updates)
        generator = APARTState(learnt, inner, state.method.starts.at[batch.places].set(kept))
        return state.descended(optimizer, descent, statistics=statistics, method=generator), {"loss": mean}

    def points(self, scalars: Scalars, starts: Array, sign: Array, x: Array) -> Array:
        """Give the attacked images: a step from the stored start, for signs of the gradient there."""
        eps = self.threat.eps
        start = jnp.clip(scalars.alpha_start * starts, -eps, eps)
        return jnp.clip(x + jnp.clip(start + scalars.alpha * sign, -eps, eps), 0, 1)

    def _signs(self, f: Any, params: Any, scalars: Scalars, starts: Array, batch: Batch) -> tuple[Array, list[Array]]:
        """Give the signs of the gradients in the image, at the stored start, and in the hidden states."""
        loss = get_loss(self.loss)
        zeros = [jnp.zeros(state.shape, state.dtype) for state in f.hidden(params, batch.x)]

        def total(x: Array, shifts: list[Array]) -> tuple[Array, None]:
            return jnp.sum(loss(f.forward(params, x, shifts)[0], batch.labels)), None

        def slopes(x: Array, shifts: list[Array]) -> Any:
            return jax.grad(total, argnums=(0, 1), has_aux=True)(x, shifts)[0]

        point = self.points(scalars._replace(alpha=jnp.zeros_like(scalars.alpha)), starts, starts, batch.x)
        image, hidden = canonical_convolutions(slopes)(point, zeros)
        return jnp.sign(image), [jnp.sign(slope) for slope in hidden]

    def _ascent(self) -> optax.GradientTransformation:
        return sgd(self.scalar_rate, momentum=self.scalar_momentum, weight_decay=self.scalar_decay)
