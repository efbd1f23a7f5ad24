"""How signals end a command: as errors do, so that temporary files are removed, and in one line."""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from oats_vision import ranks
from oats_vision.errors import notes

GRACE = 0.3  # seconds from a signal to one process of a group until all have it


def guarded(command: Callable[[], object]) -> None:
    """Call a command; SIGINT, SIGTERM and SIGHUP end it in one line, with the status that shells give them.

    The line says how to go on, if what was stopped has noted that.
    """
    received: list[int] = []
    said: list[str] = []
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if os.getpid() != process:  # a worker, which the same keys reach: the main process ends it
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        signal.signal(number, signal.SIG_DFL)  # a second one is not waited for
        raise SystemExit(128 + number)

    def in_a_worker() -> None:
        """What fails in its threads because others were stopped is not told; the signal may come to it last."""
        usual = sys.excepthook

        def tell(*error: Any) -> None:
            time.sleep(GRACE)
            if not received:
                usual(*error)

        sys.excepthook = tell

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=in_a_worker)
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
