"""Files that are never left half-written, and are on the disk before anything is built on them."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file beside `file` that takes its place at the end, or is gone after an error.

    A link is replaced and not followed: in a folder from a stranger it may lead anywhere.

    Raises:
        OSError: the folder is missing or not writable, what is there is a device or the like, or the disk is full.
    """
    if file.exists() and not (file.is_file() or file.is_symlink()):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def at_home(path: Path) -> Path:
    """The path with its ~ followed, where there is such a home: shells leave that of `--out=~/x` alone."""
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path


def readable(name: str) -> str:
    """A file's name as text that can be written and drawn: it may be in no encoding."""
    return name.encode(errors="backslashreplace").decode()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: they cannot be written there.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno != errno.EINVAL:  # of folders, on some network file systems
            raise
    finally:
        os.close(handle)


def why(problem: Exception) -> str:
    """Why something could not be written, and what to do about it, as far as the system or a library says so."""
    # safetensors and tokenizers raise errors of their own, with the system's words in them
    if getattr(problem, "errno", None) in NO_SPACE or any(os.strerror(code) in str(problem) for code in NO_SPACE):
        return "the disk is full: free some space"
    return str(getattr(problem, "strerror", None) or problem)


def umask() -> int:
    """The process's mask of permissions for new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
