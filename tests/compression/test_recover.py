import copy
import itertools
import json

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import oats_vision as ov
from oats_vision.compression import block_training
from oats_vision.compression import recover as recovery
from oats_vision.compression.record import record
from oats_vision.compression.recover import recover
from oats_vision.compression.relative_steps import RelativeAdam, layer_sizes
from oats_vision.core.oats import Factors
from oats_vision.errors import CheckpointError, ConfigError, DataError, ModelError
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear, compressed_layers
from oats_vision.progress import Step

STEPS = 20


def batches(count: int, seed: int) -> list[torch.Tensor]:
    """Of smooth pictures, so that some say something of others."""
    coarse = torch.randn(8 * count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return list(nn.functional.interpolate(coarse, 32, mode="bilinear").split(8))


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, nn.Module]:
    """A tiny ViT with LayerScale, compressed and dense."""
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    dense = timm.create_model("vit_tiny_patch16_224", init_values=1.0, **options).eval()
    model = copy.deepcopy(dense)
    ov.compress(model, batches(4, 0), rate=0.6, iterations=10, refit=False)
    return model, dense


@pytest.fixture
def model(twins) -> nn.Module:
    return copy.deepcopy(twins[0])


def error(model: nn.Module, dense: nn.Module, data: list[torch.Tensor]) -> float:
    with torch.no_grad():
        expected = torch.cat([dense.forward_features(x) for x in data])
        found = torch.cat([model.forward_features(x) for x in data])
    return float((found - expected).norm() / expected.norm())


def test_outputs_come_closer_to_the_dense_ones_on_data_that_training_has_not_seen(model, twins):
    dense, others = twins[1], batches(2, 2)
    before = error(model, dense, others)
    steps: list[Step] = []
    done = recover(model, dense, batches(4, 0), held_out=batches(2, 1), steps=STEPS, progress=steps.append)
    assert error(model, dense, others) < 0.95 * before
    assert all(block.after < block.before for block in done.blocks)
    assert (done.samples, done.held_out, done.kept) == (32, 16, True)
    assert done.after == pytest.approx(error(model, dense, batches(2, 1)), rel=1e-3)
    assert done.before == pytest.approx(error(twins[0], dense, batches(2, 1)), rel=1e-3)
    assert steps[-1].done == 1
    assert all(a.done <= b.done for a, b in itertools.pairwise(steps))
    assert not any(parameter.requires_grad for parameter in compressed_layers(model)["blocks.0.mlp.fc1"].parameters())


def test_training_all_blocks_together_goes_on_where_the_blocks_own_training_ends(model, twins):
    dense, held_out = twins[1], batches(2, 1)
    done = recover(model, dense, batches(4, 0), held_out=held_out, steps=STEPS)
    assert done.together.after < 0.99 * done.together.before
    assert done.after == done.together.after == pytest.approx(error(model, dense, held_out), rel=1e-3)
    assert done.blocks[-1].after == pytest.approx(done.together.before, rel=1e-3)


def test_positions_stay_and_nothing_becomes_dense(model, twins):
    before = {name: (layer.spec, layer.sparse.mask()) for name, layer in compressed_layers(model).items()}
    recover(model, twins[1], batches(4, 0), steps=5)
    for name, layer in compressed_layers(model).items():
        spec, mask = before[name]
        assert layer.spec == spec
        assert torch.equal(layer.sparse.mask(), mask)
        assert torch.equal(layer.sparse.dense() != 0, mask)
        assert not torch.equal(layer.sparse.values, twins[0].get_submodule(name).sparse.values)


@torch.no_grad()
def test_a_block_that_does_not_gain_on_held_out_data_stays_as_it_was(model, twins, monkeypatch):
    monkeypatch.setattr(block_training, "SHARE", 100.0)  # every step leads astray
    done = recover(model, twins[1], batches(4, 0), steps=10)
    assert [block.step for block in done.blocks] == [0, 0, 0]
    assert all(block.after == block.before for block in done.blocks)
    assert not done.kept
    assert done.together.step == 0
    assert done.after == done.before
    assert all(len(block.curve) == 1 + block_training.PATIENCE for block in done.blocks)
    for name, tensor in twins[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_steps_are_a_share_of_what_they_change():
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 10.0, 0.1, 1.0])
    W = torch.randn(6, 4) / scale
    S = torch.where(torch.rand(6, 4) > 0.3, W, torch.zeros(()))
    layer = SparseLowRankLinear.from_factors(
        [("a", Factors(S, W[:, :1] * 100, W[:1] / 100, error=0.0, iterations=1))], torch.ones(6), torch.float32
    )
    gain = nn.Parameter(torch.tensor([0.002, 1.0, -5.0, 0.0]))
    sizes = layer_sizes(layer, scale) | {gain: gain.detach().abs()}
    before = {p: p.detach().clone() for p in sizes}
    for parameter in sizes:
        parameter.grad = torch.randn_like(parameter) * 10.0 ** torch.randint(-6, 6, parameter.shape)
    RelativeAdam(sizes).step(0.01)
    moved = {p: (p.detach() - before[p]).abs() for p in sizes}
    torch.testing.assert_close(moved[gain], 0.01 * before[gain].abs())
    mask = layer.sparse.mask()
    A = torch.zeros(6, 4).masked_scatter(mask, moved[layer.sparse.values]) * scale  # in scaled coordinates
    rows = ((S * scale).square().sum(1) / mask.sum(1)).sqrt()
    torch.testing.assert_close(A[mask], (0.01 * rows[:, None].expand(6, 4))[mask])
    low_rank = layer.low_rank
    torch.testing.assert_close(moved[low_rank.U], torch.full((6, 1), 0.01 * float(before[low_rank.U].norm()) / 6**0.5))
    expected = 0.01 * (before[low_rank.V] * scale).norm() / 2
    torch.testing.assert_close(moved[low_rank.V] * scale, expected.expand(1, 4))


