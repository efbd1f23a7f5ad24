"""One whole run of `oats-vision compress`: load, calibrate, compress, write, and measure what it cost."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oats_vision import checkpoint, ranks
from oats_vision.compression.blocks import nobody
from oats_vision.compression.common import Common
from oats_vision.compression.journal import Journal
from oats_vision.compression.pipeline import compress
from oats_vision.compression.record import record
from oats_vision.compression.recover import check_enough, recover
from oats_vision.compression.settings import CompressionSettings
from oats_vision.compression.trial import trial
from oats_vision.data.batches import expected_samples
from oats_vision.data.pictures import Batches
from oats_vision.data.text import Sequences
from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ConfigError, RankError, one_line, saying
from oats_vision.evaluation.evaluate import evaluation_of
from oats_vision.evaluation.protocols import Given, Measurement, Protocol
from oats_vision.evaluation.protocols.settings import Settings
from oats_vision.evaluation.reference import Reference
from oats_vision.evaluation.tasks import Task, task_of
from oats_vision.machine import available_memory, choose_device, dtype_of, machine, peak_memory, warn_if_slow
from oats_vision.models.loading.load import load_model, save_plain, source_of
from oats_vision.models.record import record_of, structure_of
from oats_vision.models.source import ModelSource
from oats_vision.models.structure import check_device
from oats_vision.models.transforms import Transform
from oats_vision.models.values import check_finite
from oats_vision.nn.sparse_low_rank import merge
from oats_vision.progress import Estimate
from oats_vision.runs.compress import Result, describe, measure
from oats_vision.runs.config import RunConfig
from oats_vision.runs.finished import FinishedRun
from oats_vision.runs.forecast import Forecast, forecast
from oats_vision.runs.partial import has_written, journal_of, see_same, write_noted
from oats_vision.runs.summary import log_summary
from oats_vision.runs.watch import Watch, watching

log = logging.getLogger(__name__)


@dataclass
class CalibrationSet:
    """Calibration data of one seed, and what the dense model says of the inputs that are held out of them."""

    batches: Batches | Sequences
    reference: Reference | None


@dataclass
class PreparedRun:
    """What comes before a compression, and is the same for every compression of a model.

    config: with the defaults that depend on what the model reads. parameters: of the dense model. reader: its transform
    of pictures, or its tokenizer. protocol, asked, test: what it is scored by, what that is asked for, and its data, if
    there are any.
    """

    config: RunConfig
    device: torch.device
    task: Task
    source: ModelSource
    parameters: int
    reader: Any
    protocol: Protocol[Any]
    asked: Settings | None
    test: Mapping[str, Any]

    @property
    def transform(self) -> Transform | None:
        """Of pictures."""
        return self.task.transform(self.reader)

    @property
    def tokenizer(self) -> Any:
        """Of text."""
        return self.task.tokenizer(self.reader)

    @property
    def settings(self) -> CompressionSettings:
        """Those of the run, with the precision that weights are stored in."""
        return self.config.settings(self.source.dtype)

    def open(self, seed: int, held_out: int | None = None) -> Batches | Sequences:
        """The calibration data that a seed chooses, with so many others held out, or as many as usual."""
        config = self.config.model_copy(update={"seed": seed})
        found: Batches | Sequences = self.task.calibration(config, self.reader, held_out)
        return found

    def forecast(
        self, model: nn.Module, calibration: Batches | Sequences, settings: CompressionSettings | None = None
    ) -> Forecast:
        """What compressing on these data will come to, with the run's settings or others."""
        config, others = self.config, calibration.held_out
        return forecast(
            model,
            structure_of(model),
            settings or self.settings,
            self.task.example(model, config, self.reader),
            name=config.model,
            data=config.data or "demo",
            samples=expected_samples(calibration),
            held_out=0 if others is None else expected_samples(others) or 0,
            batch_size=config.batch_size or 1,
            activation_memory=config.activation_memory,
            recover=config.recover,
        )

    def calibration_set(self, model: nn.Module, batches: Batches | Sequences, display: Display) -> CalibrationSet:
        """Ask the dense model about what is held out of the calibration data."""
        others = batches.held_out
        if not self.config.eval or others is None:
            return CalibrationSet(batches, None)
        with display.counting("dense model, held-out", self.task.unit, expected_samples(others)) as progress:
            return CalibrationSet(batches, self.task.reference(model, others, self.transform, progress))

    def score(self, model: nn.Module, which: str, display: Display) -> Measurement | None:
        """What the protocol finds, if there are data for it."""
        if self.asked is None:
            return None
        return self.protocol.function(model, Given(self.asked, self.test, self.reader, which, display))


