"""What scripts share: which settings results depend on, and how a script begins and ends.

The package itself does not import this module.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from ntkadv.training import DivergenceError

__all__ = ["launch", "settings_of"]

_PLACES = ("root", "output", "overwrite")

Config = TypeVar("Config")


def settings_of(config: Any, *without: str) -> dict[str, Any]:
    """Give the fields of a dataclass that results depend on: all but the places of files, and those named."""
    left_out = (*_PLACES, *without)
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}


def launch(main: Callable[[Config], int | None], config: type[Config], description: str | None = None) -> NoReturn:
    """Read a configuration from the command line, run a script with it, and end.

    What a user can mend ends in one line, without a traceback: bad input, files and memory that are not to be had,
    training that diverges. So does an interruption.

    Args:
        main: The script; what it gives is the exit status.
        config: A dataclass, one option a field.
        description: What `--help` says first; the docstring of the dataclass by default.
    """
    import tyro

    try:
        sys.exit(main(tyro.cli(config, description=description)))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")
    except (ValueError, OSError, MemoryError, FloatingPointError, DivergenceError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
