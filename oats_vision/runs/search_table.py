"""A search as it is printed while it goes on: a line for each trial."""

from oats_vision.display import Display
from oats_vision.evaluation.searched import Tried
from oats_vision.runs import bracket
from oats_vision.runs.config import RunConfig
from oats_vision.runs.kept import MEMORY
from oats_vision.runs.losses import Judged

HEADINGS = f"  {'rate':>5}  {'rank ratio':>10}  {'stored in':>9}  {'MB':>8}  "


def show_headings(display: Display, what: str, judged: Judged | None) -> None:
    """What is searched for, what trials are judged by, and the columns."""
    words = f"{judged.kind.words}, {judged.kind.unit} [95%]" if judged else ""
    on = f", judged by {judged.samples:,} {judged.of}" if judged else ""
    show_line(display, f"search: {what}{on}")
    show_line(display, f"{HEADINGS}{words}".rstrip())


def show_trial(display: Display, one: Tried, verdict: str) -> None:
    """One trial, and what follows from it."""
    settings = one.settings
    ratio = settings.rank_ratio if isinstance(settings.rank_ratio, str) else f"{settings.rank_ratio:.3g}"
    figures = f"  {settings.rate:5.3g}  {ratio:>10}  {settings.storage_dtype:>9}  {one.bytes / 1e6:8.2f}  "
    loss = str(one.loss) if one.loss else ""
    show_line(display, f"{figures}{loss:<24}  {verdict}")


def show_line(display: Display, line: str) -> None:
    display.say(line)


def plan_lines(lines: dict[str, str], config: RunConfig) -> dict[str, str]:
    """What a search comes to, beside what its first trial does."""
    trials = f"at most {bracket.MOST} trials" if config.max_drop else "one trial of each setting that reaches the size"
    memory = f"a second copy of the model and up to {2 * MEMORY / 1e9:g} GB of decoded pictures"
    return lines | {"search": f"{trials}; what is above is of the first, and {memory} come on top of its memory"}
