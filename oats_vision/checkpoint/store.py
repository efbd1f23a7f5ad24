"""The directory that a compressed model is stored in: config.json and model.safetensors (see docs/format.md)."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from oats_vision.checkpoint.config import CONFIG, DIGEST, FORMAT, FORMAT_VERSION, config_digest, read_config
from oats_vision.checkpoint.place import MERGED, REPORT, check_target, is_checkpoint, locked, new_directory
from oats_vision.checkpoint.weights import WEIGHTS, WeightsFile, check_bitmask
from oats_vision.compression.methods.slicegpt import empty_sliced_blocks
from oats_vision.compression.record import CompressionReport
from oats_vision.errors import CheckpointError, OatsVisionError
from oats_vision.files import replacing
from oats_vision.models.adapters import Adapter, adapters, find_adapter, remember_adapter
from oats_vision.models.bounds import BUILDING, MEMORY, Limits, bounded
from oats_vision.models.loading.load import TOKENIZER, remember_source, source_of
from oats_vision.models.source import ModelSource, library, rebuild
from oats_vision.models.transforms import Transform, build_transform, plain
from oats_vision.models.values import broken
from oats_vision.nn.sliced import SlicedBlock
from oats_vision.nn.sparse_low_rank import LayerSpec, SparseLowRankLinear, compressed_layers

__all__ = [
    "CONFIG",
    "MERGED",
    "REPORT",
    "WEIGHTS",
    "CompressionReport",
    "add_evaluation",
    "check_bitmask",
    "check_source",
    "check_target",
    "is_checkpoint",
    "is_sliced",
    "layer_specs",
    "load",
    "load_transform",
    "locked",
    "measure",
    "new_directory",
    "read_config",
    "read_weights",
    "save",
    "write",
    "write_json",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's tensors as stored, and what they would be dense in the same precision."""

    total: int  # the whole model, compressed
    dense_total: int  # the whole model, dense
    layers: int  # compressed layers: values, positions, U and V
    dense_layers: int  # the same layers dense
    positions: int  # the bitmasks' share of `layers`

    @property
    def layer_ratio(self) -> float:
        return self.layers / self.dense_layers


