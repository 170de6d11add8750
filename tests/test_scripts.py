"""What scripts share: settings without places, one line for what a user can mend."""

import dataclasses
import sys
from pathlib import Path

import pytest

from ntkadv.scripts import launch, settings_of
from ntkadv.training import DivergenceError


@dataclasses.dataclass(frozen=True)
class Config:
    """A small script."""

    n: int = 3
    """A number."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds."""
    root: Path | None = None
    """Where data lie."""
    output: Path = Path("out")
    """Where results go."""
    overwrite: bool = False
    """Whether old results go."""


def started(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        launch(main, Config, "What it is for.")
    return stopped.value.code


def test_settings_are_all_fields_but_places_and_those_named():
    assert settings_of(Config()) == {"n": 3, "seeds": (0, 1)}
    assert settings_of(Config(), "seeds") == {"n": 3}


@pytest.mark.parametrize(("given", "status"), [(None, None), (0, 0), (1, 1)])
def test_the_status_is_what_the_script_gives(monkeypatch, given, status):
    seen = []

    def main(config):
        seen.append(config.n)
        return given

    assert started(monkeypatch, main, "--n", "5") == status
    assert seen == [5]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("n must be positive"), "ValueError: n must be positive"),
        (FileNotFoundError("no such folder"), "FileNotFoundError: no such folder"),
        (MemoryError("too much"), "MemoryError: too much"),
        (FloatingPointError("inf"), "FloatingPointError: inf"),
        (KeyboardInterrupt(), "Stopped. The same command goes on from here."),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(monkeypatch, error, line):
    def main(config):
        raise error

    assert started(monkeypatch, main) == line


def test_divergence_ends_in_one_line_too(monkeypatch):
    def main(config):
        raise DivergenceError.__new__(DivergenceError, "the loss at step 3 is nan")

    assert str(started(monkeypatch, main)).startswith("DivergenceError: ")


def test_a_fault_of_the_script_keeps_its_traceback(monkeypatch):
    def main(config):
        raise KeyError("a bug")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(KeyError):
        launch(main, Config)


def test_help_describes_the_options(monkeypatch, capsys):
    assert started(monkeypatch, lambda config: None, "--help") == 0
    printed = capsys.readouterr().out
    assert "What it is for." in printed
    assert "Where results go." in printed
