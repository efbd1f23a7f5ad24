"""Load a compressed model, safely whoever made its files (see docs/format.md)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.checkpoint.config import Config, read_config
from oats_vision.checkpoint.shapes import difference, make_room
from oats_vision.checkpoint.weights import WeightsFile, check_layer
from oats_vision.compression.record import CompressionRecord
from oats_vision.errors import CheckpointError
from oats_vision.models.bounds import BUILDING, MEMORY, Limits, bounded
from oats_vision.models.families.registry import family_named
from oats_vision.models.library import library
from oats_vision.models.loading.load import moved, rebuild
from oats_vision.models.on_disk import BlocksOnDisk, Place
from oats_vision.models.record import set_record, structure_of
from oats_vision.models.transforms import Transform, build_transform


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
    low_memory: bool = False,
) -> nn.Module:
    """Load a compressed model from what `save` wrote, in eval mode; `load_model` is for dense models, by name.

    It needs neither the dense weights nor a network.

    Args:
        path: a directory that `save` wrote.
        dtype: to compute in; that of the compression run if not given. Compressed layers stay in the stored dtype if
            that is smaller, and compute in the dtype of their inputs.
        model: a module of the original class, if the model was one of your own; changed in place.
        trust_remote_code: allow code from a hub to run (models from torch.hub).
        low_memory: check the weights and leave those of blocks in the file; those of a block are read when it is
            called. The file must stay as it is.

    Raises:
        CheckpointError: not a checkpoint, truncated, corrupted, or of a later format.
        ModelError: the architecture cannot be rebuilt here.
    """
    path = Path(path)
    config = read_config(path)
    source, report, specs, storage = config.source, config.report, config.specs, config.storage_dtype
    family = family_named(report.family, str(path))
    dtype = dtype or config.dtype
    layers_dtype = storage if storage.itemsize < dtype.itemsize else dtype
    compressed = tuple(f"{name}." for name in specs)

    places: dict[str, Place] = {}  # of tensors that are not kept
    with WeightsFile(path) as file:
        file.check_layers(specs, storage)
        limits = _limits(file, config)
        if model is None:
            model = rebuild(source, trust_remote_code, limits)
            if not family.matches(model) and structure_of(model).family.name != family.name:
                raise CheckpointError(f"{path} is damaged: {source.name} is not a model of family {family.name}")
        structure = structure_of(model, family)
        with bounded(limits):
            make_room(model, structure, report, layers_dtype)
        _check_tensors(path, model, file, config)
        buffers = {name for name, _ in model.named_buffers()}
        if low_memory:
            inside = tuple(f"{name}." for name, _ in structure.named_blocks(model))
            places |= {name: Place(file.path.resolve(), name) for name in file.tensors if name.startswith(inside)}
        tensors = file.read(
            config.weights_sha256,
            lambda name: layers_dtype if name.startswith(compressed) else dtype,
            is_parameter=lambda name: name not in buffers,
            keep=lambda name: name not in places or _is_checked(name, file.tensors[name].dtype),
        )
    for name, spec in specs.items():
        check_layer(tensors, name, spec, f"{file.path}: {name}")
    tensors |= {name: tensors[owner] for name, owner in config.tied.items()}
    with BUILDING:  # parameters are assigned, which another thread may have patched
        model.load_state_dict(tensors, assign=True)
        if config.tied and hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]  # of transformers: one parameter, also on another device
    _check_computed(path, model, tensors)
    _set_generation(path, model, config.generation)
    on_disk = BlocksOnDisk.of(model, structure, places) if low_memory else None
    set_record(model, CompressionRecord(source, structure, on_disk, report=report))
    return moved(model.requires_grad_(False), torch.device(device)).eval()


def load_transform(path: str | Path) -> Transform | None:
    """The input preprocessing of a stored model, PIL picture -> tensor; None if it is not known."""
    transform = read_config(Path(path)).source.transform
    return build_transform(transform) if transform else None


def read_weights(path: Path, config: Config) -> dict[str, Tensor]:
    """All tensors, after the file's digest and each compressed layer's shapes, dtypes and counts were checked.

    Raises:
        CheckpointError: the file is missing, truncated or corrupted.
    """
    specs = config.specs
    compressed = tuple(f"{name}." for name in specs)  # of the others, only the model knows which are buffers
    with WeightsFile(path) as file:
        file.check_layers(specs, config.storage_dtype)
        tensors = file.read(config.weights_sha256, is_parameter=lambda name: name.startswith(compressed))
    for name, spec in specs.items():
        check_layer(tensors, name, spec, f"{file.path}: {name}")
    return tensors


def _is_checked(name: str, dtype: torch.dtype) -> bool:
    """Whether `check_layer` may look at a tensor of a compressed layer: at positions, scales and zeros."""
    return not (dtype.is_floating_point or name.endswith((".codes", ".low_rank.U", ".low_rank.V")))


def _limits(file: WeightsFile, config: Config) -> Limits:
    """What the architecture of a checkpoint may ask for while it is built, by what its weights file holds.

    It is built dense first: twice the tensors cover the norms that slicing removes, and heads that are replaced.
    """
    return Limits(2 * (len(file.tensors) + len(config.tied)) + 64, MEMORY + 2 * file.size)


def _check_tensors(path: Path, model: nn.Module, file: WeightsFile, config: Config) -> None:
    """See that a file's tensors are the model's, before any is read.

    Raises:
        CheckpointError: a name, a shape or a dtype differs.
    """
    expected, stored, storage = model.state_dict(), file.tensors, config.storage_dtype
    what = f"{path} does not fit {config.source.kind} model {config.source.name!r}"
    owners = {name: owner for name, owner in config.tied.items() if name not in stored and owner in stored}
    if len(owners) < len(config.tied):
        raise CheckpointError(f"{what}: a tied tensor is there itself, or its owner is not")
    found = {name: tensor.shape for name, tensor in stored.items()}
    found |= {name: found[owner] for name, owner in owners.items()}
    if wrong := difference(found, {name: tuple(tensor.shape) for name, tensor in expected.items()}):
        raise CheckpointError(f"{what}: {wrong}")
    for name, tensor in stored.items():
        dtype = storage if expected[name].is_floating_point() else expected[name].dtype
        if tensor.dtype != dtype:
            raise CheckpointError(f"{what}: {name} is {tensor}, expected {str(dtype).removeprefix('torch.')}")


def _check_computed(path: Path, model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if what is computed, and not stored, has no values or some that no model survives."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and name not in stored:
            raise CheckpointError(f"{path} is damaged: {name} has no values, and is too large to be made")
        if name not in stored and tensor.is_floating_point() and tensor.numel() and not tensor.max() < math.inf:
            raise CheckpointError(f"{path} is damaged: what config.json says makes {name} infinite or NaN")


def _set_generation(path: Path, model: nn.Module, fields: dict[str, Any] | None) -> None:
    """How a language model generates: its end tokens, length, sampling."""
    if fields is None or not hasattr(model, "generation_config"):
        return
    from transformers import GenerationConfig

    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    damaged = f"{path} is damaged: generation_config"
    model.generation_config = library(damaged, GenerationConfig.from_dict, fields)
