"""FGSM: one step of full length."""

from dataclasses import KW_ONLY, dataclass

from ntkadv.attacks.base import Attack
from ntkadv.attacks.losses import Loss, get_loss, loss_suffix
from ntkadv.attacks.model import loss_and_gradient
from ntkadv.attacks.search import Cost


@dataclass(frozen=True)
class FGSM(Attack):
    r"""The fast gradient sign method, and its analogue for other norms.

    .. math:: x' = \mathrm{project}\bigl(x + \epsilon\, \mathrm{step}(\nabla_x \ell(f(x), y))\bigr)

    where step is the sign for `Linf` and normalises the gradient for `L2`. The one point is returned whether or not it
    is stronger than the clean one. With a random start this is `PGD` with one step.

    Args:
        threat: What may be changed.
        loss: `"squared"`, `"cross_entropy"`, `"margin"`, or a function (logits, labels) -> (b,).

    Source: Goodfellow, Shlens & Szegedy, ICLR 2015, arXiv 1412.6572.
    """

    _: KW_ONLY
    loss: str | Loss = "squared"

    def __post_init__(self):
        super().__post_init__()
        get_loss(self.loss)

    @property
    def name(self) -> str:
        """`FGSM`, and the loss where it is not the squared one."""
        return "FGSM" + loss_suffix(self.loss)

    def cost(self, num_classes: int) -> Cost:
        """Count passes through the model, see `Attack.cost`."""
        return Cost(gradients=1)

    def perturb(self, model, x, labels, keys):
        """Attack one batch, see `Attack.perturb`."""
        _, gradient, _ = loss_and_gradient(model, get_loss(self.loss), x, labels)
        return self.threat.project(x + self.threat.eps * self.threat.step(gradient, x), x)
