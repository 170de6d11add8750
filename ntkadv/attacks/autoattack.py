"""AutoAttack: the standard ensemble, each member only on what all before it left unbroken."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import jax.numpy as jnp

from ntkadv._checks import require_int
from ntkadv.attacks.apgd import APGD, TargetedAPGD
from ntkadv.attacks.base import Attack
from ntkadv.attacks.best import Best, misclassified
from ntkadv.attacks.checks import EvaluationWarning, Flag, check_model, check_outcome
from ntkadv.attacks.fab import FAB
from ntkadv.attacks.losses import margin
from ntkadv.attacks.search import Stage
from ntkadv.attacks.square import SquareAttack
from ntkadv.attacks.threat_model import L2, Linf, fold_in_each

Version = Literal["standard", "plus", "custom"]

_VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
}


@dataclass(frozen=True)
class AutoAttack(Attack):
    """The ensemble of attacks by which networks are judged, with its published members, order and budgets.

    - `"standard"`: `apgd-ce`, `apgd-t` (9 targets), `fab-t` (9 targets), `square` (5,000 queries).
    - `"plus"`: `apgd-ce` and `apgd-dlr` (5 starts each), `fab` (5 starts), `square`, `apgd-t`, `fab-t`.
    - `"custom"`: `attacks_to_run`, in that order: names as above, `apgd-margin`, `apgd-squared`, or attacks of one's
      own with the same threat model. APGD and FAB have one start then.

    Images that are misclassified as they are stay as they are; every member runs only on those that are still
    classified correctly. `run` says what fell to what, keeps a state file, and warns (`EvaluationWarning`) of what
    AutoAttack's authors warn of: random outputs, probabilities, vanishing gradients, a black-box attack that wins.

    Networks fitted by squared loss, as kernel machines are, are judged well by these members, which only look at
    differences of logits or their softmax; `"custom"` can add `apgd-squared` and `apgd-margin`.

    Args:
        threat: `Linf` or `L2`.
        version: Which ensemble.
        attacks_to_run: The members of `"custom"`; empty for the others.
        steps: Steps of the members that follow gradients; published with 100.
        queries: Queries of Square Attack; published with 5,000.
        targets: Classes that the targeted members go for; published with 9. All others, if there are fewer.

    Raises:
        TypeError: `threat` is another threat model, or a member is neither a name nor an attack.
        ValueError: an unknown version or name, members without `version="custom"`, or of another threat model.

    With fewer than four classes, for which the targeted DLR loss is not defined, `apgd-t` takes the margin, and with
    two `apgd-dlr` does too.

    Source: Croce & Hein, ICML 2020, arXiv 2003.01690; budgets as in the authors' package.
    """

    _: KW_ONLY
    version: Version = "standard"
    attacks_to_run: Sequence[str | Attack] = ()
    steps: int = 100
    queries: int = 5000
    targets: int = 9

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.threat, (Linf, L2)):
            raise TypeError(f"threat must be Linf or L2, which FAB and Square know, got {self.threat!r}; use APGD.")
        for name in ("steps", "queries", "targets"):
            require_int(name, getattr(self, name), minimum=1)
        if self.version not in (*_VERSIONS, "custom"):
            raise ValueError(f"version must be 'standard', 'plus' or 'custom', got {self.version!r}.")
        if isinstance(self.attacks_to_run, str):
            raise TypeError(f"attacks_to_run must be a list of members, got one; write [{self.attacks_to_run!r}].")
        object.__setattr__(self, "attacks_to_run", tuple(self.attacks_to_run))
        if (self.version == "custom") != bool(self.attacks_to_run):
            raise ValueError(
                f"attacks_to_run names the members of version='custom' and of no other, got version={self.version!r} "
                f"with {len(self.attacks_to_run)} members."
            )
        self.members(10)

    @property
    def name(self) -> str:
        """`AutoAttack`; then the version, the members of a custom one, and budgets that are not the published ones."""
        kind = "" if self.version == "standard" else f" {self.version}"
        if self.version == "custom":
            kind = " (" + ", ".join(m if isinstance(m, str) else m.name for m in self.attacks_to_run) + ")"
        published = {"steps": 100, "queries": 5000, "targets": 9}
        budgets = [f"{getattr(self, k)} {k}" for k, usual in published.items() if getattr(self, k) != usual]
        return "AutoAttack" + kind + (" " + ", ".join(budgets) if budgets else "")

    @property
    def starts_from_correct(self) -> bool:
        """Misclassified images stay as they are."""
        return True

    @property
    def black_box_parts(self) -> tuple[str, ...]:
        """Names of the members that use no gradients."""
        return tuple(member.name for member in self.members(10) if member.black_box)

    def members(self, num_classes: int) -> tuple[Attack, ...]:
        """List the members, for a model with so many classes."""
        restarts = 5 if self.version == "plus" else 1
        dlr = {"apgd-dlr": "dlr" if num_classes > 2 else "margin", "apgd-t": "dlr" if num_classes > 3 else "margin"}
        known: dict[str, Attack] = {
            "apgd-ce": APGD(self.threat, steps=self.steps, restarts=restarts),
            "apgd-dlr": APGD(self.threat, steps=self.steps, restarts=restarts, loss=dlr["apgd-dlr"]),
            "apgd-margin": APGD(self.threat, steps=self.steps, loss="margin"),
            "apgd-squared": APGD(self.threat, steps=self.steps, loss="squared"),
            "apgd-t": TargetedAPGD(self.threat, steps=self.steps, loss=dlr["apgd-t"], targets=self.targets),
            "fab": FAB(self.threat, steps=self.steps, restarts=restarts, untargeted=True),
            "fab-t": FAB(self.threat, steps=self.steps, targets=self.targets),
            "square": SquareAttack(self.threat, queries=self.queries),
        }
        chosen = _VERSIONS.get(self.version, self.attacks_to_run)
        return tuple(self._member(member, known) for member in chosen)

    def _member(self, member: str | Attack, known: dict[str, Attack]) -> Attack:
        if isinstance(member, str):
            if member not in known:
                raise ValueError(f"attacks_to_run must be attacks or among {', '.join(known)}, got {member!r}.")
            return known[member]
        if not isinstance(member, Attack):
            raise TypeError(f"attacks_to_run must hold names or attacks, got {type(member).__name__}: {member!r}.")
        if member.threat != self.threat:
            raise ValueError(
                f"attacks_to_run must share the threat model {self.threat!r}, but {member!r} has {member.threat!r}."
            )
        return member

    def with_eps(self, eps):
        """Give the same ensemble with another radius, members of one's own included."""
        own = tuple(m if isinstance(m, str) else m.with_eps(eps) for m in self.attacks_to_run)
        return dataclasses.replace(self, threat=self.threat.with_eps(eps), attacks_to_run=own)

    def stages(self, num_classes: int) -> tuple[Stage, ...]:
        """List the stages of all members, see `Attack.stages`."""
        return tuple(
            stage._replace(salt=(place, *stage.salt))
            for place, member in enumerate(self.members(num_classes))
            for stage in member.stages(num_classes)
        )

    def perturb(self, model, x, labels, keys):
        """Attack one batch, see `Attack.perturb`; inside one program every member runs on all of it."""
        logits = model(x)
        best = Best(x, margin(logits, labels), misclassified(logits, labels))
        for place, member in enumerate(self.members(logits.shape[1])):
            point = member.perturb(model, x, labels, fold_in_each(keys, jnp.asarray(place, jnp.uint32)))
            logits = model(point)
            best = best.update(point, margin(logits, labels), logits, labels, until_wrong=True)
        return best.point

    def _attacked(self, model, x, labels, key, batch_size, **options):
        """Warn where the result is not to be trusted (`EvaluationWarning`)."""
        attacked = super()._attacked(model, x, labels, key, batch_size, **options)
        self._warn(check_outcome({self.name: ~attacked.is_wrong}, {self.name: self}, {self.name: attacked.fell_to}))
        return attacked

    def _before(self, model, x, labels):
        self._warn(check_model(model, x, labels))

    def _warn(self, flags: Sequence[Flag]) -> None:
        for flag in flags:
            warnings.warn(f"{flag.kind}: {flag.message}", EvaluationWarning, stacklevel=4)
