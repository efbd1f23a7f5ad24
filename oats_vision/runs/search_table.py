"""A search as it is printed while it goes on: a line for each trial."""

from oats_vision.compression.settings import CompressionSettings
from oats_vision.display import Display
from oats_vision.evaluation.searched import Tried, varied
from oats_vision.runs import bracket
from oats_vision.runs.config import RunConfig
from oats_vision.runs.kept import MEMORY
from oats_vision.runs.losses import Judged


def show_headings(display: Display, what: str, judged: Judged | None, settings: CompressionSettings) -> None:
    """What is searched for, what trials are judged by, and the columns.

    Args:
        settings: of a trial.
    """
    words = f"{judged.kind.words}, {judged.kind.unit} [95%]" if judged else ""
    on = f", judged by {judged.samples:,} {judged.of}" if judged else ""
    show_line(display, f"search: {what}{on}")
    show_line(display, f"  {_row({name: name for name in varied(settings)}, 'MB')}  {words}".rstrip())


def show_trial(display: Display, one: Tried, verdict: str) -> None:
    """One trial, and what follows from it."""
    loss = str(one.loss) if one.loss else ""
    show_line(display, f"  {_row(varied(one.settings), one.megabytes)}  {loss:<24}  {verdict}")


def _row(cells: dict[str, str], size: str) -> str:
    """Cells by their headings, and the size, below one another."""
    return "  ".join([*(f"{text:>{max(len(heading), 5)}}" for heading, text in cells.items()), f"{size:>8}"])


def show_line(display: Display, line: str) -> None:
    display.say(line)


def plan_lines(lines: dict[str, str], config: RunConfig) -> dict[str, str]:
    """What a search comes to, beside what its first trial does."""
    trials = f"at most {bracket.MOST} trials" if config.max_drop else "one trial of each setting that reaches the size"
    memory = f"a second copy of the model and up to {2 * MEMORY / 1e9:g} GB of decoded pictures"
    return lines | {"search": f"{trials}; what is above is of the first, and {memory} come on top of its memory"}
