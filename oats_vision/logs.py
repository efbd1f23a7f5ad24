"""Where the messages of a command go: warnings of ours to the console, all that is said to a file."""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from rich.console import Console

from oats_vision import ranks
from oats_vision.errors import ConfigError

KEPT = 10  # log files
SHOWN = {"shown": True}  # `extra` of what the console shows anyway
# Bars that libraries draw, which fill a log file with lines where there is no terminal
_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def folder() -> Path:
    """Where log files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "oats_vision" / "logs"


def start(command: str, console: Console) -> None:
    """Show warnings of this package on the console, and keep everything in a log file of the command's own.

    Messages of other libraries, their handlers and Python's warnings go the same way.

    Args:
        console: the one that progress is drawn on.
    """
    file = folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}-{os.getpid()}.log"
    logging.setLoggerClass(_Library)  # of what is imported from now on
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers = [handler for handler in logger.handlers if not _writes_to_a_stream(handler)]
            logger.propagate = True
    logging.root.handlers = [_Shown(console), _LogFile(file)]
    logging.root.setLevel(logging.INFO)
    logging.getLogger("oats_vision").setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    if not sys.stderr.isatty():
        for name in _BARS:
            os.environ.setdefault(name, "1")


def set_up(verbose: bool = False, log_file: Path | None = None) -> None:
    """Show everything on the console too, or keep it in another file than the command's own.

    Raises:
        ConfigError: the file cannot be written.
    """
    for handler in logging.root.handlers:
        if isinstance(handler, _Shown):
            handler.verbose = verbose
    if log_file is not None:
        try:
            log_file.open("a").close()
        except OSError as problem:
            raise ConfigError(f"`log_file` {log_file} cannot be written: {problem.strerror}") from None
        others = [handler for handler in logging.root.handlers if not isinstance(handler, _LogFile)]
        logging.root.handlers = [*others, _LogFile(log_file)]


@contextmanager
def also_in(file: Path) -> Iterator[Callable[[Path], None]]:
    """Keep all messages in another file too, from INFO on; a disk that is full is no reason to disturb a run.

    Yields:
        Moves the file to another place.
    """
    ours = logging.getLogger("oats_vision")
    level = ours.level
    handler = _RunLog(file)
    handler.begin()
    if ours.getEffectiveLevel() > logging.INFO:
        ours.setLevel(logging.INFO)
    logging.root.addHandler(handler)
    try:
        yield handler.move
    finally:
        logging.root.removeHandler(handler)
        ours.setLevel(level)
        handler.close()


def written() -> Path | None:
    """The log file, if it could be written."""
    return next((file for file in (Path(handler.baseFilename) for handler in _files()) if file.is_file()), None)


class _Shown(logging.Handler):
    """One line a message, above a progress bar if the console has one: warnings of ours, or everything."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.verbose = False

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "shown", False) or not ranks.speaks():
            return
        ours = record.name.partition(".")[0] == "oats_vision"
        if not self.verbose and not (ours and record.levelno >= logging.WARNING):
            return
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        message = f"{record.levelname.lower()}: {self.format(record)}"
        self.console.print(message, style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


class _LogFile(logging.FileHandler):
    """A file that is made at the first message; a full disk or a read-only home is no reason to disturb a run."""

    def __init__(self, file: Path) -> None:
        # names of files may be in no encoding
        super().__init__(file, delay=True, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def _open(self) -> Any:
        file = Path(self.baseFilename)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent == folder():  # and no user's own
            ended = [old for old in sorted(file.parent.glob("*.log")) if not _in_progress(old)]
            for old in ended[: 1 - KEPT]:
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


class _RunLog(_LogFile, WatchedFileHandler):
    """A log file that may be moved, and is made again if it is removed with its folder."""

    def begin(self) -> None:
        """Make the file before there is any message."""
        try:
            self.stream = self._open()
        except OSError:
            self.setLevel(logging.CRITICAL + 1)

    def _open(self) -> Any:
        stream = super()._open()
        self.stream = stream
        self._statstream()  # else it would be taken for another file
        return stream

    def move(self, place: Path) -> None:
        self.acquire()
        try:
            if self.stream is not None:
                self.stream.flush()
            shutil.move(self.baseFilename, place)
            self.baseFilename = str(place.resolve())
        finally:
            self.release()


def _in_progress(file: Path) -> bool:
    """Whether the process that writes a log file, whose number is in its name, is still there."""
    number = file.stem.rpartition("-")[2]
    try:
        os.kill(int(number), 0)
    except PermissionError:
        return True
    except (ValueError, OverflowError, OSError):
        return False
    return True


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
