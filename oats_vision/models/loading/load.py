"""Load dense models, record where they come from, and build them again."""

import logging
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from oats_vision import ranks
from oats_vision.errors import CheckpointError, ModelError
from oats_vision.machine import available_memory
from oats_vision.models.bounds import BUILDING, Limits, bounded
from oats_vision.models.library import library
from oats_vision.models.loading import provider_for, provider_of, providers
from oats_vision.models.loading.provider import Wanted
from oats_vision.models.record import record_of, set_record, structure_of
from oats_vision.models.source import ModelSource
from oats_vision.models.transforms import Transform, build_transform
from oats_vision.models.values import beyond
from oats_vision.models.weights import cast_weights, same_random_weights, weights_digest

log = logging.getLogger(__name__)

_BLOCKS = ("depth", "num_hidden_layers", "n_layer", "num_layers")  # names of the number of blocks


def load_model(
    name: str | Path,
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    low_memory: bool | None = False,
) -> tuple[nn.Module, Transform | None]:
    """Load a dense model by its name, in eval mode, and its own preprocessing; `load` is for compressed models.

    Args:
        name: `demo`; an alias such as `dinov2_vitl14`; a timm name; `hf:org/name`; `hub:entry` or
            `hub:repository_or_directory:entry`; a directory in timm's or Hugging Face's format; a .gguf file.
        pretrained: load the trained weights, or keep random ones of the architecture, the same each time.
        image_size: input size in pixels, if not the model's own (timm models).
        dtype: of the model's weights and arithmetic; buffers that are computed and not stored keep theirs.
        trust_remote_code: allow code from a hub to run.
        low_memory: leave the weights of its blocks in their files, which must be safetensors, and read those of a block
            when it is called. None: where they would take more than half of the memory that is free; ranks decide that
            together.

    Raises:
        ModelError: unknown name, a model that cannot be loaded, or one of no supported family; one that cannot be read
            block by block; or a value that the dtype cannot hold.
    """
    name, device = os.fspath(name), torch.device(device)
    provider = provider_of(name)
    room = 0.0 if low_memory else math.inf if low_memory is False else min(ranks.everyones(_free(device))) / 2
    with nullcontext() if pretrained else same_random_weights():
        model, source = provider.load(name, Wanted(pretrained, image_size, trust_remote_code, room))
    structure_of(model)
    if low_memory and not record_of(model).on_disk:
        raise ModelError(
            f"model {name!r} cannot be read block by block: only trained weights in safetensors files can, of timm or "
            "transformers, and not those of experts or GPT-2; give `low_memory=False`"
        )
    transform, source = _known_transform(name, source)
    origin = {"name": provider.origin(name), "image_size": image_size}
    record_source(model, replace(source, origin=origin, dense_sha256=weights_digest(model)))
    for parameter, tensor in model.named_parameters():
        if not tensor.is_meta and (lost := beyond(tensor, parameter, dtype)):
            raise ModelError(f"model {name!r}: {lost}: use dtype float32 or bfloat16")
    return moved(cast_weights(model, dtype), device).eval(), transform


def _free(device: torch.device) -> float:
    """Bytes that are free on a device, and on the CPU, through which weights come to it."""
    return min(available_memory(device), available_memory(torch.device("cpu")))


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a language model, by the name that `load_model` takes, or of a compressed one's directory.

    Raises:
        ModelError: there is none.
    """
    name = os.fspath(name)
    return provider_of(name).load_tokenizer(name)


def record_source(model: nn.Module, source: ModelSource) -> None:
    """Note on the model how it can be rebuilt."""
    set_record(model, replace(record_of(model), source=source))


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """A model on a device, but for the weights that are read later."""
    on_disk = record_of(model).on_disk
    if on_disk is None:
        return model.to(device=device)
    on_disk.device = device
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    return model


def record_weights(model: nn.Module) -> None:
    """Note which weights a loaded model has now: it may have been trained since.

    In 16 bits they cannot be told from the loaded ones, which were rounded: what was noted stays.
    """
    source = record_of(model).source
    if record_of(model).on_disk:
        return  # their files were not written to
    whole = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
    if source and source.dense_sha256 and whole:
        record_source(model, replace(source, dense_sha256=weights_digest(model)))


def source_of(model: nn.Module) -> ModelSource:
    """How a model can be rebuilt: noted by `load_model`, read off a Hugging Face model, else `module`."""
    source = record_of(model).source
    if source is not None:
        return provider_for(source.kind).described(source, model)
    found = (provider.recognise(model) for provider in providers())
    return next((source for source in found if source is not None), ModelSource.of_module(model))


def rebuild(source: ModelSource, trust_remote_code: bool = False, limits: Limits | None = None) -> nn.Module:
    """The architecture, without weights: parameters on the meta device, buffers real.

    Args:
        limits: of what may be built; None for a source that is trusted.

    Raises:
        ModelError: a module of the user's own, hub code that is not on this machine, an unknown name, or an argument
            that is none of an architecture's.
        CheckpointError: the limits are passed.
    """
    build = provider_for(source.kind).builder(source, trust_remote_code)
    if limits:
        _check_blocks(source.args, limits)
    with BUILDING, bounded(limits) if limits else nullcontext(), init_empty_weights(include_buffers=False):
        model: nn.Module = library(f"{source.kind} model {source.name!r} cannot be rebuilt", build)
    return model.eval()


def save_plain(model: nn.Module, source: ModelSource, dtype: torch.dtype, directory: Path) -> None:
    """Write a dense model as a plain checkpoint of its original architecture, with its preprocessing.

    timm: a directory for `timm.create_model("local-dir:...")`; Hugging Face: `from_pretrained`; else the
    state dict as `model.safetensors`.
    """
    cast_weights(model, dtype)
    structure_of(model).restore(model)
    directory.mkdir(exist_ok=True)
    provider_for(source.kind).save_plain(model, source, directory)


def _known_transform(name: str, source: ModelSource) -> tuple[Transform | None, ModelSource]:
    """The model's preprocessing; none, which is said and noted, if it is of a kind that we do not make."""
    try:
        return build_transform(source.transform) if source.transform else None, source
    except ModelError as unknown:
        log.warning("%s is loaded without its preprocessing (%s): give batches of your own", name, unknown)
        return None, replace(source, transform=None)


def _check_blocks(args: Any, limits: Limits) -> None:
    """Each block has a tensor at least, and lists as long as the number of blocks are made before any module."""
    if not isinstance(args, dict):
        return
    for name, value in args.items():
        _check_blocks(value, limits)
        if name in _BLOCKS and isinstance(value, int | float) and value > limits.tensors:
            raise CheckpointError(f"config.json asks for {value} blocks, and its weights are {limits.tensors} tensors")
