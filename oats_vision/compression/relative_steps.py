"""Adam with steps that are a share of what they change.

A weight is as large as its input feature is small, a LayerScale may be 0.002 where another is 1: one absolute step fits
neither. In scaled coordinates, S D and V D with D the root of the inputs' second moment, an entry counts as much as it
adds to the output. Adam's direction is the same in either, entry by entry, so that only the length of a step changes:
share * size, and in the weight's own coordinates the size of column j is divided by D_j.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from oats_vision.nn.low_rank import LowRank
from oats_vision.nn.sparse import PackedSparse
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear

DECAY = (0.9, 0.98)  # of Adam's means of the gradient and of its square
LEAST = 1e-15  # beside the root of the squares: no step where there is no gradient
DEAD = 1e-2  # share of the median scale below which a feature says nothing of how far its weights may move


class RelativeAdam:
    """Adam (Kingma and Ba, 2015) with a size for each entry, in place of one learning rate.

    Args:
        sizes: of each parameter that is trained: what a step of share 1 is, broadcast to its shape.
    """

    def __init__(self, sizes: Mapping[nn.Parameter, Tensor]) -> None:
        self.sizes = dict(sizes)
        self.means = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in self.sizes}
        self.steps = 0

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Move each parameter against its gradient, which is used up."""
        self.steps += 1
        first, second = (1 - decay**self.steps for decay in DECAY)  # what the means have of their weight by now
        for parameter, size in self.sizes.items():
            gradient, (mean, square) = parameter.grad, self.means[parameter]
            if gradient is None:
                continue  # an expert to which no token went
            mean.lerp_(gradient, 1 - DECAY[0])
            square.mul_(DECAY[1]).addcmul_(gradient, gradient, value=1 - DECAY[1])
            direction = (mean / first).div_((square / second).sqrt_().add_(LEAST))
            parameter.sub_(direction.mul_(size), alpha=share)
            parameter.grad = None


def layer_sizes(layer: SparseLowRankLinear, scale: Tensor) -> dict[nn.Parameter, Tensor]:
    """What the entries of a compressed layer are to be measured by.

    Of S: the root mean square of its row of S D, over D. Of U and V: that of each column of U and each row of V D,
    whose share is thereby independent of how the two divide a direction's length between them. Of the bias: its own.

    Args:
        scale: D, (in_features,), finite and positive: see `column_scale`.
    """
    assert isinstance(layer.sparse, PackedSparse)
    assert isinstance(layer.low_rank, LowRank)
    values, U, V = layer.sparse.values, layer.low_rank.U, layer.low_rank.V
    d = scale.to(values.device).clamp_min(DEAD * float(scale.median())).to(values.dtype)
    mask, S = layer.sparse.mask(), layer.sparse.dense().detach()
    count = mask.sum(1, keepdim=True).clamp_min(1)
    rows = ((S * d).square().sum(1, keepdim=True) / count).sqrt()  # (out, 1)
    heights = [part.out_features for part in layer.spec.parts]
    columns = [_size(u, dim=0).expand_as(u) for u in U.detach().split(heights)]
    sizes = {values: (rows / d)[mask], U: torch.cat(columns), V: _size(V.detach() * d, dim=1) / d}
    return sizes | ({} if layer.bias is None else {layer.bias: _size(layer.bias.detach(), dim=0)})


def vector_size(name: str, vector: nn.Parameter) -> Tensor:
    """Of a bias its root mean square; of a norm's weights or a LayerScale, which multiply, each entry's own size."""
    return _size(vector.detach().flatten(), dim=0).squeeze(0) if name.endswith("bias") else vector.detach().abs()


def _size(tensor: Tensor, dim: int) -> Tensor:
    """Root mean square along a dimension, which is kept."""
    return tensor.square().mean(dim, keepdim=True).sqrt()
