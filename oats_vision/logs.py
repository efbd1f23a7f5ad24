"""Where the messages of a command go: warnings of ours to the console, all that is said to a file."""

import logging
import os
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

KEPT = 10  # log files
# Bars that libraries draw, which fill a log file with lines where there is no terminal
_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def folder() -> Path:
    """Where log files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "oats_vision" / "logs"


def new_file(command: str) -> Path:
    """A name for the log of a command that starts now."""
    return folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}-{os.getpid()}.log"


def set_up(verbose: bool = False, log_file: Path | None = None, console: Console | None = None) -> None:
    """Show warnings of this package on the console, and keep everything in the log file, if there is one.

    Messages of other libraries, their handlers and Python's warnings go the same way. May be called again.

    Args:
        verbose: show everything on the console too.
        log_file: made at the first message; the file of an earlier call is kept if None. Where it cannot be written,
            nothing is.
        console: the one that progress is drawn on; standard error if None.
    """
    shown = _Shown(console or Console(stderr=True))
    if not verbose:
        shown.addFilter(lambda record: record.levelno >= logging.WARNING and _is_ours(record))
    handlers: list[logging.Handler] = [shown, *([_LogFile(log_file)] if log_file else _files())]
    logging.setLoggerClass(_Library)  # of what is imported from now on
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers = [handler for handler in logger.handlers if not _writes_to_a_stream(handler)]
            logger.propagate = True
    logging.root.handlers = handlers
    logging.root.setLevel(logging.INFO)
    logging.getLogger("oats_vision").setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    if not verbose and not sys.stderr.isatty():
        for name in _BARS:
            os.environ.setdefault(name, "1")


def written() -> Path | None:
    """The log file, if it could be written."""
    return next((file for file in (Path(handler.baseFilename) for handler in _files()) if file.is_file()), None)


class _Shown(logging.Handler):
    """One line a message, above a progress bar if the console has one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        message = f"{record.levelname.lower()}: {self.format(record)}"
        self.console.print(message, style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


class _LogFile(logging.FileHandler):
    """A file that is made at the first message; a full disk or a read-only home is no reason to disturb a run."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, delay=True, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def _open(self) -> Any:
        file = Path(self.baseFilename)
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in sorted(file.parent.glob("*.log"))[: 1 - KEPT]:
            old.unlink(missing_ok=True)
        stream = super()._open()
        stream.write(f"oats_vision {version('oats_vision')}: {' '.join(sys.argv)}\n")
        return stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, on what was not written yet
            super().close()


class _Library(logging.Logger):
    """A logger that passes on what it is told: libraries give theirs handlers, and everything is said twice."""

    @property
    def propagate(self) -> bool:
        return True

    @propagate.setter
    def propagate(self, value: bool) -> None:
        pass

    def addHandler(self, handler: logging.Handler) -> None:
        if not _writes_to_a_stream(handler):
            super().addHandler(handler)


def _writes_to_a_stream(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def _files() -> list[logging.FileHandler]:
    return [handler for handler in logging.root.handlers if isinstance(handler, _LogFile)]


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == "oats_vision"
