"""Images and labels: pixels in [0, 1], NHWC, float32; integer labels; splits by seed; label noise."""

from ntkadv.data.dataset import Dataset as Dataset
from ntkadv.data.dataset import targets as targets
from ntkadv.data.loading import load_dataset as load_dataset
from ntkadv.data.sources import DatasetNotFoundError as DatasetNotFoundError
