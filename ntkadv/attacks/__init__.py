"""Attacks on any JAX callable from images to logits: `attack(model, x, labels, key=key)`.

`threat_model` says what may be changed, `losses` what is maximised, `base` holds what all attacks share; then
one attack a file.
"""

from ntkadv.attacks.apgd import APGD, TargetedAPGD
from ntkadv.attacks.base import Attack, RepeatedAttack
from ntkadv.attacks.fgsm import FGSM
from ntkadv.attacks.losses import LOSSES
from ntkadv.attacks.pgd import PGD
from ntkadv.attacks.threat_model import L1, L2, Linf, ThreatModel

__all__ = [
    "APGD",
    "FGSM",
    "L1",
    "L2",
    "LOSSES",
    "PGD",
    "Attack",
    "Linf",
    "RepeatedAttack",
    "TargetedAPGD",
    "ThreatModel",
]
