import pytest
import timm
import torch
import transformers as hf
from PIL import Image
from tiny import HF
from torch import nn

import oats_vision as ov
from oats_vision.errors import ModelError
from oats_vision.models import ALIASES, rebuild, source_of


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    """Bit for bit the same tensors. What they give is so only where MKL's sums do not depend on the addresses."""
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def test_every_alias_is_a_timm_model_with_weights():
    names = set(timm.list_models(pretrained=True))
    assert set(ALIASES.values()) <= names
    assert {"dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14_reg", "dinov2_vitg14", "dinov3_vitl16"} <= set(ALIASES)


@torch.no_grad()
def test_timm_model_is_rebuilt_without_its_weights():
    model, transform = ov.load_model("vit_tiny_patch16_224", pretrained=False, image_size=64)
    assert transform(Image.new("RGB", (100, 80))).shape == (3, 64, 64)
    skeleton = rebuild(source_of(model))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    skeleton.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(skeleton(x), model(x))


@pytest.fixture
def hf_directory(tmp_path):
    hf.ViTForImageClassification(hf.ViTConfig(**HF, num_labels=5)).save_pretrained(tmp_path / "vit")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_hugging_face_directory_compress_save_load(hf_directory, tmp_path, prefix, pictures):
    model, transform = ov.load_model(f"{prefix}{hf_directory}")
    assert type(model) is hf.ViTForImageClassification
    ov.compress(model, pictures, rate=0.5, iterations=2)
    ov.save(model, tmp_path / "out")
    loaded = ov.load(tmp_path / "out")
    picture = Image.radial_gradient("L").convert("RGB")
    again = ov.load_transform(tmp_path / "out")
    assert torch.equal(transform(picture), again(picture))
    assert_same(loaded, model)
    torch.testing.assert_close(loaded(transform(picture)[None]).logits, model(again(picture)[None]).logits)


@pytest.mark.parametrize(
    ("whole", "config", "tower"),
    [
        (hf.CLIPModel, hf.CLIPConfig, "CLIPVisionModelWithProjection"),
        (hf.SiglipModel, hf.SiglipConfig, "SiglipVisionModel"),
    ],
)
@torch.no_grad()
def test_of_a_two_tower_checkpoint_the_vision_tower_is_loaded(tmp_path, whole, config, tower, pictures):
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = whole(config(vision_config=HF, text_config=text)).eval()
    model.save_pretrained(tmp_path / "m")
    loaded, _ = ov.load_model(str(tmp_path / "m"))
    assert type(loaded).__name__ == tower
    expected = model.vision_model(pictures[0]).pooler_output
    vision = getattr(loaded, "vision_model", loaded)
    torch.testing.assert_close(vision(pictures[0]).pooler_output, expected)


@pytest.fixture
def hub_repository(tmp_path):
    """A clone as torch.hub makes it: hubconf.py with entry points, here of the authors' own class."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "hubconf.py").write_text(
        "from dinov2.models.vision_transformer import DinoVisionTransformer\n"
        "def dinov2_tiny(pretrained=True):\n"
        "    return DinoVisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, "
        "block_chunks=0)\n"
    )
    return tmp_path / "repo"


@torch.no_grad()
def test_torch_hub_compress_save_load(hub_repository, tmp_path, pictures):
    name = f"hub:{hub_repository}:dinov2_tiny"
    with pytest.raises(ModelError, match="--trust-remote-code"):
        ov.load_model(name)
    model, transform = ov.load_model(name, trust_remote_code=True)
    assert transform(Image.new("RGB", (300, 280))).shape == (3, 224, 224)
    ov.compress(model, pictures, rate=0.5, iterations=2)
    ov.save(model, tmp_path / "out")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        ov.load(tmp_path / "out")
    loaded = ov.load(tmp_path / "out", trust_remote_code=True)
    assert_same(loaded, model)
    torch.testing.assert_close(loaded(pictures[0]), model(pictures[0]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_merged_checkpoint_is_one_of_the_original_architecture(kind, hf_directory, tmp_path, pictures):
    if kind == "timm":
        model, _ = ov.load_model("vit_tiny_patch16_224", pretrained=False, image_size=32)
    else:
        model, _ = ov.load_model(str(hf_directory))
    ov.compress(model, pictures, rate=0.5, iterations=2)
    expected = model(pictures[0])
    ov.models.save_plain(ov.merge(model), source_of(model), torch.float32, tmp_path / "merged")
    if kind == "timm":
        plain = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
        torch.testing.assert_close(plain(pictures[0]), expected, rtol=1e-4, atol=1e-4)
    else:
        plain = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(plain(pictures[0]).logits, expected.logits, rtol=1e-4, atol=1e-4)
    again, _ = ov.load_model(str(tmp_path / "merged"))
    assert type(again) is type(plain)


def test_users_own_module_is_given_again_to_be_loaded(tiny_vit, pictures, tmp_path):
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=1)
    ov.save(tiny_vit, tmp_path / "out")
    with pytest.raises(ModelError, match=r"pass a module of that class as load\(..., model=\)"):
        ov.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_of_the_future", "unknown model 'vit_of_the_future'.*dinov2_vitl14"),
        ("resnet18", "no adapter knows timm.models.resnet.ResNet; supported: timm_vit"),
        ("hf:/nowhere/at/all", "cannot be loaded"),
    ],
)
def test_unknown_models_are_clear_errors(name, message):
    with pytest.raises(ModelError, match=message) as error:
        ov.load_model(name, pretrained=False)
    assert "\n" not in str(error.value)


def test_directories_that_are_no_models_are_clear_errors(tmp_path, tiny_vit, pictures):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        ov.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="neither timm's"):
        ov.load_model(str(tmp_path))
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=1)
    ov.save(tiny_vit, tmp_path / "out")
    with pytest.raises(ModelError, match="compressed already"):
        ov.load_model(str(tmp_path / "out"))
