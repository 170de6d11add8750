"""Proportions with intervals, and the table of them that compares models under attack."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from scipy.special import ndtri

from ntkadv._checks import require_int, require_nonnegative

CLEAN = "clean"
WORST_CASE = "worst case"


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Give the Wilson score interval of a proportion.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    with :math:`\hat p` = successes/n and z the normal quantile at (1 + confidence)/2.

    Raises:
        ValueError: there are no trials, more successes than trials, or `confidence` is not between 0 and 1.

    Source: Wilson, Journal of the American Statistical Association 22 (1927).
    """
    require_int("n", n, minimum=1)
    require_int("successes", successes, minimum=0)
    if successes > n:
        raise ValueError(f"successes must be at most n, got {successes} of {n}.")
    require_confidence(confidence)
    p, z = successes / n, float(ndtri((1 + confidence) / 2))
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


@dataclasses.dataclass(frozen=True)
class Score:
    """Number of samples, of `n`, that were classified correctly, and the time it took to find out.

    `low` and `high` are the ends of the Wilson interval of the accuracy, see `wilson_interval`.
    """

    correct: int
    n: int
    seconds: float
    confidence: float = 0.95

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
        seconds: Wall time of each, measured when the device had finished, compilation included.
        adversarial: The attacked images by name of the attack, if they were asked for.
    """

    correct: dict[str, Bool[np.ndarray, " n"]]
    seconds: dict[str, float]
    adversarial: dict[str, Float[np.ndarray, "n h w c"]] | None = None

    @property
    def worst_case(self) -> Bool[np.ndarray, " n"]:
        """Whether each sample is classified correctly as it is and under every attack."""
        return np.logical_and.reduce(list(self.correct.values()))

    @property
    def scores(self) -> dict[str, Score]:
        """Scores for `"clean"`, every attack, and `"worst case"`."""
        answers = {**self.correct, WORST_CASE: self.worst_case}
        seconds = {**self.seconds, WORST_CASE: sum(self.seconds.values())}
        return {name: Score(int(answer.sum()), len(answer), seconds[name]) for name, answer in answers.items()}

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
        attacks: Settings of each attack by name: kind, norm, eps and the rest.
        n: Number of samples.
        confidence: Level of the intervals that are shown.
        evaluations: Answers for each sample by model; not written to JSON.
    """

    rows: dict[str, dict[str, Score]]
    attacks: dict[str, dict[str, Any]]
    n: int
    confidence: float = 0.95
    evaluations: dict[str, Evaluation] | None = dataclasses.field(default=None, compare=False, repr=False)

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
        for argument, value, known in (("model", model, self.models), ("column", column, self.columns)):
            if value not in known:
                raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {value!r}.")
        return self.rows[model][column]

    @property
    def caption(self) -> str:
        """What the numbers are: samples, level of the intervals, and threat models."""
        threats = dict.fromkeys(f"{a['norm']} eps = {a['eps']:.4g}" for a in self.attacks.values())
        return f"Accuracy on {self.n} images with {100 * self.confidence:g}% intervals" + "".join(
            f"; {threat}" for threat in threats
        )

    def to_markdown(self) -> str:
        """Write the table in Markdown."""
        head = ["model", *self.columns]
        lines = [head, ["---", *("---:" for _ in self.columns)], *self._cells()]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values that JSON can hold; `Report.from_dict` is the way back."""
        return {
            "n": self.n,
            "confidence": self.confidence,
            "attacks": self.attacks,
            "rows": {
                model: {
                    column: {
                        "correct": score.correct,
                        "accuracy": score.accuracy,
                        "interval": [score.low, score.high],
                        "seconds": score.seconds,
                    }
                    for column, score in scores.items()
                }
                for model, scores in self.rows.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: an entry is missing.
        """
        try:
            n, confidence = values["n"], values["confidence"]
            rows = {
                model: {c: Score(score["correct"], n, score["seconds"], confidence) for c, score in scores.items()}
                for model, scores in values["rows"].items()
            }
            return cls(rows, {name: dict(a) for name, a in values["attacks"].items()}, n, confidence)
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
        wide = self._table(narrow=False)
        needed = Measurement.get(console, options.update(max_width=10_000), wide).maximum
        yield wide if needed <= options.max_width else self._table(narrow=True)

    def _table(self, *, narrow: bool) -> Table:
        """Build the table; names are `Text`, lest brackets in them be read as markup."""
        table = Table(caption=self.caption, caption_justify="left", show_lines=narrow)
        table.add_column("model", style="bold", no_wrap=not narrow)
        for column in self.columns:
            table.add_column(Text(column), justify="right", no_wrap=not narrow)
        for model in self.models:
            scores = [self.cell(model, column) for column in self.columns]
            table.add_row(Text(model), *(Text(score.in_two_lines if narrow else str(score)) for score in scores))
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=10_000, color_system=None, force_terminal=False).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _cells(self) -> list[list[str]]:
        return [[model, *(str(self.cell(model, column)) for column in self.columns)] for model in self.models]


def require_confidence(confidence: float) -> None:
    """Require a level strictly between 0 and 1."""
    require_nonnegative("confidence", confidence, strict=True)
    if confidence >= 1:
        raise ValueError(f"confidence must be below 1, got {confidence}; write 95% as 0.95.")
