"""The directory that a checkpoint is written to: one run at a time, only files of ours, whole at every moment."""

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from oats_vision.checkpoint.config import CONFIG, FORMAT
from oats_vision.checkpoint.weights import WEIGHTS
from oats_vision.errors import CheckpointError
from oats_vision.files import sync, umask, why
from oats_vision.models.loading.directory import TOKENIZER
from oats_vision.under_way import LAYERS, RUN_LOG, lock_of

log = logging.getLogger(__name__)

REPORT, PAGE, MERGED = "report.json", "report.html", "merged"
# what runs of ours write, by paths in the directory
_OURS = (CONFIG, WEIGHTS, REPORT, PAGE, RUN_LOG, LAYERS)
_UNFINISHED = (f".{MERGED}.writing-", f".{REPORT}.", f".{PAGE}.")  # beginnings of what killed runs leave
# in TOKENIZER and MERGED
_OURS_BELOW = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab")
_TEMPLATES = "additional_chat_templates"
MOMENT = 0.3  # seconds
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of some network file systems


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a path against other runs; the lock dies with its process. What killed runs left beside it is tidied up.

    Raises:
        CheckpointError: another run holds it, or its parent is missing or not writable.
    """
    place = _resolved(path)
    _check_parent(place)
    file = lock_of(place)
    try:
        handle = _lock(file)
    except BlockingIOError:
        raise CheckpointError(f"{path} is being written by another run: give another `path`") from None
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be written: {why(problem)}") from problem
    try:
        _tidy(place)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _lock(file: Path) -> int:
    """Raises BlockingIOError if it is taken, and not only for the moment in which `inspect` looks whether it is."""
    end = time.monotonic() + MOMENT
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in _NO_LOCKS:
                log.warning("%s: this file system has no locks: see that no two runs write there", file.parent)
                return handle
            os.close(handle)
            if isinstance(problem, BlockingIOError) and time.monotonic() < end:
                time.sleep(MOMENT / 10)
                continue
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == file.stat().st_ino:
                return handle
        os.close(handle)  # whoever held it before has removed the file meanwhile


def _tidy(place: Path) -> None:
    """Remove what a killed run was writing beside a path; a checkpoint that it had moved aside is put back."""
    aside = _aside(place)
    if is_checkpoint(aside) and not place.exists():
        aside.rename(place)
    ours = [aside] if aside.is_dir() and _foreign(aside) is None else []
    for left in (*ours, *place.parent.glob(f".{_escaped(place.name)}.writing-*")):
        shutil.rmtree(left, ignore_errors=True)


def check_target(path: Path, overwrite: bool) -> None:
    """See that a directory can be written to `path`, before hours of work.

    Raises:
        CheckpointError: taken, holds files that are not ours, or its parent is missing or not writable.
    """
    place = _resolved(path)
    if place.exists():
        if not overwrite:
            raise CheckpointError(f"{path} exists: give another `path`, or `overwrite=True`")
        if not place.is_dir() or (any(place.iterdir()) and not is_checkpoint(place)):
            raise CheckpointError(f"{path} is not a checkpoint of ours, and is not overwritten: give another `path`")
        if (foreign := _foreign(place)) is not None:
            raise CheckpointError(
                f"{path} holds {foreign.relative_to(place)}, which is not ours and would be lost: move it, "
                "or give another `path`"
            )
    _check_parent(place)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory claims to be a checkpoint of this package, of any version."""
    try:
        return bool(json.loads((path / CONFIG).read_text()).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path`, for what is not to be kept; the next run removes it if this one is killed.

    Raises:
        CheckpointError: it cannot be made.
    """
    place = _resolved(path)
    try:
        folder = tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.writing-")
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be written: {why(problem)}") from problem
    with folder as name:
        yield Path(name)


@contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place at the end, or is gone after an error.

    Raises:
        CheckpointError: something cannot be written, or `path` has appeared meanwhile.
    """
    place = _resolved(path)
    try:
        target = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.writing-"))
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be written: {why(problem)}") from problem
    try:
        yield target
        for file in filter(Path.is_file, target.rglob("*")):
            file.chmod(0o666 & ~umask())  # safetensors makes files that only their owner can read
            sync(file)
        target.chmod(0o777 & ~umask())
        for folder in (target, *filter(Path.is_dir, target.rglob("*"))):
            sync(folder)
        _put(target, place, path, overwrite)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{path} cannot be written: {why(problem)}") from problem
    finally:
        shutil.rmtree(target, ignore_errors=True)


def put(directory: Path, path: Path, overwrite: bool) -> None:
    """Move a whole checkpoint to `path`, on the same disk; what is replaced there is removed.

    Raises:
        CheckpointError: something cannot be moved, or `path` is taken.
    """
    try:
        _put(directory, _resolved(path), path, overwrite)
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be written: {why(problem)}") from problem
    shutil.rmtree(directory, ignore_errors=True)


def _put(directory: Path, place: Path, path: Path, overwrite: bool) -> None:
    if place.exists():
        check_target(path, overwrite)  # again: hours may have passed
        _exchange(directory, place)
    else:
        directory.rename(place)
    sync(place.parent)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step, so that there is a whole one at every moment.

    Where the system cannot (network file systems), the old one is moved aside first; if that is as far as it comes,
    it lies beside as `.NAME.old`, and the next run puts it back.
    """
    if _swap(new, old):
        return
    aside = _aside(old)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)  # to be removed with the temporary directory


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def _swap(one: Path, other: Path) -> bool:
    """Whether the system swapped two paths. Raises OSError if it can, and did not."""
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(first, second, 2)  # RENAME_SWAP
        else:
            failed = libc.renameat2(-100, first, -100, second, 2)  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        return False
    number = ctypes.get_errno()
    if failed and number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(number, os.strerror(number), str(other))
    return not failed


def _foreign(place: Path) -> Path | None:
    """An entry of a checkpoint's directory that no run of ours writes."""
    for entry in sorted(place.rglob("*")):
        path = entry.relative_to(place).as_posix()
        folder, _, name = path.rpartition("/")
        if path.startswith(_UNFINISHED):
            continue
        if entry.is_symlink():
            return entry
        if entry.is_dir():
            known = name in (TOKENIZER, MERGED) if not folder else name == _TEMPLATES
        else:
            known = name in _OURS if not folder else any(fnmatch(name, pattern) for pattern in _OURS_BELOW)
        if not known:
            return entry
    return None


def _resolved(path: Path) -> Path:
    """Where the directory lies, or will: that which a link points to."""
    return path.resolve()


def _check_parent(place: Path) -> None:
    if not place.name:
        raise CheckpointError(f"{place} is the root of all folders: give another `path`")
    if not place.parent.is_dir():
        raise CheckpointError(f"{place.parent} does not exist: make it first, or give another `path`")
    if not os.access(place.parent, os.W_OK):
        raise CheckpointError(f"{place.parent} is not writable: give another `path`")


def _escaped(name: str) -> str:
    """A name whose brackets, stars and question marks mean themselves in a pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
