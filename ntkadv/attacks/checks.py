"""Signs that a robust accuracy is not to be trusted: of the model before an attack, of the accuracies after it."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ntkadv._typing import AnyArray
from ntkadv.attacks.base import Attack
from ntkadv.attacks.losses import cross_entropy, margin
from ntkadv.attacks.model import Model, in_precision, logits_of, loss_and_gradient

_RANDOM = 1e-4
"""Distance of two answers, in units of the answer, from which on a model counts as random (as in AutoAttack)."""
_BLACK_BOX = 0.002
"""Share of the samples that a black-box attack alone may break (as in AutoAttack)."""
_ROUNDING = 1e-6
"""Size of the cross-entropy's gradient, in units of the margin's, that may be all rounding."""
_LOSSES = 0.02
"""Share of the samples by which the losses may differ."""


class EvaluationWarning(UserWarning):
    """A robust accuracy may be too high."""


class Flag(NamedTuple):
    """One such sign: its kind in a word or two, and what was seen and what to do."""

    kind: str
    message: str


def check_model(
    model: Model, x: Float[AnyArray, "n h w c"], labels: Int[AnyArray, " n"], *, batch_size: int = 128
) -> list[Flag]:
    """Look for what misleads attacks: random outputs, probabilities in the place of logits, gradients that vanish.

    Looks at the first `batch_size` images, with a handful of passes through the model.

    Source: the checks of AutoAttack (Croce & Hein, ICML 2020, arXiv 2003.01690); Athalye et al., ICML 2018,
        arXiv 1802.00420.
    """
    images, y = jnp.asarray(x[:batch_size]), jnp.asarray(labels[:batch_size], jnp.int32)
    logits = np.asarray(logits_of(model, images), np.float64)
    is_correct = logits.argmax(axis=1) == np.asarray(y)
    return [*_randomness(model, images, logits), *_probabilities(logits), *_gradients(model, images, y, is_correct)]


def check_outcome(
    correct: Mapping[str, Bool[np.ndarray, " n"]],
    attacks: Mapping[str, Attack],
    fell_to: Mapping[str, np.ndarray] | None = None,
) -> list[Flag]:
    """Look for accuracies that contradict each other.

    A black-box attack has less to go by than one that follows gradients: where it breaks what they do not, gradients
    mislead. A model fitted by squared loss is attacked with that loss, which is not what decides the class: where
    squared-loss attacks and the others differ, the weaker ones flatter the model.

    Args:
        correct: Whether each sample is still classified correctly, by attack.
        attacks: The attacks by name.
        fell_to: For attacks with several parts, the name of the part that broke each sample.
    """
    return [*_black_box(correct, attacks), *_black_box_parts(attacks, fell_to or {}), *_losses(correct, attacks)]


def _randomness(model: Model, x: Array, logits: np.ndarray) -> Iterator[Flag]:
    """Compare the compiled model, which has its random numbers frozen in, with two plain calls."""
    scale = np.linalg.norm(logits, axis=1) + 1e-10
    answers = [np.asarray(model(x), np.float64) for _ in range(2)]
    difference = max(float((np.linalg.norm(a - logits, axis=1) / scale).max()) for a in answers)
    difference = max(difference, float((np.linalg.norm(answers[0] - answers[1], axis=1) / scale).max()))
    # Two compilations of one function may round differently; half precision alone comes to more than the limit.
    limit = max(_RANDOM, 100 * float(jnp.finfo(jax.eval_shape(model, x).dtype).eps))
    if not difference <= limit:
        yield Flag(
            "random outputs",
            f"the model gives other logits for the same images (relative difference {difference:.1e}); inside jit its "
            f"random numbers are frozen, so this is not the model that would be used: average it over its randomness, "
            f"or fix its key.",
        )


def _probabilities(logits: np.ndarray) -> Iterator[Flag]:
    if logits.min() >= -1e-5 and logits.max() <= 1 + 1e-5 and np.abs(logits.sum(axis=1) - 1).max() <= 1e-5:
        yield Flag(
            "softmax outputs",
            "the outputs lie in [0, 1] and sum to 1, as probabilities do: their gradients vanish where the model is "
            "sure, so return the logits before the softmax.",
        )


def _gradients(model: Model, x: Array, labels: Array, is_correct: np.ndarray) -> Iterator[Flag]:
    if not is_correct.any():
        return
    vanishes, saturates = (np.asarray(found)[is_correct] for found in _vanishing(model, x, labels))
    if vanishes.any():
        yield Flag(
            "zero gradients",
            f"{int(vanishes.sum())} of {len(vanishes)} correctly classified images have a zero gradient of the margin: "
            f"attacks that follow gradients are blind there (quantisation, saturation, stop_gradient); trust only "
            f"black-box attacks, or attack a smooth substitute.",
        )
    if (saturates & ~vanishes).any():
        yield Flag(
            "saturated cross-entropy",
            f"{int((saturates & ~vanishes).sum())} of {len(saturates)} correctly classified images have a gradient "
            f"of the cross-entropy that is next to nothing beside the margin's: the logits are so large that it rounds "
            f"away; attack with the margin or the DLR loss.",
        )


def _black_box(correct: Mapping[str, np.ndarray], attacks: Mapping[str, Attack]) -> Iterator[Flag]:
    white = [correct[name] for name, attack in attacks.items() if not attack.black_box]
    if not white:
        return
    survived = np.logical_and.reduce(white)
    for name, attack in attacks.items():
        broken = float(np.mean(survived & ~correct[name]))
        if attack.black_box and broken > _BLACK_BOX:
            yield _beaten(name, broken)


def _black_box_parts(attacks: Mapping[str, Attack], fell_to: Mapping[str, np.ndarray]) -> Iterator[Flag]:
    for name, attack in attacks.items():
        for part in attack.black_box_parts if name in fell_to else ():
            broken = float(np.mean(fell_to[name] == part))
            if broken > _BLACK_BOX:
                yield _beaten(f"{name}: {part}", broken)


def _beaten(name: str, broken: float) -> Flag:
    return Flag(
        "black box wins",
        f"{name}, which uses no gradients, breaks {broken:.1%} of the images that survive the attacks that do: the "
        f"gradients mislead, so give it more queries and restarts, and write an attack made for this model.",
    )


def _losses(correct: Mapping[str, np.ndarray], attacks: Mapping[str, Attack]) -> Iterator[Flag]:
    kinds: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for name, attack in attacks.items():
        # Attacks that have no loss of their own, as ensembles and FAB, go by the class.
        if not attack.black_box:
            kinds[getattr(attack, "loss", None) == "squared"].append(correct[name])
    if not (kinds[True] and kinds[False]):
        return
    squared, others = (float(np.logical_and.reduce(kinds[kind]).mean()) for kind in (True, False))
    if abs(squared - others) > _LOSSES:
        weak, strong = ("squared", "other") if squared > others else ("other", "squared")
        yield Flag(
            "losses disagree",
            f"robust accuracy is {squared:.1%} under the squared loss and {others:.1%} under the others: the {weak} "
            f"loss{'es flatter' if weak == 'other' else ' flatters'} the model, so report the {strong} "
            f"loss{'es' if strong == 'other' else ''}, or the worst case.",
        )


@eqx.filter_jit
def _vanishing(model: Model, x: Array, labels: Array) -> tuple[Array, Array]:
    """Whether the gradient of the margin is zero at each image, and whether that of the cross-entropy is next to it."""
    largest = []
    for loss in (margin, cross_entropy):
        _, gradient, _ = loss_and_gradient(in_precision(model, x.dtype), loss, x, labels)
        largest.append(jnp.max(jnp.abs(gradient), axis=(1, 2, 3)))
    return largest[0] == 0, largest[1] <= _ROUNDING * largest[0]
