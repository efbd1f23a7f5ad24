"""How a command ends: done, an error in one line, a bug of ours, or stopped by a signal."""

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import typer

from oats_vision import logs
from oats_vision.cli.common import notes
from oats_vision.errors import OatsVisionError

log = logging.getLogger(__name__)

BUG = 70  # exit status of an error that is ours, EX_SOFTWARE of sysexits.h; 2 is that of a wrong flag


def run(command: Callable[[], object]) -> None:
    """Run a command to one of its ends.

    An error of the user's is one line on standard error and exit status 1. A signal is one line and the status that
    shells give it, after temporary files are removed. The log file has the traceback of either.
    """
    received: list[int] = []
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker, which the same keys reach: the main process ends it
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one is not waited for
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    name = "-".join(word for word in sys.argv[1:3] if word.isidentifier()) or "help"
    logs.set_up(log_file=logs.new_file(name), console=notes)
    sys.unraisablehook = _unraisable
    threading.excepthook = _unraisable
    try:
        status = _status(command)
    except BaseException:  # a signal can come while anything is done, and end in any error
        if not received:
            raise
        status = 1
    if received:
        typer.echo(f"stopped by {signal.Signals(received[0]).name}", err=True)
        status = 128 + received[0]
    sys.exit(status)


def _status(command: Callable[[], object]) -> Any:
    """Run the command, say why it failed, and return its exit status."""
    try:
        command()
    except SystemExit as end:
        return end.code
    except OatsVisionError as error:
        log.debug("traceback", exc_info=True)
        # what is not ours may need more words
        return _failed(str(error), with_details=error.__cause__ is not None)
    except MemoryError as error:
        return _out_of_memory(error)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, on a GPU
            return _out_of_memory(error)
        log.debug("traceback", exc_info=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            where = f"{error.filename}: " if error.filename else ""
            return _failed(f"{where}{error.strerror}: free some space, or write to another place", with_details=True)
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        report = "report it with the output of `oats-vision doctor` and the log"
        return _failed(f"this is a bug in oats_vision ({what}): please {report}", with_details=True) and BUG
    return 0


def _failed(message: str, *, with_details: bool = False) -> int:
    file = logs.written() if with_details else None
    details = f" (details: {file})" if file else ""
    typer.echo(f"error: {' '.join(message.split())}{details}", err=True)
    return 1


def _out_of_memory(error: BaseException) -> int:
    log.debug("traceback", exc_info=True)
    reason = " ".join(str(error).split())[:200]
    return _failed(f"out of memory: use a smaller --batch-size or another --device {reason}")


def _unraisable(about: Any) -> None:
    """What fails where nobody can catch it, as in a thread or while objects are dropped at the end."""
    log.debug("ignored: %s", about.exc_value, exc_info=(about.exc_type, about.exc_value, about.exc_traceback))
