"""Recovery after a one-shot compression: what was kept is trained to give the dense model's outputs.

Block by block first: the inputs of block i come from the recovered blocks before it, its target is what the dense block
made of the dense model's own hidden states, so that the error that comes in is corrected too. Then all blocks together,
towards the final features. Neither labels nor texts to predict are needed.
"""

import logging
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls, capture_block_calls, check_finite_states
from oats_vision.compression.block_training import Streams, relative, train_block
from oats_vision.compression.pipeline import plain_arithmetic
from oats_vision.compression.record import BlockRecovery, CompressionRecord, RecoveryReport, record
from oats_vision.compression.recovery_journal import keep, recovery_journal, trained
from oats_vision.compression.resume import digest_of
from oats_vision.compression.together import WholeStreams, train_together
from oats_vision.data.batches import Inputs, Reader, expected_samples, read_batches
from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.models.record import set_record, structure_of
from oats_vision.models.structure import check_device, floating
from oats_vision.nn.sparse_low_rank import compressed_layers
from oats_vision.progress import Step

log = logging.getLogger(__name__)

BATCH = 16  # samples of a step, where batches are not smaller
JUDGED = 8  # one batch of so many is kept apart to judge by, where nothing is held out


def recover(
    model: nn.Module,
    dense: nn.Module,
    calibration: Any,
    *,
    steps: int,
    held_out: Any = None,
    seed: int = 0,
    activation_memory: float = 8.0,
    state: Path | None = None,
    progress: Callable[[Step], None] = lambda step: None,
) -> RecoveryReport:
    """Train what a compression kept of a model's blocks, in place, towards the dense model's outputs.

    Of each block S's values on their positions, U, V, biases, the norms' weights and LayerScale take `steps` steps.
    The weights that are best on held-out data are kept: a block that gains nothing there stays as it was, and so do all
    if the final features gain nothing. Then all blocks take as many steps together, kept if the features gain by them.

    Args:
        model: compressed, by `compress` or as loaded from a checkpoint.
        dense: what it was before.
        calibration: batches as for `compress`, without labels; read twice.
        steps: of Adam for each block.
        held_out: more of the same, to judge by; by default an eighth of the calibration's batches is kept apart.
        seed: of the order of the batches. The same one gives the same bits on the same machine.
        activation_memory: GB of both models' hidden states, and the first block's inputs, to keep in memory; what is
            beyond lives in temporary files.
        state: folder that holds each block as soon as it is done: the same call goes on from there.
        progress: called with each step.

    Returns:
        Each block's relative error on held-out data, before and after.

    Raises:
        ConfigError: a setting is out of range, or `state` is another recovery's.
        ModelError: the model is not compressed, is sliced, or is no twin of the dense one.
        DataError: there are too few batches, or the data are not the same when they are read again.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps must be a whole number from 1 on, got {steps!r}")
    if not activation_memory > 0:
        raise ConfigError(f"activation_memory must be above 0 GB, got {activation_memory}")
    start, report = time.perf_counter(), record(model).report
    if report.settings.values or report.settings.bits:
        how = report.settings.summary
        raise ConfigError(
            f"recover trains floating values, and the model's are rounded ({how}): compress it without that"
        )
    blocks, twins = _twin_blocks(model, dense)
    model.eval()
    dense.eval()
    unit = structure_of(model).family.unit
    storage = report.settings.storage_dtype
    precision = getattr(torch, storage) if storage else floating(model).dtype
    limit = activation_memory * 1e9 / 3
    with (
        plain_arithmetic(model),
        ActivationStore(limit) as hidden,
        ActivationStore(limit) as wanted,
        ActivationStore(limit) as inputs,
    ):
        data, again = _Read(calibration, held_out, hidden), _Read(calibration, held_out, wanted)
        reader = Reader.of(model, unit)
        progress(Step(0.0, 0, len(blocks), f"reading {unit}"))
        calls = capture_block_calls(model, blocks, data.batches(reader), hidden, unit)
        dense_calls = capture_block_calls(dense, twins, again.batches(reader), wanted, unit)
        if data.digests != again.digests:
            raise DataError(
                "the calibration data are not the same when they are read again: give a list, or a loader that neither "
                "shuffles nor augments"
            )
        for b in range(len(hidden)):
            inputs.append(hidden[b])
        last, norm = len(blocks) - 1, structure_of(dense).final_norm
        features = deepcopy(dense.get_submodule(norm)) if norm else nn.Identity()
        features_dtype = torch.promote_types(floating(dense).dtype, torch.float32)
        features.to(features_dtype).requires_grad_(False)
        streams = Streams(
            hidden, wanted, calls, *_shared_out(data.first_held_out, len(hidden)), features=features, last=last
        )
        one_shot = [(p, p.detach().clone()) for _, block in blocks for p in block.parameters()]
        outputs = {b: _through(blocks, calls, b, hidden[b]) for b in streams.judged}  # of the one-shot model
        done = RecoveryReport(steps, seed, _samples(hidden, streams.learnt), _samples(hidden, streams.judged))
        settings = {"recover": steps, "seed": seed, "batches to train on": len(streams.learnt)}
        journal = recovery_journal(state, model, dense, settings, data.digests, blocks=len(blocks))
        teller = _Teller(progress, len(blocks), steps)
        for i, ((name, block), (_, twin)) in enumerate(zip(blocks, twins, strict=True)):
            with torch.no_grad():
                for b in range(len(wanted)):
                    wanted[b] = dense_calls.run(twin, i, b, wanted[b])
                    check_finite_states(wanted[b], calls.masks[b], f"the dense outputs of {name}", b)
            if not compressed_layers(block):
                keep(journal, i, None)
            else:
                found = trained(journal, i)
                if found is None:
                    found = train_block(
                        block,
                        i,
                        streams,
                        steps=steps,
                        storage=precision,
                        seed=seed,
                        tell=teller.of_block(i),
                    )
                    keep(journal, i, found)
                _put(block, found.weights)
                done.blocks.append(BlockRecovery(name, found.before, found.after, found.step, found.curve))
                log.info("%s: held-out error %.4f -> %.4f (step %d)", name, found.before, found.after, found.step)
            with torch.no_grad():
                for b in range(len(hidden)) if i < last else streams.judged:
                    hidden[b] = calls.run(block, i, b, hidden[b])
                    check_finite_states(hidden[b], calls.masks[b], f"the outputs of {name}", b)
        with torch.no_grad():
            recovered = {b: hidden[b].to(calls.device) for b in streams.judged}  # they may be on disk
            done.before, done.after = (
                relative([streams.errors(last, b, y.to(features_dtype)) for b, y in found.items()])
                for found in (outputs, recovered)
            )
            if not done.after < done.before:
                for parameter, value in one_shot:
                    parameter.copy_(value)
                done.kept, done.after = False, done.before
        whole, together = nn.ModuleList(block for _, block in blocks), trained(journal, len(blocks))
        if together is None:
            together = train_together(
                whole,
                WholeStreams(inputs, wanted, calls, streams.learnt, streams.judged, features, last),
                steps=steps,
                storage=precision,
                seed=seed,
                tell=teller.of_all(),
            )
            keep(journal, len(blocks), together)
        _put(whole, together.weights)
        done.together = BlockRecovery("all blocks", together.before, together.after, together.step, together.curve)
        done.after = together.after
    done.seconds = time.perf_counter() - start
    progress(Step(1.0, len(blocks), len(blocks), "done", done.after))
    known = record(model)
    set_record(model, CompressionRecord(known.source, known.structure, report=replace(report, recovery=done)))
    return done


def _twin_blocks(model: nn.Module, dense: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """The blocks of both. Raises ModelError if they cannot be those of one model, compressed and dense."""
    if record(model).report.slicing:
        raise ModelError("recovery is for compressed layers, and slicegpt leaves none: its blocks are narrower")
    if compressed_layers(dense):
        raise ModelError("`dense` has compressed layers: give the model as it was before its compression")
    check_device(model)
    check_device(dense)
    ours, theirs = floating(model).device, floating(dense).device
    if ours != theirs:
        raise ModelError(f"the model is on {ours} and the dense one on {theirs}: move them to one device")
    blocks, twins = (structure_of(one).named_blocks(one) for one in (model, dense))
    if [name for name, _ in blocks] != [name for name, _ in twins]:
        raise ModelError(
            f"`dense` is another model: it has {len(twins)} blocks ({twins[0][0]}, ...), and the compressed one "
            f"{len(blocks)} ({blocks[0][0]}, ...)"
        )
    return blocks, twins


class _Read:
    """The calibration data and after them the held-out ones, in batches of at most `BATCH`.

    digests: of each batch that was read. first_held_out: number of the first batch that is held out, once it was read.
    """

    def __init__(self, calibration: Any, held_out: Any, hidden: ActivationStore) -> None:
        self.calibration, self.held_out, self.hidden = calibration, held_out, hidden
        self.digests: list[str] = []
        self.first_held_out: int | None = None

    def batches(self, reader: Reader) -> Iterator[Any]:
        yield from self._pieces(self.calibration, reader)
        if self.held_out is not None:
            self.first_held_out = len(self.hidden)  # batches of padding alone are not kept
            yield from self._pieces(self.held_out, reader)

    def _pieces(self, data: Any, reader: Reader) -> Iterator[Any]:
        for piece in chain.from_iterable(map(_split, read_batches(data, reader))):
            self.digests.append(digest_of(piece))
            yield piece.values if piece.by_name else piece.tensor


def _split(inputs: Inputs) -> Iterator[Inputs]:
    """A batch as several of at most `BATCH` samples."""
    count = len(inputs.tensor)
    for first in range(0, count, BATCH):
        values = {
            name: value[first : first + BATCH]
            if isinstance(value, Tensor) and value.ndim and len(value) == count
            else value
            for name, value in inputs.values.items()
        }
        yield replace(inputs, values=values)


def check_enough(calibration: Any) -> None:
    """See that there is a batch to train on and another one, as far as the data say so without being read.

    Raises:
        DataError: there is not.
    """
    total = expected_samples(calibration)
    size = getattr(getattr(calibration, "loader", calibration), "batch_size", None)
    if total is None:
        return
    if isinstance(calibration, list | tuple):
        _shared_out(None, sum(-(-len(batch) // BATCH) for batch in calibration))
    elif isinstance(calibration, Tensor) and calibration.ndim in (2, 4):
        _shared_out(None, -(-total // BATCH))
    elif isinstance(size, int):
        _shared_out(None, total // size * -(-size // BATCH) + -(-(total % size) // BATCH))


def _shared_out(first_held_out: int | None, batches: int) -> tuple[range, range]:
    """Numbers of the batches to train on, and of those to judge by."""
    first = batches - max(batches // JUDGED, 1) if first_held_out is None else first_held_out
    if not 0 < first < batches:
        raise DataError(
            f"recovery needs a batch to train on and another one to judge by, and there are {first} and "
            f"{batches - first}: give more than {BATCH} samples, or smaller batches"
        )
    return range(first), range(first, batches)


@torch.no_grad()
def _through(blocks: list[tuple[str, nn.Module]], calls: BlockCalls, batch: int, x: Tensor) -> Tensor:
    """What all blocks make of a batch's first hidden states."""
    for i, (_, block) in enumerate(blocks):
        x = calls.run(block, i, batch, x)
    return x


