"""One self-contained page about a checkpoint: what it saves, what it cost, and then all that is known of it."""

import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from oats_vision import checkpoint
from oats_vision.analysis import figures
from oats_vision.analysis.compare import short
from oats_vision.analysis.compared import by_block, errors_by_block
from oats_vision.analysis.page import render, write_page
from oats_vision.analysis.searched import searched
from oats_vision.analysis.spectra import spectra, spectra_of
from oats_vision.checkpoint.place import PAGE
from oats_vision.compression.record import CompressionReport
from oats_vision.display import Display
from oats_vision.errors import OatsVisionError
from oats_vision.evaluation.results import EXAMPLES, Cost, Evaluation
from oats_vision.evaluation.speed import Timing
from oats_vision.evaluation.stored import Measured, read_report
from oats_vision.evaluation.tasks import task_of_unit

log = logging.getLogger(__name__)

# of a run: about its directory, which may have moved, and what shows by itself
UNTOLD = ("out", "overwrite", "merge", "eval", "report", "streaming", "trust_remote_code", "dry_run")
# and whether they are texts
HEADINGS = [
    ("layer", True),
    ("part", True),
    *((heading, False) for heading in ("shape", "rank", "non-zeros", "kept", "error", "output error", "iterations")),
    ("values", True),
    ("bits", False),
]


def write_html(directory: Path, file: Path, progress: Callable[[int], None] = lambda layers: None) -> None:
    """Write the page, all of it or nothing.

    Args:
        directory: a checkpoint.
        file: to write; replaced if it exists.
        progress: called with the number of layers whose spectrum is done.

    Raises:
        CheckpointError: the checkpoint is damaged, or the file cannot be written.
    """
    write_page(html_report(directory, progress), file)


def draw_page(directory: Path, file: Path, display: Display) -> None:
    """`write_html` with a bar over the layers."""
    layers = len(spectra_of(checkpoint.read_config(directory).report))
    with display.counting("drawing the page", "layers", layers) as progress:
        write_html(directory, file, progress)


def renew_page(directory: Path, display: Display) -> None:
    """Write the page of a checkpoint anew if it has one, since report.json has changed; if that fails, it is said."""
    file = directory / PAGE
    if not file.is_file():
        return
    try:
        draw_page(directory, file, display)
    except OatsVisionError as problem:  # the result is in report.json
        log.warning("the page was not rewritten: %s", problem)


def html_report(directory: Path, progress: Callable[[int], None] = lambda layers: None) -> str:
    """The page as text, made from the directory alone."""
    measured = read_report(directory)
    config = checkpoint.read_config(directory)
    tensors = checkpoint.read_weights(directory, config)
    report, source = config.report, config.source
    sizes = checkpoint.measure(tensors.values(), report, config.storage_dtype)
    name = directory.resolve().name
    chosen = spectra_of(report)
    found = spectra([report.layers[i] for i in chosen], tensors, progress)
    model = source.origin_name
    return render(
        "report.html",
        title=f"{model}, {report.settings.method} at {report.settings.size}",
        model=model,
        subtitle=f"{report.settings.summary}, stored in {config.content['storage_dtype']}",
        headlines=[_bytes(sizes), _speed(measured, name), _cost(measured, name, report.unit)],
        measured=measured,
        exceptions=report.exceptions_made,
        examples=measured.examples[:EXAMPLES],
        accuracy=_accuracy(measured),
        search=measured.search and searched(measured.search),
        speed=[_timing_row(timing) for timing in measured.speed],
        plots=_plots(report, sizes),
        layers=len(report.layers),
        mean_error=f"{sum(layer.error for layer in report.layers) / max(len(report.layers), 1):.4f}",
        error_name=report.error_name,
        headings=HEADINGS,
        rows=_rows(report, config.storage_dtype.itemsize),
        few_bits=any(layer.spec.grid for layer in report.layers),
        two_terms=any("low_rank" in one["values"] for one in found),
        spectra=found,
        drawn=[report.layers[i].name for i in chosen],
        about=_tables(config, report, measured, name),
    )


@dataclass(frozen=True)
class Headline:
    """One of the page's first figures, whose value and unit read as a sentence. command: measures what is not yet."""

    name: str
    value: str = ""
    unit: str = ""
    text: str = ""
    small: Sequence[str] = ()
    command: str = ""


