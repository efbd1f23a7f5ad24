"""The rows of a sweep as people look at them: with the mean over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from oats_vision.analysis.compare import short
from oats_vision.analysis.compared import ComparedModel
from oats_vision.compression import methods
from oats_vision.evaluation import results
from oats_vision.evaluation.results import Evaluation, Metric
from oats_vision.evaluation.speed import Timing
from oats_vision.runs.grid import AXES

if TYPE_CHECKING:
    from oats_vision.compression.settings import CompressionSettings
    from oats_vision.runs.sweep import Sweep
    from oats_vision.runs.sweep_rows import Row


SPREAD = (
    "Each run is the mean over its seeds, and ranges are one standard deviation to both sides; those of a run with one "
    "seed are 95% intervals."
)


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
    cells = [list(rows) for _, rows in groupby(sweep.rows, lambda row: row.run.name)]
    figures = [[_figures(row) for row in rows] for rows in cells]
    headings = list(dict.fromkeys(name for cell in figures for one in cell for name in one))
    what = [_settings(rows[0].settings) for rows in cells]
    failed = list(dict.fromkeys(_settings(one.settings) for one in sweep.failures))
    axes = [i for i in range(len(AXES)) if len({one[i] for one in [*what, *failed]}) > 1] or list(range(len(AXES)))
    table = Table(title=_title(sweep, [i for i in range(len(AXES)) if i not in axes]), title_justify="left")
    table.box, table.padding, table.pad_edge, table.collapse_padding = SIMPLE_HEAD, (0, 1, 0, 0), False, True
    table.add_column("", justify="left")
    for i in axes:
        table.add_column(AXES[i].replace("_", " "), justify="left" if AXES[i] in ("method", "pattern") else "right")
    for heading in headings:
        table.add_column(heading, justify="right")
    dense = _dense(sweep.rows)
    blank = [""] * len(axes)
    table.add_row("dense", *blank, *(str(dense.get(heading, "")) for heading in headings), end_section=True)
    for one, cell in zip(what, figures, strict=True):
        found = [[of_seed[heading] for of_seed in cell if heading in of_seed] for heading in headings]
        table.add_row("", *(one[i] for i in axes), *map(_over_seeds, found))
    for one in failed:
        table.add_row("failed", *(one[i] for i in axes))
    return table


def _title(sweep: Sweep, shared: Sequence[int]) -> str:
    """The model, what all cells share of the grid, and what the figures are."""
    first = _settings(sweep.rows[0].settings)
    words = [f"{AXES[i].replace('_', ' ')} {first[i]}" for i in shared if first[i]]
    several = len({row.seed for row in sweep.rows}) > 1
    seeds = ": mean ± standard deviation over the seeds" * several
    return f"{', '.join([sweep.rows[0].run.model, *words])}{seeds}"


def _settings(settings: CompressionSettings) -> tuple[str, ...]:
    return tuple(_setting(settings, name) for name in AXES)


def _setting(settings: CompressionSettings, name: str) -> str:
    method = methods.find(settings.method)
    if name == "pattern" and not method.keeps_sparse:
        return ""
    if name == "rank_ratio" and method.rank_ratio is not None:
        return ""
    value = settings.named.get(name, "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _over_seeds(figures: Sequence[Figure]) -> str:
    """The mean, and the deviation in place of an interval."""
    if len(figures) < 2 or not figures[0].varies:
        return "".join(map(str, figures[:1]))
    values, first = [figure.value for figure in figures], figures[0]
    deviation = f"± {statistics.stdev(values):.{first.digits}f}"
    return str(first._replace(value=statistics.mean(values), small=deviation))


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
        small = str(run.labelled.difference[name]).replace(" points", "")
        found[name] = _of_labelled(run.labelled.pair(name)[1], small)
    error = row.error if row.output_error is None else row.output_error
    if not run.cost and error is not None:
        found["error of layers"] = Figure(error, 4)
    return found


def _of_metric(metric: Metric) -> Figure:
    digits, unit = {"percent": (1, "%"), "ratio": (4, " x")}.get(metric.kind, (4, ""))
    return Figure(metric.value, digits, unit, metric.interval)


def _dense(rows: Sequence[Row]) -> dict[str, Figure]:
    """What the table shows of the dense model, which every row was timed in turns with."""
    run = rows[0].run
    found = {"MB": Figure(run.dense_bytes / 1e6, 2)}
    for what in dict.fromkeys(timing.what for row in rows for timing in row.run.speed):
        seconds = statistics.median(timing.dense for row in rows for timing in row.run.speed if timing.what == what)
        found[short(what)] = Figure(1, 2, " x", f"{seconds * 1e3:.1f} ms")
    if run.labelled and run.labelled.compared:
        found[run.labelled.compared] = _of_labelled(run.labelled.pair(run.labelled.compared)[0])
    return found


def _of_labelled(figure: results.Figure, small: str = "") -> Figure:
    unit, digits = ("%", 2) if figure.kind == "percent" else ("", 3)
    return Figure(figure.value, digits, unit, small)


def mean_runs(rows: Sequence[Row]) -> list[ComparedModel]:
    """One run for each cell: the mean over its seeds, with the standard deviation to both sides for an interval."""
    cells = groupby(rows, lambda row: row.run.name)
    return [_mean_run([row.run for row in seeds]) for seeds in (list(group) for _, group in cells)]


def _mean_run(runs: Sequence[ComparedModel]) -> ComparedModel:
    if len(runs) == 1:
        return runs[0]
    first = runs[0]
    timings = [one for run in runs for one in run.speed]  # which may have failed in some
    whats = [one.what for one in timings]
    shared = [block for block in first.errors if all(block in run.errors for run in runs)]  # dense in none
    mean: dict[str, Any] = {
        "bytes": round(statistics.mean(run.bytes for run in runs)),
        "speed": [_mean_timing([one for one in timings if one.what == what]) for what in dict.fromkeys(whats)],
        "errors": {block: statistics.mean(run.errors[block] for run in runs) for block in shared},
    }
    if first.cost:
        costs = [run.cost for run in runs if run.cost]
        metrics = [_mean_metric(seen) for seen in zip(*(cost.metrics for cost in costs), strict=True)]
        mean["cost"] = first.cost.model_copy(update={"metrics": metrics})
    if first.labelled and first.labelled.compared:
        mean["labelled"] = _mean_labelled([run.labelled for run in runs if run.labelled], first.labelled.compared)
    return replace(first, **mean)


def _mean_timing(timings: Sequence[Timing]) -> Timing:
    """With the mean of the speedups: both sides were measured in turns, and a busy machine slows both."""
    compressed = statistics.mean(timing.compressed for timing in timings)
    speedup = statistics.mean(timing.speedup for timing in timings)
    return replace(timings[0], dense=speedup * compressed, compressed=compressed, low=None, high=None)


def _mean_metric(seen: Sequence[Metric]) -> Metric:
    value, low, high = _spread([metric.value for metric in seen])
    return seen[0].model_copy(update={"value": value, "low": low, "high": high})


def _mean_labelled(seen: Sequence[Evaluation], metric: str) -> Evaluation:
    changes = [evaluation.difference[metric] for evaluation in seen]
    change = changes[0].moved(*_spread([change.value for change in changes]))
    figures = [evaluation.pair(metric)[1] for evaluation in seen]
    mean = figures[0].model_copy(update={"value": statistics.mean(figure.value for figure in figures)})
    compressed = results.Score(metrics=[mean])
    return seen[0].model_copy(update={"compressed": compressed, "difference": {metric: change}})


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and one standard deviation below and above it."""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return mean, mean - deviation, mean + deviation
