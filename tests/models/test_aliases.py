"""The names of models that are known without PyTorch, held to what timm says."""

import inspect
import sys

import pytest
import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from oats_vision.errors import ModelError
from oats_vision.models.aliases import ALIASES, known_models, timm_models
from oats_vision.models.loading import provider_of


def test_every_alias_is_a_timm_model_with_weights():
    names = set(timm.list_models(pretrained=True))
    assert set(ALIASES.values()) <= names
    assert {"dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14_reg", "dinov2_vitg14", "dinov3_vitl16"} <= set(ALIASES)


def test_listed_timm_models_are_those_whose_classes_are_served():
    """timm_models.txt: to be made anew, as here, when timm brings models."""
    modules = {
        name.rpartition(".")[2]
        for name, module in list(sys.modules.items())
        if name.startswith("timm.models.")
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, (VisionTransformer, Eva))
    }
    served = sorted({name for module in modules for name in timm.list_models(pretrained=True, module=module)})
    assert list(timm_models()) == served


@pytest.mark.parametrize(
    "name",
    ["demo", "dinov2_vitl14", "vit_base_patch16_224", "vit_base_patch14_dinov2.lvd142m", "resnet18", "hf:a/b", "hub:a"],
)
def test_names_that_may_be_models_are_let_through(name):
    provider_of(name)


def test_every_model_of_timm_is_let_through(tmp_path):
    for name in timm.list_models("vit_*")[::20] + timm.list_models()[::100]:
        provider_of(name)
    provider_of(str(tmp_path))
    assert {"demo", *ALIASES, *ALIASES.values()} <= set(known_models())


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("vit_bas_patch16_224", "'vit_base_patch16_224'"),
        ("dinov2_vitl41", "'dinov2_vitl14'"),
        ("DINOv2_ViTL14", "'dinov2_vitl14'"),
        ("none", ""),
    ],
)
def test_names_that_are_no_models_are_refused_with_what_is_close(name, closest):
    with pytest.raises(ModelError, match="unknown model") as error:
        provider_of(name)
    hint = str(error.value).partition(" Did you mean ")[2]
    assert hint.startswith(closest) if closest else not hint
