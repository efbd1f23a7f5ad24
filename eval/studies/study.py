"""What the studies share: a grid of compressions, each evaluated and written down before the next one starts.

A row of the CSV file is one compression measured on one set of data. A study that is started again does what is
missing from its file. Compressions that follow each other and differ only in how large the model is to be share what
they find out about it, as those of a search do: the seconds of all but the first are without that.
"""

import argparse
import copy
import csv
import logging
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import oats_vision as ov
from benches import Bench, Row, console
from oats_vision.compression.common import Common
from oats_vision.compression.pipeline import compress
from oats_vision.compression.settings import CompressionSettings, resolve
from oats_vision.files import replacing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# what tells a row's compression from others; no study sets the rest
SETTINGS = [
    name
    for name in CompressionSettings.model_fields
    if name not in ("error_tolerance", "latency_tokens", "storage_dtype", "skip")
]


Make = Callable[..., argparse.ArgumentParser]


def parser(description: str | None, out: str, make: Make = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of every study."""
    flags = make(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", type=Path, help="YAML file as for `oats-vision compress`; flags override it")
    flags.add_argument("--model", help="any model that `compress` takes [default: demo]")
    flags.add_argument("--data", help="calibration data [default: demo]")
    flags.add_argument("--samples", type=int, help="calibration pictures (sequences of text), drawn anew for each seed")
    flags.add_argument("--eval-samples", type=int, help="evaluate on that many only [default: all]")
    flags.add_argument("--batch-size", type=int)
    flags.add_argument("--device")
    flags.add_argument("--workers", type=int)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seed for choosing the calibration data")
    flags.add_argument("--out", type=Path, default=Path(out), help="folder for the CSV file, the plot and the table")
    return flags


def picture_parser(description: str | None, out: str, make: Make = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of a study on pictures."""
    flags = parser(description, out, make)
    flags.add_argument("--eval-data", help="labelled pictures [default: demo]")
    flags.add_argument("--mixed-precision", choices=["bfloat16", "float16"], help="of the evaluation")
    return flags


LAYERS = ["parameters", "bits_a_weight", "layer_error", "output_error", "rounds", "solver_seconds", "seconds"]


def run(bench: Bench, args: argparse.Namespace, name: str, cells: Sequence[dict[str, Any]]) -> list[Row]:
    """Do what is missing of a study and return all its rows.

    Args:
        name: of the CSV file.
        cells: compression settings, fields of CompressionOptions.
    """
    logging.basicConfig(format="%(message)s")
    keys = bench.KEYS + SETTINGS
    wanted: dict[tuple[str, ...], Row] = {}
    jobs: dict[tuple[CompressionSettings, int], list[Row]] = defaultdict(list)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{name}.csv"
    done = {tuple(row[field] for field in keys): row for row in _read(file, keys + bench.RESULTS + LAYERS)}
    for seed in args.seeds:
        for cell in cells:
            settings = settings_of(bench, cell)
            for target in bench.targets:
                about = bench.about | {"seed": seed, "eval_data": target}
                row = {field: str(value) for field, value in (about | described(settings)).items()}
                key = tuple(row[field] for field in keys)
                wanted[key] = row
                if key not in done:
                    jobs[settings, seed].append(row)
    if jobs:
        for row in _do(bench, file, jobs):
            done[tuple(row[field] for field in keys)] = row
    return [done[key] for key in wanted]


def settings_of(bench: Bench, cell: dict[str, Any]) -> CompressionSettings:
    """Complete settings: those of a cell, and the study's own for the rest."""
    names = ("iterations", "solver", "tolerance", "scaling", "fused_qkv")
    return resolve(**{name: getattr(bench.config, name) for name in names} | cell)


def described(settings: CompressionSettings) -> dict[str, Any]:
    """What a row says of them."""
    return {field: getattr(settings, field) for field in SETTINGS}


def _do(bench: Bench, file: Path, jobs: dict[tuple[CompressionSettings, int], list[Row]]) -> Iterator[Row]:
    """Compress for each job, and measure what is missing of it."""
    dense = bench.load()
    calibration = lru_cache(maxsize=1)(bench.calibration)  # of one seed, for all its cells
    common = lru_cache(maxsize=1)(lambda of_any_size, seed: Common())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(jobs))
        for (settings, seed), rows in jobs.items():
            bar.update(task, description=f"{settings.method} {settings.rate:.3g} seed {seed}")
            model, start = copy.deepcopy(dense), time.perf_counter()
            memory = bench.config.activation_memory
            shared = common(settings.model_copy(update={"rate": 0.0, "bits": None}), seed)
            report = compress(model, calibration(seed), settings, activation_memory=memory, common=shared)
            layers = _layers(report, time.perf_counter() - start)
            ov.merge(model)
            for row in rows:
                row |= bench.measure(model, row["eval_data"]) | layers
                _append(file, row, bench.KEYS + SETTINGS + bench.RESULTS + LAYERS)
                yield row
            bar.advance(task)


def _layers(report: ov.CompressionReport, seconds: float) -> Row:
    errors = [max(layer.errors.values()) for layer in report.layers]
    of_output = [max(layer.output_errors.values()) for layer in report.layers if layer.output_errors]
    iterations = [max(layer.iterations.values()) for layer in report.layers]
    bits = 8 * sum(layer.spec.stored_bytes(2) for layer in report.layers)  # what is floating in 16 of them
    return {
        "parameters": f"{report.parameters / report.dense_parameters:.4f}",
        "bits_a_weight": f"{bits / report.dense_parameters:.2f}",
        "layer_error": f"{statistics.mean(errors):.5f}" if errors else "",
        "output_error": f"{statistics.mean(of_output):.5f}" if of_output else "",
        "rounds": f"{statistics.mean(iterations):.1f}" if iterations else "",
        "solver_seconds": f"{sum(layer.seconds for layer in report.layers):.4g}",
        "seconds": f"{seconds:.2f}",
    }


