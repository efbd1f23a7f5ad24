"""The rows of a sweep as a CSV file, and as a table with the mean over the seeds."""

from __future__ import annotations

import csv
import os
import re
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from oats_vision.compare import short
from oats_vision.config import METHOD_DEFAULTS
from oats_vision.errors import CheckpointError
from oats_vision.evaluation import Difference
from oats_vision.files import replacing
from oats_vision.results import Metric

if TYPE_CHECKING:
    from oats_vision.config import CompressionSettings
    from oats_vision.sweep import Failure, Row, Sweep

SETTINGS = ("method", "rate", "rank_ratio", "pattern")


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
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be written: {problem}") from None


def csv_row(row: Row) -> dict[str, Any]:
    """The figures of a row, by column.

    `bytes` and `parameters` are of the whole model; `error` and `output_error` the mean over its layers. Each metric of
    the cost, such as `same_class`, comes with the ends of its 95% interval, `_low` and `_high`. Each timing, such as
    `forward_batch_1`, is in milliseconds (`_ms`), with that of the dense model measured in turns with it (`_dense_ms`),
    and their ratio (`_speedup`). Accuracy on labelled data, such as `top1`, is in percent, with that of the dense model
    (`_dense`), and the change (`_change`, of a perplexity a factor) with its interval.
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
    if run.labelled and run.labelled.compared and run.labelled.dense:
        metric_name = run.labelled.compared
        name, change = _column(metric_name), run.labelled.difference[metric_name]
        line[name] = _rounded(run.labelled.compressed.values[metric_name])
        line[f"{name}_dense"] = _rounded(run.labelled.dense.values[metric_name])
        value = change.points if isinstance(change, Difference) else change.value
        line |= _with_interval(f"{name}_change", value, change.low, change.high)
    return line | {"seconds": _rounded(row.seconds)}


def _identity(name: str, settings: CompressionSettings, seed: int) -> dict[str, Any]:
    return {"name": name, **{field: getattr(settings, field) for field in SETTINGS}, "seed": seed}


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


class Figure(NamedTuple):
    """A value, how it is shown, a second line, and whether it depends on the seed."""

    value: float
    digits: int
    unit: str = ""
    small: str = ""
    varies: bool = True

    def __str__(self) -> str:
        return f"{self.value:.{self.digits}f}{self.unit}" + f"\n{self.small}" * bool(self.small)


def sweep_table(sweep: Sweep) -> Table:
    """One line for each cell, with the mean and the deviation over its seeds if it has several; the dense model first.

    Args:
        sweep: with one row at least.
    """
    several = len({row.seed for row in sweep.rows}) > 1
    cells = {
        key: [_figures(row) for row in rows] for key, rows in groupby(sweep.rows, lambda row: _settings(row.settings))
    }
    headings = list(dict.fromkeys(name for figures in cells.values() for one in figures for name in one))
    seeds = ": mean ± standard deviation over the seeds" * several
    table = Table(title=f"{sweep.rows[0].run.model}{seeds}", title_justify="left")
    table.box, table.padding, table.pad_edge, table.collapse_padding = SIMPLE_HEAD, (0, 1, 0, 0), False, True
    for name in SETTINGS:
        table.add_column(name.replace("_", " "), justify="left" if name in ("method", "pattern") else "right")
    for heading in headings:
        table.add_column(heading, justify="right")
    dense = _dense(sweep.rows[0])
    table.add_row("dense", "", "", "", *(str(dense.get(heading, "")) for heading in headings), end_section=True)
    for key, figures in cells.items():
        found = [[one[heading] for one in figures if heading in one] for heading in headings]
        table.add_row(*key, *map(_over_seeds, found, [len(figures) > 1] * len(found)))
    for key in dict.fromkeys(_settings(one.settings) for one in sweep.failures):
        table.add_row(*key, "failed")
    return table


def _settings(settings: CompressionSettings) -> tuple[str, ...]:
    return tuple(_setting(settings, name) for name in SETTINGS)


def _setting(settings: CompressionSettings, name: str) -> str:
    if name == "pattern" and settings.method in ("svd", "slicegpt"):
        return ""
    if name == "rank_ratio" and METHOD_DEFAULTS[settings.method][1] is not None:
        return ""
    value = getattr(settings, name)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _over_seeds(figures: Sequence[Figure], several: bool) -> str:
    """The mean, and the deviation in place of an interval."""
    if not figures or not several or not figures[0].varies:
        return "".join(map(str, figures[:1]))
    mean, first = statistics.mean(figure.value for figure in figures), figures[0]
    deviation = f"± {statistics.stdev(figure.value for figure in figures):.{first.digits}f}" if len(figures) > 1 else ""
    return str(first._replace(value=mean, small=deviation))


def _figures(row: Row) -> dict[str, Figure]:
    """What the table shows of a row, by heading."""
    run = row.run
    found = {"MB": Figure(run.bytes / 1e6, 2, small=f"{run.bytes / run.dense_bytes:.3f} x", varies=False)}
    for timing in run.speed:
        found[short(timing.what)] = Figure(timing.speedup, 2, " x", f"{timing.compressed * 1e3:.1f} ms")
    for metric in run.cost.metrics if run.cost else []:
        found[metric.name] = _of_metric(metric)
    if run.labelled and run.labelled.compared:
        name = run.labelled.compared
        change = run.labelled.difference[name]
        unit, digits = ("", 3) if name == "perplexity" else ("%", 2)
        small = str(change).replace(" points", "")
        found[name] = Figure(run.labelled.compressed.values[name], digits, unit, small)
    if not run.cost and row.error is not None:
        found["error of layers"] = Figure(row.error, 4)
    return found


def _of_metric(metric: Metric) -> Figure:
    digits, unit = {"percent": (1, "%"), "ratio": (4, " x")}.get(metric.kind, (4, ""))
    return Figure(metric.value, digits, unit, metric.interval)


def _dense(row: Row) -> dict[str, Figure]:
    """What the table shows of the dense model, which all rows were compared with."""
    run = row.run
    found = {"MB": Figure(run.dense_bytes / 1e6, 2)}
    found |= {short(timing.what): Figure(1, 2, " x", f"{timing.dense * 1e3:.1f} ms") for timing in run.speed}
    if run.labelled and run.labelled.dense and run.labelled.compared:
        name = run.labelled.compared
        unit, digits = ("", 3) if name == "perplexity" else ("%", 2)
        found[name] = Figure(run.labelled.dense.values[name], digits, unit)
    return found
