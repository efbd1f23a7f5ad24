"""Compress a model block by block: the inputs of a block come from the compressed blocks before it."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import capture_block_calls
from oats_vision.calibration.explained import explained
from oats_vision.compression import methods, resume
from oats_vision.compression.block_files import BlockFiles
from oats_vision.compression.blocks import STREAM, Job, LayerDone, nobody
from oats_vision.compression.common import Common
from oats_vision.compression.journal import Journal
from oats_vision.compression.methods import BlockMethod
from oats_vision.compression.plan import Plan, plan_model
from oats_vision.compression.record import CompressionRecord, CompressionReport
from oats_vision.compression.sequence import compress_block
from oats_vision.compression.settings import CompressionSettings
from oats_vision.compression.sharing import Parts, share_out
from oats_vision.data.batches import expected_samples
from oats_vision.errors import ConfigError, ModelError
from oats_vision.models.families import Family, Structure
from oats_vision.models.families.find import refuse_wrappers
from oats_vision.models.loading.load import record_weights
from oats_vision.models.record import read_values, record_of, set_record, structure_of
from oats_vision.models.structure import all_called, check_device, floating
from oats_vision.models.values import check_finite, check_storable, restore, round_to
from oats_vision.nn.sliced import SlicedBlock
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from oats_vision.progress import Clock, Step, shares

log = logging.getLogger(__name__)


@torch.no_grad()
def compress(
    model: nn.Module,
    calibration: Any,
    settings: CompressionSettings,
    *,
    family: Family | None = None,
    activation_memory: float = 8.0,
    progress: Callable[[Step], None] = lambda step: None,
    before: Callable[[nn.Module], None] = lambda model: None,
    layer_done: LayerDone = nobody,
    journal: Journal | None = None,
    finished_blocks: Path | None = None,
    common: Common | None = None,
) -> CompressionReport:
    """Compress the linears of a model's blocks, in place, as OATS does it (section 3.3), or by a baseline.

    Args:
        model: of a known family; put in eval mode and changed in place. An error that comes before
            its first layer is replaced leaves it as it was.
        calibration: batches, iterated once: tensors or arrays, (tensor, ...) or mappings of keyword arguments, or
            single pictures (sequences), in an iterable or a Dataset; or one tensor of many.
        settings: as `resolve` makes them.
        family: that the model is of; found by itself if not given.
        activation_memory: GB of activations to keep in memory; what is beyond lives in temporary files.
        progress: called with each step.
        before: called with the dense model once it is seen to be fit, and before anything of it is changed.
        layer_done: called with a block's name and what became of one of its linears, as soon as that is known.
        journal: keeps each block as soon as it is finished, and those that it has already are not compressed again.
            Slicing keeps nothing, and begins again.
        finished_blocks: folder for those of a model that is read block by block, the same for all ranks; a temporary
            one if not given.
        common: what earlier compressions of the same model on the same data found, with settings that differ only in
            how large it is to be; what is found here is added.

    Returns:
        The settings, and each layer's budget and error.

    Raises:
        ConfigError: a setting is out of range, leaves a layer without rank or non-zeros, or differs from those of the
            run that is in the journal.
        ModelError: no family fits the model, it does not run block by block, has linears that are more than
            nn.Linear, or values that are not finite.
        DataError: no calibration batch, or one that the model cannot take; or a layer cannot be decomposed.
        CheckpointError: the journal cannot be written.
    """
    if not activation_memory > 0:
        raise ConfigError(f"activation_memory must be above 0 GB, got {activation_memory}")
    start = time.perf_counter()
    check_finite(model)
    check_device(model)
    refuse_wrappers(model)
    record_weights(model)
    with plain_arithmetic(model), ExitStack() as undo, _unless_begun(model, undo):
        _leave_inference_mode(model)
        structure, plan = prepare(model, family, settings, undo)
        if plan.slicing and record_of(model).on_disk:
            raise ConfigError(f"{settings.method} changes all blocks at once: load the model with `low_memory=False`")
        dtype = floating(model).dtype
        storage = getattr(torch, settings.storage_dtype) if settings.storage_dtype else dtype
        buffers = {name for name, _ in model.named_buffers()}
        check_storable(read_values(model, model.state_dict().items()), storage, buffers)
        report = CompressionReport(structure.family.name, settings, unit=structure.family.unit, slicing=plan.slicing)
        tick = time.perf_counter()
        before(model)
        start += time.perf_counter() - tick  # which is no part of the compression
        clock, expected = Clock(plan.work, structure.family.unit, progress, start=start), expected_samples(calibration)
        share = STREAM if settings.targets else 1.0
        journal = None if plan.slicing else journal
        weights = resume.dense_digest(model) if journal else ""
        data = resume.Noted()
        with ActivationStore(share * activation_memory * 1e9) as hidden:
            clock.read(0, expected)
            # what is not compressed is stored rounded too, and must be calibrated so
            undo.callback(restore, round_to(_before_work(model, plan.blocks), storage))
            finished = BlockFiles.of(model, storage, finished_blocks, undo)
            with all_called((block for _, block in plan.blocks), plan.linears, once=settings.follows_calls):
                calls = capture_block_calls(
                    model,
                    plan.blocks,
                    calibration,
                    hidden,
                    structure.family.unit,
                    lambda samples: clock.read(samples, expected),
                    data.note if journal else lambda number, inputs: None,
                )
            plan.linears.clear()  # so that the memory of those that are replaced is free
            report.samples = calls.samples
            if journal:
                resume.begin(journal, model, settings, data, len(plan.blocks), weights)
            if plan.slicing:
                method = methods.find(settings.method)
                assert isinstance(method, BlockMethod)
                report.slicing = method.compress(model, structure, plan.slicing, hidden, calls, clock)
                check_storable(model.state_dict().items(), storage, buffers)
                round_to(model.state_dict().values(), storage)
            else:
                whole = journal is not None and journal.done == len(plan.blocks)
                job = Job.of(
                    model,
                    structure,
                    plan.parts,
                    settings,
                    storage,
                    hidden,
                    calls,
                    clock,
                    report,
                    whole,
                    layer_done,
                    common,
                )
                parts = resume.shared_out(
                    journal,
                    lambda: share_out(
                        model, structure, plan, settings, hidden, calls, job.gradients, clock.sharing, common
                    ),
                )
                _compress_blocks(job, plan.blocks, parts, journal, finished, undo.pop_all)
                if not report.layers:
                    raise ModelError(f"no layer could be compressed: {' '.join(report.exceptions_made[:3])}")
    clock.finish()
    report.seconds = clock.seconds
    known = record_of(model)
    set_record(model, CompressionRecord(known.source, known.structure, known.on_disk, report=report))
    return report


def _compress_blocks(
    job: Job,
    blocks: Sequence[tuple[str, nn.Module]],
    parts: Parts,
    journal: Journal | None,
    files: BlockFiles,
    begun: Callable[[], object],
) -> None:
    """Compress the blocks one by one, but for those that are finished already, which are put back."""
    finished, report = journal.done if journal else 0, job.report
    for i, (name, block) in enumerate(blocks):
        last = i + 1 == len(blocks)
        kept = journal.block(i) if journal and i < finished else None
        before = len(report.layers), len(report.exceptions)
        with files.block(name, block):
            if kept:
                resume.put_back(job, i, name, block, kept, begun, last or finished == len(blocks))
                continue
            with explained(block, name, job.calls, i, job.hidden, job.dense):
                compress_block(job, i, name, block, parts[name], begun, last)
            if journal:
                resume.keep(journal, job, i, block, report.layers[before[0] :], report.exceptions[before[1] :])
        log.info("block %d/%d: %s so far", i + 1, len(blocks), shares(job.clock.seconds))


def prepare(
    model: nn.Module, family: Family | None, settings: CompressionSettings, undo: ExitStack
) -> tuple[Structure, Plan]:
    """Ready a model for its blocks to be run one by one, and plan what is done to each.

    Args:
        undo: is given what gives the model back as it was.
    """
    training = [module for module in model.modules() if module.training]
    known = vars(model).get("oats_vision")

    def as_it_was() -> None:
        for module in training:
            module.training = True
        if known is not None:
            set_record(model, known)
        else:
            vars(model).pop("oats_vision", None)

    undo.callback(as_it_was)
    structure = structure_of(model, family)
    set_record(model, replace(record_of(model), structure=structure))
    model.eval()
    structure.prepare(model)
    undo.callback(structure.restore, model)
    return structure, plan_model(model, structure, settings)


@contextmanager
def plain_arithmetic(model: nn.Module) -> Iterator[None]:
    """Whatever autocast, default dtype or inference mode the caller has set, results are those without."""
    first, default = floating(model), torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(first.dtype, torch.float32))
    try:
        with (
            torch.autocast("cpu", enabled=False),
            torch.autocast(first.device.type, enabled=False),
            torch.inference_mode(False),  # whose tensors have no gradients
            torch.no_grad(),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


def _leave_inference_mode(model: nn.Module) -> None:
    """Give a model that was made, or has run, in inference mode tensors that gradients can go through."""
    for module in model.modules():
        for name, value in list(vars(module).items()):  # what its forward pass keeps
            if isinstance(value, Tensor) and value.is_inference():
                setattr(module, name, value.clone())
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_inference():
                setattr(module, name, nn.Parameter(parameter.clone(), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_inference():
                setattr(module, name, buffer.clone())


@contextmanager
def _unless_begun(model: nn.Module, undo: ExitStack) -> Iterator[None]:
    """Of what is to be undone, undo it only if something is wrong before the model's first layer is replaced."""
    try:
        yield
    except BaseException:
        if any(isinstance(module, (SparseLowRankLinear, SlicedBlock)) for module in model.modules()):
            undo.pop_all()
        raise
    undo.pop_all()


def _before_work(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> list[Tensor]:
    """The tensors of a model that matter before its second block: those in no other block than the first."""
    later = tuple(f"{name}." for name, _ in blocks[1:])
    tensors = [tensor for name, tensor in model.state_dict().items() if not later or not name.startswith(later)]
    return [tensor for tensor in tensors if not tensor.is_meta]  # those are rounded as they are read