def measure(tensors: Iterable[Tensor], report: CompressionReport, storage: torch.dtype) -> Sizes:
    """Sizes when stored in the given precision; biases count to the whole model only.

    Args:
        tensors: all of the compressed model's state dict.
        report: of its compression.
    """
    compressed = report.parameters * storage.itemsize
    positions = sum(layer.spec.out_features * layer.spec.row_bytes for layer in report.layers)
    dense = report.dense_parameters * storage.itemsize
    # tied weights are stored once; on the meta device they are one tensor
    once = {(tensor.data_ptr() or id(tensor), tensor.shape): tensor for tensor in tensors}.values()
    stored = sum(tensor.numel() * (storage if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in once)
    return Sizes(stored, stored - compressed - positions + dense, compressed + positions, dense, positions)


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


def write(model: nn.Module, path: Path, overwrite: bool = False, tokenizer: Any = None) -> None:
    """`save` for who holds the lock of the path."""
    model = _unwrapped(model)
    report = getattr(model, "_oats_vision_report", None)
    if not isinstance(report, CompressionReport):
        raise CheckpointError("the model is not compressed: call oats_vision.compress first")
    check_target(path, overwrite)
    source, state = source_of(model), model.state_dict()
    _check_report(model, report)
    _check_values(model, state)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    storage = getattr(torch, report.settings.storage_dtype) if report.settings.storage_dtype else dtype
    if source.kind in ("timm", "huggingface"):
        check_source(model, report)
    tied = _tied(state)
    generation = getattr(model, "generation_config", None)
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written_by": f"oats_vision {version('oats_vision')}",
        "source": source.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "storage_dtype": str(storage).removeprefix("torch."),
        "tied": tied,
        **report.to_dict(),
        "generation_config": plain(generation.to_diff_dict()) if generation is not None else None,
    }
    buffers = {name for name, _ in model.named_buffers()}
    tensors = {
        name: (tensor.to(storage) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in state.items()
        if name not in tied
    }
    for name, tensor in tensors.items():
        if bad := broken(tensor, name, is_parameter=name not in buffers):
            raise CheckpointError(f"the model cannot be stored in {config['storage_dtype']}: {bad}")
    with new_directory(path, overwrite) as target:
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        config["weights_sha256"] = _sha256(target / WEIGHTS)
        config[DIGEST] = config_digest(config)
        (target / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(target / TOKENIZER)


def check_source(model: nn.Module, report: CompressionReport | None = None) -> None:
    """See that what is noted of a model's architecture makes a model of its tensors' names and shapes.

    Args:
        report: of its compression; None if it is dense.

    Raises:
        CheckpointError: it does not, and a checkpoint of the model could not be loaded.
    """
    source = source_of(model)
    if source.kind not in ("timm", "huggingface"):  # hub code is not run again, other modules are given to `load`
        return
    try:
        built = rebuild(source)
        if report:
            _make_room(built, find_adapter(model), report, torch.float32)
    except OatsVisionError as problem:
        raise CheckpointError(f"the model could not be loaded again: {problem}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrong := _difference(shapes, {name: tuple(t.shape) for name, t in built.state_dict().items()}):
        where = "model.num_classes" if source.kind == "timm" else "model.config (num_labels, ...)"
        raise CheckpointError(
            f"the model is no longer the {source.kind} model {source.name!r} that it was loaded as, and could not be "
            f"loaded again: {wrong}. If its head was replaced, say so in {where}"
        )


def _difference(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The first tensor that differs in name or shape, in words; empty if none does."""
    for name in [*expected, *found]:
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not of this architecture"
        if found[name] != expected[name]:
            return f"{name} is {list(found[name])}, expected {list(expected[name])}"
    return ""


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile or a wrapper for several devices holds."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _check_report(model: nn.Module, report: CompressionReport) -> None:
    """Raises CheckpointError if the model's layers are not those of its report."""
    layers = {name: layer.spec for name, layer in compressed_layers(model).items()}
    noted = {layer.name: layer.spec for layer in report.layers}
    sliced = any(isinstance(module, SlicedBlock) for module in model.modules())
    if layers == noted and sliced == bool(report.slicing):
        return
    if not layers and not sliced:
        raise CheckpointError("the model was merged since: save it before the merge, or as a dense model")
    differ = sorted(name for name in layers.keys() | noted.keys() if layers.get(name) != noted.get(name))
    raise CheckpointError(
        f"the model's compressed layers are not those of its report (such as {differ[0] if differ else 'its blocks'}): "
        "a run was stopped in the middle, or layers were changed by hand; load the dense model and compress it again"
    )


def _check_values(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a tensor's values are not in memory."""
    away = next((name for name, tensor in state.items() if tensor.is_meta), None)
    if away is not None:
        raise CheckpointError(
            f"{away} is on the meta device and has no values (offloaded by accelerate?): "
            "load the whole model into memory, without device_map, and compress it there"
        )


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one's memory, and that one's name (an embedding that is also the head)."""
    first: dict[tuple[int, torch.Size], str] = {}
    owners = {name: first.setdefault((t.data_ptr(), t.shape), name) for name, t in state.items() if t.numel()}
    return {name: owner for name, owner in owners.items() if owner != name}


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a compressed model in eval mode; needs neither the dense weights nor a network.

    Args:
        path: a directory that `save` wrote.
        dtype: to compute in; that of the compression run if not given. Compressed layers stay in the stored dtype if
            that is smaller, and compute in the dtype of their inputs.
        model: a module of the original class, if the model was one of your own; changed in place.
        trust_remote_code: allow code from a hub to run (models from torch.hub).

    Raises:
        CheckpointError: not a checkpoint, truncated, corrupted, or of a later format.
        ModelError: the architecture cannot be rebuilt here.
    """
    path = Path(path)
    config = read_config(path)
    source = ModelSource(**config["source"])
    report = CompressionReport.from_dict(config)
    adapter = next((adapter for adapter in adapters() if adapter.name == config["adapter"]), None)
    if adapter is None:
        raise CheckpointError(f"{path} needs the adapter {config['adapter']!r}: register it first")
    dtype = dtype or getattr(torch, config["dtype"])
    storage = getattr(torch, config["storage_dtype"])
    layers_dtype = storage if storage.itemsize < dtype.itemsize else dtype
    specs = layer_specs(config)
    compressed = tuple(f"{name}." for name in specs)

    def convert(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(layers_dtype if name.startswith(compressed) else dtype)

    with WeightsFile(path) as file:
        file.check_layers(specs, storage)
        limits = _limits(file, config)
        if model is None:
            model = rebuild(source, trust_remote_code, limits)
            if not adapter.matches(model) and find_adapter(model).name != adapter.name:
                raise CheckpointError(f"{path} is damaged: {source.name} is no model of adapter {adapter.name}")
        with bounded(limits):
            _make_room(model, adapter, report, layers_dtype)
        _check_tensors(path, model, file, config, storage)
        buffers = {name for name, _ in model.named_buffers()}
        tensors = file.read(config["weights_sha256"], convert, lambda name: name not in buffers)
    for name, spec in specs.items():
        check_bitmask(tensors[f"{name}.sparse.bitmask"], spec, f"{file.path}: {name}")
    tensors |= {name: tensors[owner] for name, owner in config["tied"].items()}
    with BUILDING:  # parameters are assigned, which another thread may have patched
        model.load_state_dict(tensors, assign=True)
        if config["tied"] and hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]  # of transformers: one parameter, also on another device
    _check_computed(path, model, tensors)
    _set_generation(path, model, config.get("generation_config"))
    remember_source(model, source)
    model._oats_vision_report = report  # type: ignore[assignment]
    return model.requires_grad_(False).to(device=device).eval()


def _limits(file: WeightsFile, config: dict[str, Any]) -> Limits:
    """What the architecture of a checkpoint may ask for while it is built, by what its weights file holds.

    It is built dense first: twice the tensors cover the norms that slicing removes, and heads that are replaced.
    """
    return Limits(2 * (len(file.tensors) + len(config["tied"])) + 64, MEMORY + 2 * file.size)


def _make_room(model: nn.Module, adapter: Adapter, report: CompressionReport, dtype: torch.dtype) -> None:
    """Give a rebuilt model the empty compressed layers, or sliced blocks, of a report.

    Raises:
        CheckpointError: the model has no such linear.
    """
    adapter = remember_adapter(model, adapter)
    adapter.prepare(model)
    if report.slicing:
        try:
            empty_sliced_blocks(model, adapter, report.slicing)
        except (AttributeError, RuntimeError) as problem:
            raise CheckpointError(f"the blocks cannot be sliced as config.json says: {problem}") from None
    modules = dict(model.named_modules())
    for layer in report.layers:
        linear, spec = modules.get(layer.name), layer.spec
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"config.json has a compressed layer {layer.name}, and the model no such linear")
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        if size != (spec.in_features, spec.out_features, spec.bias):
            raise CheckpointError(
                f"config.json has {layer.name} of {spec.in_features} inputs and {spec.out_features} outputs, "
                f"bias {spec.bias}, and the model's has {size[0]}, {size[1]}, {size[2]}"
            )
        model.set_submodule(layer.name, SparseLowRankLinear.empty(spec, dtype))


def _check_tensors(
    path: Path, model: nn.Module, file: WeightsFile, config: dict[str, Any], storage: torch.dtype
) -> None:
    """See that a file's tensors are the model's, before any is read.

    Raises:
        CheckpointError: a name, a shape or a dtype differs.
    """
    expected, stored = model.state_dict(), file.tensors
    what = f"{path} does not fit {config['source']['kind']} model {config['source']['name']!r}"
    owners = {name: owner for name, owner in config["tied"].items() if name not in stored and owner in stored}
    if len(owners) < len(config["tied"]):
        raise CheckpointError(f"{what}: a tied tensor is there itself, or its owner is not")
    found = {name: tensor.shape for name, tensor in stored.items()}
    found |= {name: found[owner] for name, owner in owners.items()}
    if wrong := _difference(found, {name: tuple(tensor.shape) for name, tensor in expected.items()}):
        raise CheckpointError(f"{what}: {wrong}")
    for name, tensor in stored.items():
        dtype = storage if expected[name].is_floating_point() else expected[name].dtype
        if tensor.dtype != dtype:
            raise CheckpointError(f"{what}: {name} is {tensor}, expected {str(dtype).removeprefix('torch.')}")


def _check_computed(path: Path, model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if what is computed, and not stored, has no values or some that no model survives."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
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


def load_transform(path: str | Path) -> Transform | None:
    """The input preprocessing of a stored model, PIL picture -> tensor; None if it is not known."""
    transform = ModelSource(**read_config(Path(path))["source"]).transform
    return build_transform(transform) if transform else None


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, all of it or nothing."""
    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be written: {problem}") from problem


def add_evaluation(path: Path, result: dict[str, Any]) -> None:
    """Add an evaluation to a checkpoint's report.json, in the place of an earlier one of the same protocol and data."""

    def added(content: dict[str, Any]) -> dict[str, Any]:
        kept = [old for old in content.get("evaluations", []) if _what(old) != _what(result)]
        return {"evaluations": [*kept, result]}

    change_report(path, added)


def change_report(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Give fields of a checkpoint's report.json other values; where it cannot be written, that is said.

    Args:
        change: from what is there, the fields that change.

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


def _what(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(name) for name in ("protocol", "data", "train", "val"))


def is_sliced(model: nn.Module) -> bool:
    """Whether a model was compressed by slicegpt."""
    report = getattr(model, "_oats_vision_report", None)
    return isinstance(report, CompressionReport) and report.slicing is not None


def layer_specs(config: dict[str, Any]) -> dict[str, LayerSpec]:
    """The compressed layers of a checkpoint, by name."""
    return {layer["name"]: LayerSpec.from_dict(layer["spec"]) for layer in config["layers"]}


def read_weights(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors, after the file's digest and each compressed layer's shapes, dtypes and counts were checked.

    Raises:
        CheckpointError: the file is missing, truncated or corrupted.
    """
    specs = layer_specs(config)
    compressed = tuple(f"{name}." for name in specs)  # of the others, only the model knows which are buffers
    with WeightsFile(path) as file:
        file.check_layers(specs, getattr(torch, config["storage_dtype"]))
        tensors = file.read(config["weights_sha256"], is_parameter=lambda name: name.startswith(compressed))
    for name, spec in specs.items():
        check_bitmask(tensors[f"{name}.sparse.bitmask"], spec, f"{file.path}: {name}")
    return tensors


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
