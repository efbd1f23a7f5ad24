"""One compressed model as comparisons show it, read from its files."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from oats_vision.checkpoint import measure, read_config
from oats_vision.checkpoint.reports import that_matter
from oats_vision.checkpoint.weights import WeightsFile
from oats_vision.compression.record import CompressionReport, LayerReport
from oats_vision.compression.settings import CompressionSettings
from oats_vision.errors import ConfigError
from oats_vision.evaluation.results import Cost, Evaluation
from oats_vision.evaluation.speed import Timing
from oats_vision.evaluation.stored import read_report
from oats_vision.models.structure import in_experts

MOST = 20  # runs that are read for one comparison


@dataclass(frozen=True)
class ComparedModel:
    """One compressed model, as the table and the page of a comparison show it.

    bytes, dense_bytes: of the whole model as stored, and dense in the same precision. speed: batch 1 first. labelled:
    an evaluation with a `compared` metric. errors: mean relative error of each block's linears, by the block's number.
    dense_sha256: of the weights that were compressed, if known. machine, dtype: that the speed was measured on and in.
    seed: if it tells the runs apart. held_out: what the samples of `cost` were drawn from, and how, if known.
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
    dtype: str = ""
    seed: int | None = None
    held_out: str = ""

    @classmethod
    def read(cls, directory: Path) -> "ComparedModel":
        """A checkpoint's: of its config.json, its report.json and the header of its weights.

        Raises:
            CheckpointError: the directory is not a checkpoint, or a file of it is damaged.
        """
        config, measured = read_config(directory), read_report(directory)
        report = config.report
        with WeightsFile(directory) as file:
            tensors = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in file.tensors.values()]
        sizes = measure(tensors, report, config.storage_dtype)
        source = config.source
        return cls(
            name=directory.resolve().name,
            model=source.origin_name,
            settings=report.settings,
            bytes=sizes.total,
            dense_bytes=sizes.dense_total,
            speed=measured.speed,
            cost=measured.cost,
            labelled=measured.labelled,
            errors=mean_errors(report),
            dense_sha256=source.dense_sha256,
            machine=", ".join(value for _, value in measured.speed_machine),
            dtype=measured.dtype,
            held_out=_held_out(dict(measured.run), report.unit),
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
            "labelled": self.labelled.to_dict() if self.labelled else None,
            "errors": {str(block): error for block, error in self.errors.items()},
            "dense_sha256": self.dense_sha256,
            "machine": self.machine,
            "dtype": self.dtype,
            "seed": self.seed,
        }


def _held_out(run: Mapping[str, str], unit: str) -> str:
    """What a run drew the samples of its `cost` from, and how: of text and of streams they lie after the others."""
    names = ["data", "split", "seed"]
    if unit == "sequences" or run.get("streaming") == "True":
        names += ["samples", "sequence_length"]
    return ", ".join(f"{name} {run[name]}" for name in names if name in run)


def measured_on(evaluation: Evaluation) -> tuple[str, str | None, str]:
    """What must be the same for two evaluations to be compared: the data, the metric, and the settings that matter."""
    return evaluation.where, evaluation.compared, json.dumps(that_matter(evaluation.settings), sort_keys=True)


def read_compared(directories: Sequence[Path]) -> list[ComparedModel]:
    """The runs of several checkpoints, under names that tell them apart.

    Raises:
        ConfigError: there are fewer than 2 or more than 20 directories, or one twice.
        CheckpointError: one is not a checkpoint, or a file of it is damaged.
    """
    if not 2 <= len(directories) <= MOST:
        raise ConfigError(f"compare takes 2 to {MOST} checkpoints, got {len(directories)}")
    places = [directory.resolve() for directory in directories]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise ConfigError(f"{directories[i]} is given twice: give each checkpoint once")
    runs = [ComparedModel.read(directory) for directory in directories]
    names: list[str] = []
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            break
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def errors_by_block(report: CompressionReport) -> dict[str, dict[int, float]]:
    """Mean relative error of each kind of linear, as `by_block`."""
    return by_block(report, lambda layer: layer.error)


def by_block(report: CompressionReport, figure: Callable[[LayerReport], float]) -> dict[str, dict[int, float]]:
    """Mean figure of each kind of linear (its name within a block), by the block's number.

    Experts of a block count as one kind.
    """
    gathered: dict[str, dict[int, list[float]]] = {}
    for layer, (block, kind) in zip(report.layers, places(report), strict=True):
        gathered.setdefault(kind, {}).setdefault(block, []).append(figure(layer))
    return {
        kind: {block: sum(found) / len(found) for block, found in blocks.items()} for kind, blocks in gathered.items()
    }


def mean_errors(report: CompressionReport) -> dict[int, float]:
    """Mean relative error of all linears of each block, by the block's number."""
    gathered: dict[int, list[float]] = {}
    for layer, (block, _) in zip(report.layers, places(report), strict=True):
        gathered.setdefault(block, []).append(layer.error)
    return {block: sum(es) / len(es) for block, es in gathered.items()}


def places(report: CompressionReport) -> list[tuple[int, str]]:
    """The number of each linear's block, and its name within the block with `*` for the number of an expert."""
    return _places([layer.name for layer in report.layers])


def _places(names: Sequence[str]) -> list[tuple[int, str]]:
    """As `places`, of names.

    >>> _places(["blocks.0.11.mlp.fc1", "blocks.0.12.mlp.fc1", "head"])
    [(11, 'mlp.fc1'), (12, 'mlp.fc1'), (0, 'head')]
    >>> _places(["0.layers.3.attn.qkv", "0.layers.3.mlp.experts.5.w1", "0.layers.4.attn.qkv"])
    [(3, 'attn.qkv'), (3, 'mlp.experts.*.w1'), (4, 'attn.qkv')]
    >>> _places(["layers.3.mlp.experts.0.w1", "layers.3.mlp.experts.1.w1"])
    [(3, 'mlp.experts.*.w1'), (3, 'mlp.experts.*.w1')]
    """
    found = [re.match(r"(?:.*?\.)??(?:[0-9]+\.)*([0-9]{1,9})\.(.*)", name, re.DOTALL) for name in names]
    before = {name[: one.end(1)] if one else name for name, one in zip(names, found, strict=True)}
    rests = [one[2] for one in found if one]
    others = [re.match(r"(.*?)\.[0-9]+\.", rest) for rest in rests]
    if len(before) == 1 and rests and all(other and not in_experts(other[1]) for other in others):
        return _places(rests)  # what all are in is no block, but a model's place in another one
    return [
        (int(one[1]), re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", one[2])) if one else (0, name)
        for name, one in zip(names, found, strict=True)
    ]