def test_a_layer_scale_of_0_002_takes_relative_steps():
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    dense = timm.create_model("vit_tiny_patch16_224", init_values=1.0, **options).eval()
    for block in dense.blocks:
        block.ls1.gamma.data[::3] = 0.002
    model = copy.deepcopy(dense)
    ov.compress(model, batches(4, 0), rate=0.6, iterations=10, refit=False)
    recover(model, dense, batches(4, 0), steps=STEPS)
    for ours, theirs in zip(model.blocks, dense.blocks, strict=True):
        change = (ours.ls1.gamma / theirs.ls1.gamma - 1).abs()
        assert 0 < change.max() < 0.5
        assert change[::3].max() > 0


def test_the_same_seed_gives_the_same_bits_and_a_stopped_run_goes_on(twins, tmp_path):
    dense, data = twins[1], batches(4, 0)

    def recovered(**options) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(twins[0])
        recover(model, dense, data, steps=6, **options)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Stopped(Exception):
        pass

    def stop(step: Step) -> None:
        if step.block == 2:
            raise Stopped

    whole = recovered()
    with pytest.raises(Stopped):
        recovered(state=tmp_path / "state", progress=stop)
    assert [file.name for file in sorted((tmp_path / "state").iterdir())] == ["0000.safetensors", "run.json"]
    steps: list[Step] = []
    resumed = recovered(state=tmp_path / "state", progress=steps.append)
    assert 1 not in [step.block for step in steps]  # the first block was read
    trained = [step for step in steps if step.activity.startswith("recovering")]
    assert trained[0].left is None  # what was done before says nothing of how long the rest takes
    assert all(step.left is not None for step in trained[1:])
    assert [step.done for step in trained] == sorted(step.done for step in trained)
    again = recovered(state=tmp_path / "state")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
        assert torch.equal(again[name], tensor), name
    other = recovered(seed=1)
    assert not torch.equal(other["blocks.0.mlp.fc1.sparse.values"], whole["blocks.0.mlp.fc1.sparse.values"])

    model = copy.deepcopy(twins[0])
    for options, message in (
        ({"steps": 7}, "after block 3 of 3, .*`recover` was 6 and is 7"),
        ({"seed": 3}, "`seed` was 0 and is 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            recover(model, dense, data, **{"steps": 6, "state": tmp_path / "state"} | options)
    with pytest.raises(ConfigError, match="SHA-256 of the calibration data differs"):
        recover(model, dense, batches(4, 9), steps=6, state=tmp_path / "state")
    with pytest.raises(ConfigError, match="batches to train on was 3 and is 2"):
        recover(model, dense, data[:2], held_out=data[2:], steps=6, state=tmp_path / "state")
    model.blocks[0].norm1.weight.data *= 2
    with pytest.raises(ConfigError, match="SHA-256 of the compressed weights differs"):
        recover(model, dense, data, steps=6, state=tmp_path / "state")
    (tmp_path / "state" / "0000.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="is damaged"):
        recovered(state=tmp_path / "state")


def test_weights_are_rounded_as_they_are_stored_and_judged_so(twins, tmp_path):
    model = copy.deepcopy(twins[1])
    ov.compress(model, batches(4, 0), rate=0.6, iterations=10, refit=False, storage_dtype="float16")
    others = batches(2, 1)
    before = error(model, twins[1], others)
    done = recover(model, twins[1], batches(4, 0), held_out=others, steps=STEPS)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            assert torch.equal(tensor, tensor.half().to(tensor.dtype))
    assert error(model, twins[1], others) < before
    ov.save(model, tmp_path / "model")
    loaded = ov.load(tmp_path / "model", model=copy.deepcopy(twins[1]))
    assert record(loaded).report.recovery == done
    assert json.loads((tmp_path / "model" / "config.json").read_text())["recovery"]["steps"] == STEPS
    torch.testing.assert_close(loaded(others[0]), model(others[0]))
    more = recover(loaded, twins[1], batches(4, 0), steps=2)  # as loaded, once more
    assert record(loaded).report.recovery == more


@pytest.mark.parametrize("padded", [False, True])
def test_language_models_recover(language_directory, padded):
    dense = AutoModelForCausalLM.from_pretrained(language_directory, dtype=torch.float32).eval()
    model = copy.deepcopy(dense)
    ids = torch.randint(0, 300, (24, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[::2, 8:] = 0
    data = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]
    ov.compress(model, data, rate=0.6, iterations=10, refit=False)
    done = recover(model, dense, data, steps=STEPS)
    assert all(block.after <= block.before for block in done.blocks)
    assert done.blocks[0].after < done.blocks[0].before
    assert (done.samples, done.held_out) == (20, 4)


class Gate(nn.Module):
    """A branch's weight and bias, of no dimension, as ReZero and Fixup have them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.bias = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.bias


def test_a_parameter_without_dimensions_is_trained_too(twins):
    dense = copy.deepcopy(twins[1])
    for block in dense.blocks:
        block.ls1 = Gate()
    model = copy.deepcopy(dense)
    ov.compress(model, batches(4, 0), rate=0.6, iterations=10, refit=False)
    recover(model, dense, batches(4, 0), steps=STEPS)
    moved = [abs(float(block.ls1.weight.detach()) - 0.5) for block in model.blocks]
    assert 0 < max(moved) < 0.05


def test_padding_does_not_decide_how_long_steps_are(language_directory, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(block_training, "layer_sizes", lambda layer, scale: seen.append(scale) or {})
    dense = AutoModelForCausalLM.from_pretrained(language_directory, dtype=torch.float32).eval()
    ids = torch.randint(1, 300, (24, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    model = copy.deepcopy(dense)
    ov.compress(model, ids[:, :8].split(4), rate=0.6, iterations=10, refit=False)
    for last in (0, 7):  # tokens of the padding
        ids[:, 8:] = last
        data = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]
        recover(copy.deepcopy(model), dense, data, steps=1)
    for one, other in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        torch.testing.assert_close(one, other)


def test_what_cannot_be_recovered_is_refused_in_a_line(model, twins, tiny_vit):
    dense, data = twins[1], batches(4, 0)
    with pytest.raises(ConfigError, match="steps must be a whole number from 1 on, got 0"):
        recover(model, dense, data, steps=0)
    with pytest.raises(ModelError, match="is not compressed"):
        recover(copy.deepcopy(dense), dense, data, steps=1)
    with pytest.raises(ModelError, match="`dense` has compressed layers"):
        recover(model, model, data, steps=1)
    with pytest.raises(DataError, match="a batch to train on and another one to judge by"):
        recover(model, dense, data[:1], steps=1)
    shuffled = torch.utils.data.DataLoader(torch.cat(data), batch_size=8, shuffle=True)
    with pytest.raises(DataError, match="not the same when they are read again"):
        recover(model, dense, shuffled, steps=1)
    sliced = copy.deepcopy(tiny_vit)
    ov.compress(sliced, data, method="slicegpt", rate=0.3)
    with pytest.raises(ModelError, match="slicegpt leaves none"):
        recover(sliced, tiny_vit, data, steps=1)
    few_bits = copy.deepcopy(tiny_vit)
    ov.compress(few_bits, data, method="rtn")
    with pytest.raises(ConfigError, match=r"and the model's are rounded \(rtn, int4 in groups of 64\)"):
        recover(few_bits, tiny_vit, data, steps=1)
    with pytest.raises(ConfigError, match="recover is for methods that keep"):
        ov.compress(tiny_vit, data, method="slicegpt", rate=0.3, recover=1)
    with pytest.raises(ConfigError, match="recover must be a whole number of steps from 0 on, got -1"):
        ov.compress(tiny_vit, data, recover=-1)
    with pytest.raises(ModelError, match="`dense` is another model"):
        recover(model, timm.create_model("vit_tiny_patch16_224", depth=1), data, steps=1)


def test_large_batches_are_split_for_the_steps(model, twins, monkeypatch):
    monkeypatch.setattr(recovery, "BATCH", 8)
    done = recover(model, twins[1], [torch.cat(batches(4, 0))], steps=2)
    assert (done.samples, done.held_out) == (24, 8)


def test_compress_measures_the_one_shot_model_first(twins):
    model = copy.deepcopy(twins[1])
    data = (batch for batch in batches(4, 0))
    result = ov.compress(model, data, held_out=batches(2, 1), rate=0.6, iterations=10, refit=False, recover=STEPS)
    before, after = (cost.metrics[-1] for cost in (result.one_shot, result.cost))
    assert before.name == after.name == "relative error of features"
    assert after.value < before.value
    assert "one shot, before recovery" in str(result)
    assert "Recovered by 20 steps a block on 24 samples, judged by 8 others" in str(result)
    assert result.to_dict()["recovery"]["steps"] == STEPS
    assert result.to_dict()["one_shot"]["cost"]["metrics"][-1]["value"] == before.value
