"""report.json of a checkpoint: what was measured when it was made and since."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oats_vision.checkpoint.place import REPORT
from oats_vision.errors import CheckpointError
from oats_vision.files import replacing, why

# settings of an evaluation that do not change what it measures
HOW_READ = {"batch_size", "cache", "no_cache", "streaming", "workers"}

log = logging.getLogger(__name__)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, all of it or nothing."""
    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be written: {why(problem)}") from problem


def add_evaluation(path: Path, result: dict[str, Any]) -> bool:
    """Add an evaluation to a checkpoint's report.json, in the place of an earlier one of the same.

    The same is: of as many models, with equal protocol, data, precision and settings, but for those of `HOW_READ`; of
    results of earlier versions, which have no settings, protocol and data.

    Returns:
        Whether it could be written.
    """

    def added(content: dict[str, Any]) -> dict[str, Any]:
        kept = [old for old in content.get("evaluations", []) if not _same(old, result)]
        return {"evaluations": [*kept, result]}

    return change_report(path, added)


def change_report(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
    """Give fields of a checkpoint's report.json other values; where it cannot be written, that is said.

    Args:
        change: from what is there, the fields that change.

    Returns:
        Whether it could be written.

    Raises:
        CheckpointError: the report is damaged.
    """
    file = path / REPORT
    try:
        content = json.loads(file.read_text()) if file.exists() else {}
        content |= change(content)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None
    try:
        write_json(file, content)
    except CheckpointError as problem:  # a shared, read-only checkpoint can be evaluated too
        log.warning("the result was not added to %s: %s", file, problem)
        return False
    return True


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    if any(old.get(name) != new.get(name) for name in ("protocol", "data", "train", "val")):
        return False
    if ("dense" in old) != ("dense" in new) or old.get("dtype", new.get("dtype")) != new.get("dtype"):
        return False
    before, now = old.get("settings"), new.get("settings")
    return not (before and now) or that_matter(before) == that_matter(now)


def that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an evaluation that change what it measures; where all samples are taken, no seed does."""
    without = HOW_READ | ({"seed"} if settings.get("samples", 0) is None else set())
    return {name: value for name, value in settings.items() if name not in without}
