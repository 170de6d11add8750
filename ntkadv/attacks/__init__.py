"""Attacks on any JAX callable from images to logits: `attack(model, x, labels, key=key)`.

`threat_model` says what may be changed, `losses` what is maximised, `base` holds what all attacks share, `search` how
one goes over many samples; then one attack a file, and `AutoAttack`, the ensemble. `checks` looks for signs that a
result is not to be trusted, `certificates` for what no attack can exceed, `bridges` lead to Foolbox and PyTorch.
"""

from ntkadv.attacks.apgd import APGD, TargetedAPGD
from ntkadv.attacks.autoattack import AutoAttack
from ntkadv.attacks.base import Attack, RepeatedAttack
from ntkadv.attacks.bridges import foolbox_model, torch_module
from ntkadv.attacks.certificates import Certificate, estimate_curvature, first_order_bound, linear_worst_case
from ntkadv.attacks.checks import EvaluationWarning, Flag, check_model, check_outcome
from ntkadv.attacks.fab import FAB
from ntkadv.attacks.fgsm import FGSM
from ntkadv.attacks.losses import LOSSES, TARGETED_LOSSES
from ntkadv.attacks.pgd import PGD
from ntkadv.attacks.search import Attacked, Cost
from ntkadv.attacks.square import SquareAttack
from ntkadv.attacks.threat_model import L1, L2, Linf, ThreatModel

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "L1",
    "L2",
    "LOSSES",
    "PGD",
    "TARGETED_LOSSES",
    "Attack",
    "Attacked",
    "AutoAttack",
    "Certificate",
    "Cost",
    "EvaluationWarning",
    "Flag",
    "Linf",
    "RepeatedAttack",
    "SquareAttack",
    "TargetedAPGD",
    "ThreatModel",
    "check_model",
    "check_outcome",
    "estimate_curvature",
    "first_order_bound",
    "foolbox_model",
    "linear_worst_case",
    "torch_module",
]