def _bytes(sizes: checkpoint.Sizes) -> Headline:
    return Headline(
        "Bytes",
        f"{sizes.total / sizes.dense_total:.2f}",
        " x the bytes",
        f"{sizes.dense_total / 1e6:.1f} → {sizes.total / 1e6:.1f} MB",
        [f"{sizes.layer_ratio:.3f} x in the compressed layers: {sizes.bits:.2f} bits a weight"],
    )


def _speed(measured: Measured, name: str) -> Headline:
    if not measured.speed:
        return Headline("Speed", command=f"oats-vision bench {shlex.quote(name)}")
    first, *others = measured.speed
    return Headline(
        "Speed",
        f"{first.speedup:.2f}",
        " x as fast",
        f"{first.dense * 1e3:.1f} → {first.compressed * 1e3:.1f} ms at {short(first.what)}",
        [f"{timing.speedup:.2f} x at {short(timing.what)}" for timing in others],
    )


def _cost(measured: Measured, name: str, unit: str) -> Headline:
    """The difference on labelled data if there is one, else the first metric of what was measured without."""
    cost = measured.cost
    if evaluation := measured.labelled:
        return _labelled(evaluation, [f"{cost.metrics[0].name} {cost.metrics[0]}, {_held_out(cost)}"] if cost else [])
    if cost:
        first, *others = cost.metrics
        sign = {"percent": "%", "ratio": " x", "number": ""}[first.kind]
        return Headline(
            "What it cost",
            first.figure.removesuffix(sign),
            sign,
            f"{first.name} beside the dense model",
            [f"95% interval {first.interval}, {_held_out(cost)}", *(f"{one.name} {one}" for one in others[:2])],
        )
    return Headline("What it cost", command=task_of_unit(unit).eval_command(name))


def _held_out(cost: Cost) -> str:
    return f"on {cost.samples:,} held-out {cost.unit}"


def _labelled(evaluation: Evaluation, agreement: list[str]) -> Headline:
    metric = str(evaluation.compared)
    dense, ours = evaluation.pair(metric)
    values = f"{dense.figure} → {ours.figure}"
    count = evaluation.compressed.count if evaluation.compressed else ""
    where = f"on {count} of {evaluation.where}" if count else f"on {evaluation.where}"
    value, unit, interval = evaluation.difference[metric].words
    return Headline(
        "What it cost", value, unit, f"{metric}: {values}", [f"95% interval {interval}, {where}", *agreement]
    )


def _accuracy(measured: Measured) -> list[list[str]]:
    """Metric, dense, compressed, the difference with its interval, protocol and data."""
    rows = [
        [*row, evaluation.protocol, evaluation.where]
        for evaluation in measured.evaluations
        for row in evaluation.rows()
    ]
    for cost, when in ((measured.cost, ""), (measured.one_shot, ", one shot, before recovery")):
        if cost:
            where, how = f"{cost.samples:,} held-out {cost.unit}", f"against dense, no labels{when}"
            rows += [[one.name, "", one.figure, one.interval, how, where] for one in cost.metrics]
    return rows


def _timing_row(timing: Timing) -> list[str]:
    rates = (f"{timing.units / seconds:,.1f}" for seconds in (timing.dense, timing.compressed))
    times = (f"{seconds * 1e3:.1f} ms" for seconds in (timing.dense, timing.compressed))
    known = timing.low is not None and timing.high is not None
    spread = f" [{timing.low:.2f}, {timing.high:.2f}]" if known else ""
    return [timing.what, *times, f"{timing.speedup:.2f} x{spread}", *rates, timing.unit]


def _rows(report: CompressionReport, itemsize: int) -> list[list[tuple[str, str]]]:
    """The table of layers: what is shown and what is sorted by, for each cell.

    Args:
        itemsize: bytes of a floating value.
    """
    rows: list[list[tuple[str, str]]] = []
    for layer in report.layers:
        bits = layer.spec.bits(itemsize)
        for part in layer.spec.parts:
            size = part.out_features * layer.spec.in_features
            kept = (part.nonzeros + part.rank * (part.out_features + layer.spec.in_features)) / max(size, 1)
            rows.append(
                [
                    (layer.name, str(len(rows))),  # the model's order
                    (part.name, part.name),
                    (f"{part.out_features} x {layer.spec.in_features}", str(size)),
                    (str(part.rank), str(part.rank)),
                    (f"{part.nonzeros:,}", str(part.nonzeros)),
                    (f"{kept:.1%}", f"{kept:.6f}"),
                    _number(layer.errors.get(part.name)),
                    _number(layer.output_errors.get(part.name)),
                    (str(layer.iterations.get(part.name, "")), str(layer.iterations.get(part.name, ""))),
                    (
                        layer.spec.grid.short if layer.spec.grid else "floating",
                        str(layer.spec.grid.bits if layer.spec.grid else 8 * itemsize),
                    ),
                    (f"{bits:.3f}", f"{bits:.6f}"),
                ]
            )
    return rows


