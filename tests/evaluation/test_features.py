import copy
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from torch import nn

import oats_vision as ov
from oats_vision.data.pictures import Batches, load_pictures
from oats_vision.errors import DataError, ModelError
from oats_vision.evaluation.features import cached_features, extract_features
from oats_vision.evaluation.fingerprint import model_fingerprint
from tiny import HF


class _Fixed:
    """Batches of random pictures with labels, and a name for their contents."""

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pictures = torch.randn(12, 3, 32, 32, generator=generator)
        labels = torch.arange(12) % classes
        loader = [(x, y, 0, ["one"] * len(y)) for x, y in zip(self.pictures.split(5), labels.split(5), strict=True)]
        self.batches = Batches(loader, 12, None, lambda: f"seed {seed}")


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_features_are_timms_intermediate_layers(name):
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3}
    model = timm.create_model(name, **args).eval()
    data = _Fixed()
    features = extract_features(model, data.batches)
    layers = model.forward_intermediates(
        data.pictures, indices=4, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    expected = torch.stack([prefix[:, 0] for _, prefix in layers], 1)
    torch.testing.assert_close(features.class_tokens.float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(features.patch_mean.float(), layers[-1][0].mean(1), rtol=2e-3, atol=2e-3)
    assert features.labels.tolist() == [i % 3 for i in range(12)]
    assert features.select(4, True).shape == (12, 5 * 48)


@torch.no_grad()
def test_features_of_hugging_face_models():
    torch.manual_seed(0)
    data = _Fixed()
    model = hf.Dinov2Model(hf.Dinov2Config(**HF)).eval()
    features = extract_features(model, data.batches)
    states = model(data.pictures, output_hidden_states=True).hidden_states
    expected = torch.stack([model.layernorm(state)[:, 0] for state in states[-2:]], 1)  # it has two blocks
    torch.testing.assert_close(features.class_tokens.float(), expected, rtol=2e-3, atol=2e-3)
    siglip = hf.SiglipVisionModel(hf.SiglipVisionConfig(**HF)).eval()  # has no class token
    features = extract_features(siglip, data.batches, blocks=1)
    hidden = siglip(data.pictures).last_hidden_state
    torch.testing.assert_close(features.patch_mean.float(), hidden.mean(1), rtol=2e-3, atol=2e-3)
    assert torch.equal(features.class_tokens[:, 0], features.patch_mean)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "vit_betwixt_patch16_reg4_gap_256",  # registers, no class token
        "vit_dlittle_patch16_reg1_gap_256",
        "vit_base_patch16_rpn_224",  # no prefix at all, norm after the pooling
        "vit_medium_patch16_gap_240",  # norm before it
        "eva02_tiny_patch14_224",  # a class token, but pooled by the mean
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_features_of_average_pooled_models_are_what_they_pool(name, compressed):
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = timm.create_model(name, num_classes=5, **args).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.2)  # tokens that differ, so that the order of mean and norm matters
    data = _Fixed()
    if compressed:
        ov.compress(model, [data.pictures], rate=0.5, iterations=2)
    features = extract_features(model, data.batches)
    tokens = model.forward_features(data.pictures)
    own = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(features.patch_mean.float(), own, rtol=2e-3, atol=2e-3)
    last = model.fc_norm(tokens)[:, 0] if model.cls_token is not None else own
    torch.testing.assert_close(features.class_tokens[:, -1].float(), last, rtol=2e-3, atol=2e-3)


def test_sliced_models_have_features_of_the_last_block_only(tiny_vit, pictures):
    ov.compress(tiny_vit, pictures, rate=0.3, method="slicegpt")
    assert extract_features(tiny_vit, _Fixed().batches, blocks=1).class_tokens.shape == (12, 1, 48)
    with pytest.raises(ModelError, match="use the last block only"):
        extract_features(tiny_vit, _Fixed().batches, blocks=2)


def test_one_class_and_no_picture_are_errors(tiny_vit):
    with pytest.raises(DataError, match="one class"):
        extract_features(tiny_vit, _Fixed(classes=1).batches)
    with pytest.raises(DataError, match="no picture could be read"):
        extract_features(tiny_vit, Batches([(torch.empty(0), torch.empty(0), 3, [])], 3))


def test_what_is_not_finite_is_said_of_the_first_pictures_it_is_seen_in(tiny_vit):
    data = _Fixed()
    data.pictures[7, 0, 3, 3] = float("nan")
    with pytest.raises(DataError, match="pictures 6 to 10 of the data are not finite"):
        extract_features(tiny_vit, data.batches)
    for value in (float("nan"), 1e9):  # 1e9 is none of float16's
        with torch.no_grad():
            tiny_vit.norm.weight[3] = value
        with pytest.raises(ModelError, match=r"VisionTransformer are not finite in float16 from pictures 1 to 5"):
            extract_features(tiny_vit, _Fixed().batches)
    assert not tiny_vit.blocks[-1]._forward_hooks


def test_language_models_have_no_features():
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=50))
    with pytest.raises(ModelError, match="LlamaForCausalLM reads text"):
        extract_features(model, _Fixed().batches)


@pytest.fixture
def counted(tiny_vit) -> tuple[nn.Module, list[int]]:
    """A model, and the number of its forward passes so far."""
    calls: list[int] = []
    tiny_vit.register_forward_hook(lambda *_: calls.append(1))
    return tiny_vit, calls


