import numpy as np
import pytest
import timm
import torch
import transformers as hf
from PIL import Image
from torch import nn

import oats_vision as ov
from oats_vision.analysis.rollout import draw, record_attention, rollout, rollout_map, views
from oats_vision.errors import ModelError
from oats_vision.models.transforms import as_seen
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from tiny import HF


def test_rollout_is_the_papers_product():
    """Abnar & Zuidema's equation, head by head and picture by picture in numpy."""
    generator = np.random.default_rng(0)
    raw = generator.random((3, 2, 4, 10, 10))  # blocks, pictures, heads, tokens, tokens
    attentions = raw / raw.sum(-1, keepdims=True)
    ours = rollout([torch.from_numpy(attention) for attention in attentions], discarded=0.4)
    for picture in range(2):
        joint = np.eye(10)
        for attention in attentions:
            fused = attention[picture].mean(0)
            fused[fused <= np.sort(fused.ravel())[39]] = 0.0  # the lowest 40 of 100
            fused = 0.5 * fused + 0.5 * np.eye(10)
            joint = (fused / fused.sum(-1, keepdims=True)) @ joint
        # the identity weighs as much as a whole row of attention
        assert ours[picture].numpy() == pytest.approx(joint, rel=1e-4, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_attention_of_timm_models_is_seen_and_left_as_it_was(name):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model, x = timm.create_model(name, **args).eval(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    with record_attention(model) as seen:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    tokens = 16 + model.num_prefix_tokens
    assert [attention.shape for attention in seen] == [(2, 3, tokens, tokens)] * 2
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 3, tokens))
    assert torch.equal(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_class", "config"),
    [(hf.ViTModel, hf.ViTConfig), (hf.Dinov2Model, hf.Dinov2Config), (hf.CLIPVisionModel, hf.CLIPVisionConfig)],
)
def test_attention_of_hugging_face_models_is_what_they_report(model_class, config):
    model, x = model_class(config(**HF)).eval(), torch.randn(2, 3, 32, 32)
    with record_attention(model) as seen:
        reported = model(x, output_attentions=True).attentions
    for ours, theirs in zip(seen, reported, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model.config._attn_implementation == "sdpa"


SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prefix", "class_token"),
    [
        ("vit_betwixt_patch16_reg4_gap_256", 4, False),  # registers are no class token
        ("vit_base_patch16_siglip_224", 0, False),
        ("deit_tiny_distilled_patch16_224", 2, True),
        ("vit_small_patch14_reg4_dinov2", 5, True),
    ],
)
def test_a_map_is_of_the_class_token_or_of_all_patches(name, prefix, class_token):
    model, x = timm.create_model(name, **SIZES).eval(), torch.randn(2, 3, 32, 32)
    with record_attention(model) as seen:
        model(x)
    joint = rollout(seen)
    rows = joint[:, 0] if class_token else joint[:, prefix:].mean(1)
    found = rollout_map(model, x).flatten(1)
    expected = rows[:, prefix:]
    low, high = expected.amin(1, keepdim=True), expected.amax(1, keepdim=True)
    torch.testing.assert_close(found, (expected - low) / (high - low))


def _no_drop(model: nn.Module) -> None:
    del model.blocks[1].attn.attn_drop


def _bypassed(model: nn.Module) -> None:
    model.blocks[1].attn.forward = lambda x, **_: x


UNSEEN = {
    "side by side": ("vit_small_patch16_18x2_224", lambda model: None, "ParallelThingsBlock has no attn"),
    "beside the MLP": ("vit_base_patch16_xp_224", lambda model: None, "ParallelScalingBlock has no attn"),
    "difference of two": ("vit_dlittle_patch16_reg1_gap_256", lambda model: None, "6 x 17 x 17 probabilities for 3"),
    "second block's own way": ("vit_tiny_patch16_224", _no_drop, "attention of Attention cannot be seen"),
    "not called": ("vit_tiny_patch16_224", _bypassed, "1 of 2 blocks show their attention"),
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "change", "message"), UNSEEN.values(), ids=UNSEEN.keys())
def test_attention_that_cannot_be_seen_is_an_error_that_changes_nothing(name, change, message):
    model, x = timm.create_model(name, **SIZES).eval(), torch.randn(2, 3, 32, 32)
    change(model)

    def state() -> list[object]:
        return [(len(m._forward_hooks), getattr(m, "fused_attn", None)) for m in model.modules()]

    before = state()
    with pytest.raises(ModelError, match=message):
        rollout_map(model, x)
    assert state() == before


def test_hugging_face_attention_that_gives_no_probabilities_is_an_error():
    model = hf.ViTModel(hf.ViTConfig(**HF)).eval()
    model.layers[1].attention.register_forward_hook(lambda _, args, output: (output[0], None))
    with pytest.raises(ModelError, match="cannot be seen"):
        rollout_map(model, torch.randn(1, 3, 32, 32))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("where", ["blocks.0.attn.qkv.bias", "head.bias"])
def test_what_is_not_finite_has_no_rollout(where, tiny_vit):
    with torch.no_grad():
        tiny_vit.get_parameter(where)[-1] = float("nan")
    with pytest.raises(ModelError, match="VisionTransformer are not finite"):
        rollout_map(tiny_vit, torch.randn(1, 3, 32, 32))


def test_the_two_terms_add_up_and_are_looked_at_one_by_one(tiny_vit, pictures, tmp_path):
    ov.compress(tiny_vit, pictures, rate=0.4, iterations=5)
    seen = views(tiny_vit)
    sparse, low_rank = seen["sparse"], seen["low_rank"]
    layers = [module for module in tiny_vit.modules() if isinstance(module, SparseLowRankLinear)]
    parts = [[m for m in model.modules() if isinstance(m, SparseLowRankLinear)] for model in (sparse, low_rank)]
    for whole, s, uv in zip(layers, *parts, strict=True):
        torch.testing.assert_close(whole.dense_weight(), s.dense_weight() + uv.dense_weight())
    maps = {view: rollout_map(model, pictures[0]) for view, model in seen.items()}
    assert {view: grid.shape for view, grid in maps.items()} == dict.fromkeys(maps, (4, 4, 4))
    assert all(grid.min() >= 0 and grid.max() <= 1 for grid in maps.values())
    assert not torch.allclose(maps["sparse"], maps["low_rank"])
    picture = Image.new("RGB", (32, 32), (10, 200, 30))
    draw(picture, {view: grid[0] for view, grid in maps.items()}, tmp_path / "r.png")
    drawn = np.asarray(Image.open(tmp_path / "r.png").convert("RGB"))
    assert drawn.shape[1] > 3 * drawn.shape[0]
    assert (np.abs(drawn.astype(int) - (10, 200, 30)).sum(-1) < 6).mean() > 0.1  # the picture itself is in it


def test_models_without_one_of_the_terms_have_no_rollout(tiny_vit, pictures):
    ov.compress(tiny_vit, pictures, rate=0.4, method="wanda")
    with pytest.raises(ModelError, match="method oats"):
        views(tiny_vit)


def test_picture_as_the_model_sees_it_has_its_colours():
    _, transform = ov.load_model("demo")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    np.testing.assert_allclose(np.asarray(as_seen(picture, transform)), np.asarray(picture), atol=1)
