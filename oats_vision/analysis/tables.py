"""Tables of a run, of a checkpoint's layers and of measurements."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from oats_vision.compression.record import CompressionReport
    from oats_vision.evaluation.speed import Timing

CHANGES = ("dense", "compressed", "change [95% interval]")  # headings


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def run_table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """Dense against compressed: name, both values and the change of each figure."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in CHANGES:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def as_text(table: Table) -> str:
    """A table as plain lines, in a notebook too."""
    stream = io.StringIO()
    plain: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
    Console(file=stream, width=100, force_jupyter=False, force_terminal=False, **plain).print(table)
    return stream.getvalue().rstrip()


def as_html(title: str, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """`run_table` and lines below it, for notebooks."""
    head = "".join(f"<th style='text-align:right'>{html.escape(heading)}</th>" for heading in CHANGES)
    lines = [
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        + "".join(f"<td style='text-align:right'>{html.escape(value)}</td>" for value in values)
        + "</tr>"
        for name, *values in rows
    ]
    table = f"<table><caption>{html.escape(title)}</caption><tr><th></th>{head}</tr>{''.join(lines)}</table>"
    return table + "".join(f"<p>{html.escape(note)}</p>" for note in notes)


ERRORS = "error", "output error"


def layer_table(report: CompressionReport) -> Table:
    """One row for each compressed layer."""
    table = Table(title="compressed layers", title_justify="left")
    formats = ["values"] if any(layer.spec.grid for layer in report.layers) else []
    for heading in ("layer", "shape", "part", *formats, "rank", "non-zeros", "kept", *ERRORS, "iterations"):
        named = heading in ("layer", "part")
        table.add_column(heading, justify="left" if named else "right", overflow="fold" if named else "ellipsis")
    for layer in report.layers:
        for i, part in enumerate(layer.spec.parts):
            size = part.out_features * layer.spec.in_features
            kept = part.nonzeros + part.rank * (part.out_features + layer.spec.in_features)
            table.add_row(
                layer.name if i == 0 else "",
                f"{part.out_features} x {layer.spec.in_features}",
                part.name,
                *[layer.spec.grid.short if layer.spec.grid else "" for _ in formats],
                str(part.rank),
                f"{part.nonzeros:,}",
                f"{kept / size:.1%}",
                *(
                    f"{errors[part.name]:.4f}" if part.name in errors else ""
                    for errors in (layer.errors, layer.output_errors)
                ),
                str(layer.iterations.get(part.name, "")),
            )
    return table


def models_table(title: str, models: list[str], rows: dict[str, list[str]], differences: dict[str, str]) -> Table:
    """One column a model, and the differences with their intervals where there are two.

    Args:
        rows: each metric's values, one a model.
        differences: of some of the metrics.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for model in models:
        table.add_column(model, justify="right", overflow="fold")
    if differences:
        table.add_column("difference [95% interval]", justify="right")
    for metric, values in rows.items():
        table.add_row(metric, *values, *([differences.get(metric, "")] if differences else []))
    return table


def key_values(title: str, rows: dict[str, Any]) -> Table:
    """Two columns: name and value."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(overflow="fold")  # names and paths whole, however long
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def ratio(dense: float, ours: float) -> str:
    return f"{ours / dense:.3f} x"


def bench_table(title: str, timings: Sequence[Timing], memory: tuple[int, int]) -> Table:
    """Latency and throughput, dense against compressed, and the bytes of the weights in memory."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("dense", "compressed", "change"):
        table.add_column(heading, justify="right")
    for timing in timings:
        pair = (timing.dense, timing.compressed)
        table.add_row(timing.what, *(f"{seconds * 1e3:.1f} ms" for seconds in pair), timing.change)
        table.add_row(f"  {timing.unit}/s", *(f"{timing.units / seconds:.1f}" for seconds in pair), "")
    table.add_row("weights in memory", *map(megabytes, memory), ratio(*memory))
    return table
