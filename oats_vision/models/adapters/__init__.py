"""Model families: those that ship with the package, and those that a user registers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from oats_vision.errors import ModelError
from oats_vision.models.adapters import causal_lm, dino_hub, hf_vit, timm_vit
from oats_vision.models.adapters.base import Adapter, Residual
from oats_vision.models.adapters.wrappers import outermost, refuse_wrappers, within

__all__ = ["Adapter", "Residual", "adapters", "find_adapter", "refuse_wrappers", "register_adapter", "remember_adapter"]

SHIPPED: tuple[Adapter, ...] = (*timm_vit.ADAPTERS, *hf_vit.ADAPTERS, *dino_hub.ADAPTERS, *causal_lm.ADAPTERS)
_adapters: list[Adapter] = list(SHIPPED)


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


def remember_adapter(model: nn.Module, adapter: Adapter) -> Adapter:
    """Note on a model, before its blocks are changed, which adapter it belongs to and what that finds in it.

    Returns:
        The adapter as it fits the model: of the part that belongs to the family, if that is wrapped in others.
    """
    if adapter is getattr(model, "_oats_vision_adapter", None):
        return adapter  # its blocks may be of other classes by now
    if not adapter.matches(model):
        inside = outermost(model, adapter.matches)
        adapter = within(adapter, inside[0]) if len(inside) == 1 else adapter
    names = ("blocks", "final_norm", "prefix_tokens", "class_token", "pooled_before_norm")
    answers: dict[str, Any] = {name: _always(getattr(adapter, name)(model)) for name in names}
    found = replace(adapter, **answers)
    model._oats_vision_adapter = found  # type: ignore[assignment]  # a plain attribute
    return found


def _always(answer: Any) -> Callable[[nn.Module], Any]:
    return lambda model: answer


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of the model's family: noted on a compressed model, found by its structure on others.

    A model that wraps one of a family (a backbone under a head of the user's own) belongs to that family.

    Raises:
        ModelError: no adapter knows the model, or several know parts of it, or it is wrapped for replicas or compiled.
    """
    noted = getattr(model, "_oats_vision_adapter", None)
    if isinstance(noted, Adapter):
        return noted
    refuse_wrappers(model)
    matching = [adapter for adapter in _adapters if adapter.matches(model)]
    if matching and (matching[0] not in SHIPPED or len(matching) == 1):
        return matching[0]
    if matching:
        raise _several(model, {adapter.blocks(model): adapter for adapter in matching})
    inside = outermost(model, lambda module: _family(module) is not None)
    if not inside:
        known = ", ".join(f"{adapter.name} ({adapter.serves})" for adapter in _adapters)
        raise ModelError(
            f"no adapter knows {type(model).__module__}.{type(model).__name__}; supported: {known}. "
            "Other models: oats_vision.register_adapter, see the README"
        )
    parts = {path: find_adapter(model.get_submodule(path)) for path in inside}
    if len(parts) > 1:
        raise _several(model, parts)
    return within(parts[inside[0]], inside[0])


def _family(module: nn.Module) -> Adapter | None:
    return next((adapter for adapter in _adapters if adapter.matches(module)), None)


def _several(model: nn.Module, parts: Mapping[str, Adapter]) -> ModelError:
    found = ", ".join(f"{adapter.name} at {path}" for path, adapter in parts.items())
    return ModelError(f"{type(model).__name__} holds models of several families ({found}): compress one part by itself")
