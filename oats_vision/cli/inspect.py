"""`oats-vision inspect`: what a checkpoint is."""

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

    With --html one page that works offline: accuracy as far as it was evaluated, errors by block, the budget, the
    spectrum of each layer, and a table of layers that sorts.
    """
    need_directory(directory)
    if html:
        see_writable(html, [directory])
    from oats_vision.analysis import tables
    from oats_vision.analysis.html_report import draw_page
    from oats_vision.analysis.inspection import inspect as look

    found = look(directory)
    if html:
        draw_page(directory, html, Display(messages))
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    console = results()
    console.print(tables.key_values(str(directory), found.rows()))
    if found.report.layers:
        console.print(tables.layer_table(found.report))
    if html:
        console.print(f"Written to {html}.", soft_wrap=True)
