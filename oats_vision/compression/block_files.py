"""The blocks of a model larger than memory, once they are compressed: their layers are in a file of each block."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.errors import CheckpointError
from oats_vision.files import why
from oats_vision.models.on_disk import BlocksOnDisk
from oats_vision.models.record import record_of
from oats_vision.nn.sparse_low_rank import layer_tensors


@dataclass(frozen=True)
class BlockFiles:
    """Where blocks are written once they are compressed; nowhere, of a model that fits in memory.

    on_disk: the model's blocks. storage: precision that they are rounded to. folder: of the files. shared: whether all
    ranks have the same folder, and the main one writes for them.
    """

    on_disk: BlocksOnDisk | None
    storage: torch.dtype
    folder: Path | None
    shared: bool = False

    @classmethod
    def of(cls, model: nn.Module, storage: torch.dtype, folder: Path | None, undo: ExitStack) -> "BlockFiles":
        """For a model whose blocks are not touched yet.

        Args:
            folder: the same for all ranks; a temporary one of each rank's own if not given.
            undo: is given what takes the model back to that.
        """
        on_disk = record_of(model).on_disk
        if on_disk is None:
            return cls(None, storage, None)
        shared = folder is not None
        if folder is None:
            on_disk.finished = tempfile.TemporaryDirectory(prefix="oats_vision_blocks_")
            folder = Path(on_disk.finished.name)
        first = next(iter(on_disk.blocks))
        on_disk.round(first, storage)  # what is not compressed yet must be calibrated as it will be stored
        undo.callback(on_disk.rounded.pop, first, None)
        return cls(on_disk, storage, folder, shared)

    @contextmanager
    def block(self, name: str, block: nn.Module) -> Iterator[None]:
        """Hold a block with its weights while it is compressed; then its layers are written, and its memory is free.

        Raises:
            CheckpointError: they cannot be written.
        """
        if self.on_disk is None or self.folder is None:
            yield
            return
        file = self.folder / f"{name}.safetensors"
        with self.on_disk.at_work(name):
            yield
            if self.shared:
                ranks.on_main(lambda: self._write(block, file))
            else:
                self._write(block, file)
        self.on_disk.leave(name, file, self.storage)

    def _write(self, block: nn.Module, file: Path) -> None:
        try:
            save_file(self._stored(block), file)
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(f"{file} cannot be written: {why(problem)}") from problem

    def _stored(self, block: nn.Module) -> dict[str, Tensor]:
        """The compressed layers' tensors, by their names in the block."""
        return {
            name: (tensor.to(self.storage) if tensor.is_floating_point() else tensor).cpu().contiguous()
            for name, tensor in layer_tensors(block).items()
        }
