"""A run that is under way, or was stopped: what it has written beside its output so far.

While it goes on, its log, a line of JSON for each linear and where it stands lie in a folder beside the output; the
first two move into the checkpoint once that is written.
"""

import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# in the checkpoint's directory once it is written, but for the last
RUN_LOG, LAYERS, STATUS = "run.log", "layers.jsonl", "status.json"
_WARNING = " WARNING "


def folder_of(out: Path) -> Path:
    """Where a run keeps what it has until its output is complete."""
    place = out.resolve()
    return place.with_name(f"{place.name}.partial")


def lock_of(out: Path) -> Path:
    """The file by which a run holds its output: the lock dies with its process, and the file may stay."""
    place = out.resolve()
    return place.with_name(f".{place.name}.lock")


def is_held(out: Path) -> bool:
    """Whether a run holds its output; where there are no locks, whether one seems to."""
    try:
        handle = os.open(lock_of(out), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


@dataclass(frozen=True)
class UnderWay:
    """What a run says of itself.

    running: whether it is still there. status: where it stood last, as `progress.Step` says it; when it began, when
    that was noted, and whether the checkpoint is written. layers: those that are done, in order. warnings: of its log.
    """

    out: Path
    running: bool
    status: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    log: Path | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since it began; of one that was stopped, until it was last heard of."""
        now = time.time() if self.running else _number(self.status, "time")
        return max(now - _number(self.status, "started"), 0.0)

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes, if that is known and it runs."""
        if not self.running or not isinstance(self.status.get("left"), int | float):
            return None
        return max(_number(self.status, "left") - (time.time() - _number(self.status, "time")), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "state": "running" if self.running else "stopped",
            "out": str(self.out),
            **{name: value for name, value in self.status.items() if name != "time"},
            "elapsed": self.elapsed,
            "left": self.left,
            "layers": self.layers,
            "warnings": self.warnings,
            "log": str(self.log) if self.log else None,
        }


def under_way(out: Path) -> UnderWay | None:
    """The run that makes a checkpoint, or that was stopped while it did; None if nothing is there of any."""
    folder, running = folder_of(out), is_held(out)
    status = _json(folder / STATUS)
    if not running and not status:
        return None
    place = out if status.get("written") is True else folder
    log = place / RUN_LOG
    return UnderWay(out, running, status, read_layers(place / LAYERS), _warnings(log), log if log.is_file() else None)


def read_layers(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's file of layers; of two of one linear the later one, of lines that are no JSON none."""
    layers: dict[str, dict[str, Any]] = {}
    for line in _lines(file):
        try:
            layer = json.loads(line)
        except (ValueError, RecursionError):  # cut short
            continue
        if isinstance(layer, dict) and isinstance(layer.get("name"), str):
            layers.pop(layer["name"], None)
            layers[layer["name"]] = layer
    return list(layers.values())


def _warnings(log: Path) -> list[str]:
    """The warnings in a log, as they were shown."""
    return [line.partition(_WARNING)[2].partition(": ")[2] for line in _lines(log) if _WARNING in line[:40]]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
