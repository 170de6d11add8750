"""Square: random search over squares, without gradients."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ntkadv._checks import require_int, require_nonnegative
from ntkadv.attacks.base import RepeatedAttack
from ntkadv.attacks.best import Best, select
from ntkadv.attacks.losses import Loss, get_loss, loss_suffix
from ntkadv.attacks.search import Cost
from ntkadv.attacks.threat_model import L2, Linf, fold_in_each

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which the share of the pixels that a square covers is halved."""


@dataclass(frozen=True)
class SquareAttack(RepeatedAttack):
    r"""Random search: change one square at a time, and keep what increases the loss.

    A square covers the share p of the pixels, which is halved as the search goes on. For `Linf`, the search starts at
    vertical stripes of :math:`\pm\epsilon`, and a square sets each channel to one of them. For `L2`, it starts at tiles

    .. math:: \eta_{ij} \propto \pm \sum_{k \ge \max(|i - i_0|, |j - j_0|)} (k + 1)^{-2}

    and a change takes the norm of one window to another, along the sum of what is there and of such a tile.

    No gradients are used. Every sample has its own squares, is left alone once it is misclassified, and the search ends
    when all are. The clean image and the start count as points found.

    Args:
        threat: `Linf` or `L2`.
        queries: Points tried in one start, the start included, at most.
        p_init: The share of the pixels at first.
        restarts: Number of starts.
        rescale_schedule: Stretch the schedule, made for 10,000 queries, to as many as there are; as in AutoAttack, not
            by default.
        loss: `"margin"`, `"cross_entropy"`, `"squared"`, or a function (logits, labels) -> (b,).

    Raises:
        TypeError, ValueError: a setting is out of range, or the threat is another.

    Source: Andriushchenko et al., ECCV 2020, arXiv 1912.00049.
    """

    _: KW_ONLY
    queries: int = 5000
    p_init: float | int = 0.8
    restarts: int = 1
    rescale_schedule: bool = False
    loss: str | Loss = "margin"
    black_box: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.threat, (Linf, L2)):
            raise TypeError(f"threat must be Linf or L2 for Square, got {self.threat!r}; use a gradient attack there.")
        require_int("queries", self.queries, minimum=1)
        require_int("restarts", self.restarts, minimum=1)
        require_nonnegative("p_init", self.p_init, strict=True)
        if self.p_init > 1:
            raise ValueError(f"p_init is a share of the pixels, got {self.p_init}; pass at most 1.")
        object.__setattr__(self, "p_init", float(self.p_init))
        get_loss(self.loss)

    @property
    def name(self) -> str:
        """`Square`; then queries and restarts, where they are not 5000 and one, and the loss, where not the margin."""
        restarts = f"-{self.restarts}" if self.restarts > 1 else ""
        queries = f"-{self.queries}" if restarts or self.queries != 5000 else ""
        loss = "" if self.loss == "margin" else loss_suffix(self.loss) or " squared"
        return "Square" + queries + restarts + loss

    def cost(self, num_classes: int) -> Cost:
        """Count passes through the model, see `Attack.cost`."""
        return Cost(forwards=self.queries + 1)

    def attempts(self, num_classes: int) -> int:
        """Give the number of starts."""
        return self.restarts

    def halved_after(self) -> tuple[int, ...]:
        """List the queries after which the share of the pixels is halved."""
        if not self.rescale_schedule:
            return _HALVED_AFTER
        return tuple(query * self.queries // 10_000 for query in _HALVED_AFTER)

    def sides(self, height: int, width: int) -> tuple[int, ...]:
        """List the sides of the squares, in pixels: at first, after one halving of the share, after two, ..."""
        sides = [round((self.p_init / 2**k * height * width) ** 0.5) for k in range(len(_HALVED_AFTER) + 1)]
        if isinstance(self.threat, L2):
            sides = [max(side, 3) // 2 * 2 + 1 for side in sides]
        return tuple(min(max(side, 1), height, width) for side in sides)

    def attempt(self, model, x, labels, keys, number):
        """One start on one batch, see `RepeatedAttack.attempt`."""
        del number
        loss, threat = get_loss(self.loss), self.threat
        static_sides = self.sides(*x.shape[1:3])
        sides, halved_after = jnp.asarray(static_sides, jnp.int32), jnp.asarray(self.halved_after(), jnp.uint32)

        if isinstance(threat, Linf):
            start = _stripes

            def change(key, offset, stage):
                return _recolour(key, offset, threat.eps, sides[stage])
        else:
            start = _tiles
            patches = jnp.asarray(_padded(static_sides), x.dtype)

            def change(key, offset, stage):
                return _redistribute(key, offset, threat.eps, sides[stage], patches[stage])

        def judge(best, point):
            logits = model(point)
            return best.update(point, loss(logits, labels), logits, labels, until_wrong=True)

        def query(carry):
            count, best = carry
            offset = jax.vmap(change, (0, 0, None))(
                fold_in_each(keys, count), best.point - x, jnp.sum(count > halved_after)
            )
            return count + 1, judge(best, threat.project(x + offset, x))

        def goes_on(carry):
            count, best = carry
            return (count < self.queries) & ~jnp.all(best.is_wrong)

        nothing = Best.nothing(x, jax.eval_shape(lambda x: loss(model(x), labels), x).dtype)
        clean = judge(nothing, x)
        offset = jax.vmap(start, (0, 0, None))(fold_in_each(keys, jnp.uint32(0)), x, threat.eps)
        first = judge(nothing._replace(is_wrong=clean.is_wrong), threat.project(x + offset, x))
        _, best = jax.lax.while_loop(goes_on, query, (jnp.uint32(1), first))
        return select(best.is_wrong | (best.loss >= clean.loss), best.point, x)


def _stripes(key: Key[Array, ""], image: Float[Array, "h w c"], eps: float | Array) -> Float[Array, "h w c"]:
    """Draw columns of plus or minus eps."""
    signs = jax.random.rademacher(key, (1, *image.shape[1:]), image.dtype)
    return jnp.broadcast_to(eps * signs, image.shape)


def _recolour(
    key: Key[Array, ""], offset: Float[Array, "h w c"], eps: float | Array, side: Int[Array, ""]
) -> Float[Array, "h w c"]:
    """Take a square to plus or minus eps, beyond which the projection clips."""
    h, w, c = offset.shape
    draws = jax.random.uniform(key, (2 + c,), offset.dtype)
    square = _Window(draws[:2], side, h, w).inside[:, :, None]
    return offset + jnp.where(square, 2 * eps * _signs(draws[2:]), 0)


def _tiles(key: Key[Array, ""], image: Float[Array, "h w c"], eps: float | Array) -> Float[Array, "h w c"]:
    """Draw about 5 x 5 patches with random signs and orientations, of norm eps together."""
    h, w, c = image.shape
    side = max(min(h, w) // 5, 1)
    rows, columns = h // side, w // side
    sign_key, turn_key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (rows, 1, columns, 1, c), image.dtype)
    turned = jax.random.bernoulli(turn_key, shape=(rows, 1, columns, 1, 1))
    patch = jnp.asarray(_patch(side), image.dtype)[None, :, None, :, None]
    tiles = signs * jnp.where(turned, jnp.swapaxes(patch, 1, 3), patch)
    above, left = (h - rows * side) // 2, (w - columns * side) // 2
    margins = ((above, h - rows * side - above), (left, w - columns * side - left), (0, 0))
    tiled = jnp.pad(tiles.reshape(rows * side, columns * side, c), margins)
    return eps * tiled / jnp.linalg.norm(tiled)


def _redistribute(
    key: Key[Array, ""],
    offset: Float[Array, "h w c"],
    eps: float | Array,
    side: Int[Array, ""],
    patch: Float[Array, "s s"],
) -> Float[Array, "h w c"]:
    """Put the norm of two windows, and what is left of eps, into the first of them."""
    h, w, c = offset.shape
    draws = jax.random.uniform(key, (5 + c,), offset.dtype)
    to, source = _Window(draws[:2], side, h, w), _Window(draws[2:4], side, h, w)
    patch = to.place(jnp.stack([patch, patch.T]), (draws[4] < 0.5).astype(side.dtype))
    inside, both = to.inside[:, :, None], (to.inside | source.inside)[:, :, None]
    direction = _unit(_signs(draws[5:]) * patch[:, :, None] + _unit(jnp.where(inside, offset, 0)))
    unused = jnp.maximum(eps**2 - jnp.sum(offset**2), 0)
    available = jnp.sqrt(jnp.sum(jnp.where(both, offset, 0) ** 2, axis=(0, 1)) + unused / c)
    return jnp.where(both, 0, offset) + available * direction


class _Window:
    """A square of pixels of an image, at a place made of two numbers in [0, 1)."""

    def __init__(self, draws: Float[Array, "2"], side: Int[Array, ""], h: int, w: int):
        self.shape = h, w
        self.row, self.column = (_below(draw, size - side + 1) for draw, size in zip(draws, (h, w), strict=True))
        rows, columns = (jnp.arange(size, dtype=side.dtype) - at for size, at in ((h, self.row), (w, self.column)))
        in_rows, in_columns = ((place >= 0) & (place < side) for place in (rows, columns))
        self.inside: Bool[Array, "h w"] = in_rows[:, None] & in_columns

    def place(self, patches: Float[Array, "n s s"], number: Int[Array, ""]) -> Float[Array, "h w"]:
        """Give the image that has one of the patches in the window, and zeros elsewhere."""
        h, w = self.shape
        around = jnp.pad(patches, ((0, 0), (h, h), (w, w)))
        return jax.lax.dynamic_slice(around, (number, h - self.row, w - self.column), (1, h, w))[0]


def _below(draw: Float[Array, ""], count: Int[Array, ""]) -> Int[Array, ""]:
    """Make a whole number in 0 .. count - 1 of a number in [0, 1)."""
    return jnp.minimum((draw * count.astype(draw.dtype)).astype(count.dtype), count - 1)


def _signs(draws: Float[Array, " c"]) -> Float[Array, " c"]:
    return jnp.where(draws < 0.5, -1.0, 1.0).astype(draws.dtype)


def _unit(offset: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Scale each channel to unit norm; zero stays zero."""
    norm = jnp.sqrt(jnp.sum(offset**2, axis=(0, 1)))
    return offset / jnp.where(norm > 0, norm, 1)


def _padded(sides: tuple[int, ...]) -> np.ndarray:
    """Fill up the patches of all sides with zeros to one size."""
    largest = max(sides)
    return np.stack([np.pad(_patch(side), (0, largest - side)) for side in sides])


def _patch(side: int) -> np.ndarray:
    """Compute two rectangular bumps of opposite sign, one above the other, of unit norm (equation 2 of the paper)."""
    upper = side // 2
    bumps = [sign * _bump(rows, side) for sign, rows in ((1, upper), (-1, side - upper)) if rows]
    patch = np.concatenate(bumps)
    return patch / np.linalg.norm(patch)


def _bump(rows: int, columns: int) -> np.ndarray:
    distance = np.maximum(
        np.abs(np.arange(rows) - rows // 2)[:, None], np.abs(np.arange(columns) - columns // 2)[None, :]
    )
    terms = 1 / np.arange(1, max(rows, columns) // 2 + 2) ** 2
    bump = np.cumsum(terms[::-1])[::-1][distance]
    return bump / np.linalg.norm(bump)
