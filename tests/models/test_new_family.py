"""A family that is new to the package: one registration, and everything else follows."""

import inspect

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import oats_vision as ov
from oats_vision.cli.commands import app
from oats_vision.errors import CheckpointError, ConfigError, ModelError
from oats_vision.models.families import registry


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(48), nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 48, 8, 8)
        self.trunk = nn.ModuleList(Attention() for _ in range(2))
        self.norm = nn.LayerNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).mT
        for block in self.trunk:
            y = block(y)
        return self.norm(y).mean(1)


class TrunkFamily(ov.Family):
    name = "trunk"
    serves = "towers that are nothing but a trunk"
    fused = {"qkv": ("q", "k", "v")}  # noqa: RUF012

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Trunk)

    def blocks(self, model: nn.Module) -> str:
        return "trunk"

    def final_norm(self, model: nn.Module) -> str:
        return "norm"

    def prefix_tokens(self, model: nn.Module) -> int:
        return 0


@pytest.fixture
def registered(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_registered", [])
    assert ov.register_family(TrunkFamily) is TrunkFamily


@torch.no_grad()
def test_it_is_compressed_saved_loaded_and_listed(registered, pictures, tmp_path):
    assert len(inspect.getsource(TrunkFamily).splitlines()) < 30
    torch.manual_seed(0)
    model = Trunk().eval()
    report = ov.compress(model, pictures, rate=0.5, iterations=2).report
    assert report.family == "trunk"
    assert [[part.name for part in layer.spec.parts] for layer in report.layers] == [["q", "k", "v"], ["out"]] * 2
    torch.manual_seed(0)
    given = ov.compress(Trunk().eval(), pictures, rate=0.5, iterations=2, family=TrunkFamily).report
    assert [layer.errors for layer in given.layers] == [layer.errors for layer in report.layers]
    with pytest.raises(ConfigError, match=r"family must be a class of ov\.Family, such as you register, got 'trunk'"):
        ov.compress(Trunk().eval(), pictures, family="trunk")
    ov.save(model, tmp_path / "out")
    loaded = ov.load(tmp_path / "out", model=Trunk())
    torch.testing.assert_close(loaded(pictures[0]), model(pictures[0]))
    listed = CliRunner().invoke(app, ["models"], env={"COLUMNS": "120"}).stdout
    assert "towers that are nothing but a trunk" in listed


def test_without_its_registration_it_is_not_found(registered, pictures, tmp_path, monkeypatch):
    model = Trunk().eval()
    ov.compress(model, pictures, rate=0.5, iterations=1)
    ov.save(model, tmp_path / "out")
    monkeypatch.setattr(registry, "_registered", [])
    with pytest.raises(CheckpointError, match="needs the model family 'trunk': register it first"):
        ov.load(tmp_path / "out", model=Trunk())
    with pytest.raises(ModelError, match=r"no model family fits .*Trunk; known: timm_vit"):
        ov.compress(Trunk(), pictures)


def test_a_cell_that_is_run_again_registers_its_family_again(registered):
    def cell(words: str) -> type[ov.Family]:
        @ov.register_family
        class Mine(TrunkFamily):
            name = "mine"
            serves = words

        return Mine

    for words in ("first", "second"):
        assert cell(words).serves == words
    assert [family.serves for family in registry.families() if family.name == "mine"] == ["second"]
    with pytest.raises(ValueError, match="'mine' is registered already"):
        ov.register_family(type("Other", (TrunkFamily,), {"name": "mine"}))
