"""The products of compressed layers: `sparse_low_rank_linear` and `expand`, each on the best path there is."""

from oats_vision.kernels.product import expand, sparse_low_rank_linear

__all__ = ["expand", "sparse_low_rank_linear"]
