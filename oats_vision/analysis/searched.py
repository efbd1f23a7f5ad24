"""What a search for a rate or bits tried, as the page of its result shows it."""

from dataclasses import dataclass

from markupsafe import Markup

from oats_vision.analysis import figures
from oats_vision.analysis.figures import Point
from oats_vision.evaluation.searched import Searched, varied


@dataclass(frozen=True)
class SearchSection:
    """Of the page. plot: the loss against the size, None if there was nothing to choose by."""

    sentence: str
    note: str
    caption: str
    plot: Markup | None
    headings: list[str]
    rows: list[list[str]]


def searched(search: Searched) -> SearchSection:
    """All that was tried, in the order in which it was."""
    for_a_drop = search.sort == "max_drop"
    limit = f"{search.limit:g} {search.unit}" if for_a_drop else f"{search.limit / 1e6:g} MB"
    points = [
        Point(
            next(iter(varied(one.settings).values())),
            one.bytes / 1e6,
            one.loss.value,
            (one.loss.low, one.loss.high),
            0,
            one == search.best,
        )
        for one in search.trials
        if one.loss and one.bytes
    ]
    label = f"{search.loss}, {search.unit}"
    first, *others = varied(search.best.settings)
    lines = (None, search.limit) if for_a_drop else (search.limit / 1e6, None)
    return SearchSection(
        sentence=search.sentence,
        note=(
            f"The limit, {limit}, is the dashed line; the upper end of the interval must stay below it."
            if for_a_drop
            else f"The limit, {limit}, is the dashed line."
        )
        + f" Numbers are {'rates' if first == 'rate' else first}; the chosen one is ringed.",
        caption=f"{search.loss} against bytes, on {search.samples:,} {search.of}, with 95% intervals",
        plot=figures.scatter(points, "MB", label, limit=lines) if points else None,
        headings=["trial", first, *others, "MB", f"{label} [95%]", ""],
        rows=[
            [
                str(one.number),
                *varied(one.settings).values(),
                one.megabytes,
                str(one.loss or one.failed or ""),
                "chosen" * (one == search.best),
            ]
            for one in search.trials
        ],
    )
