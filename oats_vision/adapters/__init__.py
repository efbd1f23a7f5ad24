"""Model families: those that ship with the package, and those that a user registers."""

from torch import nn

from oats_vision.adapters import dinov2_hub, hf_vit, timm_vit
from oats_vision.adapters.base import Adapter
from oats_vision.errors import ModelError

__all__ = ["Adapter", "adapters", "find_adapter", "register_adapter"]

_adapters: list[Adapter] = [*timm_vit.ADAPTERS, *hf_vit.ADAPTERS, *dinov2_hub.ADAPTERS]


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


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of the model's family.

    Raises:
        ModelError: no adapter knows the model; the error lists those that are there.
    """
    for adapter in _adapters:
        if adapter.matches(model):
            return adapter
    known = ", ".join(f"{adapter.name} ({adapter.serves})" for adapter in _adapters)
    raise ModelError(
        f"no adapter knows {type(model).__module__}.{type(model).__name__}; supported: {known}. "
        "Other models: oats_vision.register_adapter, see the README"
    )
