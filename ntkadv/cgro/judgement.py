r"""How robust a CGRO classifier is, by attacks that its flat regions do not fool, and by what the construction implies.

Inside its balls the classifier is constant and has no gradient, so that attacks by gradients see nothing there. But the
construction itself says where it is wrong: in an l_inf ball of radius eps around x there is a point of the training
ball of X_i exactly if |x - X_i| <= eps + delta, and clip(X_i, x - eps, x + eps) is one. If X_i has another class, x is
broken; if X_i has its class and |x - X_i| <= delta - eps, nothing can break x. In between the classifier is the clean
one, on which attacks work: what they find counts if it fools f_S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ntkadv._checks import require_images, require_key, require_labels, require_same_length
from ntkadv._typing import AnyArray
from ntkadv.attacks.base import Attack
from ntkadv.attacks.losses import margin
from ntkadv.attacks.model import Model, logits_of, num_classes_of
from ntkadv.attacks.threat_model import Linf, move
from ntkadv.cgro.representation import CGROClassifier
from ntkadv.evaluation import is_correct

__all__ = ["CGROJudgement", "judge_cgro_classifier", "small_margin"]


@dataclass(frozen=True, eq=False)
class CGROJudgement:
    """What withstands what, image by image; `(n,)` each.

    Attributes:
        clean: right on the image as it is.
        direct: right under the attacks on f_S itself, which its flat regions may fool.
        transferred: right under the attacks on the clean classifier, shown to f_S.
        balls: right at the point of the ball that is nearest to a memorised image of another class, and not within
            eps + delta of one.
        worst: right under all of these.
        certified: for sure robust, in a training ball of its class and at eps from its rim.
        inside: within delta of some memorised training image.
        near_wrong: within eps + delta of a memorised image of another class; for sure broken.
    """

    clean: Bool[np.ndarray, " n"]
    direct: Bool[np.ndarray, " n"]
    transferred: Bool[np.ndarray, " n"]
    balls: Bool[np.ndarray, " n"]
    worst: Bool[np.ndarray, " n"]
    certified: Bool[np.ndarray, " n"]
    inside: Bool[np.ndarray, " n"]
    near_wrong: Bool[np.ndarray, " n"]

    def shares(self) -> dict[str, float]:
        """Share of the images for which each holds."""
        return {name: float(np.mean(value)) for name, value in vars(self).items()}


def judge_cgro_classifier(
    network: CGROClassifier,
    x: Float[AnyArray, "n h w c"],
    labels: Int[AnyArray, " n"],
    *,
    eps: float,
    attacks: Sequence[Attack],
    key: Key[Array, ""],
    batch_size: int = 128,
) -> CGROJudgement:
    """Attack a CGRO classifier directly, through its clean classifier, and by what the construction implies.

    Args:
        network: the classifier.
        x: images.
        labels: their classes.
        eps: radius of the attack, in l_inf; the attacks' own radius is replaced by it.
        attacks: attacks of the package, all in l_inf.
        key: a random key.
        batch_size: images at a time.

    Raises:
        TypeError, ValueError: an argument is out of range, or an attack is in another norm.
    """
    require_images("x", x)
    require_same_length(x=x, labels=labels)
    require_labels("labels", labels, num_classes_of(network, x))
    require_key("key", key)
    for attack in attacks:
        if not isinstance(attack.threat, Linf):
            raise ValueError(f"attacks must be in l_inf, as the balls are, got {attack.threat!r}; use Linf(eps).")
    threat, labels = Linf(eps), np.asarray(labels)

    def right(images: AnyArray) -> np.ndarray:
        return is_correct(network, images, labels, batch_size, "CGRO classifier")

    clean = right(x)
    found = {}
    for name, target in (("direct", network), ("transferred", network.clean)):
        found[name] = clean.copy()
        for attack in attacks:
            points = attack.with_eps(eps)(target, x, labels, key=key, batch_size=batch_size)
            found[name] &= right(points)
    points, inside, near_wrong, certified = _nearest(network, x, labels, threat, batch_size)
    balls = right(points) & ~near_wrong
    worst = clean & found["direct"] & found["transferred"] & balls
    return CGROJudgement(clean, found["direct"], found["transferred"], balls, worst, certified, inside, near_wrong)


def small_margin(
    clean: Model,
    x: Float[AnyArray, "n h w c"],
    labels: Int[AnyArray, " n"],
    *,
    attack: Attack,
    key: Key[Array, ""],
    threshold: float = 0.0,
    batch_size: int = 128,
) -> Bool[np.ndarray, " n"]:
    """Find the images on which a clean classifier has a small margin within the ball: those that must be memorised.

    An image counts if the lead of its class, where the attack leaves it, is at most `threshold`.

    Args:
        clean: the clean classifier.
        x: training images.
        labels: their classes.
        attack: which point of the ball; the margin there is an upper bound on the smallest.
        key: a random key.
        threshold: 0 memorises what the attack breaks; more than that leaves room for stronger attacks.
        batch_size: images at a time.
    """
    points = np.asarray(attack(clean, x, labels, key=key, batch_size=batch_size))
    leads = []
    for i in range(0, len(points), batch_size):
        logits = logits_of(clean, jnp.asarray(points[i : i + batch_size]))
        leads.append(-np.asarray(margin(logits, jnp.asarray(labels[i : i + batch_size], jnp.int32))))
    return np.concatenate(leads) <= threshold


def _nearest(
    network: CGROClassifier, x: AnyArray, labels: np.ndarray, threat: Linf, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each image the allowed point nearest to an image of another class, and what the distances imply."""
    if not len(network.centres):
        nothing = np.zeros(len(x), bool)
        return np.asarray(x), nothing, nothing, nothing
    centre_labels = np.argmax(np.asarray(network.values), axis=1)
    distances_of = eqx.filter_jit(CGROClassifier.distances)
    points, rows = [], []
    for i in range(0, len(x), batch_size):
        images = jnp.asarray(x[i : i + batch_size])
        distances = np.asarray(distances_of(network, images))
        rows.append(distances)
        wrong = np.where(centre_labels[None] != labels[i : i + batch_size, None], distances, np.inf)
        aims = network.centres[jnp.asarray(np.argmin(wrong, axis=1))].reshape(images.shape).astype(images.dtype)
        points.append(np.asarray(move(images, jnp.clip(aims - images, -threat.eps, threat.eps))))
    distances = np.concatenate(rows)
    other = np.where(centre_labels[None] != labels[:, None], distances, np.inf).min(axis=1)
    own = np.where(centre_labels[None] == labels[:, None], distances, np.inf).min(axis=1)
    # Distances are rounded; what is within rounding of the edge is left to the attacks.
    slack = 1e-6
    inside = distances.min(axis=1) <= network.delta
    return (
        np.concatenate(points),
        inside,
        other <= threat.eps + network.delta - slack,
        own <= network.delta - threat.eps - slack,
    )
