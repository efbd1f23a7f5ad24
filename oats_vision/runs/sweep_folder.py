"""The folder of a sweep: what is in it, whose it is, and what is missing.

sweep.json says what all cells share, and cells/NAME.json holds one finished cell and seed. sweep.csv and sweep.html are
made of those. Each file is whole at every moment.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from oats_vision import checkpoint
from oats_vision.errors import CheckpointError, ConfigError
from oats_vision.evaluation.tasks import TASKS, task_of_unit
from oats_vision.machine import choose_device
from oats_vision.runs.config import RunConfig
from oats_vision.runs.grid import AXES, FOR_ONE_RUN, SweepConfig
from oats_vision.runs.sweep_rows import Row

log = logging.getLogger(__name__)

STATE, CELLS, CSV, PAGE = "sweep.json", "cells", "sweep.csv", "sweep.html"
FORMAT = "oats_vision sweep"
# settings that a sweep may be continued with other values of: no figure depends on them
FREE = {*AXES, *FOR_ONE_RUN, "out", "workers", "activation_memory", "report", "dry_run"}


def _shared(base: RunConfig, unit: Any) -> dict[str, Any]:
    """The settings that all cells of a sweep share, and every figure may depend on."""
    fields = task_of_unit(unit).completed(base).model_dump(mode="json", exclude=FREE)
    return fields | {"device": str(choose_device(base.device))}


def read_state(config: SweepConfig) -> dict[str, Any] | None:
    """What a folder says of the sweep that is in it, None if there is none yet; and see that it is this one.

    Raises:
        CheckpointError: the folder holds something else.
        ConfigError: its sweep has other settings.
    """
    out = config.out
    if not out.exists():
        return None
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file: give another out")
    if all(entry.name.startswith(".") for entry in out.iterdir()):
        return None
    try:
        state: dict[str, Any] = json.loads((out / STATE).read_text())
        shared, unit = dict(state["shared"]), state["unit"]
        ours = state["format"] == FORMAT and "dense_sha256" in state and unit in TASKS
    except FileNotFoundError:
        ours = False
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise CheckpointError(f"{out / STATE} is damaged: {problem}") from None
    if not ours:
        raise CheckpointError(f"{out} is not a folder of a sweep: give another out")
    now = _shared(config.base, unit)
    differ = [name for name in now if name in shared and shared[name] != now[name]]
    if differ:
        words = "; ".join(f"{name} is {shared[name]} there and {now[name]} here" for name in differ)
        raise ConfigError(f"{out} holds a sweep with other settings: {words}. Give these, or another out")
    _tidy(out)
    return state


def _tidy(out: Path) -> None:
    """Remove what a killed sweep was writing."""
    for left in out.glob(".*.writing-*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in [*out.glob(".sweep.*"), *(out / CELLS).glob(".*")]:
        left.unlink(missing_ok=True)


def write_state(config: SweepConfig, unit: str, dense_sha256: str | None) -> dict[str, Any]:
    """Make the folder of a new sweep."""
    state = {
        "format": FORMAT,
        "format_version": 1,
        "unit": unit,
        "dense_sha256": dense_sha256,
        "shared": _shared(config.base, unit),
    }
    try:
        config.out.mkdir(exist_ok=True)
    except OSError as problem:
        raise CheckpointError(f"{config.out} cannot be written: {problem}") from None
    checkpoint.write_json(config.out / STATE, state)
    return state


def read_rows(out: Path) -> dict[str, Row]:
    """The finished cells, by name; what cannot be read is done again."""
    rows = {}
    for file in sorted((out / CELLS).glob("[!.]*.json")):
        try:
            row = Row.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as problem:
            log.warning("%s cannot be read, and its cell is done again: %s", file, str(problem).splitlines()[0])
        else:
            rows[row.name] = row
    return rows


def write_row(out: Path, row: Row) -> None:
    """Note that a cell is finished."""
    (out / CELLS).mkdir(exist_ok=True)
    checkpoint.write_json(out / CELLS / f"{row.name}.json", row.model_dump(mode="json"))
