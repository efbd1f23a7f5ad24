"""Model families: those that ship with the package, and those that a user registers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from oats_vision.adapters import causal_lm, dinov2_hub, hf_vit, timm_vit
from oats_vision.adapters.base import Adapter, Residual
from oats_vision.errors import ModelError

__all__ = ["Adapter", "Residual", "adapters", "find_adapter", "register_adapter", "remember_adapter"]

_adapters: list[Adapter] = [*timm_vit.ADAPTERS, *hf_vit.ADAPTERS, *dinov2_hub.ADAPTERS, *causal_lm.ADAPTERS]


def register_adapter(adapter: Adapter) -> Adapter:
    """Make a model family known; one that is registered later is asked first.

    Raises:
        ValueError: the name is taken.
    """
    if any(known.name == adapter.name for known in _adapters):
        raise ValueError(f"an adapter named {adapter.name!r} is registered already")
    _adapters.insert(0, adapter)
    return adapter


def adapters() -> list[Adapter]:
    """All registered adapters, in the order in which they are asked."""
    return list(_adapters)


def remember_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Note on a model, before its blocks are changed, which adapter it belongs to and what that finds in it."""
    names = ("blocks", "final_norm", "prefix_tokens", "class_token", "pooled_before_norm")
    answers: dict[str, Any] = {name: _always(getattr(adapter, name)(model)) for name in names}
    found = replace(adapter, **answers)
    model._oats_vision_adapter = found  # type: ignore[assignment]  # a plain attribute


def _always(answer: Any) -> Callable[[nn.Module], Any]:
    return lambda model: answer


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of the model's family: noted on a compressed model, found by its structure on others.

    Raises:
        ModelError: no adapter knows the model; the error lists those that are there.
    """
    noted = getattr(model, "_oats_vision_adapter", None)
    if isinstance(noted, Adapter):
        return noted
    for adapter in _adapters:
        if adapter.matches(model):
            return adapter
    known = ", ".join(f"{adapter.name} ({adapter.serves})" for adapter in _adapters)
    raise ModelError(
        f"no adapter knows {type(model).__module__}.{type(model).__name__}; supported: {known}. "
        "Other models: oats_vision.register_adapter, see the README"
    )
