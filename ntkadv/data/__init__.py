"""Images and labels: pixels in [0, 1], NHWC, float32; integer labels; splits by seed; label noise."""

from ntkadv.data.dataset import Dataset as Dataset
from ntkadv.data.dataset import targets as targets
