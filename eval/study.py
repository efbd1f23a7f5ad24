"""What the studies share: a grid of compressions, each evaluated and written down before the next one starts.

A row of the CSV file is one compression. A study that is started again does what is missing from its file.
"""

import argparse
import copy
import csv
import logging
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import oats_vision as ov
from oats_vision.cli.common import choose_device, machine
from oats_vision.config import CompressionSettings, RunConfig, load_run_config, validated
from oats_vision.data import Batches, load_pictures
from oats_vision.evaluation import Top1, evaluate_top1, paired_difference

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KEYS = ["model", "data", "samples", "seed", "eval_data", "eval_samples", "precision"]
SETTINGS = [
    "method",
    "pattern",
    "rate",
    "rank_ratio",
    "iterations",
    "solver",
    "tolerance",
    "scaling",
    "refit",
    "fused_qkv",
]
RESULTS = ["dense_top1", "top1", "top5", "difference", "low", "high", "parameters", "error", "rounds", "seconds"]
Row = dict[str, str]
KEEP_IN_MEMORY = 2e9  # bytes of evaluation pictures


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The flags of every study."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", type=Path, help="YAML file as for `oats-vision compress`; flags override it")
    flags.add_argument("--model", help="any model that `compress` takes [default: demo]")
    flags.add_argument("--data", help="calibration pictures [default: demo]")
    flags.add_argument("--eval-data", help="labelled pictures [default: demo]")
    flags.add_argument("--samples", type=int, help="calibration pictures, drawn anew for each seed")
    flags.add_argument("--eval-samples", type=int, help="evaluate on that many only [default: all]")
    flags.add_argument("--batch-size", type=int)
    flags.add_argument("--device")
    flags.add_argument("--workers", type=int)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the choice of calibration pictures")
    flags.add_argument("--mixed-precision", choices=["bfloat16", "float16"], help="of the evaluation")
    flags.add_argument("--out", type=Path, default=Path(out), help="folder for the CSV file, the plot and the table")
    return flags


def run(args: argparse.Namespace, name: str, cells: Sequence[dict[str, Any]]) -> list[Row]:
    """Do what is missing of a study and return all its rows.

    Args:
        name: of the CSV file.
        cells: compression settings, fields of CompressionSettings.
    """
    logging.basicConfig(format="%(message)s")
    given = ("model", "data", "eval_data", "samples", "eval_samples", "batch_size", "device", "workers")
    config = load_run_config(args.config, {field: getattr(args, field) for field in given})
    config = config.completed("pictures").model_copy(
        update={"data": config.data or "demo", "eval_data": config.eval_data or "demo"}
    )
    common = {
        "model": config.model,
        "data": config.data,
        "samples": config.samples,
        "eval_data": config.eval_data,
        "eval_samples": config.eval_samples or "all",
        "precision": args.mixed_precision or config.dtype,
    }
    base = {field: getattr(config, field) for field in ("iterations", "solver", "tolerance", "scaling", "fused_qkv")}
    wanted: dict[tuple[str, ...], tuple[CompressionSettings, int]] = {}
    for seed in args.seeds:
        for cell in cells:
            settings = validated(CompressionSettings, base | cell)
            row = common | {"seed": seed} | _described(settings)
            wanted[tuple(str(row[field]) for field in KEYS + SETTINGS)] = settings, seed
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{name}.csv"
    done = {tuple(row[field] for field in KEYS + SETTINGS): row for row in _read(file)}
    missing = {key: value for key, value in wanted.items() if key not in done}
    if missing:
        done |= _do(config, args, file, missing, common)
    return [done[key] for key in wanted]


def _do(
    config: RunConfig,
    args: argparse.Namespace,
    file: Path,
    missing: dict[tuple[str, ...], tuple[CompressionSettings, int]],
    common: dict[str, Any],
) -> dict[tuple[str, ...], Row]:
    device, mixed = choose_device(config.device), args.mixed_precision and getattr(torch, args.mixed_precision)
    dtype = getattr(torch, config.dtype)
    dense, transform = ov.load_model(config.model, dtype=dtype, device=device, image_size=config.image_size)
    if transform is None:
        raise SystemExit(f"{config.model} says nothing about its preprocessing")
    loading = {"batch_size": config.batch_size, "workers": config.workers}
    test = _in_memory(
        load_pictures(
            str(config.eval_data),
            transform,
            samples=config.eval_samples,
            seed=config.seed,
            labelled=True,
            split=config.eval_split,
            **loading,
        )
    )
    before = evaluate_top1(dense, test, mixed_precision=mixed)
    console = Console(stderr=True)
    console.print(f"{config.model}: dense top-1 {before.top1:.2f}% on {before.pictures} pictures; {machine(device)}")
    rows: dict[tuple[str, ...], Row] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(missing))
        for key, (settings, seed) in missing.items():
            bar.update(task, description=f"{settings.method} {settings.rate:.3g} seed {seed}")
            model = copy.deepcopy(dense)
            pictures = load_pictures(
                str(config.data), transform, samples=config.samples, seed=seed, split=config.split, **loading
            )
            start = time.perf_counter()
            report = ov.compress(model, pictures, settings=settings, activation_memory=config.activation_memory)
            seconds = time.perf_counter() - start
            after = evaluate_top1(ov.merge(model), test, mixed_precision=mixed)
            rows[key] = _row(common | {"seed": seed} | _described(settings), before, after, report, seconds)
            _append(file, rows[key])
            bar.advance(task)
    return rows


def _row(about: dict[str, Any], before: Top1, after: Top1, report: ov.CompressionReport, seconds: float) -> Row:
    difference = paired_difference(before.correct, after.correct)
    errors = [layer.error for layer in report.layers]
    rounds = [max(layer.rounds.values()) for layer in report.layers]
    results = {
        "dense_top1": f"{before.top1:.3f}",
        "top1": f"{after.top1:.3f}",
        "top5": f"{after.top5:.3f}",
        "difference": f"{difference.points:.3f}",
        "low": f"{difference.low:.3f}",
        "high": f"{difference.high:.3f}",
        "parameters": f"{report.parameters / report.dense_parameters:.4f}",
        "error": f"{statistics.mean(errors):.5f}" if errors else "",
        "rounds": f"{statistics.mean(rounds):.1f}" if rounds else "",
        "seconds": f"{seconds:.2f}",
    }
    return {field: str(value) for field, value in (about | results).items()}


def _described(settings: CompressionSettings) -> dict[str, Any]:
    return {field: getattr(settings, field) for field in SETTINGS}


def _read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if rows and list(rows[0]) != KEYS + SETTINGS + RESULTS:
        raise SystemExit(f"{file} is of another study or release: move it away, or give another --out")
    return [row for row in rows if None not in row.values()]  # a line that was being written when the study stopped


def _append(file: Path, row: Row) -> None:
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, KEYS + SETTINGS + RESULTS)
        if new:
            writer.writeheader()
        writer.writerow(row)
        stream.flush()
        os.fsync(stream.fileno())


def _in_memory(batches: Batches) -> Batches:
    """The same batches, read once, if they are not too many."""
    if not batches.total:
        return batches
    picture = next(iter(batches))[0][0]
    if batches.total * picture.numel() * picture.element_size() > KEEP_IN_MEMORY:
        return batches
    return replace(batches, loader=list(batches.loader))  # type: ignore[arg-type]  # any iterable of batches will do


Cells = dict[tuple[str, str], list[float]]


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
    cells: Cells, title: str, column: str, value: str, out: Path, log_x: bool = False, level: float | None = None
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
    axes.set(xlabel=column, ylabel=value, title=title, xscale="log" if log_x else "linear")
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
