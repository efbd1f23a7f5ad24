"""Calls into timm and transformers on what a stranger's file says."""

from collections.abc import Callable
from typing import Any

from oats_vision.errors import ModelError, OatsVisionError


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
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise ModelError(f"{what}: {reason[:400]}") from problem
