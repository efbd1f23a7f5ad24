"""Whether what a model returned can be meant."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def is_finite(output: Any) -> bool:
    """Whether every tensor of a model's output, at any depth of tuples and mappings, is finite."""
    if isinstance(output, Tensor):
        return bool(output.isfinite().all())
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return all(map(is_finite, parts))
