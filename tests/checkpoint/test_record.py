"""What is kept on a compressed model travels with it: copied, pickled, wrapped, loaded twice."""

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

import oats_vision as ov
from oats_vision.errors import CheckpointError, ModelError
from oats_vision.models.families import registry
from oats_vision.models.loading.load import record_source
from oats_vision.models.source import ModelSource
from tiny import HF

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
TEXT = {"vocab_size": 60, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 1}
EXPERTS = {
    "vocab_size": 60,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_local_experts": 4,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


class Own(nn.Module):
    """A model of the user's own, of a family of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 48, 8, 8)
        self.trunk = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).mT
        for block in self.trunk:
            y = block(y)
        return y.mean(1)


class OwnFamily(ov.Family):
    name, serves = "own", "my own model"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Own)

    def blocks(self, model: nn.Module) -> str:
        return "trunk"


class Headed(nn.Module):
    """A head of the user's own on somebody's backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = timm_vit(), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def timm_vit() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", **TIMM)
    record_source(model, ModelSource("timm", "vit_tiny_patch16_224", TIMM))
    return model


@dataclass(frozen=True)
class Case:
    build: Any
    options: dict[str, Any]
    text: bool = False
    given: bool = False  # to `load`, since nothing else can build it

    def fresh(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()


OATS = {"rate": 0.5, "iterations": 2, "storage_dtype": "float16"}
CASES = {
    "timm": Case(timm_vit, OATS),
    "sliced": Case(timm_vit, {"rate": 0.3, "method": "slicegpt"}),
    "CLIP": Case(lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**HF)), OATS),
    "GPT-2": Case(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TEXT, eos_token_id=2)), OATS, text=True),
    "experts": Case(lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**EXPERTS)), OATS, text=True),
    "own": Case(Own, OATS, given=True),
    "headed": Case(Headed, OATS, given=True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, monkeypatch) -> Case:
    monkeypatch.setattr(registry, "_registered", [])
    ov.register_family(OwnFamily)
    return request.param


@pytest.fixture
def batches(case, pictures) -> list[Tensor]:
    texts = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(1))
    return list(texts.split(4)) if case.text else pictures


@pytest.fixture
def compressed(case, batches) -> nn.Module:
    model = case.fresh()
    ov.compress(model, batches, **case.options)
    return model


@torch.no_grad()
def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Bit for bit the same tensors, and what they give; MKL sums in another order at other addresses."""
    one, other = ours.state_dict(), theirs.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    found, expected = ours(x), theirs(x)
    if not isinstance(found, Tensor):
        found, expected = found[0], expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _torch_saved,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_the_same_and_is_saved(case, compressed, batches, tmp_path, way):
    again = WAYS[way](compressed)
    assert_same(again, compressed, batches[0])
    assert ov.record(again) == ov.record(compressed)
    ov.save(again, tmp_path / "out")
    loaded = ov.load(tmp_path / "out", model=case.fresh() if case.given else None)
    assert_same(loaded, compressed, batches[0])


def test_a_model_that_was_loaded_twice_is_saved(case, compressed, batches, tmp_path):
    for number in range(3):
        ov.save(compressed, tmp_path / str(number))
        loaded = ov.load(tmp_path / str(number), model=case.fresh() if case.given else None)
        assert_same(loaded, compressed, batches[0])
        assert ov.record(loaded).report == ov.record(compressed).report
        compressed = loaded


def test_a_wrapper_is_saved_with_what_it_wraps(case, compressed, batches, tmp_path):
    """As a module of the user's own, which is given again to be loaded."""
    wrapped = nn.Sequential(compressed)
    record = ov.record(wrapped)
    assert record.structure.blocks == f"0.{ov.record(compressed).structure.blocks}"
    assert {layer.name.partition(".")[0] for layer in record.report.layers} <= {"0"}
    ov.save(wrapped, tmp_path / "out")
    with pytest.raises(ModelError, match=r"container\.Sequential: pass a module of that class"):
        ov.load(tmp_path / "out")
    loaded = ov.load(tmp_path / "out", model=nn.Sequential(case.fresh()))
    assert_same(loaded, wrapped, batches[0])


def test_a_merged_model_is_saved_only_where_it_is_still_compressed(case, compressed, batches, tmp_path):
    sliced = ov.record(compressed).report.slicing is not None
    merged = ov.merge(compressed)
    if sliced:  # has nothing to merge
        ov.save(merged, tmp_path / "out")
        assert_same(ov.load(tmp_path / "out"), compressed, batches[0])
        return
    with pytest.raises(CheckpointError, match="was merged and is dense again: save it before the merge"):
        ov.save(merged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="is dense again"):
        ov.record(merged)


def test_a_part_of_a_compressed_model_is_not_saved(pictures, tmp_path):
    model = Headed().eval()
    ov.compress(model, pictures, **OATS)
    with pytest.raises(CheckpointError, match="a part of a compressed model, which is saved whole"):
        ov.save(model.backbone, tmp_path / "out")
    with pytest.raises(ModelError, match="is not compressed"):
        ov.record(timm_vit())


def test_several_compressed_models_are_saved_one_by_one(pictures, tmp_path):
    model = timm_vit().eval()
    ov.compress(model, pictures, **OATS)
    both = nn.ModuleList([model, copy.deepcopy(model)])
    with pytest.raises(CheckpointError, match=r"ModuleList wraps several compressed models \(0, 1\): give one of them"):
        ov.save(both, tmp_path / "out")


def test_the_record_is_plain_data_that_names_its_family(pictures):
    model = timm_vit().eval()
    ov.compress(model, pictures, **OATS)
    record = model.oats_vision
    assert record is ov.record(model)
    assert record.source.kind == "timm"
    assert (record.structure.family.name, record.structure.blocks, record.structure.final_norm) == (
        "timm_vit",
        "blocks",
        "norm",
    )
    assert record.report.family == "timm_vit"
