"""Fill the command line's page: where it says `<!-- oats-vision compress -->` comes what `--help` prints."""

import os
import re
from typing import Any
from unittest import mock

import typer

PAGE, WIDTH = "cli.md", 84
MARK = re.compile(r"^<!-- (oats-vision.*?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page."""
    return with_help(markdown) if page.file.src_uri == PAGE else markdown


def with_help(markdown: str) -> str:
    """The page with the help of every command.

    Raises:
        ValueError: a command has no place in the page, or a place no command.
    """
    known, named = helps(), MARK.findall(markdown)
    if sorted(known) != sorted(named):
        wrong = ", ".join(sorted({*known} ^ {*named}))
        raise ValueError(f"docs/{PAGE} must name each command once, as <!-- oats-vision NAME -->; see to {wrong}")
    return MARK.sub(lambda mark: f"```text\n{known[mark[1]]}\n```", markdown)


def helps() -> dict[str, str]:
    """What `--help` prints, for every command: `oats-vision eval top1` -> ..."""
    from oats_vision.cli.commands import app

    found = {}

    def visit(command: Any, name: str, parent: Any) -> None:
        context = command.context_class(command, info_name=name, parent=parent)
        found[context.command_path] = command.get_help(context).rstrip()
        for inner, one in getattr(command, "commands", {}).items():
            visit(one, inner, context)

    with mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}):
        visit(typer.main.get_command(app), "oats-vision", None)
    return found
