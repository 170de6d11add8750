"""Training on the images as they are."""

from dataclasses import dataclass

from ntkadv.training.method import Method


@dataclass(frozen=True)
class StandardTraining(Method):
    """Training without attacks, see `Method`."""
