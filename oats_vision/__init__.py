"""Compress vision transformers with OATS: sparse plus low-rank, in one shot."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from oats_vision.checkpoint import load, load_transform, save
    from oats_vision.compression.record import CompressionReport, record
    from oats_vision.data.pictures import load_pictures
    from oats_vision.data.text import load_sequences, load_tokens
    from oats_vision.errors import OatsVisionError
    from oats_vision.models.families import Family, register_family
    from oats_vision.models.loading.load import load_model, load_tokenizer
    from oats_vision.nn.semi_structured import to_semi_structured
    from oats_vision.nn.sparse_low_rank import SparseLowRankLinear, merge
    from oats_vision.runs.compress import Result, compress

__all__ = [
    "CompressionReport",
    "Family",
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
    "record",
    "register_family",
    "save",
    "to_semi_structured",
]

# the modules of the public names; each is imported when one of its names is first used, since PyTorch takes seconds
_HOMES = {
    "models.families": ("Family", "register_family"),
    "checkpoint": ("load", "load_transform", "save"),
    "runs.compress": ("Result", "compress"),
    "data.pictures": ("load_pictures",),
    "errors": ("OatsVisionError",),
    "nn.semi_structured": ("to_semi_structured",),
    "nn.sparse_low_rank": ("SparseLowRankLinear", "merge"),
    "models.loading.load": ("load_model", "load_tokenizer"),
    "compression.record": ("CompressionReport", "record"),
    "data.text": ("load_sequences", "load_tokens"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("oats_vision")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value  # found without this function from now on
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
