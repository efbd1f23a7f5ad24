"""Several compressed models side by side: one table and one page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.table import Table

from oats_vision.analysis import figures
from oats_vision.analysis.compared import ComparedModel, measured_on
from oats_vision.analysis.figures import Point
from oats_vision.analysis.page import render
from oats_vision.evaluation.results import Evaluation, Metric

ALWAYS = ("method", "rate", "rank_ratio", "pattern")  # settings that are said even if all runs share them


@dataclass(frozen=True)
class Cell:
    """What a table shows; what it sorts by; and a smaller second line."""

    text: str = ""
    key: float | str = ""
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One cell a run."""

    heading: str
    cells: list[Cell]
    numeric: bool = True


def comparison_page(
    rows: Sequence[ComparedModel], title: str, *, notes: Sequence[str] = (), spread: str | None = None
) -> str:
    """The page as text: scatters against bytes and against latency, the table, and errors by block.

    Args:
        rows: at least one.
        notes: that stand above.
        spread: what intervals mean, if not 95% confidence.
    """
    shown = columns(rows)
    errors = {f"{i}  {run.name}": run.errors for i, run in enumerate(rows, 1) if run.errors}
    return render(
        "compare.html",
        title=title,
        alike=alike(rows),
        doubts=[*doubts(rows), *notes],
        spread=spread or "Intervals are at 95%.",
        plots=scatters(rows),
        columns=shown,
        headings=[(column.heading, not column.numeric) for column in shown],
        count=len(rows),
        series=figures.SERIES,
        errors=figures.line_plot(errors, "relative error") if errors else None,
    )


def comparison_table(rows: Sequence[ComparedModel], title: str) -> Table:
    """The page's table for a terminal."""
    shown = columns(rows)
    starred = any(cell.best for column in shown for cell in column.cells)
    caption = "* best of its column" if starred else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.box, table.padding, table.pad_edge, table.collapse_padding = SIMPLE_HEAD, (0, 1, 0, 0), False, True
    for column in shown:
        table.add_column(column.heading, justify="right" if column.numeric else "left", overflow="fold")
    for i in range(len(rows)):
        cells = [column.cells[i] for column in shown]
        table.add_row(*(f"{cell.text}{'*' * cell.best}" + f"\n{cell.small}" * bool(cell.small) for cell in cells))
    return table


def alike(rows: Sequence[ComparedModel]) -> str:
    """What all runs share, and what their dense model is, in words."""
    shared = {name: texts[0] for name, texts in _what_they_are(rows).items() if len(set(texts)) == 1}
    words = ", ".join(f"{name} {text}" for name, text in shared.items() if text)
    return f"The same in all: {words}.{_dense(rows)}" if words else _dense(rows).strip()


def _dense(rows: Sequence[ComparedModel]) -> str:
    """The dense model's size and accuracy, if there is one for all."""
    found = {f"{run.dense_bytes / 1e6:.2f} MB" for run in rows}
    accuracies = {
        f", {run.labelled.compared} {run.labelled.pair(run.labelled.compared)[0].figure}"
        for run in rows
        if run.labelled and run.labelled.compared
    }
    if len({(run.model, run.dense_sha256) for run in rows}) > 1 or len(found) > 1 or len(accuracies) > 1:
        return ""
    return f" Dense: {''.join([*found, *accuracies])}."


def doubts(rows: Sequence[ComparedModel]) -> list[str]:
    """What stands in the way of comparing the runs, each in one line."""
    found = []
    if len({run.model for run in rows}) > 1:
        found.append("The runs are of different models.")
    elif len({run.dense_sha256 for run in rows if run.dense_sha256}) > 1:
        found.append(f"The runs are of different dense weights, all named {rows[0].model}.")
    if len({run.machine for run in rows if run.speed}) > 1:
        found.append("Their speed was measured on different machines or numbers of threads.")
    if len(dtypes := {run.dtype for run in rows if run.speed and run.dtype}) > 1:
        found.append(f"Their speed was measured in different precisions: {', '.join(sorted(dtypes))}.")
    if len({(run.cost.unit, run.cost.samples) for run in rows if run.cost}) > 1:
        found.append("Their agreement with the dense model was measured on different numbers of samples.")
    elif len({run.held_out for run in rows if run.cost and run.held_out}) > 1:
        found.append("Their agreement with the dense model was measured on different samples.")
    if len({measured_on(run.labelled) for run in rows if run.labelled}) > 1:
        found.append("Their accuracy was measured on different data, or with different settings.")
    elif len(precisions := _precisions(rows)) > 1:
        found.append(f"Their accuracy was measured in different precisions: {', '.join(sorted(precisions))}.")
    return found


