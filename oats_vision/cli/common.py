"""What the commands share: consoles, and what a directory must be."""

from pathlib import Path
from typing import Any

from rich.console import Console

from oats_vision.errors import CheckpointError


def plain_console(**options: Any) -> Console:
    """A console that shows strings as they are: names, paths and errors may hold `[...]` or `:smile:`."""
    return Console(markup=False, highlight=False, emoji=False, **options)


messages = plain_console(stderr=True)  # progress and warnings; results go to standard output


def results() -> Console:
    """Standard output; wide enough for the tables when it is a file or a pipe."""
    console = plain_console()
    return console if console.is_terminal else plain_console(width=120)


def need_directory(directory: Path) -> None:
    """See that a checkpoint's directory is one.

    Raises:
        CheckpointError: it is missing, or a file.
    """
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist: give the directory of a compressed model")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: give the directory of a compressed model")
