"""One judge for all: accuracy under attack with intervals, and tables that compare models."""

import dataclasses
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from tqdm.auto import tqdm

from ntkadv._checks import (
    require_finite,
    require_images,
    require_int,
    require_key,
    require_labels,
    require_same_length,
)
from ntkadv._typing import AnyArray
from ntkadv.attacks.base import Attack
from ntkadv.attacks.model import Model, num_classes_of
from ntkadv.attacks.search import batches
from ntkadv.data import Dataset
from ntkadv.report import CLEAN, WORST_CASE, Evaluation, Report, Score, require_confidence, wilson_interval

__all__ = ["Evaluation", "Report", "Score", "compare", "evaluate", "wilson_interval"]

Split = Literal["test", "val", "train"]


def evaluate(
    model: Model,
    data: Dataset | tuple[AnyArray, AnyArray],
    attacks: Iterable[Attack] | Mapping[str, Attack] = (),
    *,
    key: Key[Array, ""],
    batch_size: int = 256,
    split: Split = "test",
    keep_adversarial: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Find out which samples a model classifies correctly, as they are and under each attack.

    Every attack runs on all samples. Its random numbers depend on `key` and on its name, not on the other attacks.

    Args:
        model: A function in JAX from images (b, h, w, c) to logits (b, num_classes), see `Attack`.
        data: A data set, or images (n, h, w, c) in [0, 1] and labels (n,).
        attacks: Attacks, told apart by their names; a dictionary gives them other names.
        key: A random key.
        batch_size: Number of images at a time.
        split: Which part of a data set to use.
        keep_adversarial: Keep the attacked images in the result.
        progress: Show progress bars.

    Raises:
        TypeError, ValueError: as `Attack` does; and if two attacks share a name or the logits are not finite.
    """
    x, labels = _samples(data, split)
    named = name_attacks(attacks)
    require_key("key", key)
    require_int("batch_size", batch_size, minimum=1)
    require_labels("labels", labels, num_classes_of(model, x))
    batch_size = min(batch_size, len(x))

    start = time.perf_counter()
    correct = {CLEAN: _is_correct(model, x, labels, batch_size, CLEAN)}
    seconds = {CLEAN: time.perf_counter() - start}
    adversarial = {}
    for name, attack in named.items():
        attack_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        start = time.perf_counter()
        attacked = attack(model, x, labels, key=attack_key, batch_size=batch_size, progress=progress)
        correct[name] = _is_correct(model, attacked, labels, batch_size, name)
        seconds[name] = time.perf_counter() - start
        if keep_adversarial:
            adversarial[name] = np.asarray(attacked)
    return Evaluation(correct, seconds, adversarial if keep_adversarial else None)


def compare(
    models: Mapping[str, Model],
    data: Dataset | tuple[AnyArray, AnyArray],
    attacks: Iterable[Attack] | Mapping[str, Attack] = (),
    *,
    key: Key[Array, ""] | None = None,
    batch_size: int = 256,
    split: Split = "test",
    confidence: float = 0.95,
    keep_adversarial: bool = False,
    progress: bool = True,
) -> Report:
    """Evaluate several models, given by name, on the same samples with the same attacks and random numbers.

    Args:
        models: Models by name, see `evaluate`.
        data: A data set, or images and labels.
        attacks: Attacks, told apart by their names; a dictionary gives them other names.
        key: A random key; `jax.random.key(0)` if not given.
        batch_size: Number of images at a time.
        split: Which part of a data set to use.
        confidence: Level of the intervals that the report shows.
        keep_adversarial: Keep the attacked images in `Report.evaluations`.
        progress: Show progress bars.

    Raises:
        TypeError, ValueError: as `evaluate` does; and if there are no models.
    """
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f'models must be a dictionary with at least one model by name, got {models!r}; {{"NTK": f}}.')
    require_confidence(confidence)
    key = jax.random.key(0) if key is None else key
    named = name_attacks(attacks)
    evaluations = {}
    for name, model in (bar := tqdm(models.items(), disable=not progress)):
        bar.set_description(name)
        evaluations[name] = evaluate(
            model,
            data,
            named,
            key=key,
            batch_size=batch_size,
            split=split,
            keep_adversarial=keep_adversarial,
            progress=progress,
        )
    rows = {
        name: {column: dataclasses.replace(score, confidence=confidence) for column, score in evaluation.scores.items()}
        for name, evaluation in evaluations.items()
    }
    n = next(iter(rows.values()))[CLEAN].n
    return Report(rows, {name: settings_of(attack) for name, attack in named.items()}, n, confidence, evaluations)


def name_attacks(attacks: Iterable[Attack] | Mapping[str, Attack]) -> dict[str, Attack]:
    """Name attacks by their settings, or as the dictionary says.

    Raises:
        TypeError: something is not an attack.
        ValueError: two attacks have one name, or a name is taken by a column of every table.
    """
    if isinstance(attacks, Attack):
        raise TypeError(f"attacks must be a list of attacks, got one; write [{attacks!r}].")
    given: list[Any] = list(attacks.items()) if isinstance(attacks, Mapping) else [(None, a) for a in attacks]
    named: dict[str, Attack] = {}
    for own_name, attack in given:
        if not isinstance(attack, Attack):
            raise TypeError(
                f"attacks must hold attacks, got {type(attack).__name__}: {attack!r}; write PGD(Linf(0.1))."
            )
        name = attack.name if own_name is None else own_name
        if name in (CLEAN, WORST_CASE):
            raise ValueError(f"attacks must not be called {name!r}, which is a column of its own; choose another name.")
        if name in named:
            raise ValueError(
                f"attacks must have distinct names, but two are called {name!r}: {named[name]!r} and {attack!r}; "
                f"pass a dictionary from names to attacks."
            )
        named[name] = attack
    return named


def settings_of(attack: Attack) -> dict[str, Any]:
    """List the settings of an attack in plain values: kind, norm, eps, and its own fields."""
    own = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack) if f.name != "threat"}
    plain = {
        name: value
        if isinstance(value, (str, int, float, bool, type(None)))
        else getattr(value, "__name__", repr(value))
        for name, value in own.items()
    }
    return {"attack": type(attack).__name__, "norm": attack.threat.norm, "eps": attack.threat.eps, **plain}


def _samples(data: Dataset | tuple[AnyArray, AnyArray], split: str) -> tuple[AnyArray, AnyArray]:
    if isinstance(data, Dataset):
        if split not in ("test", "val", "train"):
            raise ValueError(f"split must be 'test', 'val' or 'train', got {split!r}.")
        x, labels = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
    elif isinstance(data, Sequence) and len(data) == 2:
        x, labels = data
    else:
        raise TypeError(f"data must be a Dataset or a pair (images, labels), got {type(data).__name__}.")
    require_images("images", x)
    require_same_length(images=x, labels=labels)
    return x, labels


def _is_correct(model: Model, x: AnyArray, labels: AnyArray, batch_size: int, name: str) -> Bool[np.ndarray, " n"]:
    logits = []
    for batch in batches(np.arange(len(x)), batch_size):
        logits.append(np.asarray(_logits(model, jnp.asarray(x[batch.places])))[: batch.size])
    all_logits = np.concatenate(logits)
    require_finite(f"logits ({name})", all_logits)
    return all_logits.argmax(axis=1) == np.asarray(labels)


@eqx.filter_jit
def _logits(model: Model, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
    return model(x)
