"""How long a compression will take, by a trial of one block on a few samples."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import GRADIENT_SAMPLES, capture_block_calls, gradient_samples
from oats_vision.compression import methods
from oats_vision.compression.blocks import Job
from oats_vision.compression.methods import BlockMethod
from oats_vision.compression.pipeline import plain_arithmetic, prepare
from oats_vision.compression.record import CompressionReport
from oats_vision.compression.sequence import compress_block
from oats_vision.compression.settings import CompressionSettings
from oats_vision.compression.sharing import share_out
from oats_vision.data.batches import Reader, expected_samples, read_batches
from oats_vision.errors import ConfigError
from oats_vision.models.families import Family
from oats_vision.models.families.find import refuse_wrappers
from oats_vision.models.record import read_values, record_of
from oats_vision.models.structure import check_device, floating
from oats_vision.models.values import check_finite, check_storable
from oats_vision.progress import Clock, Estimate, Step, Unit


@dataclass(frozen=True)
class Trial:
    """Seconds that a few samples and one block took.

    first: of the first batch, which runs through the whole model. sample: of reading one more sample. checks: of a
    block, before any is changed. statistics and applying: of `samples` on the block. decomposing: of its weights.
    gradients: of the dense model's output, on `samples` of the `gradient_samples` that they are taken on. budgets: to
    see what the block's weights may lose.
    """

    samples: int
    first: float
    sample: float
    checks: float
    statistics: float
    decomposing: float
    applying: float
    gradients: float = 0.0
    budgets: float = 0.0
    gradient_samples: int = GRADIENT_SAMPLES

    def extrapolated(self, samples: int, blocks: int, work: float, unit: Unit) -> Estimate:
        """To all samples and blocks.

        Args:
            work: weights of all blocks, as a multiple of this one's.
        """
        reading = self.first + self.sample * samples + self.checks * blocks
        each = samples / self.samples
        few = min(samples, max(self.gradient_samples, self.samples)) / self.samples
        budgets = self.gradients * few + self.budgets * work
        total = reading + each * (self.statistics * blocks + self.applying * (blocks - 1)) + self.decomposing * work
        return Estimate(total + budgets, reading, blocks, unit, budgets)


@torch.no_grad()
def trial(
    model: nn.Module,
    calibration: Any,
    settings: CompressionSettings,
    *,
    family: Family | None = None,
    samples: int | None = None,
    progress: Callable[[Step], None] = lambda step: None,
) -> Estimate:
    """How long `compress` will take, by one block on the first two batches; the model stays as it is.

    Args:
        calibration: as for `compress`; its first two batches are read.
        samples: that there are, if `calibration` does not say so itself.

    Raises:
        OatsVisionError: as `compress` would.
    """
    samples = samples or expected_samples(calibration)
    if samples is None:
        raise ConfigError("samples must be given: the calibration data do not say how many there are")
    check_finite(model)
    check_device(model)
    refuse_wrappers(model)
    storage = getattr(torch, settings.storage_dtype) if settings.storage_dtype else floating(model).dtype
    check_storable(read_values(model, model.state_dict().items()), storage, {name for name, _ in model.named_buffers()})
    with plain_arithmetic(model), ExitStack() as undo, ActivationStore(math.inf) as hidden:
        structure, plan = prepare(model, family, settings, undo)
        unit = structure.family.unit
        index = next(i for i, work in enumerate(plan.work) if work)  # others may be left dense
        name, original = plan.blocks[index]
        on_disk = record_of(model).on_disk
        block = on_disk.copy_of(name) if on_disk else deepcopy(original)
        batches = islice(read_batches(calibration, Reader.of(model, unit)), 2)
        data = (inputs.values if inputs.by_name else inputs.tensor for inputs in batches)
        clock, marks = Clock(plan.work, unit, progress), [(0, time.perf_counter())]

        def tell(read: int) -> None:
            marks.append((read, time.perf_counter()))
            clock.read(read, samples)

        calls = capture_block_calls(model, plan.blocks, data, hidden, unit, tell)
        (_, start), (first, then), (tried, end) = (*marks, marks[-1])[:3]
        sample = (end - then) / (tried - first) if tried > first else 0.0
        read = clock.seconds["reading"]
        if plan.slicing:
            alone = nn.ModuleList([block])
            method = methods.find(settings.method)
            assert isinstance(method, BlockMethod)
            method.compress(alone, replace(structure, blocks=""), plan.slicing, hidden, calls, clock)
        else:
            report = CompressionReport(structure.family.name, settings, tried, unit)
            job = Job.of(model, structure, plan.parts, settings, storage, hidden, calls, clock, report)
            alone_plan = replace(plan, blocks=[(name, original)], parts={name: plan.parts[name]})
            share_out(model, structure, alone_plan, settings, hidden, calls, job.gradients, clock.sharing)
            compress_block(job, index, name, block, plan.parts[name], lambda: None, last=False)
        taken, tokens = clock.seconds, hidden[0].shape[1:-1].numel()
    done = Trial(
        tried,
        then - start - sample * first,
        sample,
        taken["reading"] - read,
        taken["statistics"],
        taken["decomposing"],
        taken["applying"],
        taken.get("gradients", 0.0),
        taken.get("budgets", 0.0),
        gradient_samples(tokens, samples),
    )
    return done.extrapolated(samples, len(plan.blocks), sum(plan.work) / plan.work[index], unit)
