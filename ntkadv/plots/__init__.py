"""Figures from results, and nothing else: every function takes what was measured and returns a matplotlib `Figure`.

`plots.wide`, `plots.features`, `plots.after` and `plots.training` have those of their experiments, `plots.style` what
all of them share.
"""

from ntkadv.plots import style
from ntkadv.plots.results import (
    accuracy_curves,
    adv_ntk_progress,
    image_strip,
    over_time,
    robustness,
    transfer_matrix,
)
from ntkadv.plots.style import BLUE, GREEN, ORANGE, PURPLE, VERMILION

__all__ = [
    "BLUE",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "VERMILION",
    "accuracy_curves",
    "adv_ntk_progress",
    "image_strip",
    "over_time",
    "robustness",
    "style",
    "transfer_matrix",
]
