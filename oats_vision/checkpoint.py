"""The directory that a compressed model is stored in: config.json and model.safetensors (see docs/format.md)."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from oats_vision.adapters import adapters, remember_adapter
from oats_vision.errors import CheckpointError
from oats_vision.files import replacing, umask
from oats_vision.layers import LayerSpec, SparseLowRankLinear
from oats_vision.models import TOKENIZER, ModelSource, rebuild, remember_source, source_of
from oats_vision.pipeline import CompressionReport
from oats_vision.slicing import empty_sliced_blocks
from oats_vision.transforms import Transform, build_transform

log = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "oats_vision", 1
CONFIG, WEIGHTS, REPORT = "config.json", "model.safetensors", "report.json"
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


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
    once = {(tensor.data_ptr(), tensor.shape): tensor for tensor in tensors}.values()  # tied weights are stored once
    stored = sum(tensor.numel() * (storage if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in once)
    return Sizes(stored, stored - compressed - positions + dense, compressed + positions, dense, positions)


def save(model: nn.Module, path: str | Path, *, overwrite: bool = False, tokenizer: Any = None) -> None:
    """Write a compressed model to a directory, all of it or nothing.

    Args:
        model: compressed by `compress` (or loaded by `load`).
        path: directory to make; its parent must exist.
        overwrite: replace a checkpoint of ours that is there. Any other directory is left alone.
        tokenizer: of a language model, written beside its weights for `load_tokenizer`.

    Raises:
        CheckpointError: not compressed, the path is taken, or the files cannot be written.
    """
    path = Path(path)
    report = getattr(model, "_oats_vision_report", None)
    if not isinstance(report, CompressionReport):
        raise CheckpointError("the model is not compressed: call oats_vision.compress first")
    check_target(path, overwrite)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    storage = getattr(torch, report.settings.storage_dtype) if report.settings.storage_dtype else dtype
    state = model.state_dict()
    tied = _tied(state)
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written_by": f"oats_vision {version('oats_vision')}",
        "source": source_of(model).to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "storage_dtype": str(storage).removeprefix("torch."),
        "tied": tied,
        **report.to_dict(),
    }
    tensors = {
        name: (tensor.to(storage) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in state.items()
        if name not in tied
    }
    with new_directory(path, overwrite) as target:
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        config["weights_sha256"] = _sha256(target / WEIGHTS)
        (target / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(target / TOKENIZER)


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
    dtype = dtype or getattr(torch, config["dtype"])
    storage = getattr(torch, config["storage_dtype"])
    layers_dtype = storage if storage.itemsize < dtype.itemsize else dtype
    tensors = read_weights(path, config)
    adapter = next((adapter for adapter in adapters() if adapter.name == config["adapter"]), None)
    if adapter is None:
        raise CheckpointError(f"{path} needs the adapter {config['adapter']!r}: register it first")
    model = rebuild(source, trust_remote_code) if model is None else model
    remember_adapter(model, adapter)
    try:
        adapter.prepare(model)
        report = CompressionReport.from_dict(config)
        if report.slicing:
            empty_sliced_blocks(model, adapter, report.slicing)
        specs = layer_specs(config)
        for name, spec in specs.items():
            model.set_submodule(name, SparseLowRankLinear.empty(spec, layers_dtype))
        compressed = tuple(f"{name}." for name in specs)
        cast = {
            name: t.to(layers_dtype if name.startswith(compressed) else dtype) if t.is_floating_point() else t
            for name, t in tensors.items()
        }
        model.load_state_dict(cast | {name: cast[original] for name, original in config["tied"].items()}, assign=True)
        if config["tied"] and hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]  # of transformers: one parameter, also on another device
    except (AttributeError, KeyError, RuntimeError) as mismatch:
        reason = " ".join(str(mismatch).split())[:400]
        raise CheckpointError(f"{path} does not fit {source.kind} model {source.name!r}: {reason}") from None
    remember_source(model, source)
    model._oats_vision_report = report  # type: ignore[assignment]
    return model.to(device=device).eval()


def load_transform(path: str | Path) -> Transform | None:
    """The input preprocessing of a stored model, PIL picture -> tensor; None if it is not known."""
    transform = read_config(Path(path))["source"]["transform"]
    return build_transform(transform) if transform else None


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's config.json, checked for format and version.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of another or a later format.
    """
    file = path / CONFIG
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no compressed model: there is no {CONFIG}") from None
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a config of oats_vision")
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {config.get('format_version')!r} and this release reads {FORMAT_VERSION}: "
            "update oats_vision"
        )
    try:  # what loading relies on
        for layer in config["layers"]:
            LayerSpec.from_dict(layer["spec"])
        ModelSource(**config["source"])
        CompressionReport.from_dict(config)
        if not isinstance(getattr(torch, config["dtype"]), torch.dtype):
            raise ValueError(f"unknown dtype {config['dtype']}")
        getattr(torch, config["storage_dtype"]).itemsize, config["adapter"], config["weights_sha256"]
        if not isinstance(config["tied"], dict):
            raise ValueError("tied must be a mapping of names")
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise CheckpointError(f"{file} is damaged: {type(problem).__name__}: {problem}") from None
    return config


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, all of it or nothing."""
    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be written: {problem}") from problem


def add_evaluation(path: Path, result: dict[str, Any]) -> None:
    """Add an evaluation to a checkpoint's report.json, in the place of an earlier one of the same protocol and data."""
    file = path / REPORT
    try:
        content = json.loads(file.read_text()) if file.exists() else {}
        kept = [old for old in content.get("evaluations", []) if _what(old) != _what(result)]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None
    try:
        write_json(file, content | {"evaluations": [*kept, result]})
    except CheckpointError as problem:  # a shared, read-only checkpoint can be evaluated too
        log.warning("the result was not added to %s: %s", file, problem)


