"""The hidden states between two blocks, for all calibration batches: in memory up to a limit, then on disk."""

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class ActivationStore:
    """Tensors by position; past `memory_limit` bytes they live in memory-mapped temporary files.

    A tensor put in the place of one of the same shape reuses its memory. Use it as a context manager: the
    files are gone when it exits.
    """

    def __init__(self, memory_limit: float) -> None:
        self.memory_limit = memory_limit
        self.in_memory = 0
        self._slots: list[Tensor] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._slots.clear()
        if self._directory:
            self._directory.cleanup()

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
        """Keep a copy of a tensor, on its device or, past the limit, in a file (then on the CPU)."""
        size = hidden.numel() * hidden.element_size()
        if self.in_memory + size <= self.memory_limit:
            self.in_memory += size
            self._slots.append(hidden.detach().clone())
            return
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="oats_vision_activations_")
        file = str(Path(self._directory.name) / f"{len(self._slots)}.bin")
        slot = torch.from_file(file, shared=True, size=hidden.numel(), dtype=hidden.dtype)
        self._slots.append(slot.view(hidden.shape).copy_(hidden.detach()))

    @property
    def on_disk(self) -> bool:
        return self._directory is not None
