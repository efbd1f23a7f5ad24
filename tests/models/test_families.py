"""Every family on a tiny randomly initialised model of its real class."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import nn

import oats_vision as ov
from hub_dinov3 import DinoVisionTransformer
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import capture_block_calls
from oats_vision.compression.plan import plan_block
from oats_vision.compression.settings import resolve
from oats_vision.compression.slicing import plan_slicing, slice_blocks
from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.models.families import families
from oats_vision.models.families.find import structure_as
from oats_vision.models.loading.load import source_of
from oats_vision.models.record import Record, set_record, structure_of
from tiny import HF

FUSED = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
HF_ATTENTION = {f"attention.{name}_proj" for name in "qkvo"}
CLIP = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")} | {"mlp.fc1", "mlp.fc2"}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


@dataclass(frozen=True)
class Case:
    """A model, the family that must take it, and its linears in each block."""

    family: str
    build: Any
    blocks: str
    linears: set[str]
    fused: set[str] = field(default_factory=set)


def _timm(name: str, **args: Any):
    return lambda: timm.create_model(name, **{**TIMM, **args})


def _hf(model: type, config: type, **args: Any):
    return lambda: model(config(**{**HF, **args}))


def _hub(**args: Any):
    from dinov2.models.vision_transformer import DinoVisionTransformer

    return DinoVisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, block_chunks=0, **args)


class OwnHead(nn.Module):
    """What users build: a head on the class token of somebody's backbone, called by position."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(48, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = getattr(self.backbone, "forward_features", self.backbone)(x)
        tokens = tokens.get("x_norm_clstoken", tokens.get("last_hidden_state")) if hasattr(tokens, "get") else tokens
        return self.head(tokens if tokens.ndim == 2 else tokens[:, 0])


def _wrapped(build: Any):
    return lambda: OwnHead(build())


def _timm_wrapper():
    config = {"architecture": "vit_tiny_patch16_224", "num_labels": 5}
    args = {name: value for name, value in TIMM.items() if name != "num_classes"}
    return hf.TimmWrapperForImageClassification(hf.TimmWrapperConfig(**config, model_args=args))


