"""Bytes of a model as it is stored, and what it would be dense."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from oats_vision.compression.record import CompressionReport


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
