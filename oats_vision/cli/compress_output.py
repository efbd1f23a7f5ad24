"""What `oats-vision compress` prints at its end: the table and a few lines, the plan of a dry run, or JSON."""

import json

import typer

from oats_vision.analysis import tables
from oats_vision.checkpoint.place import MERGED, PAGE
from oats_vision.cli.common import results
from oats_vision.display import Display
from oats_vision.progress import Estimate, count, duration, shares
from oats_vision.runs.forecast import Forecast
from oats_vision.runs.run import FinishedRun


def print_plan(planned: Forecast) -> None:
    """What a run would come to, but for the time, which takes a trial."""
    Display(results()).lines("plan", {name: text for name, text in planned.lines().items() if name != "time"})


def print_time(planned: Forecast, estimate: Estimate, trials: int = 0) -> None:
    """The plan's last line.

    Args:
        trials: that a search makes at most; 0: it is none.
    """
    text = f"{estimate}, by a trial of one block; nothing was written"
    if trials:
        whole = duration(trials * estimate.total)
        text = f"{text}. The search compresses at most {count(trials, 'time')}: {whole}, and the measurements"
    Display(results()).lines("", {"time": text}, column=max(map(len, planned.lines())))


def print_finished(finished: FinishedRun, as_json: bool) -> None:
    """The table, what was done and where it is, and last what came out worse than it should."""
    if as_json:
        typer.echo(json.dumps(finished.to_dict()))
        return
    config, result = finished.config, finished.result
    console = results()
    title = f"{config.model}: {finished.settings.summary}, stored in {finished.settings.storage_dtype}"
    console.print(tables.run_table(title, [*finished.score_rows(), *result.rows()]))
    lines = [finished.searched.sentence if finished.searched else "", result.footnote, *_what_was_done(finished)]
    if not finished.evaluation and result.cost is None:
        lines.append(f"What it cost was not measured: {finished.task.eval_command(str(config.out))}")
    for line in filter(None, [*lines, *result.advice]):
        console.print(line, soft_wrap=True)


def _what_was_done(finished: FinishedRun) -> list[str]:
    config, done = finished.config, finished.result.report
    errors = [layer.error for layer in done.layers]
    quality = ""
    if errors:
        quality = f"{done.error_name.capitalize()}: mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}."
    elif done.slicing:
        quality = f"Signal kept in a cut: smallest {min(done.slicing.kept):.4f}."
    skipped = f" ({finished.skipped} unreadable ones skipped)" if finished.skipped else ""
    planned = f" (planned: {finished.planned_memory / 1e9:.2f} GB)" if finished.planned_memory else ""
    places = [f"{config.out} ({tables.megabytes(finished.files['model.safetensors'])})"]
    places += [f"the page {config.out / PAGE}"] * finished.has_page
    places += [f"the dense merge {config.out / MERGED}"] * config.merge
    return [
        f"{f'{len(errors)} layers' if errors else 'All blocks'} compressed with {done.samples} {done.unit}{skipped} in "
        f"{shares(done.seconds)}; {duration(finished.seconds)} in all. "
        f"Peak memory {finished.peak_memory / 1e9:.2f} GB{planned}.",
        quality,
        done.recovery.summary if done.recovery else "",
        f"Written: {', '.join(places)}.",
    ]
