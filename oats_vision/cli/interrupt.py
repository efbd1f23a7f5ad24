"""How signals end a command: as errors do, so that temporary files are removed, and in one line."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from oats_vision import ranks
from oats_vision.errors import notes


def guarded(command: Callable[[], object]) -> None:
    """Call a command; SIGINT, SIGTERM and SIGHUP end it in one line, with the status that shells give them.

    The line says how to go on, if what was stopped has noted that.
    """
    received: list[int] = []
    said: list[str] = []
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
    try:
        command()
    except BaseException as stopped:  # what is cut short may fail in any way
        if not received:
            raise
        said += notes(stopped)
    if received:
        if ranks.speaks():
            sys.stderr.write(": ".join([f"stopped by {signal.Signals(received[0]).name}", *said[:1]]) + "\n")
        sys.exit(128 + received[0])
