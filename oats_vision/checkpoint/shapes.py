"""The empty compressed layers that a rebuilt model gets, and whether tensors are those that it expects."""

from collections.abc import Mapping

import torch
from torch import nn

from oats_vision.compression.record import CompressionReport
from oats_vision.compression.slicing import empty_sliced_blocks
from oats_vision.errors import CheckpointError
from oats_vision.models.families import Structure
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear


def make_room(model: nn.Module, structure: Structure, report: CompressionReport, dtype: torch.dtype) -> None:
    """Give a rebuilt model the empty compressed layers, or sliced blocks, of a report.

    Raises:
        CheckpointError: the model has no such linear.
    """
    structure.prepare(model)
    if report.slicing:
        try:
            empty_sliced_blocks(model, structure, report.slicing)
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


def difference(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The first tensor that differs in name or shape, in words; empty if none does."""
    for name in [*expected, *found]:
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not of this architecture"
        if found[name] != expected[name]:
            return f"{name} is {list(found[name])}, expected {list(expected[name])}"
    return ""