def _samples(hidden: ActivationStore, batches: range) -> int:
    return sum(len(hidden[b]) for b in batches)


@torch.no_grad()
def _put(block: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the parameters of a block, or of all, these values."""
    own = dict(block.named_parameters())
    for name, value in weights.items():
        own[name].copy_(value)


class _Teller:
    """Turns steps of a block, or of all, into those of the whole. Blocks that were done before take no time.

    All blocks are trained once, and then together, which takes about as long again.
    """

    def __init__(self, progress: Callable[[Step], None], blocks: int, steps: int) -> None:
        self.progress, self.blocks, self.steps = progress, blocks, steps
        self._begun: tuple[float, float] | None = None  # when training began, and what was done by then

    def of_block(self, block: int) -> Callable[[int, float], None]:
        """Told of the steps of one, by its number from 0."""
        return lambda step, error: self._tell(block, 1, "recovering", step, error)

    def of_all(self) -> Callable[[int, float], None]:
        """Told of the steps of all together."""
        return lambda step, error: self._tell(self.blocks, self.blocks, "recovering all blocks", step, error)

    def _tell(self, before: int, trained: int, what: str, step: int, error: float) -> None:
        """Of `trained` blocks, with `before` behind them."""
        now, done = time.perf_counter(), (before + trained * step / self.steps) / (2 * self.blocks)
        self._begun = self._begun or (now, done)
        start, first = self._begun
        left = (now - start) * (1 - done) / (done - first) if done > first else None
        block = min(before + 1, self.blocks)
        self.progress(Step(done, block, self.blocks, what, error, f"step {step} of {self.steps}", left))
