"""How many bytes a checkpoint will take, before anything is compressed, and the rate or bits that make it fit."""

import json
from bisect import bisect_left
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.checkpoint import measure
from oats_vision.checkpoint.write import content
from oats_vision.compression import methods
from oats_vision.compression.record import CompressionReport
from oats_vision.compression.settings import CompressionSettings, resolve
from oats_vision.errors import ConfigError
from oats_vision.models.record import structure_of
from oats_vision.models.structure import floating
from oats_vision.runs.config import RunConfig
from oats_vision.runs.forecast import planned_shell
from oats_vision.runs.run import PreparedRun
from oats_vision.runs.scale import Scale

WIDE = 1.2345678901234567e-05  # no number that JSON holds is longer
FINER = 10  # steps in the place of one of a search
RATIOS = (0.1, 0.2, 0.3)  # rank ratios that are tried
DIGESTS, SPARE = 400, 0.02  # bytes of config.json's digests, and a share for what is not known of it yet


def planned_bytes(model: nn.Module, settings: CompressionSettings, others: int = 0) -> int:
    """Bytes of all files that are needed to load the model compressed: exact but for config.json, of which a bound.

    With `bits` as many as the layers may take, which the formats that are chosen may not reach.

    Args:
        others: bytes of a tokenizer.

    Raises:
        ConfigError: the settings leave a layer without rank or non-zeros.
    """
    shell, plan, report, _ = planned_shell(model, structure_of(model), settings)
    dtype = floating(model).dtype
    storage = getattr(torch, settings.storage_dtype) if settings.storage_dtype else dtype
    state = shell.state_dict(keep_vars=True)
    owners: dict[int, str] = {}
    tied = {name: owner for name, tensor in state.items() if (owner := owners.setdefault(id(tensor), name)) != name}
    tensors = {name: tensor for name, tensor in state.items() if name not in tied}
    config = json.dumps(content(shell, _with_figures(report, len(plan.blocks)), dtype, storage, tied), indent=2)
    sizes = measure(tensors.values(), report, storage)
    more = sizes.with_bits(settings.bits, report.dense_parameters).total - sizes.total if settings.bits else 0
    return _weights(tensors, storage) + more + round(len(config) * (1 + SPARE)) + DIGESTS + others


def _weights(tensors: dict[str, Tensor], storage: torch.dtype) -> int:
    """Bytes of model.safetensors: a length, a header that names each tensor, its shape and its place, and the data."""
    dtypes = {name: storage if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    data = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():  # every place as long as the last one
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [data, data]}
    return 8 + len(json.dumps(header, separators=(",", ":"))) + 7 + data


def _with_figures(report: CompressionReport, blocks: int) -> CompressionReport:
    """The report with numbers as long as they can be in the place of what a compression will find."""
    layers = []
    for layer in report.layers:
        errors = {part.name: WIDE for part in layer.spec.parts}
        rounds = dict.fromkeys(errors, 1000)
        figures: dict[str, Any] = {"errors": errors, "output_errors": errors, "iterations": rounds}
        layers.append(replace(layer, **figures, seconds=WIDE, tokens=10**9))
    slicing = report.slicing and replace(report.slicing, kept=(WIDE,) * 2 * blocks)
    seconds = {f"{stage:>12}": WIDE for stage in range(8)}
    return replace(report, samples=10**9, layers=layers, slicing=slicing, seconds=seconds)


def size_of(directory: Path) -> int:
    """Bytes of all files of a checkpoint that are needed to load it."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def tokenizer_bytes(tokenizer: Any) -> int:
    """Bytes of a tokenizer's files; 0 without one."""
    if tokenizer is None:
        return 0
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return size_of(Path(directory))


def settings_at(options: dict[str, Any], scale: Scale, step: int, storage: str | None) -> CompressionSettings:
    """The settings of a run at a step, with the precision that weights are stored in."""
    settings = resolve(**options | {scale.name: scale.at(step)})
    return settings.model_copy(update={"storage_dtype": settings.storage_dtype or storage})


def highest_possible(model: nn.Module, options: dict[str, Any], scale: Scale) -> int:
    """The highest step at which every layer keeps something, or has its bits; below the lowest if none is."""
    steps = range(scale.lowest, scale.highest + 1)
    return scale.lowest - 1 + bisect_left(steps, True, key=lambda step: not _possible(model, options, scale, step))


def candidates(config: RunConfig, model: nn.Module, prepared: PreparedRun) -> list[CompressionSettings]:
    """The settings that reach `target_mb`, the lowest rate first: for each precision and rank ratio that may be chosen.

    Bits leave no choice.

    Without data to choose by there is the first alone.

    Raises:
        ConfigError: there are none.
    """
    target, found, sizes = round(1e6 * float(config.target_mb or 0)), list[CompressionSettings](), list[int]()
    own = str(prepared.settings.storage_dtype)
    storages = [own] if config.storage_dtype or own != "float32" else ["float16", own]
    free = config.rank_ratio is None and methods.find(config.method).rank_ratio is None
    ratios = RATIOS if free and not config.bits and ":" not in prepared.settings.pattern else (config.rank_ratio,)
    others = tokenizer_bytes(prepared.tokenizer)
    for storage, ratio in product(storages, ratios):
        options = config.compression | {"rank_ratio": ratio, "storage_dtype": storage}
        settings, *both = largest_fitting(model, options, config.scale, storage, target, others)
        sizes += both
        found += [settings] if settings else []
    if not found:
        raise ConfigError(
            f"`target_mb` must be in [{min(sizes) / 1e6:.2f}, {max(sizes) / 1e6:.2f}) for {config.model}, the sizes of "
            f"{config.scale.ends}, got {config.target_mb:g}"
        )
    found.sort(key=lambda one: one.rate)
    return found if config.eval else found[:1]


def largest_fitting(
    model: nn.Module, options: dict[str, Any], scale: Scale, storage: str | None, target: int, others: int = 0
) -> tuple[CompressionSettings | None, int, int]:
    """The settings of the largest model, in tenths of a step, whose files are no larger than a target.

    Args:
        target: bytes. others: of these for a tokenizer.

    Returns:
        The settings, None if even the smallest model's files are larger, or the largest one's smaller; and the bytes of
        the smallest and of the largest.
    """
    scale = scale.finer(FINER)
    least, most = scale.lowest, highest_possible(model, options, scale)

    def at(step: int) -> CompressionSettings:
        return settings_at(options, scale, step, storage)

    def size(step: int) -> int:
        return planned_bytes(model, at(step), others)

    smallest, largest = size(most), size(least)
    if not smallest <= target < largest:
        return None, smallest, largest
    fitting = bisect_left(range(least, most), True, key=lambda step: size(step) <= target) + least
    return at(fitting), smallest, largest


def _possible(model: nn.Module, options: dict[str, Any], scale: Scale, step: int) -> bool:
    """Whether every layer keeps something at a step, or has its bits."""
    try:
        planned_shell(model, structure_of(model), settings_at(options, scale, step, None))
    except ConfigError:
        return False
    return True
