"""Scores with intervals and costs, and the table of them that compares models under attack."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console, ConsoleOptions
from rich.table import Table

from ntkadv._tables import as_text, build_table, fitting, markdown, pack, unpack, write_csv
from ntkadv.attacks.checks import Flag
from ntkadv.attacks.search import Cost
from ntkadv.statistics import McNemar, mcnemar, require_confidence, wilson_interval

__all__ = ["CLEAN", "WORST_CASE", "Evaluation", "Report", "Score", "require_confidence", "wilson_interval"]

CLEAN = "clean"
WORST_CASE = "worst case"


@dataclasses.dataclass(frozen=True)
class Score:
    """Number of samples, of `n`, that were classified correctly, and what it took to find out.

    `low` and `high` are the ends of the Wilson interval of the accuracy, see `wilson_interval`; `cost` counts passes
    through the model over all samples, None if it is not known.
    """

    correct: int
    n: int
    seconds: float
    confidence: float = 0.95
    cost: Cost | None = None

    @property
    def accuracy(self) -> float:
        """Fraction of correct samples."""
        return self.correct / self.n

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return wilson_interval(self.correct, self.n, self.confidence)[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return wilson_interval(self.correct, self.n, self.confidence)[1]

    @property
    def in_two_lines(self) -> str:
        """Accuracy, and below it the interval in short."""
        return f"{self.accuracy:.3f}\n{self.low:.2f}-{self.high:.2f}"

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model did on each sample.

    Attributes:
        correct: Whether each sample is classified correctly, for `"clean"` and for every attack by name.
        seconds: Wall time of each, measured when the device had finished, compilation included; of an evaluation that
            went on from its state, the last part only.
        adversarial: The attacked images by name of the attack, if they were asked for.
        costs: Passes through the model for each, over all samples.
        logs: What each attack did stage by stage, see `Attacked`.
        fell_to: For each attack, what broke each sample, see `Attacked`; not written to JSON.
        flags: Signs that the accuracies are not to be trusted.
    """

    correct: dict[str, Bool[np.ndarray, " n"]]
    seconds: dict[str, float]
    adversarial: dict[str, Float[np.ndarray, "n h w c"]] | None = None
    costs: dict[str, Cost] = dataclasses.field(default_factory=dict)
    logs: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    fell_to: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    flags: list[Flag] = dataclasses.field(default_factory=list)

    @property
    def worst_case(self) -> Bool[np.ndarray, " n"]:
        """Whether each sample is classified correctly as it is and under every attack."""
        return np.logical_and.reduce(list(self.correct.values()))

    @property
    def answers(self) -> dict[str, Bool[np.ndarray, " n"]]:
        """Whether each sample is classified correctly: `correct`, and `"worst case"`."""
        return {**self.correct, WORST_CASE: self.worst_case}

    @property
    def scores(self) -> dict[str, Score]:
        """Scores for `"clean"`, every attack, and `"worst case"`."""
        seconds = {**self.seconds, WORST_CASE: sum(self.seconds.values())}
        costs: dict[str, Cost | None] = {name: self.costs.get(name) for name in self.correct}
        known = [cost for cost in costs.values() if cost is not None]
        if len(known) == len(costs):
            costs[WORST_CASE] = Cost(sum(cost.gradients for cost in known), sum(cost.forwards for cost in known))
        return {
            name: Score(int(answer.sum()), len(answer), seconds[name], cost=costs.get(name))
            for name, answer in self.answers.items()
        }

    def accuracy(self, name: str = CLEAN) -> float:
        """Accuracy for `"clean"`, an attack by its name, or `"worst case"`."""
        if name not in self.scores:
            raise ValueError(f"name must be one of {', '.join(map(repr, self.scores))}, got {name!r}.")
        return self.scores[name].accuracy


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores of several models under the same attacks; printed as a table.

    Attributes:
        rows: Scores by model and by attack; the first is `"clean"`, the last `"worst case"`.
        attacks: Settings of each attack by name: kind, the name it gives itself, norm, eps and the rest.
        n: Number of samples.
        confidence: Level of the intervals that are shown.
        evaluations: Answers for each sample by model.
        flags: Signs that accuracies are not to be trusted, by model.
        dataset: Name of the data set, if it has one.
        info: What was said of each model: `architecture`, `venue`, `link`, `authors`, ...
    """

    rows: dict[str, dict[str, Score]]
    attacks: dict[str, dict[str, Any]]
    n: int
    confidence: float = 0.95
    evaluations: dict[str, Evaluation] | None = dataclasses.field(default=None, compare=False, repr=False)
    flags: dict[str, list[Flag]] = dataclasses.field(default_factory=dict)
    dataset: str | None = None
    info: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """`"clean"`, the attacks, and `"worst case"`."""
        return [CLEAN, *self.attacks, WORST_CASE]

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(self.rows)

    def cell(self, model: str, column: str = WORST_CASE) -> Score:
        """Score of a model in one column of the table.

        Raises:
            ValueError: there is no such model or column.
        """
        self._require(model=model, column=column)
        return self.rows[model][column]

    def paired(self, first: str, second: str, column: str = WORST_CASE) -> McNemar:
        """Compare two models on the same samples, see `mcnemar`.

        Raises:
            ValueError: there is no such model or column, or the answers for each sample are not known.
        """
        self._require(first=first, second=second, column=column)
        if self.evaluations is None:
            raise ValueError(
                "the report must hold the answers for each sample, but it was read from a file without them; "
                "evaluate the models again."
            )
        ours, theirs = (self.evaluations[model].answers[column] for model in (first, second))
        return mcnemar(ours, theirs, self.confidence)

    @property
    def threats(self) -> list[tuple[str, float]]:
        """Norm and eps of each threat model, each once."""
        return list(dict.fromkeys((attack["norm"], attack["eps"]) for attack in self.attacks.values()))

    @property
    def caption(self) -> str:
        """What the numbers are: samples, level of the intervals, and threat models."""
        return f"Accuracy on {self.n} images with {100 * self.confidence:g}% intervals" + "".join(
            f"; {norm} eps = {eps:.4g}" for norm, eps in self.threats
        )

    @property
    def notes(self) -> list[str]:
        """A line for each flag, with the name of the model."""
        return [f"{model}: {flag.message}" for model, flags in self.flags.items() for flag in flags]

    def to_markdown(self) -> str:
        """Write the table in Markdown, the flags below it."""
        return markdown(["model", *self.columns], self._cells(), self.notes)

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each model and column; gradients and forwards are counted over all samples."""
        head = ["model", "column", "accuracy", "low", "high", "n", "seconds", "gradients", "forwards", "norm", "eps"]
        lines = []
        for model, scores in self.rows.items():
            for column, score in scores.items():
                gradients, forwards = ("", "") if score.cost is None else score.cost
                norm, eps = self._threat_of(column)
                numbers = [score.accuracy, score.low, score.high, score.n, score.seconds, gradients, forwards]
                lines.append([model, column, *numbers, norm, eps])
        write_csv(path, head, lines)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values that JSON can hold; `Report.from_dict` is the way back.

        The entries of `"models"` have the keys, and the percentages as strings, of RobustBench's `model_info`; `"rows"`
        has the rest, with a bit for each sample, packed as hexadecimal digits.
        """
        return {
            "n": self.n,
            "confidence": self.confidence,
            "dataset": self.dataset,
            "attacks": self.attacks,
            "models": {model: self._model_info(model) for model in self.models},
            "info": self.info,
            "rows": {
                model: {column: self._plain_cell(model, column, score) for column, score in scores.items()}
                for model, scores in self.rows.items()
            },
            "flags": {model: [flag._asdict() for flag in flags] for model, flags in self.flags.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Read what `to_dict` writes, or wrote when it knew nothing of costs, flags and single samples.

        Raises:
            ValueError: an entry is missing, or does not fit the others.
        """
        try:
            n, confidence = values["n"], values["confidence"]
            rows = {
                model: {c: _read_score(score, n, confidence) for c, score in scores.items()}
                for model, scores in values["rows"].items()
            }
            flags = {model: [Flag(**flag) for flag in found] for model, found in values.get("flags", {}).items()}
            return cls(
                rows,
                {name: dict(a) for name, a in values["attacks"].items()},
                n,
                confidence,
                _read_evaluations(values["rows"], rows, flags),
                flags,
                values.get("dataset"),
                {model: dict(said) for model, said in values.get("info", {}).items()},
            )
        except KeyError as error:
            raise ValueError(f"values must be what Report.to_dict gives, but {error} is missing.") from error

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "Report":
        """Read the file that `to_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Show one line a model, or, where that does not fit, the intervals below the accuracies."""
        caption, head = "\n".join([self.caption, *self.notes]), ["model", *self.columns]
        wide, narrow = (build_table(head, self._cells(narrow=n), caption, narrow=n) for n in (False, True))
        yield from fitting(console, options, wide, narrow)

    def __str__(self) -> str:
        return as_text(self)

    def _cells(self, *, narrow: bool = False) -> list[list[str]]:
        return [
            [model, *(score.in_two_lines if narrow else str(score) for score in map(scores.__getitem__, self.columns))]
            for model, scores in self.rows.items()
        ]

    def _require(self, **given: str) -> None:
        for argument, value in given.items():
            known = self.columns if argument == "column" else self.models
            if value not in known:
                raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {value!r}.")

    def _threat_of(self, column: str) -> tuple[str, float | str]:
        """Norm and eps of a column, empty for `"clean"` and where attacks of several threat models meet."""
        if column in self.attacks:
            return self.attacks[column]["norm"], self.attacks[column]["eps"]
        return self.threats[0] if column == WORST_CASE and len(self.threats) == 1 else ("", "")

    def _model_info(self, model: str) -> dict[str, str]:
        """Describe a model as RobustBench does, as far as the attacks leave no doubt.

        Only the standard AutoAttack with its published budgets has no more in its name than that.
        """
        entry = {"name": model} | ({} if self.dataset is None else {"dataset": self.dataset})
        complete = [name for name, attack in self.attacks.items() if attack.get("name", name) == "AutoAttack"]
        chosen = complete[0] if len(complete) == 1 else WORST_CASE
        norm, eps = self._threat_of(chosen)
        if norm:
            entry |= {"threat_model": norm, "eps": _as_fraction(float(eps))}
        entry["clean_acc"] = f"{100 * self.cell(model, CLEAN).accuracy:.2f}"
        if chosen != WORST_CASE:
            entry["autoattack_acc"] = f"{100 * self.cell(model, chosen).accuracy:.2f}"
        return entry | self.info.get(model, {})

    def _plain_cell(self, model: str, column: str, score: Score) -> dict[str, Any]:
        cell: dict[str, Any] = {
            "correct": score.correct,
            "accuracy": score.accuracy,
            "interval": [score.low, score.high],
            "seconds": score.seconds,
        }
        if score.cost is not None:
            cell |= score.cost._asdict()
        if self.evaluations is not None and column != WORST_CASE:
            cell["bits"] = pack(self.evaluations[model].correct[column])
            cell["log"] = self.evaluations[model].logs.get(column, [])
        return cell


