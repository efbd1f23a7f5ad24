"""`oats-vision compare`: several compressed models side by side."""

import json
from pathlib import Path
from typing import Annotated

import typer

from oats_vision.cli.common import need_directory, results
from oats_vision.cli.help import MODELS, OUTPUT
from oats_vision.cli.options import Json, option
from oats_vision.cli.pages import see_writable

EXAMPLES = """\
  oats-vision compare dinov2_l_30 dinov2_l_50 dinov2_l_70
  oats-vision compare runs/* --html runs.html"""


def compare(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="2 to 20 compressed models", rich_help_panel=MODELS)
    ],
    html: Annotated[Path, option(OUTPUT, metavar="FILE", help="page to write, which works offline")] = Path(
        "compare.html"
    ),
    as_json: Json = False,
) -> None:
    """Compare compressed models side by side: their bytes, their speed, and what compression cost.

    One table, in which the best of each column is marked; and one page with the same table, accuracy against bytes and
    against latency, and errors by block.
    """
    for directory in directories:
        need_directory(directory)
    see_writable(html, directories)
    from oats_vision.analysis.compare import alike, comparison_page, comparison_table, doubts
    from oats_vision.analysis.compared import read_compared
    from oats_vision.analysis.page import write_page

    runs = read_compared(directories)
    models = {run.model for run in runs}
    title = f"{len(runs)} runs of {models.pop()}" if len(models) == 1 else f"{len(runs)} runs"
    write_page(comparison_page(runs, title), html.resolve())  # a link of the user's own is followed
    if as_json:
        typer.echo(json.dumps({"runs": [run.to_dict() for run in runs], "doubts": doubts(runs), "html": str(html)}))
        return
    console = results()
    console.print(comparison_table(runs, title))
    for line in filter(None, (alike(runs), *doubts(runs), f"Written to {html}.")):
        console.print(line, soft_wrap=True)
