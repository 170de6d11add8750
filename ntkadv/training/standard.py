"""Training on the images as they are."""

from dataclasses import dataclass

from ntkadv.training.method import Method


@dataclass(frozen=True)
class StandardTraining(Method):
    """Training without attacks, see `Method`."""

    def images(self, f, params, batch):
        """Give the images as they are."""
        del f, params
        return batch.x