def _as_fraction(eps: float) -> str:
    """As RobustBench writes it: 8/255, or 0.5."""
    steps = round(255 * eps)
    return f"{steps}/255" if 0 < steps <= 32 and abs(steps / 255 - eps) < 1e-6 else f"{eps:g}"


def _read_score(cell: Mapping[str, Any], n: int, confidence: float) -> Score:
    cost = Cost(cell["gradients"], cell["forwards"]) if "gradients" in cell else None
    return Score(cell["correct"], n, cell["seconds"], confidence, cost)


def _read_evaluations(
    cells: Mapping[str, Any], rows: dict[str, dict[str, Score]], flags: dict[str, list[Flag]]
) -> dict[str, Evaluation] | None:
    """Answers of each sample, if they were written.

    Raises:
        ValueError: they are not those that were counted.
    """
    evaluations = {}
    for model, scores in rows.items():
        columns = {column: score for column, score in scores.items() if column != WORST_CASE}
        if any("bits" not in cells[model][column] for column in columns):
            return None
        correct = {column: unpack(cells[model][column]["bits"], score.n) for column, score in columns.items()}
        for column, answers in correct.items():
            if answers.sum() != scores[column].correct:
                raise ValueError(
                    f"the answers of {model!r} under {column!r} must be {scores[column].correct} right ones, got "
                    f"{answers.sum()}; the file is damaged."
                )
        evaluations[model] = Evaluation(
            correct,
            {column: score.seconds for column, score in columns.items()},
            costs={column: score.cost for column, score in columns.items() if score.cost is not None},
            logs={column: log for column in columns if (log := cells[model][column].get("log"))},
            flags=flags.get(model, []),
        )
    return evaluations
