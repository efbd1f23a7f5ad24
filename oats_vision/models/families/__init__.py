"""Model families, the package's own and those that a user registers; none needs PyTorch to be listed."""

# the order in which families are asked
from oats_vision.models.families import timm_vit, hf_vit, dino_hub, causal_lm  # noqa: F401, I001
from oats_vision.models.families.base import Family, Residual, Structure
from oats_vision.models.families.registry import families, families_served, register_family

__all__ = ["Family", "Residual", "Structure", "families", "families_served", "register_family"]
