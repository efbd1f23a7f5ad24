"""Progress as people see it: bars on a terminal, a line now and then in a log file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from oats_vision.pipeline import Step

LOGGED_EVERY = 15  # seconds
_text = partial(TextColumn, markup=False)  # what is shown may be a name with brackets


class Bars(Progress):
    """Progress bars; where they cannot be drawn, as in a log file, their lines now and then."""

    def __init__(self, *columns: str | ProgressColumn, console: Console) -> None:
        super().__init__(*columns, console=console)
        self._logged = self.get_time()

    def update(self, *args: Any, **fields: Any) -> None:
        super().update(*args, **fields)
        if not self.console.is_terminal and self.get_time() - self._logged >= LOGGED_EVERY:
            self._logged = self.get_time()
            self.console.print(self.get_renderable())


class Display:
    """Where progress is drawn: a console, or nowhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)

    @contextmanager
    def compression(self) -> Iterator[Callable[[Step], None]]:
        """A bar with block, linear, error of the last layer, and time left."""
        columns = (
            SpinnerColumn(),
            _text("block {task.fields[block]}/{task.fields[blocks]}"),
            BarColumn(bar_width=24),
            _text("{task.percentage:>3.0f}%"),
            _text("{task.fields[activity]}"),
            _text("{task.fields[error]}"),
            TimeElapsedColumn(),
            _text("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console) as bar:
            task = bar.add_task("", total=1.0, block=0, blocks="?", activity="loading pictures", error="")

            def show(step: Step) -> None:
                error = "" if step.error is None else f"error {step.error:.4f}"
                fields: dict[str, Any] = {
                    "block": step.block,
                    "blocks": step.blocks,
                    "activity": step.activity,
                    "error": error,
                }
                bar.update(task, completed=step.done, **fields)

            yield show

    @contextmanager
    def counting(self, what: str, unit: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A bar over things that are counted."""
        columns = (
            SpinnerColumn(),
            _text("{task.description}"),
            BarColumn(bar_width=24),
            _text("{task.completed} {task.fields[unit]}"),
            TimeElapsedColumn(),
            _text("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console) as bar:
            task = bar.add_task(what, total=total, unit=unit)
            yield lambda done: bar.update(task, completed=done)
