"""Calls into timm and transformers on what a stranger's file says."""

from collections.abc import Callable
from typing import Any

from oats_vision.errors import ModelError, OatsVisionError, one_line


def library(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call timm or transformers on what a file or a hub says, where they raise what they like.

    Raises:
        ModelError: one line, `what` and the reason.
    """
    try:
        return function(*args, **kwargs)
    except OatsVisionError:
        raise
    except Exception as problem:
        raise ModelError(f"{what}: {one_line(problem, 400)}") from problem
