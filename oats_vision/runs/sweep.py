"""`oats-vision sweep`: a grid of compressions of one model, each measured and written down before the next begins."""

import copy
import hashlib
import logging
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from oats_vision import checkpoint
from oats_vision.analysis.compare import comparison_page
from oats_vision.analysis.compared import ComparedModel
from oats_vision.analysis.page import write_page
from oats_vision.analysis.tables import as_text
from oats_vision.compression.journal import Journal
from oats_vision.compression.settings import CompressionSettings
from oats_vision.data.pictures import Batches
from oats_vision.data.text import Sequences
from oats_vision.display import Display
from oats_vision.errors import ConfigError, DataError, ModelError, one_line, saying
from oats_vision.evaluation.protocols import Measurement
from oats_vision.models.weights import tensor_bytes
from oats_vision.progress import count, duration
from oats_vision.runs.grid import SweepConfig, cell_name, cell_words
from oats_vision.runs.partial import journal_of, see_same
from oats_vision.runs.run import CalibrationSet, PreparedRun, compress_and_write, measure_stored, prepare
from oats_vision.runs.sweep_folder import CSV, PAGE, read_rows, read_state, write_row, write_state
from oats_vision.runs.sweep_rows import Failure, Row, in_order, row_name, write_csv
from oats_vision.runs.sweep_table import SPREAD, mean_runs, sweep_table

UNKEPT = ".cell"  # folder of the checkpoint that is measured, in the sweep's own


class SeededCell(NamedTuple):
    """A cell of the grid and the seed of its calibration data."""

    settings: CompressionSettings
    seed: int


