"""One judge for all: accuracy under attack with intervals, and tables that compare models."""

import dataclasses
import os
import time
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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
from ntkadv._tables import file_name
from ntkadv._typing import AnyArray
from ntkadv.attacks.base import Attack
from ntkadv.attacks.checks import EvaluationWarning, Flag, check_model, check_outcome
from ntkadv.attacks.model import Model, logits_of, num_classes_of
from ntkadv.attacks.search import Cost, batches
from ntkadv.data import Dataset
from ntkadv.report import CLEAN, WORST_CASE, Evaluation, Report, Score
from ntkadv.statistics import require_confidence, wilson_interval

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
    state: str | os.PathLike[str] | None = None,
    check: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Find out which samples a model classifies correctly, as they are and under each attack.

    Every attack runs on all samples, and the images that it returns are judged anew. Its random numbers depend on `key`
    and on its name, not on the other attacks.

    Args:
        model: A function in JAX from images (b, h, w, c) to logits (b, num_classes), see `Attack`.
        data: A data set, or images (n, h, w, c) in [0, 1] and labels (n,).
        attacks: Attacks, told apart by their names; a dictionary gives them other names.
        key: A random key.
        batch_size: Number of images at a time.
        split: Which part of a data set to use.
        keep_adversarial: Keep the attacked images in the result.
        state: A folder for what has been computed, made if need be; a stopped evaluation goes on from there. It serves
            one model; another one, other data or other settings are refused.
        check: Look for signs that the accuracies are not to be trusted, see `check_model` and `check_outcome`. Each is
            an `EvaluationWarning`, and is kept in `Evaluation.flags`.
        progress: Show progress bars.

    Raises:
        TypeError, ValueError: as `Attack` does; and if two attacks share a name, the logits are not finite, or `state`
            holds another evaluation.
    """
    return _evaluate(
        model,
        data,
        attacks,
        key=key,
        batch_size=batch_size,
        split=split,
        keep_adversarial=keep_adversarial,
        state=state,
        check=check,
        progress=progress,
    )


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
    state: str | os.PathLike[str] | None = None,
    check: bool = True,
    info: Mapping[str, Mapping[str, str]] | None = None,
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
        state: A folder for what has been computed, see `evaluate`; each model gets one inside it.
        check: Look for signs that the accuracies are not to be trusted, see `evaluate`.
        info: What else the report's file says of a model, in the words of RobustBench: `architecture`, `venue`, `link`,
            `authors`, ...
        progress: Show progress bars.

    Raises:
        TypeError, ValueError: as `evaluate` does; and if there are no models, or `info` is about another one.
    """
    models = require_models("models", models)
    unknown = [name for name in info or {} if name not in models]
    if unknown:
        raise ValueError(f"info must be about the models {', '.join(map(repr, models))}, got {unknown[0]!r}.")
    require_confidence(confidence)
    key = jax.random.key(0) if key is None else key
    named = name_attacks(attacks)
    evaluations = {}
    for name, model in (bar := tqdm(models.items(), disable=not progress)):
        bar.set_description(name)
        evaluations[name] = _evaluate(
            model,
            data,
            named,
            key=key,
            batch_size=batch_size,
            split=split,
            keep_adversarial=keep_adversarial,
            state=None if state is None else Path(state) / file_name(name),
            check=check,
            progress=progress,
            prefix=f"{name}: ",
        )
    rows = {
        name: {column: dataclasses.replace(score, confidence=confidence) for column, score in evaluation.scores.items()}
        for name, evaluation in evaluations.items()
    }
    return Report(
        rows,
        {name: settings_of(attack) for name, attack in named.items()},
        next(iter(rows.values()))[CLEAN].n,
        confidence,
        evaluations,
        {name: evaluation.flags for name, evaluation in evaluations.items() if evaluation.flags},
        data.name if isinstance(data, Dataset) else None,
        {name: dict(said) for name, said in (info or {}).items()},
    )


