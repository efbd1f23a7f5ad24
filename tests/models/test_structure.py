"""Models whose linears cannot be replaced just so: each is refused before anything is changed, or comes out right."""

import copy
import logging

import pytest
import torch
from torch import nn

import oats_vision as ov
from oats_vision.errors import ConfigError, DataError, ModelError

OPTIONS = {"rate": 0.5, "iterations": 2}


class Scaled(nn.Linear):
    """Looks like a linear, and is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A class of its own that does what nn.Linear does."""


class Attention(nn.Module):
    """PyTorch's attention reads `out_proj.weight` past the module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.mlp(self.attention(y, y, y, need_weights=False)[0])


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(4, 16), nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


SMALL = {"rate": 0.5, "iterations": 2, "rank_ratio": 0}


class Stacks(ov.Family):
    name, serves = "stack", "stacks"

    def matches(self, model):
        return isinstance(model, Stack)

    def blocks(self, model):
        return "layers"


STACK = Stacks()
TOKENS = [torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def _replaced(model: nn.Module, kind: type[nn.Linear]) -> None:
    """The first block's last linear becomes one of another class."""
    old = model.blocks[0].mlp.fc2
    model.blocks[0].mlp.fc2 = kind(old.in_features, old.out_features)


def _hooked(model: nn.Module) -> None:
    model.blocks[1].attn.proj.register_forward_hook(print)


def _own_forward(model: nn.Module) -> None:
    model.blocks[0].mlp.fc1.forward = lambda x: torch.zeros(*x.shape[:-1], 192)


def _tied_weight(model: nn.Module) -> None:
    model.blocks[2].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def _tied_module(model: nn.Module) -> None:
    model.blocks[1].mlp.fc2 = model.blocks[2].mlp.fc2


def _two_names(model: nn.Module) -> None:
    model.blocks[0].mlp.also = model.blocks[0].mlp.fc2


def _unused(model: nn.Module) -> None:
    model.blocks[1].spare = nn.Linear(48, 48)


def _on_meta(model: nn.Module) -> None:
    model.blocks[2].to("meta")


def _not_a_number(model: nn.Module) -> None:
    model.head.weight.data[0, :3] = torch.nan


def _infinite_buffer(model: nn.Module) -> None:
    model.register_buffer("statistics", torch.tensor([1.0, torch.inf]))


def _overflowing(model: nn.Module) -> None:
    """Finite weights, infinite activations."""
    for name in ("norm1", "attn.qkv", "attn.proj"):
        model.blocks[1].get_submodule(name).weight.data.fill_(1e17)


def _compiled(model: nn.Module) -> None:
    model.blocks[1].compile(backend="eager")


FAULTS = {
    "own forward by class": (lambda model: _replaced(model, Scaled), r"blocks\.0\.mlp\.fc2 is a .*Scaled .* skip="),
    "own forward by instance": (_own_forward, r"blocks\.0\.mlp\.fc1 is a .* forward of its own"),
    "hooks": (_hooked, r"blocks\.1\.attn\.proj has forward hooks"),
    "one weight in two linears": (_tied_weight, r"blocks\.0\.mlp\.fc1 and blocks\.2\.mlp\.fc1 share one weight"),
    "one linear in two blocks": (_tied_module, r"blocks\.1\.mlp\.fc2 and blocks\.2\.mlp\.fc2 share one weight"),
    "one linear of two names": (_two_names, r"blocks\.0\.mlp\.fc2 and blocks\.0\.mlp\.also share one weight"),
    "never called": (_unused, r"blocks\.1\.spare was never called .* skip='blocks\.1\.spare'"),
    "meta": (_on_meta, r"blocks\.2\.norm1\.weight has no values: it is on the meta device"),
    "NaN in the head": (_not_a_number, r"head\.weight holds values that are NaN or infinite \(3 of 480\)"),
    "infinite buffer": (_infinite_buffer, r"statistics holds values that are NaN or infinite \(1 of 2\)"),
    "compiled block": (_compiled, r"blocks\.1 of the model is compiled"),
}


def _unchanged(model: nn.Module, before: nn.Module) -> bool:
    state, old = model.state_dict(), before.state_dict()
    return (
        state.keys() == old.keys()
        and all(a.is_meta or torch.equal(a.nan_to_num(), old[name].nan_to_num()) for name, a in state.items())
        and [m.training for m in model.modules()] == [m.training for m in before.modules()]
        and "oats_vision" not in vars(model)
    )


