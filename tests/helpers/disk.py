"""A disk that is full soon: a small tmpfs where this process may mount one, else a limit on the size of its files."""

import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Make a folder that has room for so many bytes; what is yielded makes room.

    Where nothing can be mounted, no single file of this process may be larger.
    """
    folder.mkdir()
    if _mount(f"size={size},mode=755", folder):
        try:
            yield lambda: None if _mount("remount,size=1g", folder) else pytest.fail("the disk stays small")
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
        return
    (soft, hard), handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def _mount(options: str, folder: Path) -> bool:
    try:
        command = ["mount", "-t", "tmpfs", "-o", options, "small", folder]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
