"""The hidden states between two blocks, for all calibration batches: in memory up to a limit, then on disk."""

import errno
import os
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from oats_vision.errors import DataError


class ActivationStore:
    """Tensors by position; past `memory_limit` bytes they live in memory-mapped temporary files.

    A tensor put in the place of one of the same shape reuses its memory. Use it as a context manager: the
    tensors are freed when it exits. The files have no names while they are in use, so that none is left behind
    however the process ends.
    """

    def __init__(self, memory_limit: float) -> None:
        self.memory_limit = memory_limit
        self.in_memory = 0
        self.on_disk = 0  # bytes
        self._slots: list[Tensor] = []

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slots.clear()

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> Tensor:
        return self._slots[index]

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        slot = self._slots[index]
        if slot.shape == hidden.shape and slot.dtype == hidden.dtype:
            slot.copy_(hidden)
        else:
            self._slots[index] = hidden.detach().clone()

    def append(self, hidden: Tensor) -> None:
        """Keep a copy of a tensor, on its device or, past the limit, in a file (then on the CPU).

        Raises:
            DataError: the disk is full.
        """
        size = hidden.numel() * hidden.element_size()
        if self.in_memory + size <= self.memory_limit:
            self.in_memory += size
            self._slots.append(hidden.detach().clone())
            return
        slot = self._mapped(hidden.numel(), hidden.dtype, size)
        self.on_disk += size
        self._slots.append(slot.view(hidden.shape).copy_(hidden.detach()))

    def _mapped(self, count: int, dtype: torch.dtype, size: int) -> Tensor:
        """An uninitialised tensor in a file of its own, which goes when the tensor does."""
        handle, path = tempfile.mkstemp(prefix="oats_vision_activations_")
        try:
            _reserve(handle, size)  # a write to a mapped page that the disk has no room for would kill the process
            return torch.from_file(path, shared=True, size=count, dtype=dtype)
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
            raise DataError(
                f"TMPDIR {tempfile.gettempdir()} has no room for the next {size:,} bytes of activations "
                f"({self.on_disk:,} are there, {max(size - free, 0):,} are missing): point TMPDIR to a larger disk, "
                f"raise `activation_memory` ({self.memory_limit / 1e9:g} GB) or use fewer samples"
            ) from None
        finally:
            os.close(handle)
            Path(path).unlink()  # what is mapped stays


def _reserve(handle: int, size: int) -> None:
    """Give a new file its full size on the disk. Raises OSError if there is no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    for start in range(0, size, 1 << 20):
        os.write(handle, bytes(min(1 << 20, size - start)))
