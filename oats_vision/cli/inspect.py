"""`oats-vision inspect`: what a checkpoint is, or how far the run is that makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from oats_vision.cli.common import messages, need_directory, results
from oats_vision.cli.help import OUTPUT
from oats_vision.cli.options import Directory, Json, option
from oats_vision.cli.pages import see_writable
from oats_vision.display import Display
from oats_vision.errors import CheckpointError
from oats_vision.under_way import under_way

EXAMPLES = """\
  oats-vision inspect dinov2_l_50
  oats-vision inspect dinov2_l_50 --html page.html"""


def inspect(
    directory: Directory,
    html: Annotated[
        Path | None, option(OUTPUT, metavar="FILE", help="also write a self-contained page, such as page.html")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint: its settings, sizes, and each layer's budget and error.

    Of a run that is under way, or was stopped, it shows how far that is, the last layers, and warnings.

    With --html one page that works offline: accuracy as far as it was evaluated, errors by block, the budget, the
    spectrum of each layer, and a table of layers that sorts.
    """
    if _show_run(directory, html, as_json):
        return
    need_directory(directory)
    if html:
        see_writable(html, [directory])
    from oats_vision.analysis import tables
    from oats_vision.analysis.html_report import draw_page
    from oats_vision.analysis.inspection import inspect as look

    found = look(directory)
    if html:
        draw_page(directory, html.resolve(), Display(messages))  # a link of the user's own is followed
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    console = results()
    console.print(tables.key_values(str(directory), found.rows()))
    if found.report.layers:
        console.print(tables.layer_table(found.report))
    if html:
        console.print(f"Written to {html}.", soft_wrap=True)


def _show_run(directory: Path, html: Path | None, as_json: bool) -> bool:
    """Show the run that makes a checkpoint, if there is one; whether that was all that there is to show.

    Raises:
        CheckpointError: a page is asked for, and there is no checkpoint yet.
    """
    if not directory.resolve().name or not directory.resolve().parent.is_dir():
        return False
    run = under_way(directory)
    if run is None:
        return False
    if (directory / "config.json").is_file() and (html or not (run.running and run.status)):
        what = "a run that was to replace it was stopped"
        if run.status.get("written") is True:
            what = "its run was stopped after it was written, and the same command does the rest"
        messages.print(f"{directory}: {'a run is at work on it' if run.running else what}", soft_wrap=True)
        return False
    if html:
        raise CheckpointError(f"{directory} is not written yet: leave --html out to see how far its run is")
    if as_json:
        typer.echo(json.dumps(run.to_dict()))
        return True
    from oats_vision.analysis.live import WARNINGS, live_lines, live_table

    console = results()
    for line in live_lines(run):
        console.print(line, soft_wrap=True)
    if run.layers:
        console.print(live_table(run.layers))
    for warning in run.warnings[-WARNINGS:]:
        console.print(f"warning: {warning}", soft_wrap=True)
    if run.log:
        console.print(f"log: {run.log}", soft_wrap=True)
    return True