def _what(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(name) for name in ("protocol", "data", "train", "val"))


def is_sliced(model: nn.Module) -> bool:
    """Whether a model was compressed by slicegpt."""
    report = getattr(model, "_oats_vision_report", None)
    return isinstance(report, CompressionReport) and report.slicing is not None


def check_target(path: Path, overwrite: bool) -> None:
    """See that a directory can be written to `path`, before hours of work.

    Raises:
        CheckpointError: taken, or its parent is missing or not writable.
    """
    if path.exists():
        if not overwrite:
            raise CheckpointError(f"{path} exists: give another --out, or --overwrite")
        if not path.is_dir() or (any(path.iterdir()) and not is_checkpoint(path)):
            raise CheckpointError(f"{path} is not a checkpoint of ours, and is not overwritten: give another --out")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise CheckpointError(f"{parent} does not exist: make it first, or give another --out")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{parent} is not writable: give another --out")


def is_checkpoint(path: Path) -> bool:
    """Whether a directory claims to be a checkpoint of this package, of any version."""
    try:
        return json.loads((path / CONFIG).read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place at the end, or is gone after an error."""
    try:
        target = Path(tempfile.mkdtemp(dir=path.resolve().parent, prefix=f".{path.name}.writing-"))
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be written: {problem}") from problem
    try:
        yield target
        for file in filter(Path.is_file, target.rglob("*")):
            file.chmod(0o666 & ~umask())  # safetensors makes files that only their owner can read
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        target.chmod(0o777 & ~umask())
        if overwrite and path.exists():
            old = target.with_name(target.name + "-old")
            path.rename(old)
            target.rename(path)
            shutil.rmtree(old)
        else:
            target.rename(path)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{path} cannot be written: {problem}") from problem
    finally:
        shutil.rmtree(target, ignore_errors=True)


def layer_specs(config: dict[str, Any]) -> dict[str, LayerSpec]:
    """The compressed layers of a checkpoint, by name."""
    return {layer["name"]: LayerSpec.from_dict(layer["spec"]) for layer in config["layers"]}


def read_weights(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors, after the file's digest and each compressed layer's shapes, dtypes and counts were checked.

    Raises:
        CheckpointError: the file is missing, truncated or corrupted.
    """
    file = path / WEIGHTS
    specs = layer_specs(config)
    try:
        if _sha256(file) != config["weights_sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in {CONFIG}")
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            storage = _SAFETENSORS_NAMES[getattr(torch, config["storage_dtype"])]
            for name, spec in specs.items():
                reference = SparseLowRankLinear.empty(spec, torch.float32).state_dict()
                for key, expected in reference.items():
                    full = f"{name}.{key}"
                    if full not in names:
                        raise CheckpointError(f"{file} is damaged: {full} is missing")
                    part = stored.get_slice(full)
                    dtype = "U8" if expected.dtype == torch.uint8 else storage
                    if part.get_shape() != list(expected.shape) or part.get_dtype() != dtype:
                        raise CheckpointError(
                            f"{file} is damaged: {full} is {part.get_dtype()} {part.get_shape()}, "
                            f"expected {dtype} {list(expected.shape)}"
                        )
                check_bitmask(stored.get_tensor(f"{name}.sparse.bitmask"), spec, f"{file}: {name}")
            return {name: stored.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no compressed model: there is no {WEIGHTS}") from None
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None


def check_bitmask(bitmask: Tensor, spec: LayerSpec, where: str) -> None:
    """See that the positions agree with the number of values and lie in the matrix.

    Raises:
        CheckpointError: they do not.
    """
    ones = int(_POPCOUNT[bitmask.int()].sum(dtype=torch.int64))
    if ones != spec.nonzeros:
        raise CheckpointError(f"{where} is damaged: the bitmask has {ones} positions for {spec.nonzeros} values")
    used = spec.in_features % 8
    if used and len(bitmask) and int((bitmask[:, -1] >> used).max()):
        raise CheckpointError(f"{where} is damaged: the bitmask has positions beyond the last column")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
