"""The errors that a user can cause and fix; the CLI prints their one line and stops."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class OatsVisionError(Exception):
    """Base of all errors that say what was given, what is allowed and what to do."""


class ConfigError(OatsVisionError, ValueError):
    """A setting is out of range or settings contradict each other."""


class ModelError(OatsVisionError):
    """A model is unknown, cannot be built, or belongs to no supported family."""


class DataError(OatsVisionError):
    """A data source is missing, empty or unreadable."""


class CheckpointError(OatsVisionError):
    """A checkpoint cannot be written or is not a valid checkpoint."""


class RankError(OatsVisionError):
    """Another of the processes that share a run has failed, or is gone."""


@contextmanager
def saying(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Let what stops a run say how to go on, unless it says so already; wrong settings would not help it on.

    Args:
        how_to_go_on: in words that follow a colon; empty if nothing is kept.
    """
    try:
        yield
    except BaseException as stopped:
        wrong = isinstance(stopped, ConfigError) or isinstance(stopped.__cause__, ConfigError)
        if not wrong and not notes(stopped) and (words := how_to_go_on()):
            stopped.__notes__ = [words]  # type: ignore[attr-defined]  # as `add_note` of Python 3.11 does
        raise


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error says, in a line; its class, if it says nothing.

    Args:
        most: characters.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


def notes(error: BaseException) -> list[str]:
    """What is said of an error besides its message."""
    return list(getattr(error, "__notes__", ()))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question after a misspelt word, such as " Did you mean 'row'?"; empty if nothing known is close to it.

    Case counts for nothing, and the closest of at most three words comes first.
    """
    written = {name.lower(): name for name in known}
    *others, last = [repr(written[name]) for name in get_close_matches(word.lower(), written, n=3)] or [""]
    return f" Did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if last else ""


def near(path: str | Path) -> str:
    """A question after a path that does not exist: names close to it in the last of its folders that does."""
    path = Path(path)
    missing = next((part for part in (path, *path.parents) if part.parent.is_dir()), path)
    try:
        names = [entry.name for entry in missing.parent.iterdir()]
    except OSError:  # a folder that may not be read
        return ""
    return did_you_mean(missing.name, names)
