"""Train one compressed block to give what the dense one gave: S on its positions, U, V, biases and norms."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls
from oats_vision.calibration.statistics import SecondMoment
from oats_vision.compression.relative_steps import RelativeAdam, layer_sizes, vector_size
from oats_vision.nn.outputs import first_output
from oats_vision.nn.sparse_low_rank import compressed_layers

SHARE = 5e-4  # of an entry's size, that the largest steps move it
WARM_UP = 0.1  # share of the steps in which they grow to that; then they fall as a cosine does
LOOKS = 10  # at the held-out samples while a block is trained
SHORTER = 1 / 3  # steps after a look that finds no gain, from the best weights on
PATIENCE = 3  # looks without a gain, one after the other, before a block's training stops
SCALED_BY = 4  # batches that the inputs' second moments are taken of


@dataclass
class Streams:
    """The hidden states that blocks are given, batch by batch.

    hidden: in the compressed model. wanted: in the dense one; before block i is trained, what it made of them. calls:
    what blocks are called with besides. learnt, judged: numbers of the batches to train on, and to judge by.
    features: what the dense model makes of its last block's output, by which that block is trained and judged: a
    smaller error of the output alone may be a larger one of these.
    """

    hidden: ActivationStore
    wanted: ActivationStore
    calls: BlockCalls
    learnt: range
    judged: range
    features: nn.Module
    last: int

    def run(self, block: nn.Module, index: int, batch: int, dtype: torch.dtype) -> Tensor:
        """What block `index` in this precision makes of the compressed model's hidden states, with gradients."""
        x = self.hidden[batch].to(self.calls.device, dtype, copy=True)  # which the block may change
        return first_output(self.calls.call(index, batch).to(dtype).run(block, x))

    def errors(self, index: int, batch: int, y: Tensor) -> tuple[Tensor, Tensor]:
        """Squares of y - wanted and of wanted, summed over the tokens that are no padding, in float32 or better."""
        wanted, mask = self.wanted[batch].to(y.device, y.dtype), self.calls.masks[batch]
        if mask is not None and mask.shape == y.shape[:2]:
            y, wanted = y[mask.to(y.device)], wanted[mask.to(y.device)]
        if index == self.last:
            y, wanted = self.features(y), self.features(wanted)
        return (y - wanted).square().sum(), wanted.square().sum()


@dataclass(frozen=True)
class Trained:
    """A block's weights after its training, by name, and how far its outputs are from the dense ones on held-out data.

    before, after: relative errors. step: whose weights these are; 0: those from before, and `weights` is empty.
    curve: steps and relative errors.
    """

    weights: dict[str, Tensor]
    before: float
    after: float
    step: int
    curve: list[tuple[int, float]]


def train_block(
    block: nn.Module,
    index: int,
    streams: Streams,
    *,
    steps: int,
    storage: torch.dtype,
    seed: int,
    tell: Callable[[int, float], None] = lambda step, error: None,
) -> Trained:
    """Adam towards the dense block's outputs, in float32 or better; the block itself stays as it is.

    Args:
        storage: precision that weights are rounded to in the end, and judged in.
        tell: called with the steps that are done and the last relative error on held-out data.
    """
    dtype = torch.promote_types(next(p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    copy = deepcopy(block).to(dtype)
    copy.requires_grad_(False)
    sizes = _sizes(copy, index, streams, dtype)
    names = {name: p for name, p in copy.named_parameters() if p in sizes}
    start = _values(names)
    before = best = _held_out_error(copy, index, streams, dtype)
    kept, kept_step, curve = start, 0, [(0, before)]
    adam, order = RelativeAdam(sizes), _shuffled(streams.learnt, seed + index)
    looks = {math.ceil(steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    share, failed = SHARE, 0
    for parameter in sizes:
        parameter.requires_grad_()
    for step in range(1, steps + 1):
        with torch.enable_grad():
            error, size = streams.errors(index, batch := next(order), streams.run(copy, index, batch, dtype))
            (error / size).backward()
        adam.step(share * _schedule(step - 1, steps))
        if step in looks:
            found = _held_out_error(copy, index, streams, dtype)
            curve.append((step, found))
            if found < best:
                best, kept, kept_step, failed = found, _values(names), step, 0
            elif (failed := failed + 1) == PATIENCE:
                break
            else:
                _put(names, kept)
                share, adam = share * SHORTER, RelativeAdam(sizes)
        tell(step, curve[-1][1])
    if not kept_step:
        return Trained({}, before, before, 0, curve)
    _put(names, {name: value.to(storage) for name, value in kept.items()})
    after = _held_out_error(copy, index, streams, dtype)
    if not after < before:
        return Trained({}, before, before, 0, curve)
    return Trained({name: value.to(storage) for name, value in kept.items()}, before, after, kept_step, curve)


def _schedule(step: int, steps: int) -> float:
    """Share of the largest step: up in a line, down as a cosine."""
    warm = max(round(WARM_UP * steps), 1)
    return min((step + 1) / warm, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _shuffled(batches: Sequence[int], seed: int) -> Iterator[int]:
    """The numbers in an order of their own in each round, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


@torch.no_grad()
def _held_out_error(block: nn.Module, index: int, streams: Streams, dtype: torch.dtype) -> float:
    """Relative error of the block's outputs on the batches to judge by."""
    return relative([streams.errors(index, b, streams.run(block, index, b, dtype)) for b in streams.judged])


def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The relative error of all batches, from the squares of each."""
    error, size = (sum(map(float, column)) for column in zip(*pairs, strict=True))
    return math.sqrt(error / max(size, 1e-300))


@torch.no_grad()
def _sizes(block: nn.Module, index: int, streams: Streams, dtype: torch.dtype) -> dict[nn.Parameter, Tensor]:
    """What is trained of a block, and what each entry's steps are measured by."""
    layers = compressed_layers(block)
    moments = {name: SecondMoment(layer.in_features, streams.calls.device) for name, layer in layers.items()}
    mask: Tensor | None = None  # of the batch that runs
    handles = []
    for name, layer in layers.items():

        def update(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            counts = mask is not None and mask.shape == args[0].shape[:-1]
            moments[name].update(args[0], mask if counts else None)

        handles.append(layer.register_forward_pre_hook(update))
    try:
        for b in streams.learnt[:SCALED_BY]:
            masked = streams.calls.masks[b]
            mask = None if masked is None else masked.to(streams.calls.device)
            streams.run(block, index, b, dtype)
    finally:
        for handle in handles:
            handle.remove()
    sizes: dict[nn.Parameter, Tensor] = {}
    for name, layer in layers.items():
        if moments[name].tokens:  # else an expert that is not needed here
            sizes |= layer_sizes(layer, moments[name].scale())
    inside = tuple(f"{name}." for name in layers)
    for name, parameter in block.named_parameters():
        if (
            not name.startswith(inside)
            and parameter.is_floating_point()
            and parameter.numel() == max(parameter.shape, default=1)
        ):
            sizes[parameter] = vector_size(name, parameter)
    return sizes


def _values(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def _put(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
