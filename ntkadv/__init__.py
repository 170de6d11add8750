"""ntkadv: the neural tangent kernel theory of adversarial training, in JAX.

The rooms: `architectures` (one definition, finite network and infinite-width kernel), `gram` (kernel matrices),
`dynamics` (closed forms), `attacks`, `adv_ntk`, `evaluation`, `runs` and `plots`. See the README for the whole house.
"""

from ntkadv import architectures, attacks, cgro, dynamics, kernels, plots, runs, training, vision
from ntkadv.adv_ntk import AdvNTKFit, fit_adv_ntk
from ntkadv.curves import AccuracyCurves, accuracy_curves
from ntkadv.data import Dataset, DatasetNotFoundError, load_dataset, targets
from ntkadv.dynamics import RidgeRegression, TrainingDynamics
from ntkadv.evaluation import Evaluation, Report, compare, evaluate
from ntkadv.features import Eigenfeatures, FeatureRobustness, feature_robustness
from ntkadv.kernels import gram
from ntkadv.predictors import KernelPredictor
from ntkadv.runs import package_version
from ntkadv.selection import RobustnessPath, robustness_path
from ntkadv.statistics import McNemar, PowerLaw, mcnemar, power_law, wilson_interval
from ntkadv.transfer import TransferMatrix, transfer
from ntkadv.wide import WideNetwork

__version__ = package_version("ntkadv")

__all__ = [
    "AccuracyCurves",
    "AdvNTKFit",
    "Dataset",
    "DatasetNotFoundError",
    "Eigenfeatures",
    "Evaluation",
    "FeatureRobustness",
    "KernelPredictor",
    "McNemar",
    "PowerLaw",
    "Report",
    "RidgeRegression",
    "RobustnessPath",
    "TrainingDynamics",
    "TransferMatrix",
    "WideNetwork",
    "accuracy_curves",
    "architectures",
    "attacks",
    "cgro",
    "compare",
    "dynamics",
    "evaluate",
    "feature_robustness",
    "fit_adv_ntk",
    "gram",
    "kernels",
    "load_dataset",
    "mcnemar",
    "plots",
    "power_law",
    "robustness_path",
    "runs",
    "targets",
    "training",
    "transfer",
    "vision",
    "wilson_interval",
]
