"""The products of compressed layers: `sparse_low_rank_linear` and `expand`, each on the best path there is."""

from oats_vision.kernels.packed import PackedWeight, Part
from oats_vision.kernels.product import expand, sparse_low_rank_linear

__all__ = ["PackedWeight", "Part", "expand", "sparse_low_rank_linear"]
