"""What users' own modules do in their forward passes: they change tensors in place, keep some, call linears again."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import oats_vision as ov
from oats_vision.errors import DataError, ModelError

WIDTH = 32
INPUTS = [torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Block(nn.Module):
    """Attention of one head with a fused qkv, and an MLP."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.in_place = in_place
        self.act = nn.ReLU(inplace=in_place)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x))
        q, k, v = (qkv[..., i * WIDTH : (i + 1) * WIDTH] for i in range(3))
        if self.in_place:
            q *= 0.1
        else:
            q = q * 0.1
        x = x + self.proj((q @ k.mT).softmax(-1) @ v)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Twice(Block):
    """The MLP is called again on what it made."""

    def forward(self, x):
        x = super().forward(x)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Remembering(Block):
    """Keeps a table that its first forward pass makes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(1, 2, x.shape[-1])
        return super().forward(x * self.table)


class RememberingBuffer(Remembering):
    def __init__(self) -> None:
        super().__init__()
        del self.table
        self.register_buffer("table", None, persistent=False)


class Model(nn.Module):
    def __init__(self, block=Block, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(block(**options) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.after(self.before(x))

    def before(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x

    def after(self, x):
        return self.head(self.norm(x).mean(1))


class ScaledInPlace(Model):
    def after(self, x):
        x *= 0.5
        return super().after(x)


class Scaled(Model):
    def after(self, x):
        return super().after(x * 0.5)


class Own(ov.Family):
    name = "of this test"
    serves = "the models above"

    def matches(self, model):
        return isinstance(model, Model)

    def blocks(self, model):
        return "blocks"


def weights(model: nn.Module, **settings) -> dict[str, torch.Tensor]:
    ov.compress(model, INPUTS, family=Own, rate=0.5, **settings)
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("in_place", "other"),
    [(Model(in_place=True), Model()), (ScaledInPlace(), Scaled())],
    ids=["in a block", "after the last block"],
)
def test_what_is_changed_in_place_changes_nothing(in_place, other):
    ours, theirs = weights(copy.deepcopy(in_place)), weights(copy.deepcopy(other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [Remembering, RememberingBuffer])
@pytest.mark.parametrize("ran_before", [False, True])
def test_what_the_first_pass_keeps_is_no_tensor_of_inference_mode(block, ran_before):
    model = Model(block)
    if ran_before:
        with torch.inference_mode():
            model(INPUTS[0])
    result = ov.compress(model, INPUTS, family=Own, held_out=INPUTS[:1])
    assert result.cost.samples == 6


def test_a_linear_that_is_called_twice_is_not_judged_by_one_call():
    for settings in ({}, {"bits": 3.5, "quality": "fast"}, {"method": "wanda", "targets": True}):
        with pytest.raises(ModelError, match=r"blocks\.0\.fc1 is called more than once .* a rate with `quality` fast"):
            ov.compress(Model(Twice), INPUTS, family=Own, **settings)
    report = ov.compress(Model(Twice), INPUTS, family=Own, quality="fast").report
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert tokens["blocks.0.fc1"] == 2 * tokens["blocks.0.qkv"]


@pytest.mark.parametrize("few", [[torch.randn(10, 3, 32, 32)], torch.randn(16, 3, 32, 32)], ids=["a batch", "a tensor"])
def test_too_few_samples_for_a_recovery_are_refused_before_the_work(tiny_vit, few):
    with pytest.raises(DataError, match="recovery needs a batch to train on and another one to judge by"):
        ov.compress(tiny_vit, few, recover=3)
    assert isinstance(tiny_vit.blocks[0].attn.qkv, nn.Linear)


@pytest.mark.parametrize(
    "enough",
    [
        DataLoader(list(torch.randn(2, 8, 3, 32, 32)), batch_size=None),
        torch.randn(2, 8, 3, 32, 32),
        DataLoader(torch.randn(16, 3, 32, 32), batch_sampler=[list(range(8)), list(range(8, 16))]),
        list(torch.randn(2, 8, 3, 32, 32)),
        torch.randn(17, 3, 32, 32),
    ],
    ids=["a loader of batches", "a stack of batches", "a sampler of batches", "batches", "a tensor"],
)
def test_two_batches_are_enough_for_a_recovery(tiny_vit, enough):
    report = ov.compress(tiny_vit, enough, quality="plain", iterations=1, recover=1).report
    assert report.recovery is not None


def test_held_out_inputs_that_the_model_cannot_take_are_named():
    with pytest.raises(DataError, match=r"Model cannot take held-out batch 0, \(2, 5, 9\)"):
        ov.compress(Model(), INPUTS, family=Own, held_out=torch.randn(2, 5, 9))


def test_a_linear_too_small_for_the_first_guess_does_not_end_a_search_for_the_rank_ratio():
    model = Model()
    for block in model.blocks:
        block.fc1, block.fc2 = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
    report = ov.compress(model, INPUTS, family=Own, rank_ratio="auto", error_tolerance=2.0).report
    small = next(layer for layer in report.layers if layer.name == "blocks.0.fc1")
    assert [part.rank for part in small.spec.parts] == [0]