@pytest.mark.parametrize("method", ["oats", "magnitude", "slicegpt"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_replaced_is_refused_and_the_model_left_as_it_was(tiny_vit, pictures, fault, method):
    damage, message = FAULTS[fault]
    damage(tiny_vit.train())
    before = copy.deepcopy(tiny_vit) if fault != "compiled block" else tiny_vit
    with pytest.raises(ModelError, match=message):
        ov.compress(tiny_vit, pictures, **OPTIONS, method=method, storage_dtype="float16")
    assert _unchanged(tiny_vit, before)


@pytest.mark.parametrize(
    ("data", "settings", "error"),
    [
        ([torch.zeros(2, 3, 32, 40)], {}, DataError),
        ([], {}, DataError),
        (None, {"skip": "heads"}, ConfigError),
        (None, {"rank_ratio": 0.001}, ConfigError),
        (None, {"method": "slicegpt", "rate": 0.9999}, ConfigError),
        (None, {"activation_memory": 0}, ConfigError),
    ],
)
def test_other_errors_leave_the_model_as_it_was_too(tiny_vit, pictures, data, settings, error):
    tiny_vit.train()
    before = copy.deepcopy(tiny_vit)
    with pytest.raises(error):
        ov.compress(tiny_vit, pictures if data is None else data, **(OPTIONS | settings), storage_dtype="bfloat16")
    assert _unchanged(tiny_vit, before)


def test_a_subclass_without_a_forward_of_its_own_is_a_plain_linear(tiny_vit, pictures):
    _replaced(tiny_vit, Renamed)
    report = ov.compress(tiny_vit, pictures, **OPTIONS).report
    assert "blocks.0.mlp.fc2" in {layer.name for layer in report.layers}


def test_minus_infinity_in_a_mask_is_no_fault(tiny_vit, pictures):
    tiny_vit.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    assert ov.compress(tiny_vit, pictures, **OPTIONS).report.layers


@pytest.mark.parametrize("refit", [False, True])
def test_activations_that_overflow_are_named_by_block_linear_and_batch(tiny_vit, pictures, refit):
    _overflowing(tiny_vit)
    with pytest.raises(ModelError, match=r"blocks\.1.* not finite in calibration batch 0: the model overflows"):
        ov.compress(tiny_vit, pictures, **OPTIONS, refit=refit)


@pytest.mark.parametrize("where", ["head.bias", "blocks.0.norm1.weight", "blocks.2.mlp.fc2.weight", "pos_embed"])
def test_values_beyond_the_storage_precision_are_named(tiny_vit, pictures, where):
    tiny_vit.get_parameter(where).data.view(-1)[1] = -1e5
    before = copy.deepcopy(tiny_vit)
    with pytest.raises(ConfigError, match=rf"{where} holds 1e\+05, which float16 cannot: use storage_dtype float32 or"):
        ov.compress(tiny_vit, pictures, **OPTIONS, storage_dtype="float16")
    assert _unchanged(tiny_vit, before)
    ov.compress(tiny_vit, pictures, **OPTIONS, storage_dtype="bfloat16")


def test_attention_of_pytorch_is_refused_and_compressed_around():
    torch.manual_seed(0)
    model = Stack(Attention(16), Attention(16))
    with pytest.raises(ModelError, match=r"layers\.0\.attention\.out_proj was never called \(2 linears were not\)"):
        ov.compress(model, TOKENS, family=STACK, **SMALL)
    report = ov.compress(model, TOKENS, family=STACK, **SMALL, skip="*.out_proj").report
    assert [layer.name for layer in report.layers] == ["layers.0.mlp", "layers.1.mlp"]
    assert model.eval()(TOKENS[0]).isfinite().all()


def test_an_encoder_layer_of_pytorch_is_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ModelError, match=r"layers\.0 is an nn\.TransformerEncoderLayer"):
        ov.compress(Stack(layer), TOKENS, family=STACK, **SMALL, skip="*.out_proj")


def test_unmerged_lora_is_refused_and_merged_lora_is_not(tiny_vit, pictures):
    import peft

    wrapped = peft.get_peft_model(tiny_vit, peft.LoraConfig(r=4, target_modules=["qkv"]))
    with pytest.raises(ModelError, match="merge_and_unload"):
        ov.compress(wrapped, pictures, **OPTIONS)
    with pytest.raises(ModelError, match="merge_and_unload"):
        ov.compress(wrapped.base_model.model, pictures, **OPTIONS)
    assert ov.compress(wrapped.merge_and_unload(), pictures, **OPTIONS).report.layers


class TestSkip:
    @pytest.mark.parametrize(
        ("skip", "left"),
        [
            ("blocks.0.*", {f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}),
            ("blocks.0", {f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}),
            (["*.mlp.fc2", "blocks.[12].attn"], {f"blocks.{i}.mlp.fc2" for i in range(3)}
             | {f"blocks.{i}.attn.{name}" for i in (1, 2) for name in ("qkv", "proj")}),
        ],
    )  # fmt: skip
    def test_what_is_skipped_stays_dense_bit_by_bit(self, tiny_vit, pictures, tmp_path, skip, left):
        before = copy.deepcopy(tiny_vit)
        report = ov.compress(tiny_vit, pictures, **OPTIONS, skip=skip).report
        dense = {name: module for name, module in before.named_modules() if isinstance(module, nn.Linear)}
        compressed = {layer.name for layer in report.layers}
        assert compressed == {name for name in dense if name.startswith("blocks.")} - left
        for name in left:
            assert torch.equal(tiny_vit.get_submodule(name).weight, dense[name].weight)
        ov.save(tiny_vit, tmp_path / "out")
        loaded = ov.load(tmp_path / "out", model=before)
        assert torch.equal(loaded(pictures[0]), tiny_vit(pictures[0]))
        assert ov.record(loaded).report.settings.skip == report.settings.skip

    def test_a_name_that_is_not_there_is_an_error_that_lists_some(self, tiny_vit, pictures):
        with pytest.raises(ConfigError, match=r"`skip` 'blocks\.7' .* such as blocks\.0, blocks\.0\.attn\.qkv"):
            ov.compress(tiny_vit, pictures, **OPTIONS, skip=["blocks.0", "blocks.7"])

    def test_something_must_be_left(self, tiny_vit, pictures):
        with pytest.raises(ConfigError, match=r"leaves no linear to compress: all 12 match"):
            ov.compress(tiny_vit, pictures, **OPTIONS, skip=["*.attn", "*.mlp"])

    def test_a_linear_of_another_kind_may_be_skipped(self, tiny_vit, pictures):
        _replaced(tiny_vit, Scaled)
        _tied_weight(tiny_vit)
        assert len(ov.compress(tiny_vit, pictures, **OPTIONS, skip=["*.mlp"]).report.layers) == 6


class TestSurroundings:
    """What the caller has switched on does not change the result."""

    def _compressed(self, model: nn.Module, pictures: list[torch.Tensor]) -> torch.Tensor:
        model = copy.deepcopy(model)
        ov.compress(model, pictures, **OPTIONS)
        return torch.cat([p.detach().flatten() for p in ov.merge(model).parameters()])

    def test_autocast_default_dtype_training_and_frozen_weights(self, tiny_vit, pictures):
        expected = self._compressed(tiny_vit, pictures)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(self._compressed(tiny_vit, pictures), expected)
            assert torch.is_autocast_enabled("cpu")
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(self._compressed(tiny_vit, pictures), expected)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.inference_mode():
            assert torch.equal(self._compressed(tiny_vit, pictures), expected)
        tiny_vit.set_grad_checkpointing()
        assert torch.equal(self._compressed(tiny_vit.train().requires_grad_(False), pictures), expected)

    def test_dropout_of_a_model_in_training_is_off(self, pictures):
        torch.manual_seed(0)
        dropping = Stack(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)), nn.Sequential(nn.Linear(16, 16)))
        plain = copy.deepcopy(dropping).eval()
        for model in (dropping.train(), plain):
            ov.compress(model, TOKENS, family=STACK, **SMALL)
        assert torch.equal(dropping(TOKENS[0]), plain(TOKENS[0]))

    def test_weights_stored_by_columns(self, tiny_vit, pictures):
        expected = self._compressed(tiny_vit, pictures)
        for module in tiny_vit.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.T.contiguous().T
        torch.testing.assert_close(self._compressed(tiny_vit, pictures), expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_models_of_other_precisions_keep_them(self, tiny_vit, pictures, dtype, caplog):
        model = tiny_vit.to(dtype)
        with caplog.at_level(logging.WARNING):
            ov.compress(model, pictures, **OPTIONS)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(pictures[0].to(dtype)).isfinite().all()


def test_a_model_of_one_channel_is_compressed_and_another_picture_is_a_clear_error(pictures):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, in_chans=1, num_classes=3)
    with pytest.raises(DataError, match=r"cannot take calibration batch 0, \(4, 3, 32, 32\)"):
        ov.compress(model, pictures, **OPTIONS)
    assert ov.compress(model, [x[:, :1] for x in pictures], **OPTIONS).report.samples == 8


def test_a_device_that_cannot_add_up_in_float64_is_refused_before_the_work(tiny_vit, pictures, monkeypatch):
    zeros = torch.zeros

    def as_on_mps(*shape, dtype=None, **named):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*shape, dtype=dtype, **named)

    monkeypatch.setattr(torch, "zeros", as_on_mps)
    with pytest.raises(ModelError, match=r"device cpu has no float64, .*: use cpu \(Cannot convert"):
        ov.compress(tiny_vit, pictures, **OPTIONS)
