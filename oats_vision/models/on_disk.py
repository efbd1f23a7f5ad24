"""Models larger than memory: blocks leave their weights in safetensors files, and one of them at a time has its own."""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from oats_vision.errors import ModelError
from oats_vision.machine import give_memory_back
from oats_vision.models.bounds import BUILDING
from oats_vision.models.families import Structure


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its name in a safetensors file."""

    file: Path
    name: str

    def read(self) -> Tensor:
        """The tensor, mapped from the file.

        Raises:
            ModelError: the file is not there any more, or is another one.
        """
        try:
            with safe_open(self.file, framework="pt") as content:
                tensor: Tensor = content.get_tensor(self.name)
        except (OSError, SafetensorError) as problem:
            raise ModelError(
                f"{self.name} cannot be read from {self.file}, which must stay as it is: {problem}"
            ) from None
        return tensor


@dataclass(eq=False)
class BlocksOnDisk:
    """Blocks of one model whose weights are in files: on the meta device but for one, the last that was called.

    A call of a block reads its weights and drops those of the one before; of several threads one at a time has a
    block. A block that is to be changed is held by `at_work`, and afterwards it is left in a file of its own.

    blocks: by their full names. places: of their tensors, by full names. device: that a block is read to.
    folder, finished: of files that were made to be read, and of changed blocks; they go with the last reference.
    rounded: precision that a block's values are rounded to as they are read, where there is one. at_hand: the block
    that has its weights. bytes_read: so far.
    """

    blocks: dict[str, nn.Module]
    places: dict[str, Place]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: "tempfile.TemporaryDirectory[str] | None" = None
    finished: "tempfile.TemporaryDirectory[str] | None" = None
    rounded: dict[str, torch.dtype] = field(default_factory=dict)
    at_hand: str = ""
    bytes_read: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    @classmethod
    def of(cls, model: nn.Module, structure: Structure, places: Mapping[str, Place]) -> "BlocksOnDisk":
        """Take the blocks of a model; what they have in these places they lose."""
        blocks = dict(structure.named_blocks(model))
        inside = tuple(f"{name}." for name in blocks)
        found = cls(blocks, {name: place for name, place in places.items() if name.startswith(inside)})
        for name in blocks:
            found._drop(name)
            found._watch(name)
        return found

    def __deepcopy__(self, memo: object) -> "BlocksOnDisk":
        return self  # copies of a model are made for their shapes

    @property
    def largest(self) -> int:
        """Bytes of the largest block."""
        return max(map(_bytes_of, self.blocks.values()))

    @property
    def bytes(self) -> int:
        """Of all blocks."""
        return sum(map(_bytes_of, self.blocks.values()))

    def read(self, name: str, like: Tensor) -> Tensor:
        """A tensor by its full name, in memory of its own, with the dtype of `like`."""
        found = self.places[name].read()
        self.bytes_read += found.nbytes
        return torch.empty(found.shape, dtype=like.dtype, device=self.device).copy_(found)

    def bring(self, name: str) -> None:
        """Give a block its weights; the one that has its own loses them."""
        if self.at_hand == name:
            return
        self._drop(self.at_hand)
        with torch.inference_mode(False), torch.no_grad():
            block = self.blocks[name]
            tensors = {
                local: self._rounded(name, self.read(full, tensor))
                for local, tensor in block.state_dict().items()
                if (full := f"{name}.{local}") in self.places
            }
            with BUILDING:  # parameters are assigned, which another thread may have patched
                block.load_state_dict(tensors, strict=False, assign=True)
        self.at_hand = name

    def round(self, name: str, precision: torch.dtype) -> None:
        """Have a block's values rounded whenever they are read."""
        self.rounded[name] = precision
        self.rest()

    def rest(self) -> None:
        """Leave no block with its weights."""
        self._drop(self.at_hand)

    @contextmanager
    def at_work(self, name: str) -> Iterator[None]:
        """Hold a block with its weights, as the plain module that it is; no other may be called meanwhile."""
        with self._lock:
            self.bring(name)
            block = self.blocks[name]
            del block.forward
            try:
                yield
            finally:
                self._watch(name)

    def copy_of(self, name: str) -> nn.Module:
        """A block with its weights, as a plain module of its own."""
        with self.at_work(name):
            return deepcopy(self.blocks[name])

    def leave(self, name: str, file: Path, precision: torch.dtype) -> None:
        """Leave a block that was changed.

        Args:
            file: holds what is new in it, by the tensors' names in the block; the others stay where they were.
            precision: that these are rounded to when they are read, as they were in the block.
        """
        names = {f"{name}.{local}" for local in self.blocks[name].state_dict()}
        gone = [full for full in self.places if full.startswith(f"{name}.") and full not in names]
        for full in gone:
            del self.places[full]
        with safe_open(file, framework="pt") as content:
            self.places |= {f"{name}.{local}": Place(file, local) for local in content.keys()}  # noqa: SIM118
        self.rounded[name] = precision
        self._drop(name)

    def _rounded(self, block: str, tensor: Tensor) -> Tensor:
        precision = self.rounded.get(block)
        return tensor if precision is None or not tensor.is_floating_point() else tensor.to(precision).to(tensor.dtype)

    def _drop(self, name: str) -> None:
        """Take a block's weights from it, as far as they are in files."""
        self.at_hand = ""
        if not name:
            return
        block = self.blocks[name]
        tensors = block.state_dict(keep_vars=True)
        away = {id(tensor) for local, tensor in tensors.items() if f"{name}.{local}" in self.places}
        with torch.inference_mode(False), torch.no_grad():  # whatever the caller has set
            block._apply(lambda tensor: tensor.to("meta") if id(tensor) in away else tensor)
        give_memory_back()  # or what is read for a hundred blocks leaves a hundred megabytes of gaps

    def _watch(self, name: str) -> None:
        """Have a block's weights read when it is called."""
        block: Any = self.blocks[name]
        block.forward = update_wrapper(partial(self._run, name), block.forward)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self.bring(name)
            block = self.blocks[name]
            return type(block).forward(block, *args, **kwargs)


def _bytes_of(block: nn.Module) -> int:
    return int(sum(tensor.nbytes for tensor in block.state_dict().values()))


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with its parameters on the meta device, and buffers that are computed."""
    from accelerate import init_empty_weights

    with BUILDING, init_empty_weights(include_buffers=False):
        return build()


def blocks_are_as_stored(model: nn.Module, structure: Structure) -> bool:
    """Whether a model's blocks are compressed in the form in which they are stored.

    Args:
        model: without weights.
    """
    prepared = deepcopy(model)
    structure.prepare(prepared)
    shapes = [{name: t.shape for name, t in each.state_dict().items()} for each in (model, prepared)]
    return shapes[0] == shapes[1]
