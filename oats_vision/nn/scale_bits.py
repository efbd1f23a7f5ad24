"""Scales held as the bits of bfloat16, in int16, which conversions of a model to another dtype leave alone."""

import torch
from torch import Tensor

# what the first 9 bits, sign and exponent, stand for
_POWERS = (torch.arange(512) << 7).to(torch.int16).view(torch.bfloat16).float()


def to_bits(scale: Tensor) -> Tensor:
    """The bits of a bfloat16 tensor, int16."""
    return scale.view(torch.int16)


def from_bits(bits: Tensor) -> Tensor:
    """The scales, bfloat16."""
    traced = not torch.compiler.is_compiling() and torch._C._is_tracing()
    if not traced and not torch.onnx.is_in_onnx_export():
        return bits.view(torch.bfloat16)
    # TorchScript and ONNX cannot take the same bits for another dtype, so the number is put together from them
    unsigned = bits.int() % 65536  # first of all, since ONNX divides negative numbers in another way
    scale = _POWERS.to(bits.device)[unsigned // 128] * (1 + (unsigned % 128).float() / 128)
    return scale.to(torch.bfloat16)