EVA = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj"}
SWIGLU = {"mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"}
CASES = {
    "timm vit": Case("timm_vit", _timm("vit_tiny_patch16_224"), "blocks", FUSED, {"attn.qkv"}),
    "timm deit": Case("timm_vit", _timm("deit_tiny_patch16_224"), "blocks", FUSED, {"attn.qkv"}),
    "timm dinov2": Case("timm_vit", _timm("vit_small_patch14_dinov2"), "blocks", FUSED, {"attn.qkv"}),
    "timm dinov2 reg": Case("timm_vit", _timm("vit_small_patch14_reg4_dinov2"), "blocks", FUSED, {"attn.qkv"}),
    "timm dinov2 giant": Case(
        "timm_vit", _timm("vit_giant_patch14_dinov2", mlp_ratio=4), "blocks", FUSED, {"attn.qkv"}
    ),
    "timm siglip": Case("timm_vit", _timm("vit_base_patch16_siglip_224"), "blocks", FUSED, {"attn.qkv"}),
    "timm clip": Case("timm_vit", _timm("vit_base_patch16_clip_224"), "blocks", FUSED, {"attn.qkv"}),
    "timm dinov3": Case("timm_eva", _timm("vit_small_patch16_dinov3"), "blocks", FUSED, {"attn.qkv"}),
    "timm dinov3 qkv bias": Case("timm_eva", _timm("vit_small_patch16_dinov3_qkvb"), "blocks", FUSED, {"attn.qkv"}),
    "timm dinov3 swiglu": Case(
        "timm_eva", _timm("vit_small_plus_patch16_dinov3"), "blocks", {"attn.qkv", "attn.proj"} | SWIGLU, {"attn.qkv"}
    ),
    "timm eva02 fused": Case("timm_eva", _timm("eva02_tiny_patch14_224"), "blocks", FUSED, {"attn.qkv"}),
    "timm eva02 separate": Case("timm_eva", _timm("eva02_base_patch14_224", embed_dim=48), "blocks", EVA | SWIGLU),
    "timm mixed rope": Case("timm_eva", _timm("vit_small_patch16_rope_mixed_224"), "blocks", FUSED, {"attn.qkv"}),
    "hf vit": Case(
        "hf_vit",
        _hf(hf.ViTForImageClassification, hf.ViTConfig),
        "vit.layers",
        HF_ATTENTION | {"mlp.fc1", "mlp.fc2"},
    ),
    "hf dinov2": Case(
        "hf_dinov2", _hf(hf.Dinov2Model, hf.Dinov2Config), "encoder.layer", HF_ATTENTION | {"mlp.fc1", "mlp.fc2"}
    ),
    "hf dinov2 swiglu": Case(
        "hf_dinov2",
        _hf(hf.Dinov2ForImageClassification, hf.Dinov2Config, use_swiglu_ffn=True),
        "dinov2.encoder.layer",
        HF_ATTENTION | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    ),
    "hf dinov2 registers": Case(
        "hf_dinov2_with_registers",
        _hf(hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig),
        "encoder.layer",
        HF_ATTENTION | {"mlp.fc1", "mlp.fc2"},
    ),
    "hf dinov3": Case(
        "hf_dinov3",
        _hf(hf.DINOv3ViTModel, hf.DINOv3ViTConfig),
        "model.layer",
        HF_ATTENTION | {"mlp.up_proj", "mlp.down_proj"},
    ),
    "hf dinov3 gated": Case(
        "hf_dinov3",
        _hf(hf.DINOv3ViTModel, hf.DINOv3ViTConfig, use_gated_mlp=True),
        "model.layer",
        HF_ATTENTION | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    ),
    "hf clip": Case("hf_clip", _hf(hf.CLIPVisionModel, hf.CLIPVisionConfig), "encoder.layers", CLIP),
    "hf clip projection": Case(
        "hf_clip", _hf(hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig), "vision_model.encoder.layers", CLIP
    ),
    "hf siglip": Case("hf_siglip", _hf(hf.SiglipVisionModel, hf.SiglipVisionConfig), "encoder.layers", CLIP),
    "hf deit": Case(
        "hf_deit",
        _hf(hf.DeiTForImageClassification, hf.DeiTConfig),
        "deit.layers",
        HF_ATTENTION | {"mlp.fc1", "mlp.fc2"},
    ),
    "hf timm wrapper": Case("timm_vit", _timm_wrapper, "timm_model.blocks", FUSED, {"attn.qkv"}),
    "hub dinov2": Case("dinov2_hub", _hub, "blocks", FUSED, {"attn.qkv"}),
    "hub dinov3": Case("dinov3_hub", DinoVisionTransformer, "blocks", FUSED, {"attn.qkv"}),
    "own head on timm": Case(
        "timm_vit", _wrapped(_timm("vit_tiny_patch16_224")), "backbone.blocks", FUSED, {"attn.qkv"}
    ),
    "own head on timm eva": Case(
        "timm_eva", _wrapped(_timm("vit_small_patch16_dinov3_qkvb")), "backbone.blocks", FUSED, {"attn.qkv"}
    ),
    "own head on hf": Case(
        "hf_dinov2",
        _wrapped(_hf(hf.Dinov2Model, hf.Dinov2Config)),
        "backbone.encoder.layer",
        HF_ATTENTION | {"mlp.fc1", "mlp.fc2"},
    ),
    "own head on hub": Case("dinov2_hub", _wrapped(_hub), "backbone.blocks", FUSED, {"attn.qkv"}),
    "own head on hub dinov3": Case(
        "dinov3_hub", _wrapped(DinoVisionTransformer), "backbone.blocks", FUSED, {"attn.qkv"}
    ),
}
SLICED = [name for name, case in CASES.items() if case.family != "dinov3_hub"]


def _outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    output = model(x)
    if isinstance(output, torch.Tensor):
        return [output]
    return [value for value in output.values() if isinstance(value, torch.Tensor)]


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


