"""Find and build dense models: one provider a file, each asked in this order whether a name is its own."""

from oats_vision.models.loading import demo, huggingface, torch_hub, gguf, directory, timm, module  # noqa: F401, I001
from oats_vision.models.loading.registry import provider_for, provider_of, providers

__all__ = ["provider_for", "provider_of", "providers"]
