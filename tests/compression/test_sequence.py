"""Linears compressed one after another, each aimed at the dense model's outputs, against plain restatements."""

import copy

import pytest
import timm
import torch
import transformers
from torch import nn

import oats_vision as ov
from oats_vision.compression import methods
from oats_vision.compression.methods.magnitude import Magnitude
from tests.helpers.on_ranks import tiny_llama

OPTIONS = {"rate": 0.5, "rank_ratio": 0.0}


@pytest.fixture
def aimed_at():
    """The weights that a method is given to decompose, which keeps the largest of each; by calls in order."""
    found: list[torch.Tensor] = []

    @methods.register
    class Noting(Magnitude):
        name = "noting"

        def decompose(self, weight, statistic, budget, settings):
            found.append(weight.detach().clone())
            return super().decompose(weight, statistic, budget, settings)

    yield found
    methods.unregister("noting")


def vit(gain: float) -> nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", init_values=gain, **args).double().eval()
    for name, parameter in model.named_parameters():
        if "ls" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


class Seen:
    """What passes a module: its last inputs."""

    def __init__(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.note)

    def note(self, module, args) -> None:
        self.x = args[0].detach().clone()


@pytest.mark.parametrize("gain", [0.001, 0.05, 1.0, 10.0])  # of LayerScale
@torch.no_grad()
def test_each_target_is_that_of_the_formula_whatever_the_layer_scale(aimed_at, gain):
    model = vit(gain)
    dense = copy.deepcopy(model)
    pictures = list(torch.randn(12, 3, 16, 16, dtype=torch.float64).split(5))
    report = ov.compress(model, pictures, method="noting", targets=True, **OPTIONS).report
    names = [layer.name for layer in report.layers]
    linears = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert names == [f"blocks.{i}.{linear}" for i in range(2) for linear in linears]

    ours = copy.deepcopy(dense)  # compressed again, linear by linear, as the report's layers were
    targets = iter(aimed_at)
    x, y = torch.cat(pictures), torch.cat(pictures)
    for name in names:
        block = name.rpartition(".")[0].rpartition(".")[0]
        pairs = []
        for one, batch in ((ours, x), (dense, y)):
            one = copy.deepcopy(one)
            seen = Seen(one.get_submodule(name))
            stream = Seen(one.get_submodule(block if "attn" in name else f"{block}.norm2"))
            one(batch)
            pairs.append((seen.x.flatten(0, 1), stream.x.flatten(0, 1)))
        (z, r), (z_dense, r_dense) = pairs
        W = dense.get_submodule(name).weight
        wanted = z_dense @ W.T
        if name.endswith(("proj", "fc2")):
            wanted = wanted + (r_dense - r) / gain
        squares = z.square().mean(0)
        level = squares.clamp_max(10 * squares.median()).mean()
        root = (0.03 * len(z) * level).sqrt() * torch.eye(len(squares), dtype=z.dtype)
        solution = torch.linalg.lstsq(torch.cat([z, root]), torch.cat([wanted, root @ W.T])).solution.T
        parts = 3 if name.endswith("qkv") else 1
        found = torch.cat([next(targets) for _ in range(parts)])
        torch.testing.assert_close(found, solution, rtol=1e-5, atol=1e-6 * float(solution.abs().max()))
        ours.get_submodule(name).weight.copy_(model.get_submodule(name).dense_weight())
    assert next(targets, None) is None