@dataclass(frozen=True)
class Sweep:
    """All rows of a sweep's folder, earlier ones too, and what failed this time.

    missing: names of the cells that are still to be done, after a dry run.
    """

    config: SweepConfig
    rows: list[Row]
    failures: list[Failure]
    missing: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What is missing of the grid, and why."""
        failed = dict.fromkeys(f"failed: {cell_words(one.settings)}: {one.reason}" for one in self.failures)
        return [*failed, *(f"skipped: {reason}" for reason in self.config.grid.skipped)]

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "out": str(self.config.out),
            "rows": [{"name": row.name, **row.model_dump(mode="json")} for row in self.rows],
            "failed": [{"name": one.name, "reason": one.reason} for one in self.failures],
            "skipped": list(self.config.grid.skipped),
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        return "\n".join([*([as_text(sweep_table(self))] if self.rows else []), *self.notes])


def sweep(config: SweepConfig, display: Display | None = None) -> Sweep:
    """Do what is missing of a sweep, and return all of it.

    Args:
        config: see `sweep_config`.

    Raises:
        OatsVisionError: something that all cells share is wrong, or the folder is another sweep's. What only one cell
            fails of is among the failures.
    """
    display = display or Display()
    with checkpoint.locked(config.out):
        state = read_state(config.out, config.base)
        rows = {row.name: row for row in read_rows(config.out, Row)}
        cells = [SeededCell(settings, seed) for seed in config.seeds for settings in config.grid.cells]
        missing = [cell for cell in cells if not _is_done(config, rows, cell)]
        for line in [*config.grid.notes, *(f"skipped: {reason}" for reason in config.grid.skipped)]:
            display.console.print(line, soft_wrap=True)
        if len(missing) < len(cells):
            display.console.print(f"{len(cells) - len(missing)} of {len(cells)} cells are done")
        if config.base.dry_run:
            return Sweep(config, in_order(rows.values()), [], tuple(row_name(*cell) for cell in missing))
        failures: list[Failure] = []
        if missing:
            with said_once(), saying(lambda: f"the same command goes on after {count(len(rows), 'cell')}" * bool(rows)):
                failures = _do(config, state, missing, rows, display)
        done = Sweep(config, in_order(rows.values()), failures)
        if done.rows:
            write_csv(config.out / CSV, done.rows, failures)
            if config.base.report:
                _write_page(done)
    return done


def _write_page(done: Sweep) -> None:
    spread = SPREAD if len({row.seed for row in done.rows}) > 1 else None
    title = f"{done.config.base.model}: sweep"
    write_page(comparison_page(mean_runs(done.rows), title, notes=done.notes, spread=spread), done.config.out / PAGE)


# what a cell's settings may bring about; the others may do
_OF_ONE_CELL = (ConfigError, ModelError, DataError, ArithmeticError, ValueError, RuntimeError, MemoryError)


@dataclass
class _Dense:
    """The dense model, all that is known of it, and its score if there are data to score it on."""

    model: nn.Module
    prepared: PreparedRun
    score: Measurement | None = None


def _do(
    config: SweepConfig,
    state: dict[str, Any] | None,
    missing: Sequence[SeededCell],
    rows: dict[str, Row],
    display: Display,
) -> list[Failure]:
    """Do the missing cells, add their rows, and return what failed."""
    dense = _Dense(*prepare(config.base, display))
    weights = dense.prepared.source.dense_sha256
    if state is not None and state["dense_sha256"] != weights:
        raise ConfigError(f"{config.out}: the weights of {config.base.model} have changed since: give another out")
    failures, seconds = list[Failure](), list[float]()
    for seed, cells in groupby(missing, lambda cell: cell.seed):
        batches = dense.prepared.open(seed)
        data = _digest_of(batches)
        before = {row.data_sha256 for row in rows.values() if row.seed == seed and row.data_sha256}
        if data and before - {data}:
            raise ConfigError(f"{config.out}: the data of seed {seed} have changed since: give another out")
        calibration = dense.prepared.calibration_set(dense.model, batches, display)
        dense.score = dense.score or dense.prepared.score(dense.model, "dense", display)
        if state is None:  # all that the cells share is seen to be right
            state = write_state(config.out, config.base, dense.prepared.task.unit, weights)
        for settings, _ in cells:
            display.console.print(_announcement(config, settings, seed, seconds, len(missing)), soft_wrap=True)
            start = time.perf_counter()
            journal = journal_of(_directory(config, row_name(settings, seed)), "delete that folder")
            try:
                row = _cell(config, dense, calibration, settings, seed, journal, display)
            except _OF_ONE_CELL as problem:
                failures.append(Failure(settings, seed, one_line(problem)))
                display.console.print(f"failed: {failures[-1].reason}", soft_wrap=True)
            else:
                row = row.model_copy(update={"data_sha256": data})
                write_row(config.out, row.name, row)
                rows[row.name] = row
            journal.remove()
            shutil.rmtree(config.out / UNKEPT, ignore_errors=True)
            write_csv(config.out / CSV, in_order(rows.values()), failures)
            seconds.append(time.perf_counter() - start)
    return failures


def _cell(
    config: SweepConfig,
    dense: _Dense,
    calibration: CalibrationSet,
    settings: CompressionSettings,
    seed: int,
    journal: Journal,
    display: Display,
) -> Row:
    """Compress a copy of the model, and measure it as `compress` does."""
    start, prepared, directory = time.perf_counter(), dense.prepared, _directory(config, row_name(settings, seed))
    directory.parent.mkdir(exist_ok=True)
    own = {"seed": seed, "out": directory, "overwrite": directory.exists(), "report": config.keep}
    own_config = prepared.config.model_copy(update=settings.model_dump() | own)
    storage = settings.storage_dtype or prepared.settings.storage_dtype
    stored = settings.model_copy(update={"storage_dtype": storage})
    see_same(journal, own_config, stored, display)
    model = copy.deepcopy(dense.model)
    finished = compress_and_write(model, own_config, stored, prepared, calibration, journal, display)
    del model
    measure_stored(finished, prepared, calibration, dense.score, display)
    finished.seconds = time.perf_counter() - start
    finished.write(display)
    figures = replace(ComparedModel.read(directory), name=cell_name(settings))
    layers = finished.result.report.layers
    errors = [max(layer.errors.values()) for layer in layers]
    outputs = [max(layer.output_errors.values()) for layer in layers if layer.output_errors]
    return Row(
        settings=settings,
        seed=seed,
        run=figures,
        parameters=finished.result.parameters,
        error=statistics.mean(errors) if errors else None,
        output_error=statistics.mean(outputs) if outputs else None,
        seconds=finished.seconds,
    )


def _digest_of(batches: Batches | Sequences) -> str | None:
    """SHA-256 of calibration data; None of a stream."""
    if isinstance(batches, Sequences):
        return hashlib.sha256(tensor_bytes(batches.ids)).hexdigest()
    return batches.fingerprint() if batches.fingerprint else None


def _directory(config: SweepConfig, name: str) -> Path:
    """Where a cell's checkpoint is written: in the sweep's folder, for good or until it is measured."""
    return config.out / name if config.keep else config.out / UNKEPT / name


def _is_done(config: SweepConfig, rows: dict[str, Row], cell: SeededCell) -> bool:
    name = row_name(*cell)
    kept = not config.keep or checkpoint.is_checkpoint(config.out / name)
    return name in rows and rows[name].settings == cell.settings and kept


def _announcement(
    config: SweepConfig, settings: CompressionSettings, seed: int, seconds: Sequence[float], missing: int
) -> str:
    """`cell 3/6: oats, rate 0.5, rank ratio 0.2 (about 4 min left)`.

    Args:
        seconds: of each cell that was done by now, of all that were missing.
    """
    total = len(config.seeds) * len(config.grid.cells)
    number = total - missing + len(seconds) + 1
    of_seed = f", seed {seed}" if len(config.seeds) > 1 else ""
    left = f" (about {duration(statistics.mean(seconds) * (missing - len(seconds)))} left)" if seconds else ""
    return f"cell {number}/{total}: {cell_words(settings)}{of_seed}{left}"


@contextmanager
def said_once() -> Iterator[None]:
    """Keep warnings from being repeated for each compression."""

    def new(said: set[str], record: logging.LogRecord) -> bool:
        known = record.getMessage() in said
        said.add(record.getMessage())
        return not known

    filters = [(handler, partial(new, set[str]())) for handler in logging.getLogger().handlers]
    for handler, one in filters:
        handler.addFilter(one)
    try:
        yield
    finally:
        for handler, one in filters:
            handler.removeFilter(one)
