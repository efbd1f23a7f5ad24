"""What a model gives its blocks: the first one's inputs, and the extras that all of them are called with."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.activations import ActivationStore
from oats_vision.errors import DataError, ModelError

# What a model is called with: a tensor, a sequence whose first entry is it (labels are ignored), or keywords
# such as a Hugging Face processor gives; a 2-d `attention_mask` (batch, tokens) among these marks padding tokens.
Batch = Tensor | list[Any] | tuple[Any, ...] | Mapping[str, Any]


@dataclass
class BlockCalls:
    """What the model passes to its blocks besides the hidden states: rotary tables, attention masks, ...

    extras[b][i]: positional and keyword arguments of batch b for block i; one entry serves all blocks when
    the model passes each the same.
    """

    device: torch.device
    extras: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)

    def arguments(self, index: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block `index` is given in batch `batch` besides the hidden states."""
        extras = self.extras[batch]
        return extras[index] if len(extras) > 1 else extras[0]

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        args, kwargs = self.arguments(index, batch)
        return first_output(block(hidden.to(self.device), *args, **kwargs))


def capture_block_calls(
    model: nn.Module, blocks: list[tuple[str, nn.Module]], batches: Iterable[Batch], hidden: ActivationStore
) -> BlockCalls:
    """Run the embedding of every batch, and keep the first block's inputs and what all blocks are given.

    The first batch runs through the whole model, to see whether the blocks are given the same extras and
    whether each block's output is the next one's input; if so the other batches stop at the first block.

    Raises:
        ModelError: something happens to the hidden states between two blocks.
        DataError: no batch, or one that the model cannot take.
    """
    first = next(model.parameters())
    calls = BlockCalls(first.device)
    same_extras = False
    for batch in batches:
        with _record(blocks, stop_at_first=same_extras) as record, suppress(_FirstBlockReached):
            _call(model, batch, first.device, first.dtype)
        if record.changed_after:
            raise ModelError(f"the model changes the hidden states after {record.changed_after}: not block by block")
        if record.hidden is None or len(record.extras) != (1 if same_extras else len(blocks)):
            raise ModelError(f"a forward pass ran {len(record.extras)} of {len(blocks)} blocks; each should run once")
        if not same_extras:
            same_extras = all(_equal(extras, record.extras[0]) for extras in record.extras[1:])
        extras = record.extras[:1] if same_extras else record.extras
        if calls.extras and _equal(extras, calls.extras[0]):
            extras = calls.extras[0]  # one rotary table for all batches
        calls.extras.append(extras)
        calls.masks.append(_padding_mask(batch))
        hidden.append(record.hidden)
    if not len(hidden):
        raise DataError("the calibration data gave no batch")
    return calls


class _FirstBlockReached(Exception):
    """Stops a forward pass once the first block's inputs are known."""


@dataclass
class _Record:
    hidden: Tensor | None = None  # the first block's input
    extras: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    last_output: Tensor | None = None
    changed_after: str = ""


@contextmanager
def _record(blocks: list[tuple[str, nn.Module]], stop_at_first: bool) -> Iterator[_Record]:
    """Record what the blocks are given during a forward pass of the model."""
    record = _Record()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:  # transformers may pass the hidden states by name
            kwargs = dict(kwargs)
            args = (kwargs.pop("hidden_states"),)
        if record.hidden is None:
            record.hidden = args[0]
        elif record.last_output is None or not _equal(args[0], record.last_output):
            record.changed_after = record.changed_after or blocks[len(record.extras) - 1][0]
        record.last_output = None
        record.extras.append((args[1:], kwargs))
        if stop_at_first:
            raise _FirstBlockReached

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record.last_output = first_output(output)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for _, block in blocks]
    handles += [block.register_forward_hook(after) for _, block in blocks]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _call(model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> Any:
    """Call the model on a batch, moved to its device; floating tensors in its dtype."""

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    # a cache of keys and values would grow with each run of a block
    options = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}
    if isinstance(batch, Mapping):
        return model(**{name: placed(value) for name, value in batch.items() if name != "labels"}, **options)
    return model(placed(batch[0] if isinstance(batch, (list, tuple)) else batch), **options)


def _padding_mask(batch: Batch) -> Tensor | None:
    """True for tokens that are no padding, (batch, tokens), if the batch says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def first_output(output: Any) -> Tensor:
    """The hidden states among what a block (or its attention) returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _equal(a: Any, b: Any) -> bool:
    """Whether two blocks (or batches) were given the same."""
    if a is b:
        return True
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b) if isinstance(a, (int, float, str, bool)) else False
