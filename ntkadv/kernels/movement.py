"""How a kernel moves over a training run: what `measures` says of one kernel or two, for each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from ntkadv._checks import require_finite, require_int, require_same_length
from ntkadv._typing import AnyArray
from ntkadv.kernels.measures import (
    Rank,
    alignment_of,
    angle_of_units,
    centered_kernel,
    checked_kernel,
    checked_targets,
    distance_of_units,
    rank_of,
    require_rank,
    require_symmetric,
    share_of_top,
    spectrum_of,
    unit,
)

__all__ = ["KernelMovement", "kernel_movement"]


@dataclasses.dataclass(frozen=True, eq=False)
class KernelMovement:
    """How a kernel moved: one number for each time, the first kernel being the reference.

    Attributes:
        times: When; 0, 1, 2, ..., if no times were given.
        relative_distance: From the first kernel, see `measures.relative_distance`.
        cosine_distance: From the first kernel, see `measures.cosine_distance`.
        step_distance: Cosine distance from the kernel before; 0 at the first. Divided by the step in time it is the
            kernel velocity of Fort et al.
        radius, angle: Polar coordinates about the first kernel, see `measures.polar`.
        top: Numbers of eigenvalues, one for each column of `top_share`.
        rank: Definition of `effective_rank`.
        centered_distance: As `cosine_distance`, of the centred kernels; None for kernels (n, c, c).
        top_share: Share of the spectral mass in the largest eigenvalues; None without the spectrum.
        effective_rank: See `measures.effective_rank`; None without the spectrum.
        alignment, centered_alignment: With the targets, see `measures.target_alignment`; None without targets.
    """

    times: Float[np.ndarray, " t"]
    relative_distance: Float[np.ndarray, " t"]
    cosine_distance: Float[np.ndarray, " t"]
    step_distance: Float[np.ndarray, " t"]
    radius: Float[np.ndarray, " t"]
    angle: Float[np.ndarray, " t"]
    top: tuple[int, ...]
    rank: Rank
    centered_distance: Float[np.ndarray, " t"] | None = None
    top_share: Float[np.ndarray, "t tops"] | None = None
    effective_rank: Float[np.ndarray, " t"] | None = None
    alignment: Float[np.ndarray, " t"] | None = None
    centered_alignment: Float[np.ndarray, " t"] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give all of it in plain values, for JSON; `KernelMovement.from_dict` is the way back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KernelMovement:
        """Read what `to_dict` gave.

        Raises:
            ValueError: an entry is missing, or one is there that does not belong.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            wrong = ", ".join(sorted(names ^ set(values)))
            raise ValueError(f"values must be what KernelMovement.to_dict gives, but differ in {wrong}.")
        plain = {"top": tuple(values["top"]), "rank": values["rank"]}
        arrays = {k: v if v is None else np.array(v, float) for k, v in values.items() if k not in plain}
        return cls(**arrays, **plain)


def kernel_movement(
    kernels: Iterable[Float[AnyArray, "n *rest"]],
    targets: Float[AnyArray, "n c"] | None = None,
    *,
    times: Sequence[float | int] | Float[AnyArray, " t"] | None = None,
    top: Sequence[int] = (10, 20),
    rank: Rank = "entropy",
    spectrum: bool = True,
    progress: bool = True,
) -> KernelMovement:
    """Measure how a kernel moves over a training run: distances, polar coordinates, spectrum, alignment.

    Kernels are taken one at a time; only the first and the last two are held, with a few copies.

    Args:
        kernels: Kernels of one of the forms above, of one shape, in the order of time: a list, a generator, or an array
            whose first axis is time.
        targets: Targets of the same images, for the alignment; not for kernels (n, c, c), which relate no two images.
        times: When each was computed.
        top: Numbers of eigenvalues whose share of the mass is wanted.
        rank: Definition of the effective rank.
        spectrum: Compute the eigenvalues, by far the most expensive part.
        progress: Show a bar over the kernels.

    Returns:
        Arrays over time. Where a later kernel is zero, or centred is zero, so that it has no direction, what depends on
        it is NaN.

    Raises:
        TypeError, ValueError: as the functions of single kernels; and if there are no kernels, or as many times.
    """
    require_rank(rank)
    for k in top:
        require_int("top", k, minimum=1)
    labels = None if targets is None else checked_targets(targets)
    rows: list[dict[str, Any]] = []
    start: _Start | None = None
    before = np.zeros(0)
    for t, given in enumerate(tqdm(kernels, desc="kernel movement", disable=not progress, leave=False)):
        name = f"kernels[{t}]"
        kernel = checked_kernel(name, given, shape=None if start is None else start.kernel.shape)
        direction = unit(kernel)
        if start is None:
            start = _Start.of(name, kernel)
            before = direction
        row: dict[str, Any] = {
            "relative_distance": np.linalg.norm(kernel - start.kernel) / start.size,
            "cosine_distance": distance_of_units(direction, start.direction),
            "step_distance": distance_of_units(direction, before),
            "radius": np.linalg.norm(kernel) / start.size,
            "angle": angle_of_units(direction, start.direction),
        }
        if start.centered is not None:
            row["centered_distance"] = distance_of_units(unit(centered_kernel(name, kernel)), start.centered)
        if spectrum or labels is not None:
            require_symmetric(name, kernel, given.dtype)
        if spectrum:
            values = spectrum_of(name, kernel, given.dtype)
            row["top_share"] = [share_of_top(values, k) for k in top]
            row["effective_rank"] = rank_of(values, rank)
        if labels is not None:
            row["alignment"] = alignment_of(name, kernel, labels, centered=False)
            row["centered_alignment"] = alignment_of(name, kernel, labels, centered=True)
        rows.append(row)
        before = direction
    if not rows:
        raise ValueError("kernels must hold at least one kernel, got none.")
    when = np.arange(len(rows), dtype=float) if times is None else np.asarray(times, float)
    require_same_length(times=when, kernels=rows)
    require_finite("times", when)
    series: dict[str, Any] = {field: np.array([row[field] for row in rows], float) for field in rows[0]}
    return KernelMovement(times=when, top=tuple(top), rank=rank, **series)


class _Start(NamedTuple):
    """The first kernel, which the others are held against."""

    kernel: Float[np.ndarray, "n *rest"]
    size: float
    direction: Float[np.ndarray, "n *rest"]
    centered: Float[np.ndarray, "n *rest"] | None

    @classmethod
    def of(cls, name: str, kernel: Float[np.ndarray, "n *rest"]) -> _Start:
        if not kernel.any():
            raise ValueError(f"{name}, which the others are held against, is zero; begin at another time.")
        centered = None if kernel.ndim == 3 else unit(centered_kernel(name, kernel))
        return cls(kernel, float(np.linalg.norm(kernel)), unit(kernel), centered)
