"""Bytes of a model as it is stored, and what it would be dense."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oats_vision.compression.record import CompressionReport


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's tensors as stored, and what they would be dense in the same precision."""

    total: int  # the whole model, compressed
    dense_total: int  # the whole model, dense
    layers: int  # compressed layers: values, positions, scales, U and V
    dense_layers: int  # the same layers dense
    positions: int  # the bitmasks' share of `layers`
    scales: int  # that of the scales of values of few bits
    bits: float  # of `layers`, a weight

    def with_bits(self, bits: float, weights: int) -> "Sizes":
        """With layers of so many bits a weight, before it is known how they are stored."""
        layers = int(bits * weights / 8)
        return replace(self, total=self.total - self.layers + layers, layers=layers, bits=bits)

    @property
    def layer_ratio(self) -> float:
        return self.layers / max(self.dense_layers, 1)


def measure(tensors: Iterable[Tensor], report: CompressionReport, storage: torch.dtype) -> Sizes:
    """Sizes when stored in the given precision; biases count to the whole model only.

    Args:
        tensors: all of the compressed model's state dict.
        report: of its compression.
    """
    positions = sum(layer.spec.bitmask_bytes for layer in report.layers)
    scales = sum(layer.spec.scale_bytes for layer in report.layers)
    if report.slicing:
        layers = report.parameters * storage.itemsize
    else:
        layers = sum(layer.spec.stored_bytes(storage.itemsize) for layer in report.layers)
    dense = report.dense_parameters * storage.itemsize
    # tied weights are stored once; on the meta device they are one tensor
    once = {(tensor.data_ptr() or id(tensor), tensor.shape): tensor for tensor in tensors}.values()
    stored = sum(tensor.numel() * (storage if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in once)
    bits = 8 * layers / max(report.dense_parameters, 1)
    return Sizes(stored, stored - layers + dense, layers, dense, positions, scales, bits)
