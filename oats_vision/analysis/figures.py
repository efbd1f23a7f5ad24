"""Figures of the pages, as SVG whose colours are the page's own: they turn dark with it."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from oats_vision.files import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

SIZE = (4.2, 3.0)  # inches, as a phone shows them
# where a label may be, points right of its mark and above it, the usual place first
PLACES = [(6, 5), (-6, 5), (6, -11), (-6, -11), (0, 9), (0, -15), (12, -3), (-12, -3)]
MARKER = 12  # pixels around a mark that labels keep out of
SERIES = 8  # colours that templates/base.html names
# drawn in these, and replaced by the page's variables
INK, MUTED, GRID, PAPER = "#0d0d01", "#0d0d02", "#0d0d03", "#0d0d04"
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}
_VARIABLES |= {f"#0d0e{i:02x}": f"var(--s{i + 1})" for i in range(SERIES)}
STYLE: Any = {
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "oats_vision",
    "text.parse_math": False,  # a layer's name may have a $
    "text.usetex": False,
    "text.color": INK,
    "font.size": 8.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
}


def colour(number: int) -> str:
    """Of the series of that number, from 0."""
    return f"#0d0e{number % SERIES:02x}"


@dataclass(frozen=True)
class Point:
    """Of a scatter, with the interval of y if known.

    number: from 0, of its colour; None is the dense model. chosen: it is ringed.
    """

    label: str
    x: float
    y: float
    interval: tuple[float, float] | None = None
    number: int | None = None
    chosen: bool = False


def scatter(
    points: Sequence[Point], x_label: str, y_label: str, *, limit: tuple[float | None, float | None] = (None, None)
) -> Markup:
    """Points by name, with their intervals.

    Args:
        limit: of x and of y, each a line.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for point in points:
            shade = INK if point.number is None else colour(point.number)
            if point.interval:
                axes.vlines(point.x, *point.interval, color=shade, linewidth=1, alpha=0.6)
            marker = "D" if point.number is None else "o"
            axes.plot([point.x], [point.y], marker, color=shade, markersize=6, markeredgecolor=PAPER)
            if point.chosen:
                axes.plot([point.x], [point.y], "o", color="none", markersize=12, markeredgecolor=shade)
        for value, line in zip(limit, (axes.axvline, axes.axhline), strict=True):
            if value is not None:
                line(value, color=MUTED, linewidth=1, linestyle="--")
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(0.12)
        _name(figure, axes, points)

    return _svg(draw, SIZE, f"{y_label} against {x_label}")


def _name(figure: "Figure", axes: "Axes", points: Sequence[Point]) -> None:
    """Write the label of each point beside it, where it hides least of other points and labels."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # lays the axes out: only then is it known where points are
    taken = [
        Bbox.from_bounds(x - MARKER / 2, y - MARKER / 2, MARKER, MARKER)
        for x, y in axes.transData.transform([(point.x, point.y) for point in points])
    ]
    for point in points:
        text = axes.annotate(point.label, (point.x, point.y), (0, 0), textcoords="offset points", color=INK, fontsize=8)
        hidden = []
        for place in PLACES:
            _move(text, place)
            common = (Bbox.intersection(text.get_window_extent(), other) for other in taken)
            hidden.append(sum(box.width * box.height for box in common if box))
        _move(text, PLACES[hidden.index(min(hidden))])
        taken.append(text.get_window_extent())


def _move(text: "Annotation", place: tuple[int, int]) -> None:
    text.set_position(place)
    text.set_horizontalalignment("center" if place[0] == 0 else "left" if place[0] > 0 else "right")


def line_plot(lines: Mapping[str, Mapping[int, float]], label: str, *, from_zero: bool = True) -> Markup:
    """One line a name, by block.

    Args:
        lines: of each name, the value of each block that has one.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for number, values in enumerate(lines.values()):
            style = ("-", "--", ":", "-.")[number // SERIES % 4]
            size = 3 if len(lines) * len(values) < 300 else 0
            axes.plot(*_sorted(values), style, marker="o", markersize=size, linewidth=1.4, color=colour(number))
        axes.set(xlabel="block", ylabel=label)
        axes.locator_params(axis="x", integer=True)
        axes.set_ylim(bottom=0 if from_zero else None)
        # by itself a legend leaves out names that start with _
        figure.legend(axes.lines, [readable(name) for name in lines], fontsize=8, ncols=2, loc="outside lower center")

    return _svg(draw, (SIZE[0], SIZE[1] + 0.08 * len(lines)), f"{label} by block")


def bar(parts: Sequence[tuple[str, float, int | None]], label: str) -> Markup:
    """One bar of several parts.

    Args:
        parts: name, bytes and number of the colour; without a number it is no more than the ground.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        left, whole = 0.0, sum(size for _, size, _ in parts)
        for name, size, number in parts:
            shade = GRID if number is None else colour(number)
            axes.barh([0], [size / 1e6], left=left, color=shade, label=f"{readable(name)}: {size / whole:.1%}")
            left += size / 1e6
        axes.set(xlabel="MB", yticks=[])
        axes.margins(0)
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        figure.legend(fontsize=8, ncols=2, loc="outside lower center")

    return _svg(draw, (SIZE[0], 1.7), label)


def _sorted(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    blocks = sorted(values)
    return blocks, [values[block] for block in blocks]


def _svg(draw: Callable[["Figure"], None], size: tuple[float, float], label: str) -> Markup:
    """Inline SVG that fills the width it is given."""
    import matplotlib
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the same in every figure of a page
    text = re.sub(r'style="[^"]*"', lambda style: _coloured(style[0]), text)
    text = re.sub(r' (width|height)="[^"]*"', "", text, count=2)
    return Markup(text.replace("<svg ", f'<svg class="figure" role="img" aria-label="{escape(label)}" ', 1))


def _coloured(style: str) -> str:
    return re.sub(r"#0d0[de][0-9a-f]{2}", lambda found: _VARIABLES.get(found[0], found[0]), style)
