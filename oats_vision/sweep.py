"""`oats-vision sweep`: a grid of compressions of one model, each measured and written down before the next begins.

A sweep's folder holds sweep.json (what all cells share), cells/NAME.json (one finished cell and seed), sweep.csv and
sweep.html, which are made of those, and the cells' checkpoints if they are kept.
"""

import copy
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from oats_vision import checkpoint
from oats_vision.compare import Run, comparison_page
from oats_vision.config import METHOD_DEFAULTS, CompressionSettings, RunConfig
from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ConfigError, ModelError
from oats_vision.evaluation import Perplexity, Top1
from oats_vision.grid import AXES, FOR_ONE_RUN, SweepConfig, cell_name, cell_words
from oats_vision.machine import choose_device
from oats_vision.page import write_page
from oats_vision.run import Draw, Prepared, compress_and_write, measure_stored, prepare
from oats_vision.sweep_table import write_csv

log = logging.getLogger(__name__)

STATE, CELLS, CSV, PAGE = "sweep.json", "cells", "sweep.csv", "sweep.html"
FORMAT = "oats_vision sweep"
# settings that a sweep may be continued with other values of: no figure depends on them
FREE = {*AXES, *FOR_ONE_RUN, "out", "workers", "activation_memory", "report", "dry_run"}


class Row(BaseModel):
    """One finished cell and seed.

    settings: as they were asked for. parameters: of the whole model, dense and compressed. error, output_error: mean
    over the layers, if they have one. seconds: of the cell, with its measurement.
    """

    model_config = ConfigDict(frozen=True)

    settings: CompressionSettings
    seed: int
    run: Run
    parameters: tuple[int, int]
    error: float | None
    output_error: float | None
    seconds: float

    @property
    def name(self) -> str:
        return _name(self.settings, self.seed)


@dataclass(frozen=True)
class Failure:
    """A cell that could not be done, and why."""

    settings: CompressionSettings
    seed: int
    reason: str

    @property
    def name(self) -> str:
        return _name(self.settings, self.seed)


@dataclass(frozen=True)
class Sweep:
    """All rows of a sweep's folder, earlier ones too, and what failed this time."""

    config: SweepConfig
    rows: list[Row]
    failures: list[Failure]

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "out": str(self.config.out),
            "rows": [{"name": row.name, **row.model_dump(mode="json")} for row in self.rows],
            "failed": [{"name": one.name, "reason": one.reason} for one in self.failures],
            "skipped": list(self.config.grid.skipped),
        }


Job = tuple[CompressionSettings, int]


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
        state = _read_state(config)
        rows = _read_rows(config.out)
        jobs = [(settings, seed) for seed in config.seeds for settings in config.grid.cells]
        missing = [job for job in jobs if not _is_done(config, rows, job)]
        for line in [*config.grid.notes, *(f"skipped: {reason}" for reason in config.grid.skipped)]:
            display.console.print(line, soft_wrap=True)
        if len(missing) < len(jobs):
            display.console.print(f"{len(jobs) - len(missing)} of {len(jobs)} cells are done")
        with _said_once():
            failures = _do(config, state, missing, rows, display) if missing else []
        done = in_order(rows.values())
        write_csv(config.out / CSV, done, failures)
        if done:
            write_page(comparison_page(_runs(done), _title(config.base.model)), config.out / PAGE)
    return Sweep(config, done, failures)


@contextmanager
def _said_once() -> Iterator[None]:
    """Keep warnings from being repeated for each cell."""

    def new(seen: set[str], record: logging.LogRecord) -> bool:
        known = record.getMessage() in seen
        seen.add(record.getMessage())
        return not known

    filters = [(handler, partial(new, set[str]())) for handler in logging.getLogger().handlers]
    for handler, one in filters:
        handler.addFilter(one)
    try:
        yield
    finally:
        for handler, one in filters:
            handler.removeFilter(one)