def run(config: RunConfig, display: Display) -> FinishedRun:
    """Do what `oats-vision compress` does, and return what it made.

    Raises:
        OatsVisionError: something that was given is wrong; nothing is written then, or the checkpoint is whole and the
            message says so.
    """
    if config.searched_for:
        raise ConfigError(f"{config.searched_for} is for `oats_vision.runs.search.search`")
    if config.recover:
        ranks.refuse("`recover`")
    with checkpoint.locked(config.out) if ranks.is_main() else nullcontext():
        journal = journal_of(config.out)
        if config.restart:
            journal.restart()
        own = ranks.on_main(lambda: has_written(journal, config.out))
        ranks.on_main(lambda: checkpoint.check_target(config.out, config.overwrite or own))
        watched = watching(config.out, config.tensorboard, resumed=journal.done > 0, written=own)
        with watched if ranks.is_main() else nullcontext() as watch:
            finished = _run(config, journal, display, watch)
            if watch:
                log_summary(finished)
        journal.remove()
    return finished


def _run(config: RunConfig, journal: Journal, display: Display, watch: Watch | None) -> FinishedRun:
    """The run, once its output is seen to be free and is held; the main rank watches."""
    start = time.perf_counter()
    model, prepared = prepare(config, display, config.block_by_block)
    if watch:
        watch.begin(config.model, dtype_of(str(prepared.settings.storage_dtype)), prepared.device)
    see_same(journal, prepared.config, prepared.settings, display)
    batches = prepared.open(config.seed)
    if config.recover:
        check_enough(batches)
    planned = prepared.forecast(model, batches)
    display.lines("plan", planned.lines())
    if prepared.asked and record_of(model).on_disk:
        log.warning("each labelled batch reads all weights again: larger batches, or no labelled data, save that")
    calibration = prepared.calibration_set(model, batches, display)
    before = prepared.score(model, "dense", display)
    finished = compress_and_write(
        model, prepared.config, prepared.settings, prepared, calibration, journal, display, watch
    )
    finished.planned_memory = planned.memory.peak
    if watch:
        watch.move(config.out)
    with saying(lambda: journal.how_to_go_on), after_the_checkpoint(finished.config, prepared.task):
        del model
        measure_stored(finished, prepared, calibration, before, display)
        finished.seconds = time.perf_counter() - start
        finished.write(display)
        if config.recover and watch:
            recover_and_write(finished, prepared, calibration, journal, display, watch)
            measure_stored(finished, prepared, calibration, before, display)
            finished.seconds = time.perf_counter() - start
            finished.write(display)
        if config.merge:
            write_merged(finished, prepared)
    return finished


def write_merged(finished: FinishedRun, prepared: PreparedRun) -> None:
    """Write the model with dense weights S + U V beside the compressed ones."""
    if not ranks.is_main():
        return
    with checkpoint.new_directory(finished.config.out / checkpoint.MERGED, overwrite=False) as merged:
        dtype = dtype_of(str(finished.settings.storage_dtype))
        save_plain(merge(finished.result.model), prepared.source, dtype, merged)
        if prepared.tokenizer is not None:
            prepared.tokenizer.save_pretrained(merged)


def dry_run(
    config: RunConfig, display: Display, tell: Callable[[Forecast], None] = lambda planned: None
) -> tuple[Forecast, Estimate]:
    """What `run` would come to, and by a trial of one block on two batches how long it would take; nothing is written.

    Args:
        tell: called with what is known before the trial, which takes a while.

    Raises:
        OatsVisionError: something that was given is wrong.
    """
    ranks.refuse("`dry_run`")
    checkpoint.check_target(config.out, config.overwrite)
    model, prepared = prepare(config, display, config.block_by_block)
    return try_out(model, prepared, prepared.settings, display, tell)


def try_out(
    model: nn.Module,
    prepared: PreparedRun,
    settings: CompressionSettings,
    display: Display,
    tell: Callable[[Forecast], None],
) -> tuple[Forecast, Estimate]:
    """What compressing a model with these settings would come to, and by a trial how long it would take."""
    calibration = prepared.open(prepared.config.seed)
    planned = prepared.forecast(model, calibration, settings)
    tell(planned)
    with display.compression() as progress:
        return planned, trial(model, calibration, settings, samples=planned.samples, progress=progress)


def prepare(config: RunConfig, display: Display, low_memory: bool | None = False) -> tuple[nn.Module, PreparedRun]:
    """Load the dense model, and open the data that it is scored on.

    Args:
        low_memory: as `load_model` takes it.

    Raises:
        OatsVisionError: something that was given is wrong.
    """
    device = choose_device(config.device)
    warn_if_slow(config.dtype, device, "use `dtype=float32`")
    config.check_data()
    with display.status(f"loading {config.model}"):
        model, transform = load_dense(config, device, low_memory)
        check_device(model)
        check_finite(model)
        checkpoint.check_source(model)
    task = task_of(model)
    config = task.completed(config)
    reader = task.reader(config.model, transform)
    task.check(model, config)
    asked = task.evaluation(config)
    test = asked.open(reader) if asked else {}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return model, PreparedRun(config, device, task, source_of(model), parameters, reader, task.protocol, asked, test)


def load_dense(
    config: RunConfig, device: torch.device, low_memory: bool | None = False
) -> tuple[nn.Module, Transform | None]:
    """The model to compress, and what makes its inputs."""
    return load_model(
        config.model,
        pretrained=config.pretrained,
        image_size=config.image_size,
        dtype=dtype_of(config.dtype),
        device=device,
        trust_remote_code=config.trust_remote_code,
        low_memory=low_memory,
    )


