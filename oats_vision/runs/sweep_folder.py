"""The folder of a sweep or of a search: what is in it, whose it is, and what is missing.

sweep.json (search.json) says what all cells share, and cells/NAME.json holds one finished cell and seed (or trial).
sweep.csv and sweep.html are made of those. Each file is whole at every moment.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from oats_vision import checkpoint
from oats_vision.errors import CheckpointError, ConfigError
from oats_vision.evaluation.tasks import TASKS, task_of_unit
from oats_vision.files import why
from oats_vision.machine import choose_device
from oats_vision.runs.config import RunConfig
from oats_vision.runs.grid import AXES, FOR_ONE_RUN

log = logging.getLogger(__name__)

CELLS, CSV, PAGE = "cells", "sweep.csv", "sweep.html"
Sort = Literal["sweep", "search"]
ROW = TypeVar("ROW", bound=BaseModel)
# settings that either may be continued with other values of: no figure depends on them
_FREE = {"out", "workers", "activation_memory", "low_memory", "report", "dry_run"}
FREE = {"sweep": {*_FREE, *AXES, *FOR_ONE_RUN}, "search": {*_FREE, "overwrite", "restart", "merge", "max_drop"}}


def _shared(base: RunConfig, unit: Any, sort: Sort) -> dict[str, Any]:
    """The settings that all cells share, and every figure may depend on."""
    fields = task_of_unit(unit).completed(base).model_dump(mode="json", exclude=FREE[sort])
    return fields | {"device": str(choose_device(base.device))}


def read_state(out: Path, base: RunConfig, sort: Sort = "sweep") -> dict[str, Any] | None:
    """What a folder says of the sweep that is in it, None if there is none yet; and see that it is this one.

    Args:
        base: what all cells share.

    Raises:
        CheckpointError: the folder holds something else.
        ConfigError: its sweep has other settings.
    """
    file = out / f"{sort}.json"
    if not out.exists():
        return None
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file: give another out")
    if all(entry.name.startswith(".") for entry in out.iterdir()):
        return None
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        shared, unit = dict(state["shared"]), state["unit"]
        ours = state["format"] == _format(sort) and "dense_sha256" in state and unit in TASKS
    except FileNotFoundError:
        ours = False
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None
    if not ours:
        raise CheckpointError(f"{out} is not a folder of a {sort}: give another out")
    now = _shared(base, unit, sort)
    differ = [name for name in now if name in shared and shared[name] != now[name]]
    if differ:
        words = "; ".join(f"{name} is {shared[name]} there and {now[name]} here" for name in differ)
        raise ConfigError(f"{out} holds a {sort} with other settings: {words}. Give these, or another out")
    _tidy(out, sort)
    return state


def _format(sort: Sort) -> str:
    return f"oats_vision {sort}"


def _tidy(out: Path, sort: Sort) -> None:
    """Remove what a killed sweep was writing."""
    for left in out.glob(".*.writing-*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in [*out.glob(f".{sort}.*"), *(out / CELLS).glob(".*.json.*")]:
        left.unlink(missing_ok=True)


def write_state(
    out: Path, base: RunConfig, unit: str, dense_sha256: str | None, sort: Sort = "sweep", **others: Any
) -> dict[str, Any]:
    """Make the folder of a new sweep.

    Args:
        others: that are noted beside the settings.
    """
    state = {
        "format": _format(sort),
        "format_version": 1,
        "unit": unit,
        "dense_sha256": dense_sha256,
        "shared": _shared(base, unit, sort),
        **others,
    }
    try:
        out.mkdir(exist_ok=True)
    except OSError as problem:
        raise CheckpointError(f"{out} cannot be written: {why(problem)}") from None
    checkpoint.write_json(out / f"{sort}.json", state)
    return state


def read_rows(out: Path, kind: type[ROW]) -> list[ROW]:
    """The finished cells; what cannot be read is done again."""
    rows = []
    for file in sorted((out / CELLS).glob("[!.]*.json")):
        try:
            row = kind.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as problem:
            log.warning("%s cannot be read, and its cell is done again: %s", file, str(problem).splitlines()[0])
        else:
            rows.append(row)
    return rows


def write_row(out: Path, name: str, row: BaseModel) -> None:
    """Note that a cell is finished."""
    (out / CELLS).mkdir(exist_ok=True)
    checkpoint.write_json(out / CELLS / f"{name}.json", row.model_dump(mode="json"))
