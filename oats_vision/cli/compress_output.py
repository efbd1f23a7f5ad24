"""What `oats-vision compress` prints at its end: the table and a few lines, the plan of a dry run, or JSON."""

import json

import typer

from oats_vision.cli.common import results
from oats_vision.display import Display
from oats_vision.progress import Estimate, count, duration
from oats_vision.runs.finished import FinishedRun
from oats_vision.runs.forecast import Forecast
from oats_vision.runs.search import Planned
from oats_vision.runs.summary import summary_lines, summary_table


def print_plan(planned: Forecast) -> None:
    """What a run would come to, but for the time, which takes a trial."""
    Display(results()).lines("plan", {name: text for name, text in planned.lines().items() if name != "time"})


def print_time(planned: Forecast, estimate: Estimate, trials: Planned | None = None) -> None:
    """The plan's last line.

    Args:
        trials: that a search makes; None: it is none.
    """
    text = f"{estimate}, by a trial of one block; nothing was written"
    if trials:
        whole = duration(trials.seconds)
        text = f"{text}. The search compresses at most {count(trials.most, 'time')}: {whole}, and the measurements"
    Display(results()).lines("", {"time": text}, column=max(map(len, planned.lines())))


def print_finished(finished: FinishedRun, as_json: bool) -> None:
    """The table, what was done and where it is, and last what came out worse than it should."""
    if as_json:
        typer.echo(json.dumps(finished.to_dict()))
        return
    console = results()
    console.print(summary_table(finished))
    for line in summary_lines(finished):
        console.print(line, soft_wrap=True)
