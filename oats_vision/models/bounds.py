"""Build an architecture that a stranger's file describes, within what that file can account for."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from oats_vision.errors import CheckpointError

BUILDING = threading.RLock()  # held while nn.Module is patched, here or by accelerate, which all threads see
MEMORY = 64 << 20  # bytes that any architecture may ask for: masks and rotary tables are in no file


@dataclass(frozen=True)
class Limits:
    """What may be built.

    tensors: that are registered, parameters and buffers together.
    memory: bytes of one tensor in real memory, and of all buffers.
    """

    tensors: int
    memory: int = MEMORY


@contextmanager
def bounded(limits: Limits) -> Iterator[None]:
    """Count what modules register, and keep each allocation below the limit.

    Parameters may be of any size: one that is too large is made on the meta device, where it costs nothing. Its shape
    is compared with the file's later.

    Raises:
        CheckpointError: there are more tensors, or more memory is asked for.
    """
    tensors = memory = 0

    def count(tensor: Tensor | None, real: bool) -> None:
        nonlocal tensors, memory
        tensors += tensor is not None
        memory += tensor.nbytes if real and tensor is not None and not tensor.is_meta else 0
        if tensors > limits.tensors:
            raise CheckpointError(f"config.json asks for more than the {limits.tensors} tensors that its weights allow")
        if memory > limits.memory:
            raise _too_much(memory, limits)

    def parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        count(param, real=False)
        register_parameter(module, name, param)

    def buffer(module: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        count(tensor, real=True)
        register_buffer(module, name, tensor, persistent)

    patched: Any = nn.Module
    with BUILDING:
        register_parameter, register_buffer = patched.register_parameter, patched.register_buffer
        patched.register_parameter, patched.register_buffer = parameter, buffer
        try:
            with _SmallTensors(limits):
                yield
        finally:
            patched.register_parameter, patched.register_buffer = register_parameter, register_buffer


class _SmallTensors(TorchDispatchMode):
    """Infer each result's size on the meta device first."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of PyTorch
        self.limits = limits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = {} if inputs else {"device": torch.device("meta")}
        if any(tensor.is_meta for tensor in inputs) or str(kwargs.get("device")) == "meta":
            return func(*args, **kwargs)
        like_args, like_kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        try:
            found = func(*like_args, **like_kwargs | device)
        except (RuntimeError, NotImplementedError, TypeError):  # the result depends on values: no larger than its input
            return func(*args, **kwargs)
        size = max((t.untyped_storage().nbytes() for t in tree_leaves(found) if isinstance(t, Tensor)), default=0)
        if size <= self.limits.memory:
            return func(*args, **kwargs)
        if inputs:
            raise _too_much(size, self.limits)
        return found


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _too_much(size: int, limits: Limits) -> CheckpointError:
    return CheckpointError(
        f"config.json asks for {size:,} bytes beside the weights, and files of this size may ask for {limits.memory:,}"
    )
