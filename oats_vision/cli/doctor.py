"""`oats-vision doctor`: whether this machine has what is needed, and what to do where it has not."""

import json
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from oats_vision.cli.common import results
from oats_vision.cli.options import Json

EXAMPLES = """\
  oats-vision doctor
  oats-vision doctor --json > doctor.json"""
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(as_json: Json = False) -> None:
    """Check versions, processor, kernels, GPU, caches and network, test the kernels, and say what to fix.

    The exit status is 1 if something failed. Put the output into bug reports.
    """
    from oats_vision.analysis.doctor import GROUPS, examine

    found = examine()
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        console = results()
        for group in GROUPS:
            console.print(group, style="bold")
            console.print(_table([check for check in found.checks if check.group == group]))
        ok, warnings, failed = (sum(check.status == status for check in found.checks) for status in STYLES)
        console.print(f"{ok} ok, {warnings} warning{'s' * (warnings != 1)}, {failed} failed")
    if found.failed:
        raise typer.Exit(1)


def _table(checks: list[Any]) -> Table:
    """What was found, one row each, and below it what to do."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(width=9, justify="right")
    table.add_column(width=16)
    table.add_column(overflow="fold")
    for check in checks:
        style = STYLES[check.status]
        table.add_row(Text(check.status, style), check.name, check.value)
        if check.advice:
            table.add_row("", "", Text(f"-> {check.advice}", style))
    return table
