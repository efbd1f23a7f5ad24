import json
import shutil

import pytest
import timm
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import oats_vision as ov
from oats_vision.errors import CheckpointError, ModelError
from oats_vision.models.loading.load import rebuild, save_plain, source_of
from tiny import HF


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    """Bit for bit the same tensors. What they give is so only where MKL's sums do not depend on the addresses."""
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


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
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        ov.load_model(name)
    model, transform = ov.load_model(name, trust_remote_code=True)
    assert transform(Image.new("RGB", (300, 280))).shape == (3, 224, 224)
    ov.compress(model, pictures, rate=0.5, iterations=2)
    ov.save(model, tmp_path / "out")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
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
    save_plain(ov.merge(model), source_of(model), torch.float32, tmp_path / "merged")
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
        ("vit_of_the_future", "unknown model 'vit_of_the_future': give a directory"),
        ("resnet18", "no model family fits timm.models.resnet.ResNet; known: .*timm_vit"),
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


def test_the_dense_weights_are_known_by_a_digest(model_directory, tmp_path):
    """The same in each precision that they are loaded in, and another once they were trained on."""
    first, again = (
        source_of(ov.load_model(model_directory, dtype=dtype)[0]).dense_sha256
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert first == again
    shutil.copytree(model_directory, tmp_path / "trained")
    tensors = load_file(tmp_path / "trained" / "model.safetensors")
    tensors["blocks.1.attn.qkv.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "trained" / "model.safetensors")
    assert source_of(ov.load_model(tmp_path / "trained")[0]).dense_sha256 != first


def test_a_dense_model_that_a_precision_cannot_hold_is_not_loaded_in_it(model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "large")
    tensors = load_file(tmp_path / "large" / "model.safetensors")
    tensors["norm.bias"] = torch.full_like(tensors["norm.bias"], 7e4, dtype=torch.float32)
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    with pytest.raises(ModelError, match=r"norm\.bias holds 7e\+04, which float16 cannot: use dtype float32"):
        ov.load_model(tmp_path / "large", dtype=torch.float16)
    assert ov.load_model(tmp_path / "large", dtype=torch.bfloat16)[0].norm.bias[0] > 6e4


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_was_trained_after_it_was_loaded_is_another(model_directory, trained, tmp_path):
    model, _ = ov.load_model(model_directory)
    before = source_of(model).dense_sha256
    if trained:
        model.blocks[0].mlp.fc1.weight.data.add_(0.01)
    ov.compress(model, [torch.randn(8, 3, 28, 28)], rate=0.5, iterations=1)
    ov.save(model, tmp_path / "out")
    noted = json.loads((tmp_path / "out" / "config.json").read_text())["source"]["dense_sha256"]
    assert (noted != before) is trained


@pytest.mark.parametrize(
    ("args", "change"),
    [
        ({"act_layer": "gelu_tanh", "norm_layer": "layernorm"}, {}),
        ({"in_chans": 13}, {}),
        ({}, {"num_classes": 0}),
    ],
)
def test_directories_that_timm_writes_are_loaded(tmp_path, args, change):
    size = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=change.get("num_classes", 3), **size, **args)
    timm.models.save_for_hf(model, str(tmp_path), model_args=size | args, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    if change:  # as some repositories have it: in one of the two places only
        del config["pretrained_cfg"]["num_classes"]
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    loaded, transform = ov.load_model(tmp_path)
    x = torch.randn(2, args.get("in_chans", 3), 28, 28)
    torch.testing.assert_close(loaded(x), model.eval()(x))
    assert (transform is None) == ("in_chans" in args)  # no picture has 13 channels


def test_a_directory_of_one_channel_has_pictures_of_one(tmp_path):
    args = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 1, "num_heads": 3, "in_chans": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **args)
    timm.models.save_for_hf(model, str(tmp_path / "grey"), model_args=args, safe_serialization=True)
    model, transform = ov.load_model(tmp_path / "grey", image_size=28)
    picture = transform(Image.new("RGB", (40, 40), "red"))
    assert picture.shape == (1, 28, 28)
    assert model(picture[None]).shape == (1, 3)


@pytest.mark.parametrize("prefix", ["", "hf:"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_repositories_of_timm_are_loaded_by_timm(model_directory, tmp_path, prefix, wrapped):
    """As they are, and as transformers' wrapper saves them."""
    directory = model_directory
    if wrapped:
        directory = tmp_path
        config = json.loads((model_directory / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "timm_wrapper"}))
        tensors = load_file(model_directory / "model.safetensors")
        save_file({f"timm_model.{name}": t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    model, transform = ov.load_model(f"{prefix}{directory}")
    assert type(model) is timm.models.VisionTransformer
    assert transform(Image.new("RGB", (50, 40))).shape == (3, 28, 28)
    expected = load_file(model_directory / "model.safetensors")["head.weight"].float()
    assert torch.equal(model.head.weight, expected)


@pytest.fixture
def rotary(tmp_path):
    config = hf.LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=96,
        eos_token_id=2,
    )
    model = hf.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.max_new_tokens = 40
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_computed_buffers_keep_their_precision(rotary, tmp_path):
    exact = hf.LlamaForCausalLM.from_pretrained(rotary).model.rotary_emb.inv_freq
    dense, _ = ov.load_model(rotary, dtype=torch.bfloat16)
    ov.compress(dense, [torch.randint(3, 100, (4, 32))], rate=0.5, iterations=1)
    ov.save(dense, tmp_path / "out")
    for model in (dense, ov.load(tmp_path / "out"), ov.load(tmp_path / "out", dtype=torch.float16)):
        assert torch.equal(model.model.rotary_emb.inv_freq, exact)
        assert model.lm_head.weight.dtype != torch.float32


def test_how_a_model_generates_belongs_to_it(rotary, tmp_path):
    dense, _ = ov.load_model(rotary)
    ov.compress(dense, [torch.randint(3, 100, (4, 32))], rate=0.5, iterations=1)
    ov.save(dense, tmp_path / "out")
    loaded = ov.load(tmp_path / "out")
    save_plain(ov.merge(loaded), source_of(loaded), torch.float32, tmp_path / "merged")
    for model in (loaded, hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        assert model.generation_config.eos_token_id == [2, 7]
        assert model.generation_config.max_new_tokens == 40


def test_a_merge_has_the_preprocessing_of_its_model(hf_directory, model_directory, tmp_path, pictures):
    for kind, options in ((hf_directory, {}), (model_directory, {"image_size": 42})):
        model, transform = ov.load_model(kind, **options)
        size = transform(Image.new("RGB", (60, 50))).shape
        ov.compress(model, [torch.randn(4, *size)], rate=0.5, iterations=1)
        save_plain(ov.merge(model), source_of(model), torch.float32, tmp_path / kind.name)
        again, same = ov.load_model(tmp_path / kind.name)
        picture = Image.radial_gradient("L").convert("RGB")
        assert torch.equal(same(picture), transform(picture))
        assert_same(again, model)


def test_a_replaced_head_of_hugging_face_is_told_of_in_its_configuration(hf_directory, tmp_path, pictures):
    model, _ = ov.load_model(hf_directory)
    model.classifier = nn.Linear(48, 3)
    ov.compress(model, pictures, rate=0.5, iterations=1)
    with pytest.raises(CheckpointError, match=r"classifier\.weight is \[3, 48\].*model\.config \(num_labels"):
        ov.save(model, tmp_path / "out")
    model.config.num_labels = 3
    ov.save(model, tmp_path / "out")
    assert ov.load(tmp_path / "out")(pictures[0]).logits.shape == (4, 3)


def test_random_weights_are_the_same_each_time_and_leave_the_callers_numbers_alone(model_directory):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, _ = ov.load_model(model_directory, pretrained=False)
    assert torch.equal(torch.rand(1), expected)
    second, _ = ov.load_model(model_directory, pretrained=False)
    assert source_of(first).dense_sha256 == source_of(second).dense_sha256


def test_older_names_of_timm_are_left_to_timm():
    """timm leads them on to newer ones."""
    model, _ = ov.load_model("vit_tiny_patch16_224_in21k", pretrained=False, image_size=32)
    assert source_of(model).name == "vit_tiny_patch16_224"
