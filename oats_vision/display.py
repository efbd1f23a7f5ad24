"""Progress as people see it: bars on a terminal and in a notebook, a line now and then in a log file."""

from __future__ import annotations

import html
import io
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from oats_vision import logs
from oats_vision.progress import Step, duration

log = logging.getLogger(__name__)

LOGGED_EVERY = 15  # seconds
REDRAWN_EVERY = 0.25  # seconds, in a notebook
NARROW = 80  # columns that every bar fits into
_text = partial(TextColumn, markup=False)  # what is shown may be a name with brackets


class Bars(Progress):
    """Progress bars; where they cannot be drawn, as in a log file, their lines now and then."""

    def __init__(self, *columns: str | ProgressColumn, console: Console) -> None:
        # rich's own way needs ipywidgets, and leaves nothing in a notebook that is saved
        super().__init__(*columns, console=console, disable=console.is_jupyter)
        self._shown = self.get_time()
        self._output: Any = None  # of the notebook's cell

    def update(self, *args: Any, **fields: Any) -> None:
        super().update(*args, **fields)
        if self.console.is_jupyter:
            if self._output is None or self.get_time() - self._shown >= REDRAWN_EVERY:
                self._redraw()
        elif not self.console.is_terminal and self.get_time() - self._shown >= LOGGED_EVERY:
            self._shown = self.get_time()
            self.console.print(self.get_renderable())

    def stop(self) -> None:
        super().stop()
        if self.console.is_jupyter and self._output is not None:
            self._redraw()

    def _redraw(self) -> None:
        """Put the bars in the place of those before, in one output of the notebook's cell."""
        if self.console.quiet:
            return
        from IPython.display import display

        self._shown = self.get_time()
        page = Console(file=io.StringIO(), width=100, force_jupyter=False, force_terminal=False, color_system=None)
        page.print(self.get_renderable())
        text = page.file.getvalue().rstrip()  # type: ignore[attr-defined]  # a StringIO
        content = {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}
        if self._output is None:
            self._output = display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]  # of IPython
        else:
            self._output.update(content, raw=True)


class Display:
    """Where progress is drawn: a console, or nowhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)

    def say(self, text: str) -> None:
        """Text as it is, which also goes to the log."""
        self._print(text)
        log.info("%s", text, extra=logs.SHOWN)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def lines(self, title: str, rows: Mapping[str, str], column: int = 0) -> None:
        """A title if there is one, and below it a name and its text in each row, in columns.

        Args:
            column: letters that the names take at least.
        """
        if title:
            self._print(title)
        column = max(column, *map(len, rows))
        for name, text in rows.items():
            row = textwrap.fill(
                text,
                self.console.width - 1,
                initial_indent=f"  {name:<{column}}  ",
                subsequent_indent=" " * (column + 4),
                break_long_words=False,  # a path is to be copied
                break_on_hyphens=False,
            )
            self._print(row)
            log.info("%s: %s", name, text, extra=logs.SHOWN)

    @contextmanager
    def status(self, what: str) -> Iterator[None]:
        """A line that says what is going on and for how long, and is gone afterwards; none in a log file."""
        if not self.console.is_terminal:
            yield
            return
        columns = (SpinnerColumn(), _text("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            bar.add_task(what, total=None)
            yield

    @contextmanager
    def compression(self) -> Iterator[Callable[[Step], None]]:
        """A bar with block, what is done to it, error of the last layer, and time left.

        Once the first block has shown how long the whole takes, a line says so.
        """
        width = self.console.width
        bar_width = min(max(width - NARROW, 0) // 4 + 5, 24)
        columns = (
            _text("{task.fields[block]}"),
            BarColumn(bar_width=bar_width),
            _text("{task.percentage:>3.0f}%"),
            _text("{task.fields[activity]}"),
            _text("{task.fields[error]}"),
            _Time(),
        )
        others = bar_width + len("  100% ,  error 0.031, 1:02:11, ~15 min left")
        said = False
        with Bars(*columns, console=self.console) as bar:
            task = bar.add_task("", total=1.0, block="", activity="checking the model,", error="", left=None)

            def show(step: Step) -> None:
                nonlocal said
                block = f"block {step.block}/{step.blocks}" if step.block else ""
                fields: dict[str, Any] = {
                    "block": block,
                    "activity": f"{_fitting(step.activity, step.detail, width - others - len(block))},",
                    "error": "" if step.error is None else f"error {step.error:.3f},",
                    "left": step.left,
                }
                if step.estimate and not said:
                    said = True
                    self.say(str(step.estimate))
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


class _Time(ProgressColumn):
    """Time gone, and about how much is left."""

    def render(self, task: Task) -> Text:
        minutes, seconds = divmod(int(task.finished_time or task.elapsed or 0), 60)
        hours, minutes = divmod(minutes, 60)
        gone = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        left = task.fields["left"]
        return Text(
            f"{gone}, ~{duration(max(round(left), 1))} left" if left and not task.finished else gone, no_wrap=True
        )


def _fitting(activity: str, detail: str, room: int) -> str:
    """The activity and its detail; of a long name only its end."""
    space = room - len(activity) - 1
    while len(detail) > space and "." in detail:
        detail = detail.partition(".")[2]
    if not detail or space < 4:
        return activity
    return f"{activity} {detail if len(detail) <= space else '…' + detail[1 - space :]}"