def _precisions(rows: Sequence[ComparedModel]) -> set[str]:
    """That accuracy was measured in, as far as they are known."""
    return {run.labelled.dtype for run in rows if run.labelled and run.labelled.dtype}


def columns(rows: Sequence[ComparedModel]) -> list[Column]:
    """The table: each run's name, the settings that tell the runs apart, bytes, speed, and what compression cost."""
    table = [Column("run", [Cell(run.name, i) for i, run in enumerate(rows)], numeric=False)]
    for name, texts in _what_they_are(rows).items():
        if len(set(texts)) > 1:
            keys = [_key(text) for text in texts]
            numeric = all(isinstance(key, float) for key in keys if key)
            table.append(Column(name, [Cell(text, key) for text, key in zip(texts, keys, strict=True)], numeric))
    sizes = [Cell(f"{run.bytes / 1e6:.2f}", run.bytes, f"{run.bytes / run.dense_bytes:.3f} x") for run in rows]
    table.append(_ranked("MB", sizes, min))
    for what in dict.fromkeys(timing.what for run in rows for timing in run.speed):
        table.append(_ranked(short(what), [_speed(run, what) for run in rows], max))
    for name in dict.fromkeys(str(run.labelled.compared) for run in rows if run.labelled):
        table.append(
            _ranked(name, [_accuracy(run, name) for run in rows], min if _lower_is_better(rows, name) else max)
        )
    for name in _common_metrics(rows):
        metrics = [_metric(run, name) for run in rows]
        cells = [Cell(m.figure, m.value, m.interval) if m else Cell() for m in metrics]
        table.append(_ranked(name, cells, min if any(m and m.lower_is_better for m in metrics) else max))
    return table


def scatters(rows: Sequence[ComparedModel]) -> list[tuple[str, Markup]]:
    """What the runs cost against their bytes and against their latency, with captions; the dense model is marked."""
    name, unit, values, dense = _quality(rows)
    one_model = len({run.model for run in rows}) == 1

    def draw(caption: str, x_label: str, xs: Sequence[float | None], dense_x: float) -> list[tuple[str, Markup]]:
        points = [
            Point(str(i + 1), x, value[0], value[1], i)
            for i, (x, value) in enumerate(zip(xs, values, strict=True))
            if x is not None and value is not None
        ]
        if not points:
            return []
        mark = [] if dense is None else [Point("dense", dense_x, dense)]
        return [(f"{name} against {caption}", figures.scatter([*mark, *points], x_label, name + unit))]

    if one_model:
        plots = draw("bytes", "MB", [run.bytes / 1e6 for run in rows], rows[0].dense_bytes / 1e6)
    else:
        plots = draw("bytes", "bytes, dense = 1", [run.bytes / run.dense_bytes for run in rows], 1)
    timed = [{timing.what: timing for timing in run.speed} for run in rows]
    what = next((what for what in next(filter(None, timed), {}) if all(what in one for one in timed if one)), None)
    if what is not None:
        shares = [1 / one[what].speedup if one else None for one in timed]
        plots += draw(f"latency, {short(what)}", f"time at {short(what)}, dense = 1", shares, 1)
    return plots


Value = tuple[float, tuple[float, float] | None]  # with its interval