@pytest.fixture
def model(case) -> nn.Module:
    torch.manual_seed(0)
    model = case.build().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "gamma", "cls_token")):  # not at the zeros or tiny values of an untrained model
            nn.init.normal_(parameter, std=0.3)
    return model


def test_all_linears_of_the_blocks_are_found_and_none_else(case, model):
    structure = structure_of(model)
    assert structure.family.name == case.family
    blocks = structure.named_blocks(model)
    assert [name for name, _ in blocks] == [f"{case.blocks}.0", f"{case.blocks}.1"]
    for _, block in blocks:
        assert {name for name, _ in structure.named_linears(block)} == case.linears
        plan = plan_block(structure, "", block, resolve())
        assert {name for name, parts in plan.items() if len(parts) == 3} == case.fused


@torch.no_grad()
def test_prepared_model_computes_the_same(model, pictures):
    untouched = _outputs(copy.deepcopy(model), pictures[0])
    structure_of(model).prepare(model)
    for ours, theirs in zip(_outputs(model, pictures[0]), untouched, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_loaded_model_is_bit_equal(case, model, pictures, tmp_path):
    fresh = copy.deepcopy(model)
    report = ov.compress(model, pictures, rate=0.5, iterations=5, storage_dtype="float16").report
    assert {layer.name for layer in report.layers} == {
        f"{case.blocks}.{i}.{name}" for i in range(2) for name in case.linears
    }
    assert all(torch.isfinite(torch.tensor(layer.error)) for layer in report.layers)
    expected = _outputs(model, pictures[0])
    ov.save(model, tmp_path / "out")
    needs_class = source_of(model).kind == "module"
    loaded = ov.load(tmp_path / "out", model=fresh if needs_class else None)
    stored = model.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())
    # MKL sums in another order at other addresses
    for ours, theirs in zip(_outputs(loaded, pictures[0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hardly_any_compression_leaves_the_outputs(model, pictures):
    """At a rate near 0 every weight survives: what is left is the plumbing of the block-by-block run."""
    expected = _outputs(model, pictures[0])
    ov.compress(model, pictures, rate=1e-6, rank_ratio=0, pattern="layer", iterations=1)
    for ours, theirs in zip(_outputs(model, pictures[0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def _normalised(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The final norm's output: what comes before it may be without its mean in a sliced model."""
    outputs = []
    norm = model.get_submodule(structure_of(model).final_norm)
    handle = norm.register_forward_hook(lambda _, args, output: outputs.append(output))
    model(x)
    handle.remove()
    return outputs[-1]


@pytest.mark.parametrize("case", [CASES[name] for name in SLICED], ids=SLICED)
@torch.no_grad()
def test_rotated_unsliced_model_computes_the_same(model, pictures):
    """SliceGPT, Theorem 1: without a cut the rotations change nothing."""
    structure = structure_of(model)
    expected = _normalised(model, pictures[0])
    structure.prepare(model)
    set_record(model, Record(structure=structure))
    with ActivationStore(1e9) as hidden:
        calls = capture_block_calls(model, structure.named_blocks(model), pictures, hidden)
        plan = plan_slicing(structure.named_blocks(model), structure, None)
        done = slice_blocks(model, structure, plan, hidden, calls)
    assert plan.sliced_width == plan.width == 48
    assert done.kept == pytest.approx([1.0] * 4)
    torch.testing.assert_close(_normalised(model, pictures[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [CASES[name] for name in SLICED], ids=SLICED)
@torch.no_grad()
def test_sliced_model_is_smaller_and_survives_a_round_trip(model, pictures, tmp_path):
    fresh = copy.deepcopy(model)
    dense = sum(linear.weight.numel() for _, b in structure_of(model).named_blocks(model) for linear in _linears(b))
    report = ov.compress(model, pictures, rate=0.3, method="slicegpt", storage_dtype="float16").report
    blocks = [block for _, block in structure_of(model).named_blocks(model)]
    assert report.dense_parameters == dense
    assert report.parameters == sum(linear.weight.numel() for block in blocks for linear in _linears(block))
    assert report.parameters <= 0.7 * dense
    assert all(0.5 < share < 1 for share in report.slicing.kept)
    expected = _normalised(model, pictures[0])
    ov.save(model, tmp_path / "out")
    loaded = ov.load(tmp_path / "out", model=fresh if source_of(model).kind == "module" else None)
    assert torch.equal(_normalised(loaded, pictures[0]), expected)
    with pytest.raises(ModelError, match="sliced already"):
        ov.compress(loaded, pictures, rate=0.3)


def _linears(block: nn.Module) -> list[nn.Linear]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


class Bare(ov.Family):
    """Says as little as a family can."""

    name, serves = "bare", ""

    def matches(self, model):
        return False

    def blocks(self, model):
        return "blocks"


def test_slicing_needs_a_rate_that_leaves_something_and_a_described_stream(tiny_vit, pictures):
    with pytest.raises(ConfigError, match=r"rate 0\.9999 leaves nothing"):
        ov.compress(tiny_vit, pictures, rate=0.9999, method="slicegpt")
    with pytest.raises(ModelError, match="family bare does not describe it"):
        ov.compress(tiny_vit, pictures, rate=0.3, method="slicegpt", family=Bare())


POST_NORM = {
    "residual post-norm": _timm("vit_base_patch16_rpn_224"),
    "eva post-norm": _timm("eva_giant_patch14_224", use_post_norm=True),
    "more than two halves": lambda: _mixing(_timm("vit_tiny_patch16_224")()),
    "two attentions at a time": _timm("vit_small_patch16_18x2_224"),
}


def _mixing(model: nn.Module) -> nn.Module:
    """The second block adds features to others, past the norms."""
    block = model.blocks[1]
    forward = block.forward
    block.forward = lambda x, **others: forward(x, **others) + x.roll(1, -1)
    return model


@pytest.mark.parametrize("kind", POST_NORM)
def test_slicing_refuses_blocks_that_a_rotation_changes_and_leaves_them_alone(kind, pictures):
    torch.manual_seed(0)
    model = POST_NORM[kind]().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"slicegpt: (blocks\.\d .* computes something else|.* has no norm)"):
        ov.compress(model, pictures, rate=0.1, method="slicegpt", storage_dtype="float16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("build", "prefix", "class_token", "pooled_before_norm"),
    [
        (_timm("vit_tiny_patch16_224"), 1, True, False),
        (_timm("vit_small_patch14_reg4_dinov2"), 5, True, False),
        (_timm("deit_tiny_distilled_patch16_224"), 2, True, False),
        (_timm("vit_medium_patch16_reg4_gap_256"), 4, False, True),
        (_timm("vit_base_patch16_siglip_224"), 0, False, False),
        (_timm("vit_small_patch16_dinov3"), 5, True, False),
        (_timm("vit_tiny_patch16_224", global_pool="avg"), 1, True, True),
        (_wrapped(_timm("vit_medium_patch16_reg4_gap_256")), 4, False, True),
        (_hf(hf.SiglipVisionModel, hf.SiglipVisionConfig), 0, False, False),
        (_hf(hf.DeiTModel, hf.DeiTConfig), 2, True, False),
        (_wrapped(_hf(hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig)), 5, True, False),
        (_hub, 1, True, False),
        (DinoVisionTransformer, 5, True, False),
    ],
)
def test_what_a_model_pools_is_known_before_and_after_it_is_changed(
    build, prefix, class_token, pooled_before_norm, pictures
):
    model = build()
    before = structure_of(model)
    assert (before.prefix_tokens, before.class_token, before.pooled_before_norm) == (
        prefix,
        class_token,
        pooled_before_norm,
    )
    ov.compress(model, pictures, rate=0.5, iterations=1)
    assert structure_of(model) == before


def test_by_default_prefix_tokens_are_led_by_a_class_token():
    class Without(Bare):
        def prefix_tokens(self, model):
            return 0

    assert structure_as(nn.Identity(), Bare()).class_token
    assert not structure_as(nn.Identity(), Without()).class_token


@torch.no_grad()
def test_a_merged_dinov3_of_the_hub_is_one_of_its_authors_code_again(pictures):
    model = DinoVisionTransformer().eval()
    nn.init.normal_(model.blocks[0].attn.qkv.bias)
    names, kind = set(model.state_dict()), type(model.blocks[0].attn.qkv)
    ov.compress(model, pictures, rate=0.5, iterations=2)
    expected = ov.merge(model)(pictures[0])
    structure_of(model).restore(model)
    assert set(model.state_dict()) == names
    assert type(model.blocks[0].attn.qkv) is kind
    torch.testing.assert_close(model(pictures[0]), expected)


TEXT = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (hf.CLIPTextModel, hf.CLIPTextConfig),
        (hf.CLIPTextModelWithProjection, hf.CLIPTextConfig),
        (hf.SiglipTextModel, hf.SiglipTextConfig),
    ],
)
def test_text_towers_are_no_vision_towers(model, config):
    with pytest.raises(ModelError, match="no model family fits"):
        structure_of(model(config(**TEXT)))


def test_of_two_towers_that_of_the_pictures_is_taken(pictures):
    model = hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=HF, projection_dim=48))
    texts = torch.randint(3, 90, (4, 8))
    report = ov.compress(
        model, [{"pixel_values": x, "input_ids": texts} for x in pictures], rate=0.5, iterations=2
    ).report
    assert {layer.name.split(".")[0] for layer in report.layers} == {"vision_model"}


def test_a_model_with_several_models_inside_is_refused(pictures):
    two = nn.ModuleDict({"student": _timm("vit_tiny_patch16_224")(), "teacher": _timm("vit_tiny_patch16_224")()})
    with pytest.raises(ModelError, match=r"several families .timm_vit at student, timm_vit at teacher.: compress one"):
        ov.compress(two, pictures)
    vision = {"vision_config": hf.CLIPVisionConfig(**HF), "image_token_index": 5}
    llava = hf.LlavaConfig(**vision, text_config=hf.LlamaConfig(**TEXT, num_key_value_heads=3))
    with pytest.raises(ModelError, match=r"several families .hf_clip at .*, lm_llama at "):
        ov.compress(hf.LlavaForConditionalGeneration(llava), pictures)


def test_what_a_model_needs_besides_pictures_is_said(pictures):
    encoder = hf.ViTModel(hf.ViTConfig(**HF))
    decoder = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=48, n_layer=1, n_head=3, vocab_size=9, add_cross_attention=True))
    model = hf.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    with pytest.raises(DataError, match="VisionEncoderDecoderModel cannot take calibration batch 0"):
        ov.compress(model, pictures)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"the model is wrapped in DataParallel: compress model\.module"),
        (lambda model: OwnHead(nn.DataParallel(model)), r"backbone of the model is wrapped .* model\.backbone\.module"),
        (lambda model: torch.compile(model, backend="eager"), r"torch\.compile: compress model\._orig_mod"),
        (torch.jit.script, "is TorchScript"),
    ],
)
def test_replicas_and_compiled_models_are_refused_with_what_to_compress(wrap, message, pictures):
    model = wrap(_timm("vit_tiny_patch16_224")())
    with pytest.raises(ModelError, match=message):
        structure_of(model)
    with pytest.raises(ModelError, match=message):
        ov.compress(model, pictures, family=families()[0])


def test_unknown_family_is_an_error_that_lists_the_known():
    with pytest.raises(ModelError, match=r"no model family fits .*Sequential") as error:
        structure_of(nn.Sequential(nn.Linear(2, 2)))
    assert all(family.name in str(error.value) for family in families())


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        ov.register_family(type("Again", (Bare,), {"name": "timm_vit"}))
    assert "bare" not in [family.name for family in families()]


def test_a_family_must_say_its_name():
    with pytest.raises(TypeError, match="Nameless must have a name, a string"):
        ov.register_family(type("Nameless", (Bare,), {"name": None}))