def _number(value: float | None) -> tuple[str, str]:
    """What is shown and what is sorted by."""
    return ("", "") if value is None else (f"{value:.4f}", f"{value:.8f}")


def _plots(report: CompressionReport, sizes: checkpoint.Sizes) -> list[tuple[str, Markup]]:
    """Each linear's error by block, its bits if they were chosen, and where bytes go; of a sliced model the signal."""
    if report.slicing:
        kept = {"attention": report.slicing.kept[::2], "MLP": report.slicing.kept[1::2]}
        lines = {name: dict(enumerate(values)) for name, values in kept.items()}
        width = f"{report.slicing.sliced_width} of {report.slicing.width} dimensions"
        label = "share of the second moment kept"
        return [(f"Signal kept in {width}, by block", figures.line_plot(lines, label, from_zero=False))]
    itemsize = sizes.dense_layers // max(report.dense_parameters, 1)
    low_rank = sum(layer.spec.factor_bytes(itemsize) for layer in report.layers)
    budget: list[tuple[str, float, int | None]] = [
        ("S, values", sizes.layers - sizes.positions - sizes.scales - low_rank, 0),
        *([("S, bitmask", sizes.positions, 4)] if sizes.positions else []),
        *([("S, scales", sizes.scales, 3)] if sizes.scales else []),
        *([("U and V", low_rank, 1)] if low_rank else []),
        ("saved", max(sizes.dense_layers - sizes.layers, 0), None),
    ]
    bits = by_block(report, lambda layer: layer.spec.bits(itemsize))
    chosen = bool(report.settings.grid) and report.settings.budget != "uniform"  # by layer
    return [
        ("Error of each linear, by block", figures.line_plot(errors_by_block(report), report.error_name)),
        *([("Bits of each linear, by block", figures.line_plot(bits, "bits a weight, all counted"))] if chosen else []),
        (
            "Bytes of the compressed layers, out of the dense ones' bytes",
            figures.bar(budget, "Bytes of the compressed layers"),
        ),
    ]


def _tables(
    config: checkpoint.Config, report: CompressionReport, measured: Measured, name: str
) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the checkpoint is, its settings, the run and the machine: titles, and names with values."""
    source = config.source
    settings = report.settings.named
    run = [(key, value) for key, value in measured.run if key not in (*type(report.settings).model_fields, *UNTOLD)]
    times = [("compression" if key == "total" else key, f"{value:.1f} s") for key, value in report.seconds.items()]
    whole = [("whole run", f"{measured.seconds:.1f} s")] if measured.seconds else []
    memory = [("peak memory", f"{measured.peak_memory / 1e9:.2f} GB")] if measured.peak_memory else []
    tables = [
        (
            "Checkpoint",
            [
                ("directory", name),
                ("model", f"{source.kind} {source.name}"),
                ("family", report.family),
                ("parameters", f"{report.parameters:,} of {report.dense_parameters:,} in the compressed layers"),
                ("calibration", f"{report.samples:,} {report.unit}"),
                *([("recovery", report.recovery.summary)] if report.recovery else []),
                ("computed in", config.content["dtype"]),
                ("written by", f"{config.written_by}, format {config.content['format_version']}"),
                ("SHA-256 of the weights", config.weights_sha256),
                *([("of the dense weights", source.dense_sha256)] if source.dense_sha256 else []),
            ],
        ),
        ("Settings", [(_words(key), str(value)) for key, value in settings.items()]),
        ("Run", [(_words(key), value) for key, value in run]),
        ("Machine and time", [*measured.machine, *times, *whole, *memory]),
        ("Machine of the speeds", list(measured.speed_machine) if measured.speed_machine != measured.machine else []),
    ]
    return [(title, rows) for title, rows in tables if rows]


def _words(name: str) -> str:
    return name.replace("_", " ")
