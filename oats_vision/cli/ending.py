"""How a command ends: done, an error in one line, or a bug of ours in one line."""

import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import typer

from oats_vision import logs, ranks
from oats_vision.cli.common import messages
from oats_vision.cli.flags import options_of, with_flags
from oats_vision.errors import OatsVisionError, did_you_mean, notes, one_line
from oats_vision.files import NO_SPACE

log = logging.getLogger(__name__)

_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
UsageError: Any = typer.BadParameter.__base__  # of the click that typer brings
BUG = 70  # exit status of an error that is ours, EX_SOFTWARE of sysexits.h; 2 is that of a wrong flag


def run(command: Callable[[], object]) -> None:
    """Run a command and exit with its status; messages go to the console and to a log file of its own."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that the terminal's encoding does not have
    logs.start("-".join(word for word in sys.argv[1:3] if word.isidentifier()) or "help", messages)
    for handler in logging.root.handlers:
        handler.addFilter(_in_flags)
    sys.unraisablehook = _unraisable
    threading.excepthook = _unraisable
    number = status(command)
    if ranks.launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all ranks once one has ended, and this one does
    sys.exit(number)


def status(command: Callable[[], object]) -> Any:
    """Run a command, say in one line why it failed, and return its exit status: 1, of wrong flags 2, of a bug 70.

    The log file has the traceback.
    """
    try:
        return command()
    except UsageError as error:
        return _failed(_usage(error), status=2)
    except BrokenPipeError:  # the reader of a pipe had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OatsVisionError as error:
        log.debug("traceback", exc_info=True)
        # what is not ours may need more words
        return _failed(_noted(str(error), error), with_details=error.__cause__ is not None)
    except Exception as error:
        log.debug("traceback", exc_info=True)
        message = _of_the_machine(error)
        if message:
            return _failed(_noted(message, error), with_details=True)
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        report = "please report it with the output of `oats-vision doctor` and the log"
        return _failed(_noted(f"this is a bug in oats_vision ({what}): {report}", error), with_details=True, status=BUG)


def _of_the_machine(error: Exception) -> str | None:
    """What is said of an error that no code can fix: no memory, no space, no permission."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's, on a GPU
        return f"out of memory: use a smaller --batch-size or another --device ({one_line(error, 200)})"
    if isinstance(error, OSError) and error.errno in NO_SPACE + _NO_PERMISSION:
        what = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
        space = "free some space, or set TMPDIR and --out to another disk"
        return f"{what}: {space if error.errno in NO_SPACE else 'give a place that can be written'}"
    return None


def _noted(message: str, error: Exception) -> str:
    """The message, and how to go on if that was noted."""
    return ". ".join([message, *(f"{note[:1].upper()}{note[1:]}" for note in notes(error)[:1])])


def _failed(message: str, *, with_details: bool = False, status: int = 1) -> int:
    if not ranks.speaks():
        return status
    file = logs.written() if with_details else None
    details = f" (details: {file})" if file else ""
    sys.stderr.write(f"error: {' '.join(with_flags(message, _options()).split())}{details}\n")
    return status


def _usage(error: Any) -> str:
    """What is wrong with the command's words, and where help is."""
    message = error.format_message().rstrip(".")
    if hasattr(error, "option_name") and (possible := error.possibilities):
        message = f"No such option: {error.option_name}.{did_you_mean(error.option_name, possible)}"
    command = error.ctx.command_path if error.ctx else "oats-vision"
    return f"{message[:1].lower()}{message[1:]}{'.' * (not message.endswith('?'))} See {command} --help"


def _options() -> frozenset[str] | None:
    """The names of the options of the command that is running."""
    from oats_vision.cli.commands import app

    return options_of(sys.argv[1:], typer.main.get_command(app))


def _in_flags(record: logging.LogRecord) -> bool:
    """Let a message name flags too."""
    if record.name.startswith("oats_vision") and "`" in (message := record.getMessage()):
        record.msg, record.args = with_flags(message, _options()), ()
    return True


def _unraisable(about: Any) -> None:
    """What fails where nobody can catch it, as in a thread or while objects are dropped at the end."""
    log.debug("ignored: %s", about.exc_value, exc_info=(about.exc_type, about.exc_value, about.exc_traceback))
