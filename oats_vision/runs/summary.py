"""What is said at the end of a run: the table, what was done and where it is, and what came out otherwise."""

import logging

from rich.table import Table

from oats_vision import logs
from oats_vision.analysis import tables
from oats_vision.checkpoint.place import MERGED, PAGE
from oats_vision.progress import count, duration, shares
from oats_vision.runs.finished import FinishedRun

log = logging.getLogger(__name__)


def summary_table(finished: FinishedRun) -> Table:
    """Dense against compressed."""
    title = f"{finished.config.model}: {finished.settings.summary}, stored in {finished.settings.storage_dtype}"
    return tables.run_table(title, [*finished.score_rows(), *finished.result.rows()])


def summary_lines(finished: FinishedRun) -> list[str]:
    """What is said below the table."""
    config, result = finished.config, finished.result
    lines = [finished.searched.sentence if finished.searched else "", result.footnote, *_what_was_done(finished)]
    if not finished.evaluation and result.cost is None:
        lines.append(f"What it cost was not measured: {finished.task.eval_command(str(config.out))}")
    return [line for line in [*lines, *exceptions(finished), *result.advice] if line]


def log_summary(finished: FinishedRun) -> None:
    """Put what the terminal shows at the end into the run's log."""
    for line in [*tables.as_text(summary_table(finished)).splitlines(), *summary_lines(finished)]:
        log.info("%s", line, extra=logs.SHOWN)


def exceptions(finished: FinishedRun) -> list[str]:
    """Everything that was done otherwise than asked for."""
    report, skipped = finished.result.report, []
    if finished.skipped:
        skipped = [f"{count(finished.skipped, 'unreadable picture')} skipped."]
    number = len(report.exceptions) + len(skipped)
    lines = [f"  {line}" for line in [*skipped, *report.exceptions_made]]
    return [f"{count(number, 'exception')}:", *lines] if number else []


def _what_was_done(finished: FinishedRun) -> list[str]:
    config, done = finished.config, finished.result.report
    errors = [layer.error for layer in done.layers]
    quality = ""
    if errors:
        quality = f"{done.error_name.capitalize()}: mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}."
    elif done.slicing:
        quality = f"Signal kept in a cut: smallest {min(done.slicing.kept):.4f}."
    planned = f" (planned: {finished.planned_memory / 1e9:.2f} GB)" if finished.planned_memory else ""
    places = [f"{config.out} ({tables.megabytes(finished.files['model.safetensors'])})"]
    places += [f"the page {config.out / PAGE}"] * finished.has_page
    places += [f"the dense merge {config.out / MERGED}"] * config.merge
    return [
        f"{f'{len(errors)} layers' if errors else 'All blocks'} compressed with {done.samples} {done.unit} in "
        f"{shares(done.seconds)}; {duration(finished.seconds)} in all. "
        f"Peak memory {finished.peak_memory / 1e9:.2f} GB{planned}.",
        quality,
        done.recovery.summary if done.recovery else "",
        f"Written: {', '.join(places)}.",
    ]