def test_the_cache_serves_the_same_model_and_pictures_and_no_others(counted, tmp_path):
    model, calls = counted
    first = cached_features(model, _Fixed().batches, tmp_path / "cache")
    passes = len(calls)
    again = cached_features(model, _Fixed().batches, tmp_path / "cache")
    assert len(calls) == passes
    assert torch.equal(first.class_tokens, again.class_tokens)
    assert torch.equal(first.labels, again.labels)
    before = model_fingerprint(model)
    cached_features(model, _Fixed(seed=1).batches, tmp_path / "cache")  # other pictures
    cached_features(model, _Fixed().batches, tmp_path / "cache", blocks=1)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] += 1e-3
    assert model_fingerprint(model) != before
    cached_features(model, _Fixed().batches, tmp_path / "cache")  # other weights
    assert len(calls) == 4 * passes
    assert len(list((tmp_path / "cache").iterdir())) == 4


def _heads(model: nn.Module) -> None:
    model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim = 4, 12


def _nested_setting(model: nn.Module) -> None:
    model.settings = SimpleNamespace(window=[7, {"shift": 3}])


CHANGES = {
    "number of heads": _heads,
    "scale": lambda model: setattr(model.blocks[1].attn, "scale", 0.5),
    "epsilon": lambda model: setattr(model.norm, "eps", 1e-2),
    "numpy's integer": lambda model: setattr(model, "num_prefix_tokens", np.int64(2)),
    "activation's class": lambda model: setattr(model.blocks[2].mlp, "act", nn.ReLU()),
    "activation's function": lambda model: setattr(model.blocks[2].mlp, "function", torch.relu),
    "bound argument": lambda model: setattr(model.blocks[2].mlp, "function", partial(torch.clamp, min=0.1)),
    "nested setting": _nested_setting,
    "dtype": lambda model: setattr(model, "softmax_dtype", torch.float64),
    "buffer that is not stored": lambda model: model.register_buffer("table", torch.ones(2), persistent=False),
    "tensor that is none of the module's": lambda model: setattr(model, "table", [torch.ones(2)]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_cache_tells_models_apart_by_all_that_decides_their_outputs(change, tiny_vit):
    before = model_fingerprint(tiny_vit)
    tiny_vit(torch.zeros(1, 3, 32, 32))
    assert model_fingerprint(copy.deepcopy(tiny_vit)) == before
    change(tiny_vit)
    changed = model_fingerprint(tiny_vit)
    assert changed != before
    assert model_fingerprint(tiny_vit) == changed


@torch.inference_mode()
def test_running_a_compressed_model_does_not_change_what_it_is_known_by(tiny_vit, pictures):
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=2)
    before = model_fingerprint(tiny_vit)
    for images in (pictures[0], pictures[0][:1], pictures[1].half().float()):
        tiny_vit(images)
    assert model_fingerprint(tiny_vit) == before


def test_the_cache_sees_the_configuration_of_hugging_face_models():
    torch.manual_seed(0)
    model = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**HF, rope_theta=100.0)).eval()
    other = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**HF, rope_theta=50.0)).eval()
    other.load_state_dict(model.state_dict())
    assert model_fingerprint(other) != model_fingerprint(model)
    first = model_fingerprint(model)
    model.config.pos_embed_rescale = 1.5
    assert model_fingerprint(model) != first


def test_names_of_classes_are_those_of_the_pictures_not_of_the_cache(tiny_vit, tmp_path):
    data = _Fixed()
    for names in (["cats", "dog", "fish"], ["cat", "dog", "fish"]):
        data.batches.classes = names
        assert cached_features(tiny_vit, data.batches, tmp_path).classes == names
    assert len(list(tmp_path.iterdir())) == 1


def test_pictures_are_told_apart_by_their_contents(tmp_path):
    from PIL import Image

    _, transform = ov.load_model("demo")
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (28, 28), "red").save(tmp_path / name / "x.png")
    options = {"transform": transform, "batch_size": 2, "labelled": True}

    def fingerprint() -> str:
        return load_pictures(str(tmp_path), **options).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    Image.new("RGB", (28, 28), (254, 0, 0)).save(tmp_path / "a" / "x.png")
    changed = fingerprint()
    assert changed != first
    (tmp_path / "a").rename(tmp_path / "c")  # the labels of both pictures change
    assert fingerprint() not in (first, changed)


def test_damaged_and_foreign_cache_files_are_errors(tiny_vit, tmp_path):
    cached_features(tiny_vit, _Fixed().batches, tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-20] ^= 1
    for content in (b"", good[:100], good[:-8], bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"feature cache is damaged.*`no_cache`"):
            cached_features(tiny_vit, _Fixed().batches, tmp_path)
    file.write_bytes(good)
    cached_features(tiny_vit, _Fixed(seed=1).batches, tmp_path)
    (other,) = set(tmp_path.iterdir()) - {file}
    shutil.copy(other, file)
    with pytest.raises(DataError, match="of another model or other pictures"):
        cached_features(tiny_vit, _Fixed().batches, tmp_path)
    with pytest.raises(DataError, match="cannot be made"):
        cached_features(tiny_vit, _Fixed().batches, file)
