"""Several compressed models beside each other: one table and one page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oats_vision import figures
from oats_vision.benchmark import Timing
from oats_vision.checkpoint import CompressionReport, layer_specs, read_config
from oats_vision.config import CompressionSettings
from oats_vision.evaluation import Difference, Ratio
from oats_vision.evaluations import Evaluation, read_report
from oats_vision.page import render
from oats_vision.results import Cost, Metric
from oats_vision.weights import WeightsFile

ALWAYS = ("method", "rate", "rank_ratio", "pattern")  # settings that are shown even if all runs share them


@dataclass(frozen=True)
class Run:
    """One compressed model, as the table and the page of a comparison show it.

    bytes, dense_bytes: of the whole model as stored, and dense in the same precision. speed: batch 1 first. labelled:
    with a `compared` metric. errors: mean relative error of the linears of each block, by its number. dense_sha256: of
    the weights that were compressed, if known. machine: that the speed was measured on. seed: if it tells runs apart.
    """

    name: str
    model: str
    settings: CompressionSettings
    bytes: int
    dense_bytes: int
    speed: Sequence[Timing] = ()
    cost: Cost | None = None
    labelled: Evaluation | None = None
    errors: Mapping[int, float] = field(default_factory=dict)
    dense_sha256: str | None = None
    machine: str = ""
    seed: int | None = None

    @classmethod
    def read(cls, directory: Path, name: str | None = None) -> "Run":
        """A checkpoint's, by its config.json, its report.json and the header of its weights.

        Raises:
            CheckpointError: the directory is no checkpoint, or a file of it is damaged.
        """
        config, measured = read_config(directory), read_report(directory)
        report, specs = CompressionReport.from_dict(config), layer_specs(config)
        itemsize = {"float64": 8, "float32": 4}.get(config["storage_dtype"], 2)
        with WeightsFile(directory) as file:
            stored = sum(tensor.end - tensor.start for tensor in file.tensors.values())
        positions = sum(spec.out_features * spec.row_bytes for spec in specs.values())
        source = config["source"]
        return cls(
            name=name or directory.resolve().name,
            model=(source.get("origin") or source)["name"],
            settings=report.settings,
            bytes=stored,
            dense_bytes=stored - positions + (report.dense_parameters - report.parameters) * itemsize,
            speed=measured.speed,
            cost=measured.cost,
            labelled=measured.labelled,
            errors=block_errors(report),
            dense_sha256=source.get("dense_sha256"),
            machine=", ".join(value for _, value in measured.machine),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "name": self.name,
            "model": self.model,
            "settings": self.settings.model_dump(),
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "speed": [timing.to_dict() for timing in self.speed],
            "cost": self.cost.model_dump() if self.cost else None,
            "labelled": self.labelled.model_dump(exclude_none=True) if self.labelled else None,
            "errors": {str(block): error for block, error in self.errors.items()},
            "dense_sha256": self.dense_sha256,
            "machine": self.machine,
            "seed": self.seed,
        }


def comparison_page(rows: Sequence[Run], title: str) -> str:
    """The page as text: a scatter against bytes and against latency, the table, and errors by block."""
    raise NotImplementedError
