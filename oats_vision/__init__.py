"""Compress vision transformers with OATS: sparse plus low-rank, in one shot."""

from oats_vision.adapters import Adapter, register_adapter
from oats_vision.checkpoint import load, load_transform, save
from oats_vision.compression import Result, compress
from oats_vision.data import load_pictures
from oats_vision.errors import OatsVisionError
from oats_vision.kernels.semi_structured import to_semi_structured
from oats_vision.layers import SparseLowRankLinear, merge
from oats_vision.models import load_model, load_tokenizer
from oats_vision.pipeline import CompressionReport
from oats_vision.text import load_sequences, load_tokens

__all__ = [
    "Adapter",
    "CompressionReport",
    "OatsVisionError",
    "Result",
    "SparseLowRankLinear",
    "compress",
    "load",
    "load_model",
    "load_pictures",
    "load_sequences",
    "load_tokenizer",
    "load_tokens",
    "load_transform",
    "merge",
    "register_adapter",
    "save",
    "to_semi_structured",
]
