"""`oats-vision bench`: how fast a compressed model is on this machine, against its dense twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oats_vision import checkpoint
from oats_vision.analysis.html_report import renew_page
from oats_vision.display import Display
from oats_vision.evaluation.load import Load
from oats_vision.evaluation.speed import Timing, dense_twin, weight_bytes
from oats_vision.evaluation.stored import read_report
from oats_vision.evaluation.tasks import task_of
from oats_vision.machine import choose_device, dtype_of, machine, warn_if_slow
from oats_vision.nn.semi_structured import to_semi_structured
from oats_vision.runs.compress import update_speed


@dataclass(frozen=True)
class Bench:
    """What was timed.

    weight_bytes: of the dense and of the compressed model in memory. machine: that it was timed on.
    """

    directory: Path
    dtype: str
    repeats: int
    timings: Sequence[Timing]
    weight_bytes: tuple[int, int]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "directory": str(self.directory),
            "dtype": self.dtype,
            "repeats": self.repeats,
            "timings": [timing.to_dict() for timing in self.timings],
            "weight_bytes": dict(zip(("dense", "compressed"), self.weight_bytes, strict=True)),
            "machine": self.machine,
        }

    def keep(self, display: Display) -> None:
        """Put the timings into the checkpoint's report.json, if that is of the same precision, and renew its page.

        Raises:
            CheckpointError: report.json is damaged.
        """
        if self.dtype == read_report(self.directory).dtype and update_speed(self.directory, self.timings, self.machine):
            renew_page(self.directory, display)


def bench(
    directory: Path,
    load: Load,
    display: Display,
    *,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Bench:
    """Time a compressed model in turns with a dense one of the same shapes, in the same precision.

    Args:
        directory: a checkpoint.
        load: what to time, and with how many threads of the CPU.

    Raises:
        OatsVisionError: something that was given is wrong, or a model's outputs are not finite.
    """
    if load.threads:
        torch.set_num_threads(load.threads)
    target, precision = choose_device(device), dtype_of(dtype)
    warn_if_slow(dtype, target, "use `dtype=float32`")
    compressed = checkpoint.load(directory, device=target, dtype=precision, trust_remote_code=trust_remote_code)
    task, transform = task_of(compressed), checkpoint.load_transform(directory)
    dense = dense_twin(compressed)
    if target.type == "cuda" and precision != torch.float32:
        to_semi_structured(compressed)  # the layers that are 2:4
    with display.counting("timing", "rounds", task.measurements(load) * load.repeats) as progress:
        timings = task.bench(dense, compressed, transform, load, precision, progress)
    sizes = (weight_bytes(dense), weight_bytes(compressed))
    return Bench(directory, dtype, load.repeats, timings, sizes, machine(target))