@torch.no_grad()
def test_on_text_more_must_be_known_before_a_target_moves(aimed_at):
    model = tiny_llama().double()
    dense, text = copy.deepcopy(model), torch.randint(0, 50, (4, 64))
    names = [layer.name for layer in ov.compress(model, [text], method="noting", targets=True, **OPTIONS).report.layers]
    name = "model.layers.1.mlp.gate_proj"  # reads another stream than in the dense model, and does not write to it
    pairs = []
    for one in (model, dense):
        seen = Seen(one.get_submodule(name))
        one(text)
        pairs.append(seen.x.flatten(0, 1))
    x, x_dense = pairs
    W = dense.get_submodule(name).weight
    squares = x.square().mean(0)
    root = (1.0 * len(x) * squares.clamp_max(10 * squares.median()).mean()).sqrt() * torch.eye(len(squares)).double()
    solution = torch.linalg.lstsq(torch.cat([x, root]), torch.cat([x_dense @ W.T, root @ W.T])).solution.T
    torch.testing.assert_close(aimed_at[names.index(name)], solution, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_a_layer_scale_of_nothing_asks_for_nothing(dtype):
    model = vit(1.0).to(dtype)
    for block in model.blocks:
        block.ls1.gamma[::2] = 0.0
        block.ls2.gamma[:] = 0.0
        block.ls1.gamma[1] = 2e-7  # what is lost, divided by this, overflows 16 bits
    pictures = list(torch.randn(12, 3, 16, 16).to(dtype).split(5))
    wanted = model(pictures[0]).float()
    ov.compress(model, pictures, rate=0.3, storage_dtype="float32")
    found = model(pictures[0]).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("memory", [8.0, 1e-5])  # everything waits in memory; nearly nothing does
def test_batches_that_do_not_fit_into_memory_change_nothing(tiny_vit, pictures, memory, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    other = copy.deepcopy(tiny_vit)
    ov.compress(tiny_vit, pictures, rate=0.5)
    ov.compress(other, pictures, rate=0.5, activation_memory=memory)
    for (name, one), two in zip(tiny_vit.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_no_gram_is_gathered_twice_for_linears_that_read_the_same(language_directory, monkeypatch):
    from oats_vision.calibration.statistics import Gram

    gathered = []
    update = Gram.update

    def counting(self, inputs, mask=None):
        gathered.append(inputs.shape[-1])
        update(self, inputs, mask)

    monkeypatch.setattr(Gram, "update", counting)
    model = transformers.AutoModelForCausalLM.from_pretrained(language_directory, dtype=torch.float32).eval()
    ov.compress(model, [torch.randint(0, 300, (4, 16))], rate=0.5, sensitivity=False)
    # in each of two blocks: q, k and v; o; gate and up; down
    assert gathered == 2 * [48, 48, 48, 96]


def test_each_part_of_a_block_runs_once_in_each_stream(tiny_vit, pictures):
    runs = []
    tiny_vit.blocks[2].mlp.act = torch.nn.ReLU()  # in the first two it is a GELU
    for i, block in enumerate(tiny_vit.blocks):
        block.mlp.act.register_forward_hook(lambda *_, i=i: runs.append(i))
    ov.compress(tiny_vit, pictures, rate=0.5, sensitivity=False)
    # the first batch runs through the whole dense model, and alone to see how blocks of a kind use their stream; then
    # both batches once in each of the two streams
    assert [runs.count(i) for i in range(3)] == [2 + 2 * len(pictures), 1 + 2 * len(pictures), 2 + 2 * len(pictures)]


@torch.no_grad()
def test_targets_go_without_a_stream_that_is_not_used_as_the_family_says(tiny_vit, pictures, caplog):
    caplog.set_level("INFO", "oats_vision")
    for block in tiny_vit.blocks:
        block.ls2.register_forward_hook(lambda module, args, output: 2 * output)  # beside its gain
    wanted = tiny_vit(pictures[0])
    ov.compress(tiny_vit, pictures, rate=0.2, sensitivity=False)
    told = [line for line in caplog.messages if "no linear writes to the residual stream" in line]
    assert len(told) == len(tiny_vit.blocks)
    assert float((tiny_vit(pictures[0]) - wanted).norm() / wanted.norm()) < 0.3


def test_what_is_left_dense_is_passed(tiny_vit, pictures):
    result = ov.compress(tiny_vit, pictures, rate=0.5, skip=("*.attn.proj", "blocks.1"))
    names = [layer.name for layer in result.report.layers]
    assert names == [f"blocks.{i}.{linear}" for i in (0, 2) for linear in ("attn.qkv", "mlp.fc1", "mlp.fc2")]


@pytest.mark.parametrize("padded", [False, True])
def test_text_with_padding(language_directory, padded):
    model = transformers.AutoModelForCausalLM.from_pretrained(language_directory, dtype=torch.float32).eval()
    ids = torch.randint(0, 300, (6, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[:, 12:] = 0
        batch["attention_mask"] = mask
        other = {"input_ids": ids.clone(), "attention_mask": mask}
        other["input_ids"][:, 12:] = 7  # what padding holds does not matter
        twin = copy.deepcopy(model)
        ov.compress(twin, [other], rate=0.5)
    ov.compress(model, [batch], rate=0.5)
    if padded:
        for one, two in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two)


@torch.no_grad()
def test_both_levers_bring_the_model_closer_to_the_dense_one():
    """On inputs whose directions differ much in size, as those of real models do."""
    torch.manual_seed(0)
    dense = vit(1.0).float()
    pictures = (torch.randn(96, 1, 16, 16).repeat(1, 3, 1, 1) + 0.1 * torch.randn(96, 3, 16, 16)).split(32)
    others = torch.randn(64, 1, 16, 16).repeat(1, 3, 1, 1)
    errors = []
    for levers in ({"joint": False, "targets": False}, {"targets": False, "sensitivity": False}, {}):
        model = copy.deepcopy(dense)
        ov.compress(model, pictures, rate=0.6, rank_ratio=0.3, **levers)
        wanted = dense.forward_features(others)
        errors.append(float((model.forward_features(others) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.98 * errors[0]
    assert errors[2] < 0.98 * errors[1]
