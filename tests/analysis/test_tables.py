import io
import re

import pytest
from rich.console import Console

from oats_vision import display
from oats_vision.analysis import tables as report
from oats_vision.cli.common import plain_console
from oats_vision.display import Display
from oats_vision.progress import Step


@pytest.mark.parametrize(("every", "lines"), [(0, 5), (3600, 1)])
def test_progress_goes_to_a_log_file_line_by_line_now_and_then(every, lines, monkeypatch):
    monkeypatch.setattr(display, "LOGGED_EVERY", every)
    console = Console(file=io.StringIO(), width=120)
    with Display(console).compression() as progress:
        for block in range(1, 5):
            progress(Step(block / 4, block, 4, "statistics", 0.25))
    written = console.file.getvalue().splitlines()
    assert len(written) == lines  # the last one when all is done
    assert all(f"block {min(i + 1, 4) if lines > 1 else 4}/4" in line for i, line in enumerate(written))


ODD = ["run [v2]", "a[/b]", "[bold]x[/bold]", ":smile:", "{task.id} 100%", "[link=file:///]y"]


@pytest.mark.parametrize("name", ODD)
def test_names_are_shown_as_they_are_in_messages_tables_and_bars(name):
    console = plain_console(file=io.StringIO(), width=100)
    console.print(f"Written to {name}.")
    console.print(report.key_values(name, {name: name}))
    console.print(report.models_table("title", [name], {"metric": [name]}, {"metric": name}))
    with Display(console).counting(name, name, 3) as counting:
        counting(3)
    with Display(console).compression() as progress:
        progress(Step(1.0, 1, 1, name))
    assert console.file.getvalue().count(name) == 10


def test_long_names_are_folded_not_cut():
    console = plain_console(file=io.StringIO(), width=60)
    console.print(report.key_values("", {"X": "abcdefghij" * 12}))
    assert "".join(re.findall("[a-j]", console.file.getvalue())) == "abcdefghij" * 12
