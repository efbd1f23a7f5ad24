"""Write a compressed model: config.json and model.safetensors, all of it or nothing (see docs/format.md)."""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.checkpoint.config import CONFIG, DIGEST, FORMAT, VERSIONS, config_digest
from oats_vision.checkpoint.place import check_target, locked, new_directory
from oats_vision.checkpoint.shapes import difference, make_room
from oats_vision.checkpoint.stream import write_tensors
from oats_vision.checkpoint.weights import DTYPES, WEIGHTS
from oats_vision.compression.record import CompressionReport, record
from oats_vision.errors import CheckpointError, ModelError, OatsVisionError
from oats_vision.models.loading.directory import TOKENIZER
from oats_vision.models.loading.load import rebuild, source_of
from oats_vision.models.loading.registry import provider_for
from oats_vision.models.record import read_values, record_of, structure_of
from oats_vision.models.transforms import plain
from oats_vision.models.values import broken
from oats_vision.nn.sliced import SlicedBlock


def save(model: nn.Module, path: str | Path, *, overwrite: bool = False, tokenizer: Any = None) -> None:
    """Write a compressed model to a directory, all of it or nothing.

    Args:
        model: compressed by `compress` (or loaded by `load`).
        path: directory to make; its parent must exist. Of a link, the directory that it points to.
        overwrite: replace a checkpoint of ours that is there. Any other directory is left alone.
        tokenizer: of a language model, written beside its weights for `load_tokenizer`.

    Raises:
        CheckpointError: not compressed, the path is taken, the model could not be loaded again, or the files cannot be
            written.
    """
    with locked(Path(path)):
        write(model, Path(path), overwrite, tokenizer)


def write(
    model: nn.Module,
    path: Path,
    overwrite: bool = False,
    tokenizer: Any = None,
    announce: Callable[[str], object] = lambda sha256: None,
) -> None:
    """`save` for who holds the lock of the path.

    Args:
        announce: called with the digest of the weights' file before the checkpoint takes its place.
    """
    model = _unwrapped(model)
    try:
        report = record(model).report
    except ModelError as missing:
        raise CheckpointError(str(missing)) from None
    check_target(path, overwrite)
    state = model.state_dict()
    _check_values(model, state)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    storage = getattr(torch, report.settings.storage_dtype) if report.settings.storage_dtype else dtype
    check_source(model, report)
    tied = _tied(state)
    config = content(model, report, dtype, storage, tied)
    buffers = {name for name, _ in model.named_buffers()}
    shapes = {name: _stored(tensor.to("meta"), storage) for name, tensor in state.items() if name not in tied}

    def read(name: str) -> Tensor:
        ((_, value),) = read_values(model, [(name, state[name])])
        tensor = _stored(value.detach(), storage).cpu().contiguous()
        if bad := broken(tensor, name, is_parameter=name not in buffers):
            raise CheckpointError(f"the model cannot be stored in {config['storage_dtype']}: {bad}")
        return tensor

    with new_directory(path, overwrite) as target:
        config["weights_sha256"] = write_tensors(target / WEIGHTS, shapes, read)
        config[DIGEST] = config_digest(config)
        (target / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(target / TOKENIZER)
        announce(config["weights_sha256"])


def content(
    model: nn.Module, report: CompressionReport, dtype: torch.dtype, storage: torch.dtype, tied: dict[str, str]
) -> dict[str, Any]:
    """What config.json says of a compressed model, but for the digests."""
    generation = getattr(model, "generation_config", None)
    return {
        "format": FORMAT,
        "format_version": VERSIONS[any(layer.spec.grid for layer in report.layers)],
        "written_by": f"oats_vision {version('oats_vision')}",
        "source": source_of(model).to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "storage_dtype": str(storage).removeprefix("torch."),
        "tied": tied,
        **report.to_dict(),
        "generation_config": plain(generation.to_diff_dict()) if generation is not None else None,
    }


def check_source(model: nn.Module, report: CompressionReport | None = None) -> None:
    """See that a checkpoint can hold a model's tensors, and that its architecture as noted has these names and shapes.

    Args:
        report: of its compression; None if it is dense.

    Raises:
        CheckpointError: one is of a dtype that no checkpoint has, or a checkpoint of the model could not be loaded.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() and tensor.dtype not in DTYPES.values():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} is {kind}, which checkpoints do not hold: convert it, or make it a non-persistent buffer"
            )
    source = source_of(model)
    try:
        json.dumps(source.to_dict(), allow_nan=False)
    except ValueError:
        raise CheckpointError("the model's configuration holds infinity or NaN, which JSON cannot hold") from None
    provider = provider_for(source.kind)
    if not provider.closed:  # hub code is not run again, other modules are given to `load`
        return
    try:
        built = rebuild(source)
        if report:
            make_room(built, structure_of(built, structure_of(model).family), report, torch.float32)
    except OatsVisionError as problem:
        raise CheckpointError(f"the model could not be loaded again: {problem}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrong := difference(shapes, {name: tuple(t.shape) for name, t in built.state_dict().items()}):
        raise CheckpointError(
            f"the model is no longer the {source.kind} model {source.name!r} that it was loaded as, and could not be "
            f"loaded again: {wrong}. If its head was replaced, say so in {provider.told_in}"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile or a wrapper for several devices holds."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _stored(tensor: Tensor, storage: torch.dtype) -> Tensor:
    return tensor.to(storage) if tensor.is_floating_point() else tensor


def _check_values(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a tensor's values are neither in memory nor in a file that is known."""
    on_disk = record_of(model).on_disk
    known = on_disk.places if on_disk else {}
    away = next((name for name, tensor in state.items() if tensor.is_meta and name not in known), None)
    if away is not None:
        raise CheckpointError(
            f"{away} is on the meta device and has no values (offloaded by accelerate?): "
            "load the whole model into memory, without device_map, and compress it there, or load it by "
            "load_model(..., low_memory=True)"
        )


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one's memory, and that one's name (an embedding that is also the head)."""
    first: dict[tuple[Any, ...], str] = {}
    there = ((name, tensor) for name, tensor in state.items() if tensor.numel() and not tensor.is_meta)
    owners = {name: first.setdefault((t.data_ptr(), t.dtype, t.shape, t.stride()), name) for name, t in there}
    return {name: owner for name, owner in owners.items() if owner != name}


def is_sliced(model: nn.Module) -> bool:
    """Whether a model was compressed by slicegpt."""
    return any(isinstance(module, SlicedBlock) for module in model.modules())