def _read(file: Path, columns: list[str]) -> list[Row]:
    if not file.exists():
        return []
    text = file.read_text()
    if not text.endswith("\n"):  # a line that was being written when the study stopped
        with replacing(file) as temporary:
            temporary.write_text(text[: text.rfind("\n") + 1])
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if rows and list(rows[0]) != columns:
        raise SystemExit(f"{file} is of another study or release: move it away, or give another --out")
    return rows


def _append(file: Path, row: Row, columns: list[str]) -> None:
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)
        stream.flush()
        os.fsync(stream.fileno())


def parse_methods(flags: argparse.ArgumentParser, methods: list[str], rates: list[float]) -> argparse.Namespace:
    """Parse the flags of a table of methods, what `method_cells` reads among them."""
    flags.add_argument("--methods", nargs="+", default=methods, help="oats-fast, oats-plain: of that quality")
    flags.add_argument("--rates", type=float, nargs="+", default=rates)
    flags.add_argument("--rank-ratio", type=float, nargs="+", default=[0.2], help="of OATS")
    return flags.parse_args()


def method_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Settings for each of `--methods` (`oats-plain`: that quality) and `--rates`; OATS for each `--rank-ratio`."""
    return [
        {
            "method": method.partition("-")[0],
            "quality": method.partition("-")[2] or ("best" if method == "oats" else None),
            "rate": rate,
            "rank_ratio": ratio,
        }
        for rate in args.rates
        for method in args.methods
        for ratio in (args.rank_ratio if "oats" in method else [None])
    ]


def method_line(row: Row) -> str:
    """A method's name in tables."""
    if row["method"] != "oats":
        return row["method"]
    quality = "" if row["joint"] == "True" else ", fast" if row["refit"] == "True" else ", plain"
    return f"oats{quality}, rank ratio {row['rank_ratio']}"


Cells = dict[tuple[str, str], list[float]]


def suffix_of(target: str, targets: Sequence[str]) -> str:
    """What the files on one of several sets of data end with: its stem, and its number where some have the same."""
    stems = [Path(other).stem for other in targets]
    number = f"_{targets.index(target) + 1}" * (len(set(stems)) < len(stems))
    return f"_{Path(target).stem}{number}"


def collect(rows: list[Row], line: Callable[[Row], str], column: str, value: str = "top1") -> Cells:
    """Values by (line, column), over the seeds."""
    cells: Cells = defaultdict(list)
    for row in rows:
        cells[line(row), row[column]].append(float(row[value]))
    return cells


def show(rows: list[Row], cells: Cells, title: str, column: str, out: Path, log_x: bool = False) -> None:
    """Accuracies: print mean and deviation as a table, write it as Markdown, and draw it with the dense model's."""
    dense = float(rows[0]["dense_top1"])
    show_values(cells, title, column, f"top-1 (%), dense {dense:.2f}", out, log_x, level=dense)


def show_values(
    cells: Cells,
    title: str,
    column: str,
    value: str,
    out: Path,
    log_x: bool = False,
    log_y: bool = False,
    level: float | None = None,
) -> None:
    """Any values: print mean and deviation over the seeds as a table, write it as Markdown, and draw it.

    Args:
        level: drawn as a horizontal line.
    """
    lines = list(dict.fromkeys(line for line, _ in cells))
    columns = sorted({name for _, name in cells}, key=float)
    headings = [f"{float(name):.3g}" for name in columns]
    table = Table(title=f"{title}: {value}, mean ± deviation over seeds", title_justify="left")
    table.add_column(column)
    for heading in headings:
        table.add_column(heading, justify="right")
    markdown = [f"{title}: {value}, mean ± deviation over seeds", "", f"| {column} | {' | '.join(headings)} |"]
    markdown.append("|---" * (len(columns) + 1) + "|")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for line in lines:
        texts = [_text(cells.get((line, name), [])) for name in columns]
        table.add_row(line, *texts)
        markdown.append(f"| {line} | {' | '.join(texts)} |")
        points = [(float(name), cells[line, name]) for name in columns if (line, name) in cells]
        means = [statistics.mean(values) for _, values in points]
        deviations = [_deviation(values) for _, values in points]
        axes.errorbar([x for x, _ in points], means, deviations, marker="o", markersize=4, capsize=3, label=line)
    if level is not None:
        axes.axhline(level, color="black", linestyle=":", label="dense")
    axes.set(
        xlabel=column,
        ylabel=value,
        title=title,
        xscale="log" if log_x else "linear",
    )
    if log_y:
        axes.set_yscale("log", nonpositive="mask")  # what rounds to 0 is not drawn
    axes.legend(fontsize="small")
    figure.savefig(out.with_suffix(".png"), dpi=120)
    plt.close(figure)
    out.with_suffix(".md").write_text("\n".join(markdown) + "\n")
    Console(width=max(100, 18 * len(columns) + 30)).print(table)


def _text(values: Sequence[float]) -> str:
    if not values:
        return ""
    digits = 2 if statistics.mean(values) > 1 else 4
    return f"{statistics.mean(values):.{digits}f} ± {_deviation(values):.{digits}f}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
