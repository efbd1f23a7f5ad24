"""What a sweep found: one row for each cell and seed, also as a CSV file."""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from oats_vision.analysis.compared import ComparedModel
from oats_vision.compression import methods
from oats_vision.compression.settings import CompressionSettings
from oats_vision.errors import CheckpointError
from oats_vision.files import replacing, why
from oats_vision.runs.grid import AXES, cell_name


class Row(BaseModel):
    """One finished cell and seed.

    settings: as they were asked for. parameters: of the whole model, dense and compressed. error, output_error: mean
    over the layers, weighted by D and of their outputs, as far as the method knows them. seconds: of the cell, with its
    measurement. data_sha256: of the calibration data, where they are no stream.
    """

    model_config = ConfigDict(frozen=True)

    settings: CompressionSettings
    seed: int
    run: ComparedModel
    parameters: tuple[int, int]
    error: float | None
    output_error: float | None
    seconds: float
    data_sha256: str | None = None

    @property
    def name(self) -> str:
        return row_name(self.settings, self.seed)


@dataclass(frozen=True)
class Failure:
    """A cell that could not be done, and why."""

    settings: CompressionSettings
    seed: int
    reason: str

    @property
    def name(self) -> str:
        return row_name(self.settings, self.seed)


def row_name(settings: CompressionSettings, seed: int) -> str:
    return f"{cell_name(settings)}-seed{seed}"


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows by method, pattern, rate, rank ratio and seed; those by bits after those by rate, the smallest last."""
    names = methods.names()

    def place(row: Row) -> tuple[Any, ...]:
        how = row.settings.allocation
        kind = ("row", "layer", "n:m").index(how.pattern.kind)
        size = -(row.settings.bits or math.inf)
        own = names.index(row.settings.method), size, kind, str(how.pattern), how.rate, how.rank_ratio
        return *own, cell_name(row.settings), row.seed

    return sorted(rows, key=place)


def write_csv(file: Path, rows: Sequence[Row], failures: Sequence[Failure]) -> None:
    """Write one line for each cell and seed, all of them or none; see `csv_row` for the columns.

    Raises:
        CheckpointError: the file cannot be written.
    """
    lines = [csv_row(row) for row in rows]
    lines += [_identity(one.name, one.settings, one.seed) | {"failed": one.reason} for one in failures]
    columns = [name for name in dict.fromkeys(name for line in lines for name in line) if name != "failed"]
    try:
        with replacing(file) as temporary, temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [*columns, "failed"], restval="")
            writer.writeheader()
            writer.writerows(lines)
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be written: {why(problem)}") from None


def csv_row(row: Row) -> dict[str, Any]:
    """The figures of a row, by column.

    `bytes` and `parameters` are of the whole model; `error`, weighted by the scaling D, and `output_error` are the
    mean over its layers. Each metric of the cost, such as `same_class`, comes with the ends of its 95% interval,
    `_low` and `_high`. Each timing, such as `forward_batch_1`, is in milliseconds (`_ms`), with that of the dense
    model measured in turns with it (`_dense_ms`), and their ratio (`_speedup`). Accuracy on labelled data, such as
    `top1`, is in percent, with that of the dense model (`_dense`), and the change (`_change`, of a perplexity a
    factor) with its interval.
    """
    run = row.run
    line = _identity(row.name, row.settings, row.seed) | {
        "bytes": run.bytes,
        "dense_bytes": run.dense_bytes,
        "parameters": row.parameters[1],
        "dense_parameters": row.parameters[0],
        "error": _rounded(row.error),
        "output_error": _rounded(row.output_error),
    }
    for metric in run.cost.metrics if run.cost else []:
        line |= _with_interval(_column(metric.name), metric.value, metric.low, metric.high)
    for timing in run.speed:
        name = _column(timing.what)
        line[f"{name}_ms"] = _rounded(1e3 * timing.compressed)
        line[f"{name}_dense_ms"] = _rounded(1e3 * timing.dense)
        line[f"{name}_speedup"] = _rounded(timing.speedup)
    if run.labelled and run.labelled.compared:
        compared = run.labelled.compared
        name, change = _column(compared), run.labelled.difference[compared]
        dense, ours = run.labelled.pair(compared)
        line[name] = _rounded(ours.value)
        line[f"{name}_dense"] = _rounded(dense.value)
        line |= _with_interval(f"{name}_change", change.value, change.low, change.high)
    return line | {"seconds": _rounded(row.seconds)}


def _identity(name: str, settings: CompressionSettings, seed: int) -> dict[str, Any]:
    return {"name": name, **{field: settings.named.get(field) for field in AXES}, "seed": seed}


def _with_interval(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {name: _rounded(value), f"{name}_low": _rounded(low), f"{name}_high": _rounded(high)}


def _column(name: str) -> str:
    """A name fit for a column.

    >>> _column("forward, batch 1"), _column("same class"), _column("top-1"), _column("k = 20")
    ('forward_batch_1', 'same_class', 'top1', 'k_20')
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("-", ""))


def _rounded(value: float | None) -> Any:
    return "" if value is None else float(f"{value:.6g}")
