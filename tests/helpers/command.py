"""The command line as a user gives it, in this process: to start another takes seconds, most of them of imports."""

import io
import logging
import os
import runpy
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from oats_vision.cli import ending
from oats_vision.cli.commands import app

HERE = Path(__file__).parent


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `oats-vision` with these arguments and return its status and what it printed."""
    return _run(["oats-vision", *arguments], lambda: ending.run(lambda: app(standalone_mode=False)), cwd or HERE)


def run_script(file: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script as `python FILE ARGUMENTS`, and return its status and what it printed."""
    return _run([file, *arguments], lambda: runpy.run_path(str(file), run_name="__main__"), Path.cwd(), file.parent)


def _run(
    words: Sequence[object], command: Callable[[], object], cwd: Path, *folders: Path
) -> subprocess.CompletedProcess[str]:
    """Call a command in a folder, with these words as its arguments and modules of these folders to import."""
    out, err, status = io.StringIO(), io.StringIO(), None
    with _as_it_was(), redirect_stdout(out), redirect_stderr(err):
        os.chdir(cwd)
        sys.argv, sys.path[:0] = [str(word) for word in words], [str(folder) for folder in folders]
        try:
            command()
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):
                sys.stderr.write(f"{status}\n")
                status = 1
    return subprocess.CompletedProcess(list(map(str, words)), int(status or 0), out.getvalue(), err.getvalue())


def run_process(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, where that is what is tested."""
    command = [sys.executable, "-m", "oats_vision", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or HERE, check=False)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """What a command sets for its process is that of the tests again afterwards."""
    root, ours = logging.root, logging.getLogger("oats_vision")
    before = list(root.handlers), root.level, ours.level, logging.getLoggerClass()
    place, words, path, hooks = Path.cwd(), sys.argv, list(sys.path), (sys.unraisablehook, threading.excepthook)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.chdir(place)
        sys.argv, sys.path[:], (sys.unraisablehook, threading.excepthook) = words, path, hooks
        logging.captureWarnings(False)
        for handler in root.handlers:
            if handler not in before[0]:
                handler.close()
        root.handlers, kind = before[0], before[3]
        root.setLevel(before[1])
        ours.setLevel(before[2])
        logging.setLoggerClass(kind)
