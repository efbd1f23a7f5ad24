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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import oats_vision as ov
from oats_vision.cli.common import choose_device, machine
from oats_vision.config import CompressionSettings, RunConfig, load_run_config, validated
from oats_vision.data import Batches, load_pictures
from oats_vision.evaluation import Perplexity, evaluate_top1, paired_difference, paired_ratio, perplexity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
Row = dict[str, str]
KEEP_IN_MEMORY = 2e9  # bytes of evaluation pictures


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The flags of every study."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", type=Path, help="YAML file as for `oats-vision compress`; flags override it")
    flags.add_argument("--model", help="any model that `compress` takes [default: demo]")
    flags.add_argument("--data", help="calibration data [default: demo]")
    flags.add_argument("--samples", type=int, help="calibration pictures (sequences of text), drawn anew for each seed")
    flags.add_argument("--eval-samples", type=int, help="evaluate on that many only [default: all]")
    flags.add_argument("--batch-size", type=int)
    flags.add_argument("--device")
    flags.add_argument("--workers", type=int)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the choice of calibration data")
    flags.add_argument("--out", type=Path, default=Path(out), help="folder for the CSV file, the plot and the table")
    return flags


def picture_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The flags of a study on pictures."""
    flags = parser(description, out)
    flags.add_argument("--eval-data", help="labelled pictures [default: demo]")
    flags.add_argument("--mixed-precision", choices=["bfloat16", "float16"], help="of the evaluation")
    return flags


class Pictures:
    """What a study on pictures measures: top-1, against the dense model on the same pictures."""

    KEYS: ClassVar = ["model", "data", "samples", "seed", "eval_data", "eval_samples", "precision"]
    RESULTS: ClassVar = ["dense_top1", "top1", "top5", "difference", "low", "high"]

    def __init__(self, args: argparse.Namespace) -> None:
        config = run_config(args, "pictures", eval_data=args.eval_data)
        self.config = config.model_copy(update={"data": config.data or "demo", "eval_data": config.eval_data or "demo"})
        self.targets = [str(self.config.eval_data)]
        self.mixed = getattr(torch, args.mixed_precision) if args.mixed_precision else None
        self.about = {
            "model": self.config.model,
            "data": self.config.data,
            "samples": self.config.samples,
            "eval_samples": self.config.eval_samples or "all",
            "precision": args.mixed_precision or self.config.dtype,
        }

    def load(self) -> nn.Module:
        """The dense model, after it was evaluated."""
        model, transform = load_dense(self.config)
        if transform is None:
            raise SystemExit(f"{self.config.model} says nothing about its preprocessing")
        self.transform = transform
        test = self._pictures(self.targets[0], self.config.eval_samples, self.config.seed, self.config.eval_split, True)
        self.test = _in_memory(test)
        self.before = evaluate_top1(model, self.test, mixed_precision=self.mixed)
        console.print(f"{self.config.model}: dense top-1 {self.before.top1:.2f}% on {self.before.pictures} pictures")
        return model

    def calibration(self, seed: int) -> Batches:
        return self._pictures(str(self.config.data), self.config.samples, seed, self.config.split, False)

    def measure(self, model: nn.Module, target: str) -> Row:
        after = evaluate_top1(model, self.test, mixed_precision=self.mixed)
        difference = paired_difference(self.before.correct, after.correct)
        values = [self.before.top1, after.top1, after.top5, difference.points, difference.low, difference.high]
        return {name: f"{value:.3f}" for name, value in zip(self.RESULTS, values, strict=True)}

    def _pictures(self, source: str, samples: int | None, seed: int, split: str | None, labelled: bool) -> Batches:
        return load_pictures(
            source,
            self.transform,
            samples=samples,
            seed=seed,
            labelled=labelled,
            split=str(split),
            batch_size=self.config.batch_size or 1,
            workers=self.config.workers,
        )


class Texts:
    """What a study on text measures: perplexity, against the dense model on the same windows of each text."""

    KEYS: ClassVar = ["model", "data", "samples", "sequence_length", "seed", "eval_data", "eval_samples", "precision"]
    RESULTS: ClassVar = ["dense_perplexity", "perplexity", "ratio", "low", "high"]

    def __init__(self, args: argparse.Namespace) -> None:
        self.config = run_config(args, "sequences", sequence_length=args.sequence_length)
        if self.config.data is None or self.config.model == "demo":
            raise SystemExit("--model and --data must be given: a language model, and a text to calibrate with")
        self.targets = args.eval_data
        self.about = {
            "model": self.config.model,
            "data": self.config.data,
            "samples": self.config.samples,
            "sequence_length": self.config.sequence_length,
            "eval_samples": self.config.eval_samples or "all",
            "precision": self.config.dtype,
        }

    def load(self) -> nn.Module:
        """The dense model, after it was evaluated."""
        model, _ = load_dense(self.config)
        self.tokenizer = ov.load_tokenizer(self.config.model)
        self.ids, self.before = {}, {}
        for text in self.targets:
            ids = ov.load_tokens(text, self.tokenizer, split=str(self.config.eval_split))
            if self.config.eval_samples:
                ids = ids[: self.config.eval_samples * self.config.sequence_length]
            self.ids[text] = ids
            self.before[text] = self._perplexity(model, text)
            score = self.before[text]
            console.print(
                f"{self.config.model}: dense perplexity {score.value:.3f} on {len(score.tokens)} windows of {text}"
            )
        return model

    def calibration(self, seed: int) -> ov.text.Sequences:
        return ov.load_sequences(
            str(self.config.data),
            self.tokenizer,
            samples=self.config.samples or 1,
            length=self.config.sequence_length,
            batch_size=self.config.batch_size or 1,
            seed=seed,
            split=self.config.split,
        )

    def measure(self, model: nn.Module, target: str) -> Row:
        after = self._perplexity(model, target)
        ratio = paired_ratio(self.before[target], after)
        values = [self.before[target].value, after.value, ratio.value, ratio.low, ratio.high]
        return {name: f"{value:.4f}" for name, value in zip(self.RESULTS, values, strict=True)}

    def _perplexity(self, model: nn.Module, text: str) -> Perplexity:
        length, batch_size = self.config.sequence_length, self.config.batch_size or 1
        return perplexity(model, self.ids[text], length=length, batch_size=batch_size)


Bench = Pictures | Texts
LAYERS = ["parameters", "error", "rounds", "seconds"]
console = Console(stderr=True)


def run_config(args: argparse.Namespace, unit: Literal["pictures", "sequences"], **flags: Any) -> RunConfig:
    """The settings of the file, overridden by the flags."""
    given = ("model", "data", "samples", "eval_samples", "batch_size", "device", "workers")
    return load_run_config(args.config, {field: getattr(args, field) for field in given} | flags).completed(unit)


def load_dense(config: RunConfig) -> tuple[nn.Module, Any]:
    device, dtype = choose_device(config.device), getattr(torch, config.dtype)
    console.print(machine(device))
    return ov.load_model(config.model, dtype=dtype, device=device, image_size=config.image_size)


def run(bench: Bench, args: argparse.Namespace, name: str, cells: Sequence[dict[str, Any]]) -> list[Row]:
    """Do what is missing of a study and return all its rows.

    Args:
        name: of the CSV file.
        cells: compression settings, fields of CompressionSettings.
    """
    logging.basicConfig(format="%(message)s")
    config, keys = bench.config, bench.KEYS + SETTINGS
    base = {field: getattr(config, field) for field in ("iterations", "solver", "tolerance", "scaling", "fused_qkv")}
    wanted: dict[tuple[str, ...], Row] = {}
    jobs: dict[tuple[CompressionSettings, int], list[Row]] = defaultdict(list)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{name}.csv"
    done = {tuple(row[field] for field in keys): row for row in _read(file, keys + bench.RESULTS + LAYERS)}
    for seed in args.seeds:
        for cell in cells:
            settings = validated(CompressionSettings, base | cell)
            for target in bench.targets:
                about = bench.about | {"seed": seed, "eval_data": target}
                row = {field: str(value) for field, value in (about | _described(settings)).items()}
                key = tuple(row[field] for field in keys)
                wanted[key] = row
                if key not in done:
                    jobs[settings, seed].append(row)
    if jobs:
        for row in _do(bench, file, jobs):
            done[tuple(row[field] for field in keys)] = row
    return [done[key] for key in wanted]


def _do(bench: Bench, file: Path, jobs: dict[tuple[CompressionSettings, int], list[Row]]) -> Iterator[Row]:
    """Compress for each job, and measure what is missing of it."""
    dense = bench.load()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(jobs))
        for (settings, seed), rows in jobs.items():
            bar.update(task, description=f"{settings.method} {settings.rate:.3g} seed {seed}")
            model, start = copy.deepcopy(dense), time.perf_counter()
            report = ov.compress(
                model,
                bench.calibration(seed),
                settings=settings,
                activation_memory=bench.config.activation_memory,
            )
            layers = _layers(report, time.perf_counter() - start)
            ov.merge(model)
            for row in rows:
                row |= bench.measure(model, row["eval_data"]) | layers
                _append(file, row, bench.KEYS + SETTINGS + bench.RESULTS + LAYERS)
                yield row
            bar.advance(task)


def _layers(report: ov.CompressionReport, seconds: float) -> Row:
    errors = [layer.error for layer in report.layers]
    rounds = [max(layer.rounds.values()) for layer in report.layers]
    return {
        "parameters": f"{report.parameters / report.dense_parameters:.4f}",
        "error": f"{statistics.mean(errors):.5f}" if errors else "",
        "rounds": f"{statistics.mean(rounds):.1f}" if rounds else "",
        "seconds": f"{seconds:.2f}",
    }


def _described(settings: CompressionSettings) -> dict[str, Any]:
    return {field: getattr(settings, field) for field in SETTINGS}


def _read(file: Path, columns: list[str]) -> list[Row]:
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if rows and list(rows[0]) != columns:
        raise SystemExit(f"{file} is of another study or release: move it away, or give another --out")
    return [row for row in rows if None not in row.values()]  # a line that was being written when the study stopped


def _append(file: Path, row: Row, columns: list[str]) -> None:
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
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


def method_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Settings for each method of `--methods` at each of `--rates`; `oats` for each of `--rank-ratio`."""
    return [
        {"method": method.removesuffix("+refit"), "refit": "+" in method, "rate": rate, "rank_ratio": ratio}
        for rate in args.rates
        for method in args.methods
        for ratio in (args.rank_ratio if "oats" in method else [None])
    ]


def method_line(row: Row) -> str:
    """A method's name in tables."""
    name = row["method"] + " + refit" * (row["refit"] == "True")
    return f"{name}, rank ratio {row['rank_ratio']}" if row["method"] == "oats" else name


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
        yscale="log" if log_y else "linear",
    )
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
