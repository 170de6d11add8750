"""The theory's attack on any model of patch images: move the signal patch along w*, and nothing else."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ntkadv._checks import require_int
from ntkadv.attacks.base import Attack
from ntkadv.attacks.losses import margin
from ntkadv.attacks.search import Cost
from ntkadv.attacks.threat_model import L2, move

__all__ = ["LineAttack"]


@dataclass(frozen=True)
class LineAttack(Attack):
    r"""The worst of evenly spaced points of a line through the image, within a Euclidean distance of eps.

    .. math:: x' = x + s\, e, \qquad |s| \le \epsilon

    For patch images whose signal is always in the same place, with e that patch's w* and zero elsewhere, it is the
    attack of the theory, searched instead of solved: the model may be any. The misclassified point of largest margin
    loss is returned, if there is one.

    Args:
        threat: `L2(eps)`; eps in units of pixels, which is `PatchImages.scale` times that of the data.
        direction: e as numbers (h * w * c), of norm 1.
        points: how many points, the clean image and both ends among them; odd.

    Raises:
        ValueError: the direction is no unit vector, `points` is even, or the threat is not Euclidean.
    """

    _: KW_ONLY
    direction: tuple[float, ...]
    points: int = 65

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.threat, L2):
            raise ValueError(f"threat must be L2(eps), got {self.threat!r}; the length along a line is Euclidean.")
        require_int("points", self.points, minimum=3)
        if self.points % 2 == 0:
            raise ValueError(f"points must be odd, so that the clean image is one of them, got {self.points}.")
        object.__setattr__(self, "direction", tuple(float(number) for number in self.direction))
        norm = float(np.linalg.norm(self.direction))
        if abs(norm - 1) > 1e-4:
            raise ValueError(f"direction must have norm 1, got {norm:.6g}; divide it by its norm.")

    @property
    def name(self) -> str:
        """`line-65`: the number of points."""
        return f"line-{self.points}"

    def cost(self, num_classes: int) -> Cost:
        """Count passes through the model, see `Attack.cost`."""
        return Cost(gradients=0, forwards=self.points)

    def perturb(self, model, x, labels, keys):
        """Attack one batch, see `Attack.perturb`."""
        del keys
        if len(self.direction) != x[0].size:
            raise ValueError(f"direction must have {x[0].size} numbers for images {x.shape[1:]}, got "
                             f"{len(self.direction)}.")  # fmt: skip
        direction = jnp.asarray(self.direction, x.dtype).reshape(x.shape[1:])

        def at(size):
            point = move(x, jnp.broadcast_to(size * direction, x.shape))
            return margin(model(point), labels)

        sizes = self.threat.eps * (1 - 1e-6) * jnp.linspace(-1, 1, self.points, dtype=x.dtype)
        losses = jax.lax.map(at, sizes)
        best = sizes[jnp.argmax(losses, axis=0)]
        return move(x, best[:, None, None, None] * direction)
