"""What a terminal shows of a run that is under way, or was stopped."""

from typing import Any

from rich.table import Table

from oats_vision.progress import count, duration
from oats_vision.under_way import UnderWay

LAST = 12  # layers that are shown
WARNINGS = 10
COLUMNS = {"error": ".4f", "rank": "d", "density": ".3f", "bits": ".2f", "seconds": ".2f", "tokens": ",d"}


def live_lines(run: UnderWay) -> list[str]:
    """Whether it runs, where it stands, and how long the rest takes."""
    status = run.status
    block, blocks = status.get("block"), status.get("blocks")
    activity = (
        " ".join(str(status[name]) for name in ("activity", "detail") if status.get(name))
        or "of which nothing more is known"
    )
    where = f"block {block} of {blocks}, {activity}" if block else activity
    if not run.running:
        lines = [f"{run.out}: stopped at {where}, after {duration(run.elapsed)}"]
    else:
        rest = "" if run.left is None else f", about {duration(run.left)} left"
        lines = [f"{run.out}: running, {where}", f"{duration(run.elapsed)} so far{rest}"]
    dense = sum(bool(layer.get("dense")) for layer in run.layers)
    stayed = f", of which {dense} stayed dense" if dense else ""
    return [*lines, f"{count(len(run.layers), 'layer')} done{stayed}"]


def live_table(layers: list[dict[str, Any]]) -> Table:
    """The last layers that were done."""
    table = Table(title=f"the last {min(LAST, len(layers))} of {count(len(layers), 'layer')}", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for layer in layers[-LAST:]:
        if layer.get("dense"):
            table.add_row(f"{layer['name']} stays dense: {layer.get('reason', '')}")
        else:
            table.add_row(layer["name"], *(_number(layer.get(name), form) for name, form in COLUMNS.items()))
    return table


def _number(value: Any, form: str) -> str:
    """As a column shows it; what is no number is left out."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return format(int(value) if form.endswith("d") else value, form)
