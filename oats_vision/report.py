"""Tables of a run, of a checkpoint's layers and of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from oats_vision.benchmark import Timing
    from oats_vision.checkpoint import Sizes
    from oats_vision.evaluation import Perplexity, Top1
    from oats_vision.pipeline import CompressionReport


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def run_table(
    title: str, parameters: tuple[int, int], sizes: Sizes, scores: tuple[Top1 | Perplexity, Top1 | Perplexity] | None
) -> Table:
    """Dense against compressed: accuracy, parameters, bytes.

    Args:
        parameters: of the whole model, dense and compressed.
        scores: dense and compressed, if evaluated.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("dense", "compressed", "change [95% interval]"):
        table.add_column(heading, justify="right")
    for row in _score_rows(*scores) if scores else []:
        table.add_row(*row)
    table.add_row("parameters", *(f"{count / 1e6:.2f} M" for count in parameters), _ratio(*parameters))
    table.add_row(
        "bytes on disk", *map(megabytes, (sizes.dense_total, sizes.total)), _ratio(sizes.dense_total, sizes.total)
    )
    table.add_row(
        "  compressed layers",
        *map(megabytes, (sizes.dense_layers, sizes.layers)),
        _ratio(sizes.dense_layers, sizes.layers),
    )
    table.add_row("  of it positions of S", "", megabytes(sizes.positions), "")
    return table


def _score_rows(dense: Top1 | Perplexity, ours: Top1 | Perplexity) -> list[list[str]]:
    """Name, both values and the change, for each figure of an evaluation."""
    from oats_vision.evaluation import Perplexity, Top1, paired_difference, paired_ratio

    if isinstance(dense, Perplexity) and isinstance(ours, Perplexity):
        speeds = [int(score.tokens.sum()) / score.seconds for score in (dense, ours)]
        values = [f"{dense.value:.3f}", f"{ours.value:.3f}", str(paired_ratio(dense, ours))]
        return [["perplexity", *values], _speed_row("tokens/s", speeds)]
    assert isinstance(dense, Top1)
    assert isinstance(ours, Top1)
    difference = paired_difference(dense.correct, ours.correct)
    return [
        ["top-1", f"{dense.top1:.2f}%", f"{ours.top1:.2f}%", str(difference)],
        ["top-5", f"{dense.top5:.2f}%", f"{ours.top5:.2f}%", f"{ours.top5 - dense.top5:+.2f} points"],
        _speed_row("pictures/s", [score.pictures / score.seconds for score in (dense, ours)]),
    ]


def _speed_row(name: str, speeds: list[float]) -> list[str]:
    return [name, *(f"{speed:.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f} x"]


def layer_table(report: CompressionReport) -> Table:
    """One row for each compressed layer."""
    table = Table(title="compressed layers", title_justify="left")
    for heading in ("layer", "shape", "part", "rank", "non-zeros", "kept", "error", "output error", "rounds"):
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
                str(part.rank),
                f"{part.nonzeros:,}",
                f"{kept / size:.1%}",
                *(
                    f"{errors[part.name]:.4f}" if part.name in errors else ""
                    for errors in (layer.errors, layer.output_errors)
                ),
                str(layer.rounds.get(part.name, "")),
            )
    return table


def comparison_table(title: str, models: list[str], rows: dict[str, list[str]], differences: dict[str, str]) -> Table:
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


def _ratio(dense: float, ours: float) -> str:
    return f"{ours / dense:.3f} x"


def bench_table(title: str, timings: Sequence[Timing], memory: tuple[int, int]) -> Table:
    """Latency and throughput, dense against compressed, and the bytes of the weights in memory."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("dense", "compressed", "change"):
        table.add_column(heading, justify="right")
    for timing in timings:
        pair = (timing.dense, timing.compressed)
        change = f"{timing.speedup:.2f} x {'as fast' if timing.speedup < 1 else 'faster'}"
        table.add_row(timing.what, *(f"{seconds * 1e3:.1f} ms" for seconds in pair), change)
        table.add_row(f"  {timing.unit}/s", *(f"{timing.units / seconds:.1f}" for seconds in pair), "")
    table.add_row("weights in memory", *map(megabytes, memory), _ratio(*memory))
    return table