def compress_and_write(
    model: nn.Module,
    config: RunConfig,
    settings: CompressionSettings,
    prepared: PreparedRun,
    calibration: CalibrationSet,
    journal: Journal,
    display: Display,
    watch: Watch | None = None,
    common: Common | None = None,
) -> FinishedRun:
    """Compress the model, in place, as the settings say, and write it to `config.out`.

    Args:
        journal: keeps what is done; it is to be removed once the run needs it no more.
        common: what earlier compressions found; what is found here is added.
    """
    beside = checkpoint.beside(config.out) if ranks.is_main() else nullcontext()
    with saying(lambda: journal.how_to_go_on), beside as folder:
        with display.compression() as progress:
            report = compress(
                model,
                calibration.batches,
                settings,
                activation_memory=config.activation_memory,
                progress=watch.telling(progress) if watch else progress,
                layer_done=watch.layer_done if watch else nobody,
                journal=journal,
                finished_blocks=ranks.broadcast(folder),
                common=common,
            )
        ranks.on_main(lambda: write_noted(model, config, prepared.tokenizer, journal, display))
    skipped = calibration.batches.skipped if isinstance(calibration.batches, Batches) else 0
    return written(describe(model, report, prepared.parameters), config, settings, prepared, skipped)


def written(
    result: Result, config: RunConfig, settings: CompressionSettings, prepared: PreparedRun, skipped: int
) -> FinishedRun:
    """What is known of a run whose checkpoint is in `config.out`, before it is measured."""
    return FinishedRun(
        config=config,
        settings=settings,
        result=result,
        files=ranks.on_main(lambda: _sizes(config.out)),
        skipped=skipped,
        task=prepared.task,
        protocol=prepared.protocol,
        machine=machine(prepared.device),
    )


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of each file."""
    return {file.name: file.stat().st_size for file in directory.iterdir() if file.is_file()}


def recover_and_write(
    finished: FinishedRun,
    prepared: PreparedRun,
    calibration: CalibrationSet,
    journal: Journal,
    display: Display,
    watch: Watch,
) -> None:
    """Train what the compression kept, and write the model in the place of the one-shot one."""
    config, one_shot = finished.config, finished.result
    with display.status(f"loading {config.model}"):
        dense, _ = load_dense(config, prepared.device)
    display.say(
        f"{config.out} holds the one-shot model. If its recovery is stopped, the same command goes on from "
        f"{journal.recovery}"
    )
    with display.compression() as progress:
        recover(
            one_shot.model,
            dense,
            calibration.batches,
            steps=config.recover,
            seed=config.seed,
            activation_memory=config.activation_memory,
            state=journal.recovery,
            progress=watch.telling(progress),
        )
    del dense
    watch.recovered(record(one_shot.model).report.recovery)
    with watch.aside():
        write_noted(one_shot.model, config, prepared.tokenizer, journal, display)
    finished.result = describe(one_shot.model, record(one_shot.model).report, prepared.parameters)
    finished.result.one_shot, finished.one_shot = one_shot.cost, finished.evaluation
    finished.files = _sizes(config.out)


def measure_stored(
    finished: FinishedRun,
    prepared: PreparedRun,
    calibration: CalibrationSet,
    before: Measurement | None,
    display: Display,
) -> None:
    """Measure the model as its users will have it: read from its files, in the stored precision.

    Args:
        before: what the protocol found of the dense model, if there is data to score on.
    """
    config, result = finished.config, finished.result
    was_on_disk = record_of(result.model).on_disk is not None
    del result.model  # before the other one takes memory
    large = was_on_disk and (config.low_memory or result.sizes.total > available_memory(prepared.device) / 2)
    result.model = checkpoint.load(
        config.out,
        device=prepared.device,
        dtype=dtype_of(config.dtype),
        trust_remote_code=config.trust_remote_code,
        low_memory=large,
    )
    if calibration.reference is not None:
        measure(result, result.model, calibration.reference, display, config.batch_size)
    after = prepared.score(result.model, "compressed", display)
    if prepared.asked and before and after:
        found = {"dense": before, "compressed": after}
        finished.evaluation = evaluation_of(
            prepared.protocol,
            prepared.asked,
            found,
            model=str(config.out),
            machine=finished.machine,
            dtype=config.dtype,
        )
    finished.peak_memory = peak_memory(prepared.device)


@contextmanager
def after_the_checkpoint(config: RunConfig, task: Task) -> Iterator[None]:
    """What fails from here on is no lost run, and the message says so."""
    again = task.eval_command(str(config.out), config.eval_data or ("demo" if config.model == "demo" else ""))
    complete = f"the checkpoint in {config.out} is complete"
    try:
        yield
    except SystemExit:
        log.warning("%s; measure it with: %s", complete, again)
        raise
    except RankError:
        log.warning("%s; measure it with: %s", complete, again)
        raise
    except Exception as problem:  # whatever it is, hours of work are not lost
        raise CheckpointError(
            f"{complete}; what comes after it failed: {one_line(problem)}. Measure it with: {again}"
        ) from problem