def _evaluate(
    model: Model,
    data: Dataset | tuple[AnyArray, AnyArray],
    attacks: Iterable[Attack] | Mapping[str, Attack],
    *,
    key: Key[Array, ""],
    batch_size: int,
    split: Split,
    keep_adversarial: bool,
    state: str | os.PathLike[str] | None,
    check: bool,
    progress: bool,
    prefix: str = "",
) -> Evaluation:
    """As `evaluate`; `prefix` begins each warning."""
    x, labels = samples_of(data, split)
    named = name_attacks(attacks)
    require_key("key", key)
    require_int("batch_size", batch_size, minimum=1)
    require_labels("labels", labels, num_classes_of(model, x))
    batch_size = min(batch_size, len(x))
    folder = None if state is None else Path(state)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    correct = {CLEAN: is_correct(model, x, labels, batch_size, CLEAN)}
    seconds = {CLEAN: time.perf_counter() - start}
    result = Evaluation(correct, seconds, {} if keep_adversarial else None, {CLEAN: Cost(0, len(x))})
    if check:
        _flag(result, check_model(model, x, labels, batch_size=batch_size), prefix)
    for name, attack in named.items():
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EvaluationWarning)
            attacked = attack.run(
                model,
                x,
                labels,
                key=jax.random.fold_in(key, zlib.crc32(name.encode())),
                batch_size=batch_size,
                state_path=None if folder is None else folder / f"{file_name(name)}.npz",
                progress=progress,
            )
        correct[name] = is_correct(model, attacked.points, labels, batch_size, name)
        seconds[name] = time.perf_counter() - start
        result.costs[name] = attacked.cost
        result.logs[name] = attacked.log
        result.fell_to[name] = attacked.fell_to
        if result.adversarial is not None:
            result.adversarial[name] = np.asarray(attacked.points)
    if check:
        under_attack = {name: correct[name] for name in named}
        _flag(result, check_outcome(under_attack, named, result.fell_to), prefix)
    return result


def _flag(result: Evaluation, flags: list[Flag], prefix: str) -> None:
    """Keep flags, and warn of them where `evaluate` or `compare` was called."""
    for flag in flags:
        result.flags.append(flag)
        warnings.warn(prefix + flag.message, EvaluationWarning, stacklevel=4)


def require_models(name: str, models: Mapping[str, Model]) -> dict[str, Model]:
    """Require a dictionary with one model at least."""
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f'{name} must be a dictionary with at least one model by name, got {models!r}; {{"NTK": f}}.')
    return dict(models)


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
    """List the settings of an attack in plain values: kind, the name it gives itself, norm, eps, and its own fields."""
    own = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack) if f.name != "threat"}
    plain = {
        name: value
        if isinstance(value, (str, int, float, bool, type(None)))
        else getattr(value, "__name__", repr(value))
        for name, value in own.items()
    }
    threat = {"norm": attack.threat.norm, "eps": attack.threat.eps}
    return {"attack": type(attack).__name__, "name": attack.name, **threat, **plain}


def samples_of(data: Dataset | tuple[AnyArray, AnyArray], split: str) -> tuple[AnyArray, AnyArray]:
    """Images and labels of one part of a data set, or of a pair."""
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


def is_correct(model: Model, x: AnyArray, labels: AnyArray, batch_size: int, name: str) -> Bool[np.ndarray, " n"]:
    """Whether the model classifies each image correctly; `name` says in an error what the images are.

    Raises:
        ValueError: the logits are not finite.
    """
    logits = all_logits(model, x, batch_size)
    require_finite(f"logits ({name})", logits)
    return logits.argmax(axis=1) == np.asarray(labels)


def all_logits(model: Model, x: AnyArray, batch_size: int) -> Float[np.ndarray, "n classes"]:
    """Logits of all images, batch by batch, by one compiled program."""
    parts = [
        np.asarray(logits_of(model, jnp.asarray(x[batch.places])))[: batch.size]
        for batch in batches(np.arange(len(x)), batch_size)
    ]
    return np.concatenate(parts)