def in_order(rows: Any) -> list[Row]:
    """Rows by method, pattern, rate, rank ratio and seed."""
    methods = list(METHOD_DEFAULTS)

    def place(row: Row) -> tuple[Any, ...]:
        rate, ratio, pattern = row.settings.terms
        kind = ("row", "layer", "n:m").index(pattern.kind)
        return methods.index(row.settings.method), kind, str(pattern), rate, ratio, cell_name(row.settings), row.seed

    return sorted(rows, key=place)


def _do(
    config: SweepConfig, state: dict[str, Any] | None, missing: Sequence[Job], rows: dict[str, Row], display: Display
) -> list[Failure]:
    """Do the missing cells, add their rows, and return what failed."""
    model, prepared = prepare(config.base)
    if state is not None and state["dense_sha256"] != prepared.source.dense_sha256:
        raise ConfigError(f"{config.out}: the weights of {config.base.model} are others now: give another out")
    before: Top1 | Perplexity | None = None
    failures, seconds = list[Failure](), list[float]()
    for seed, jobs in groupby(missing, lambda job: job[1]):
        draw = prepared.draw(model, seed, display)
        before = before or prepared.score(model, "dense", display)
        if state is None:  # all that the cells share is right
            state = _write_state(config, prepared)
        (config.out / CELLS).mkdir(exist_ok=True)
        for settings, _ in jobs:
            number = len(config.seeds) * len(config.grid.cells) - len(missing) + len(seconds) + 1
            display.console.print(_announcement(config, settings, seed, number, seconds, len(missing)), soft_wrap=True)
            start = time.perf_counter()
            try:
                row = _cell(config, model, prepared, draw, before, settings, seed, display)
            except (ConfigError, ModelError) as problem:
                failures.append(Failure(settings, seed, " ".join(str(problem).split())))
                display.console.print(f"failed: {failures[-1].reason}", soft_wrap=True)
            else:
                checkpoint.write_json(config.out / CELLS / f"{row.name}.json", row.model_dump(mode="json"))
                rows[row.name] = row
            write_csv(config.out / CSV, in_order(rows.values()), failures)
            seconds.append(time.perf_counter() - start)
    return failures


def _cell(
    config: SweepConfig,
    model: nn.Module,
    prepared: Prepared,
    draw: Draw,
    before: Top1 | Perplexity | None,
    settings: CompressionSettings,
    seed: int,
    display: Display,
) -> Row:
    """Compress a copy of the model, and measure it as `compress` does."""
    start = time.perf_counter()
    with _directory(config, _name(settings, seed)) as directory:
        own = settings.model_dump() | {"seed": seed, "out": directory, "overwrite": directory.exists()}
        outcome = compress_and_write(copy.deepcopy(model), prepared.run.model_copy(update=own), prepared, draw, display)
        measure_stored(outcome, prepared, draw, before, display)
        outcome.seconds = time.perf_counter() - start
        checkpoint.write_json(directory / checkpoint.REPORT, outcome.to_dict())
        run = replace(Run.read(directory), name=cell_name(settings))
    layers = outcome.result.report.layers
    outputs = [max(layer.output_errors.values()) for layer in layers if layer.output_errors]
    return Row(
        settings=settings,
        seed=seed,
        run=run,
        parameters=outcome.result.parameters,
        error=statistics.mean(layer.error for layer in layers) if layers else None,
        output_error=statistics.mean(outputs) if outputs else None,
        seconds=outcome.seconds,
    )


@contextmanager
def _directory(config: SweepConfig, name: str) -> Iterator[Path]:
    """Where a cell's checkpoint is written: in the sweep's folder, for good or until it is measured."""
    if config.keep:
        yield config.out / name
        return
    with tempfile.TemporaryDirectory(dir=config.out, prefix=".cell.writing-") as temporary:
        yield Path(temporary) / name


def _is_done(config: SweepConfig, rows: dict[str, Row], job: Job) -> bool:
    name = _name(*job)
    return (
        name in rows
        and rows[name].settings == job[0]
        and (not config.keep or checkpoint.is_checkpoint(config.out / name))
    )


