"""Activations that are not finite: where they begin, and in which sample."""

import re

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import oats_vision as ov
from oats_vision.calibration.origin import NotFiniteError, origin_of
from oats_vision.errors import DataError, ModelError

QUICK = {"rate": 0.5, "iterations": 3}
FAST = QUICK | {"quality": "fast"}


class Squared(nn.Module):
    """Computes between its modules, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) ** 2)


@pytest.mark.parametrize(("size", "scale", "where"), [
    (1e30, 1e30, r"the output of block\.first \(its inputs reach 1e\+30 and its weight 1e\+30\)"),
    (1e10, 1e10, r"what block computes before block\.second"),
    (1.0, 1.0, None),
])  # fmt: skip
def test_it_is_the_first_module_whose_inputs_are_finite_or_what_comes_before_it(size, scale, where):
    model = Squared()
    model.first.weight.data = scale * torch.eye(4)
    x = torch.ones(3, 2, 4)
    x[1] *= size
    found = origin_of(model, lambda: model(x), 3, path="block")
    if where is None:
        assert found is None
        return
    assert found is not None
    assert found.sample == 1
    assert re.match(where, found.what)
    assert found.of_sample(["a.png", "b.png"]).endswith("in sample 1 of the batch (b.png)")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_padding_does_not_count():
    model, x = Squared(), torch.ones(2, 3, 4)
    x[0, 2], x[1, 0] = torch.nan, torch.nan
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert origin_of(model, lambda: model(x), 2, mask) is None
    mask[1, 0] = True
    found = origin_of(model, lambda: model(x), 2, mask)
    assert found is not None
    assert found.sample == 1


def test_a_layer_that_overflows_float16_is_named_before_any_block_is_compressed(tiny_vit, pictures):
    tiny_vit.half()
    tiny_vit.blocks[1].mlp.fc1.weight.data.sign_().mul_(3e4)
    steps = []
    with pytest.raises(ModelError) as caught:
        ov.compress(tiny_vit, pictures, **QUICK, progress=steps.append)
    assert str(caught.value).startswith(
        "the outputs of blocks.1 are not finite in calibration batch 0: the model overflows torch.float16, or is "
        "broken. It begins in the output of blocks.1.mlp.fc1 (its inputs reach "
    )
    assert str(caught.value).endswith("and its weight 3e+04), in sample 0 of the batch")
    assert {step.block for step in steps} == {0}


@pytest.mark.parametrize("options", [QUICK, FAST])
def test_a_later_picture_that_overflows_is_named_with_the_layer(tiny_vit, pictures, options):
    tiny_vit.blocks[0].norm2 = nn.Identity()  # which would take the size away
    tiny_vit.blocks[0].mlp.fc1.weight.data *= 1e4
    pictures[1][2] = 1e38
    with pytest.raises(NotFiniteError) as caught:
        ov.compress(tiny_vit, pictures, **options)
    message = str(caught.value)
    assert "in calibration batch 1: the model overflows torch.float32" in message
    assert "in sample 2 of the batch" in message


def test_it_is_said_when_only_the_compressed_model_overflows(tiny_vit, pictures):
    class Act(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = [block]  # no module of its own

        def forward(self, x: Tensor) -> Tensor:
            compressed = isinstance(self.block[0].attn.proj, ov.SparseLowRankLinear)
            return nn.functional.gelu(x) * (torch.inf if compressed else 1.0)

    tiny_vit.blocks[1].mlp.act = Act(tiny_vit.blocks[1])
    with pytest.raises(NotFiniteError, match=r"the output of blocks\.1\.mlp\.act .*in sample 0") as caught:
        ov.compress(tiny_vit, pictures, **QUICK)
    assert "in the dense model" not in str(caught.value)


def test_a_picture_that_overflows_the_model_is_named_by_its_file(tiny_vit, tmp_path):
    for i in range(6):
        Image.new("RGB", (32, 32), (40 * i, 10, 10)).save(tmp_path / f"{i}.png")

    def transform(picture: Image.Image) -> Tensor:
        value = torch.tensor(picture.getpixel((0, 0))[0] / 40)
        return torch.full((3, 32, 32), 3e38 if value == 5 else 1.0)

    batches = ov.load_pictures(tmp_path, transform, batch_size=4)
    tiny_vit.patch_embed.proj.weight.data.fill_(1.0)
    with pytest.raises(ModelError, match=r"the inputs of blocks\.0 are .* batch 1: .* begins in the output of "
                                         r"patch_embed\.proj .* in sample 1 of the batch \(.*5\.png\)"):  # fmt: skip
        ov.compress(tiny_vit, batches, **FAST)


def test_an_infinite_picture_is_named_by_its_file_before_the_model_sees_it(tiny_vit, tmp_path):
    for i in range(4):
        Image.new("RGB", (32, 32), (40 * i, 10, 10)).save(tmp_path / f"{i}.png")

    def transform(picture: Image.Image) -> Tensor:
        return torch.full((3, 32, 32), torch.inf if picture.getpixel((0, 0))[0] == 80 else 1.0)

    with pytest.raises(DataError, match=r"2\.png has values that are not finite after preprocessing"):
        ov.compress(tiny_vit, ov.load_pictures(tmp_path, transform, batch_size=4), **FAST)


def test_a_tensor_of_pictures_names_the_sample(tiny_vit, pictures):
    pictures[1][3, 0, 0, 0] = torch.inf
    with pytest.raises(DataError, match="batch 1 has 1 values that are NaN or infinite, the first of them in sample 3"):
        ov.compress(tiny_vit, pictures, **FAST)
