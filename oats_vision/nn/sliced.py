"""Blocks whose residual stream is narrower than the model's (SliceGPT, Ashkboos et al., ICLR 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision.nn.outputs import first_output


@dataclass(frozen=True)
class Slicing:
    """How a model was sliced.

    width, sliced_width: of the residual stream, before and after.
    parameters, dense_parameters: of the blocks' linears (the skip connections' matrices included) and what they were.
    kept: share of the signal's second moment that is kept, for the attention and the MLP of each block.
    """

    width: int
    sliced_width: int
    parameters: int
    dense_parameters: int
    kept: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Slicing":
        """Raises TypeError or ValueError if a field is missing, unknown or impossible."""
        slicing = cls(**{**fields, "kept": tuple(fields["kept"])})
        if not (isinstance(slicing.width, int) and isinstance(slicing.sliced_width, int)):
            raise ValueError("widths must be whole numbers")
        if not 0 < slicing.sliced_width <= slicing.width:
            raise ValueError(f"a stream {slicing.width} wide cannot be sliced to {slicing.sliced_width}")
        return slicing


class SlicedNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), the mean over the full width of the stream.

    Args:
        width: of the stream before it was sliced: what was cut off counts as zeros.
        eps: as of the norm that it replaces.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., sliced width) -> the same shape and dtype; the mean is taken in float32 or better."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) / self.width + self.eps)).to(x.dtype)


class SlicedReader(nn.Linear):
    """A linear of the attention: reads the first `in_features` of inputs that are padded to the full width."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., width), width >= in_features -> (..., out_features)."""
        return F.linear(input[..., : self.in_features], self.weight, self.bias)


class SlicedBlock(nn.Module):
    """A block on a sliced stream x: y = P1 x + attention(norm(x)), z = P2 y + mlp(norm(y)).

    The attention's own code may rely on inputs of the full width, so it gets them padded with zeros.

    Args:
        norms: before the attention and the MLP.
        attention, mlp: of the block, on linears that read the sliced stream; the attention's are `SlicedReader`s.
        entry: takes the stream from its full width to that of the block (the first block has one), or None.
        shortcuts: P1 and P2, which turn the skip connections into the next part's directions.
        width: of the stream before it was sliced.
    """

    def __init__(
        self,
        norms: tuple[SlicedNorm, SlicedNorm],
        attention: nn.Module,
        mlp: nn.Module,
        entry: nn.Linear | None,
        shortcuts: Sequence[nn.Linear],
        width: int,
    ) -> None:
        super().__init__()
        self.entry = entry
        self.norm1, self.attention, self.norm2, self.mlp = norms[0], attention, norms[1], mlp
        self.shortcut1, self.shortcut2 = shortcuts
        self.width = width

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, tokens, sliced width), of the full width into the first and out of the last block.

        Other arguments go to the attention.
        """
        x = hidden_states if self.entry is None else self.entry(hidden_states)
        padded = F.pad(self.norm1(x), (0, self.width - x.shape[-1]))
        y = self.shortcut1(x) + first_output(self.attention(padded, *args, **kwargs))
        z: Tensor = self.shortcut2(y) + self.mlp(self.norm2(y))
        return z