def _announcement(
    config: SweepConfig, settings: CompressionSettings, seed: int, number: int, seconds: Sequence[float], missing: int
) -> str:
    """`cell 3/6: oats, rate 0.5, rank ratio 0.2 (about 4 min left)`."""
    total = len(config.seeds) * len(config.grid.cells)
    of_seed = f", seed {seed}" if len(config.seeds) > 1 else ""
    left = f" (about {_duration(statistics.mean(seconds) * (missing - len(seconds)))} left)" if seconds else ""
    return f"cell {number}/{total}: {cell_words(settings)}{of_seed}{left}"


def _duration(seconds: float) -> str:
    """Seconds in the unit that people use for as many."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _name(settings: CompressionSettings, seed: int) -> str:
    return f"{cell_name(settings)}-seed{seed}"


def _title(model: str) -> str:
    return f"{model}: sweep"


def _runs(rows: Sequence[Row]) -> list[Run]:
    """The rows as a comparison shows them; seeds are named where there are several."""
    if len({row.seed for row in rows}) == 1:
        return [row.run for row in rows]
    return [replace(row.run, name=row.name, seed=row.seed) for row in rows]


def _shared(base: RunConfig, unit: Any) -> dict[str, Any]:
    """The settings that all cells of a sweep share, and every figure may depend on."""
    fields = base.completed(unit).model_dump(mode="json", exclude=FREE)
    return fields | {"device": str(choose_device(base.device))}


def _read_state(config: SweepConfig) -> dict[str, Any] | None:
    """What a folder says of the sweep that is in it, None if there is none yet; and see that it is this one.

    Raises:
        CheckpointError: the folder holds something else.
        ConfigError: its sweep has other settings.
    """
    out = config.out
    if not out.exists():
        return None
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file: give another out")
    _tidy(out)
    if all(entry.name.startswith(".") for entry in out.iterdir()):
        return None
    try:
        state = json.loads((out / STATE).read_text())
        shared, unit = dict(state["shared"]), state["unit"]
        ours = state["format"] == FORMAT and "dense_sha256" in state
    except FileNotFoundError:
        ours = False
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise CheckpointError(f"{out / STATE} is damaged: {problem}") from None
    if not ours:
        raise CheckpointError(f"{out} is no folder of a sweep: give another out")
    now = _shared(config.base, unit)
    differ = [name for name in now if name in shared and shared[name] != now[name]]
    if differ:
        words = "; ".join(f"{name} is {shared[name]} there and {now[name]} here" for name in differ)
        raise ConfigError(f"{out} holds a sweep with other settings: {words}. Give these, or another out")
    return state


def _tidy(out: Path) -> None:
    """Remove what a killed sweep was writing."""
    for left in out.glob(".*.writing-*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in [*out.glob(".sweep.*"), *(out / CELLS).glob(".*")]:
        left.unlink(missing_ok=True)


def _write_state(config: SweepConfig, prepared: Prepared) -> dict[str, Any]:
    """Make the folder of a new sweep."""
    state = {
        "format": FORMAT,
        "format_version": 1,
        "unit": prepared.unit,
        "dense_sha256": prepared.source.dense_sha256,
        "shared": _shared(config.base, prepared.unit),
    }
    try:
        config.out.mkdir(exist_ok=True)
    except OSError as problem:
        raise CheckpointError(f"{config.out} cannot be written: {problem}") from None
    checkpoint.write_json(config.out / STATE, state)
    return state


def _read_rows(out: Path) -> dict[str, Row]:
    """The finished cells, by name; what cannot be read is done again."""
    rows = {}
    for file in sorted((out / CELLS).glob("[!.]*.json")):
        try:
            row = Row.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as problem:
            log.warning("%s cannot be read, and its cell is done again: %s", file, str(problem).splitlines()[0])
        else:
            rows[row.name] = row
    return rows