def _quality(rows: Sequence[ComparedModel]) -> tuple[str, str, list[Value | None], float | None]:
    """What a scatter shows of how good the runs are: its name and unit, each run's value, and the dense model's.

    Accuracy if all were measured on the same data, else the first metric of their cost, else the layers' errors.
    """
    measured = [run.labelled for run in rows if run.labelled]
    if len(measured) == len(rows) and len(set(map(measured_on, measured))) == 1 >= len(_precisions(rows)):
        name = str(measured[0].compared)
        dense = {one.pair(name)[0].value for one in measured}
        unit = ", %" if measured[0].pair(name)[0].kind == "percent" else ""
        return name, unit, [_labelled(one, name) for one in measured], dense.pop() if len(dense) == 1 else None
    for name in _common_metrics(rows)[:1]:
        metrics = [_metric(run, name) for run in rows]
        kinds = {(metric.kind, _of_dense(metric)) for metric in metrics if metric}
        if len(kinds) == 1:
            kind, best = kinds.pop()
            unit = {"percent": ", %", "ratio": ", dense = 1"}.get(kind, "")
            return name, unit, [(m.value, (m.low, m.high)) if m else None for m in metrics], best
    errors = [(sum(run.errors.values()) / len(run.errors), None) if run.errors else None for run in rows]
    return "mean relative error of the layers", "", list(errors), 0.0


def _labelled(evaluation: Evaluation, name: str) -> Value:
    dense, ours = evaluation.pair(name)
    return ours.value, evaluation.difference[name].around(dense.value)


def _of_dense(metric: Metric) -> float:
    """What the dense model itself would have."""
    if metric.kind == "percent":
        return 100.0
    return 0.0 if metric.kind == "number" and metric.lower_is_better else 1.0


def _lower_is_better(rows: Sequence[ComparedModel], name: str) -> bool:
    """Of a metric on labelled data."""
    return any(
        run.labelled.pair(name)[0].lower_is_better for run in rows if run.labelled and name == run.labelled.compared
    )


def _common_metrics(rows: Sequence[ComparedModel]) -> list[str]:
    """Names of the metrics that every run with a cost has."""
    costs = [[metric.name for metric in run.cost.metrics] for run in rows if run.cost]
    return [name for name in dict.fromkeys(costs[0]) if all(name in names for names in costs)] if costs else []


def _metric(run: ComparedModel, name: str) -> Metric | None:
    return next((metric for metric in run.cost.metrics if metric.name == name), None) if run.cost else None


def _speed(run: ComparedModel, what: str) -> Cell:
    for timing in run.speed:
        if timing.what == what:
            return Cell(f"{timing.speedup:.2f} x", timing.speedup, f"{timing.compressed * 1e3:.1f} ms")
    return Cell()


def _accuracy(run: ComparedModel, name: str) -> Cell:
    if not run.labelled or run.labelled.compared != name:
        return Cell()
    _, ours = run.labelled.pair(name)
    return Cell(ours.figure, ours.value, str(run.labelled.difference[name]).replace(" points", ""))


def _ranked(heading: str, cells: list[Cell], best: Callable[[list[float]], float]) -> Column:
    """A column with its best values marked, if they differ."""
    keys = [cell.key for cell in cells if isinstance(cell.key, float | int)]
    if len(set(keys)) < 2:
        return Column(heading, cells)
    return Column(heading, [replace(cell, best=cell.key == best(keys)) for cell in cells])


def _what_they_are(rows: Sequence[ComparedModel]) -> dict[str, list[str]]:
    """Model and settings of each run in words: the usual settings, and others that differ; none where it had no say."""
    settings = [run.settings.model_dump() for run in rows]
    names = [name for name in settings[0] if name in ALWAYS or len({_text(one[name]) for one in settings}) > 1]
    named = [run.settings.named for run in rows]
    found = {"model": [run.model for run in rows]}
    found |= {name.replace("_", " "): [_text(one.get(name)) for one in named] for name in names}
    if any(run.seed is not None for run in rows):
        found["seed"] = [_text(run.seed) for run in rows]
    return found


def short(what: str) -> str:
    """What was timed, without what goes without saying."""
    return what.removeprefix("forward, ")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _key(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
