"""What results of all kinds share: tables for terminals, Markdown and CSV, and answers of each sample in JSON."""

import csv
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


def build_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, narrow: bool) -> Table:
    """Build a table of a first column of names and others of numbers; `Text`, lest brackets be read as markup."""
    table = Table(caption=Text(caption, style="table.caption"), caption_justify="left", show_lines=narrow)
    table.add_column(Text(head[0]), style="bold", no_wrap=not narrow)
    for column in head[1:]:
        table.add_column(Text(column), justify="right", no_wrap=not narrow)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def fitting(console: Console, options: ConsoleOptions, wide: Table, narrow: Table) -> Iterator[Table]:
    """Give the wide table where it fits, else the narrow one."""
    needed = Measurement.get(console, options.update(max_width=10_000), wide).maximum
    yield wide if needed <= options.max_width else narrow


def as_text(renderable: Any) -> str:
    """Print to a string, however wide, with no terminal codes."""
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None, force_terminal=False).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Write a table in Markdown, and a list of notes below it."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def write_csv(path: str | Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table of values separated by commas, in the long format."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def pack(answers: Bool[np.ndarray, " n"]) -> str:
    """Eight answers in two hexadecimal digits."""
    return np.packbits(answers).tobytes().hex()


def unpack(digits: str, n: int) -> Bool[np.ndarray, " n"]:
    """Read what `pack` wrote.

    Raises:
        ValueError: it is not of n answers.
    """
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
    if len(packed) != -(-n // 8):
        raise ValueError(f"the answers must be of {n} samples, got {len(digits)} hexadecimal digits; they are damaged.")
    return np.unpackbits(packed, count=n).astype(bool)


def file_name(name: str) -> str:
    """Make a file name of any name, another one for each."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40]
    return f"{plain or 'unnamed'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
