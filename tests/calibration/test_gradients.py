import pytest
import timm
import torch
import transformers
from torch import nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import capture_block_calls
from oats_vision.calibration.gradients import output_sensitivity
from oats_vision.calibration.sensitivity import DAMPING, FLOOR, OutputGradients
from oats_vision.models.record import structure_of

PROJECTIONS = 200  # the estimate's deviation is about 1 / sqrt(projections * samples)


def captured(model, batches):
    """A prepared model's structure, its linears by block, and how its blocks are called."""
    structure = structure_of(model)
    structure.prepare(model)
    blocks = structure.named_blocks(model)
    linears = {name: [linear for linear, _ in structure.named_linears(block)] for name, block in blocks}
    with torch.no_grad(), ActivationStore(1e9) as hidden:
        calls = capture_block_calls(model, blocks, batches, hidden, structure.family.unit)
    return structure, linears, calls


@torch.no_grad()
def shaken(model, name, output, batches, see, step=1e-3):
    """The sum over tokens of |dy / d output|^2 at one output of a linear, mean over samples, by finite differences."""
    linear = model.get_submodule(name)
    dense = [see(model(x)) for x in batches]
    total, tokens, samples = 0.0, [0], sum(map(len, batches))
    handle = linear.register_forward_hook(lambda module, args, y: tokens.__setitem__(0, y.shape[1]))
    model(batches[0])
    handle.remove()
    for token in range(tokens[0]):

        def shake(module, args, y, token=token):
            y = y.clone()
            y[:, token, output] += step
            return y

        handle = linear.register_forward_hook(shake)
        total += sum(float((see(model(x)) - y).square().sum()) for x, y in zip(batches, dense, strict=True))
        handle.remove()
    return total / step**2 / samples


@pytest.mark.slow
def test_of_features_it_is_what_finite_differences_give():
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **args).double().eval()
    batches = list(torch.randn(6, 3, 16, 16, dtype=torch.float64).split(4))
    found = output_sensitivity(model, *captured(model, batches), projections=PROJECTIONS)
    for name, output in (("blocks.0.attn.qkv", 30), ("blocks.0.mlp.fc1", 5), ("blocks.1.mlp.fc2", 3)):
        expected = shaken(model, name, output, batches, lambda y: model.norm(y), step=1e-4)
        assert found[name][output] == pytest.approx(expected, rel=0.2)


def test_of_a_head_it_is_the_fisher_information_of_the_probabilities():
    """Half of it times a small step's square is the Kullback-Leibler divergence; the last block's MLP acts directly."""
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **args).double().eval()
    nn.init.normal_(model.head.weight, std=0.3)
    batches = list(torch.randn(6, 3, 16, 16, dtype=torch.float64).split(4))
    found = output_sensitivity(model, *captured(model, batches), projections=PROJECTIONS)["blocks.0.mlp.fc2"]
    step = 1e-3
    for output in (0, 7):

        def shake(module, args, y, output=output):
            return y + step * nn.functional.one_hot(torch.tensor(output), y.shape[-1])

        with torch.no_grad():
            dense = torch.cat([model(x) for x in batches]).log_softmax(-1)
            handle = model.blocks[0].mlp.fc2.register_forward_hook(shake)
            ours = torch.cat([model(x) for x in batches]).log_softmax(-1)
            handle.remove()
        divergence = (dense.exp() * (dense - ours)).sum(-1).mean()
        assert found[output] == pytest.approx(float(2 * divergence / step**2), rel=0.2)


def test_language_models_batches_of_padding_and_seeds(language_directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(language_directory, dtype=torch.float32).eval()
    ids, mask = torch.randint(0, 300, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    structure, linears, calls = captured(model, [{"input_ids": ids, "attention_mask": mask}])
    first, again = (output_sensitivity(model, structure, linears, calls, seed=1) for _ in range(2))
    other = output_sensitivity(model, structure, linears, calls, seed=2)
    assert len(first) == sum(map(len, linears.values()))
    assert all((total > 0).any() and total.isfinite().all() for total in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.is_grad_enabled()  # as it was before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_final_norm_may_also_be_seen_of_earlier_blocks():
    """As where a model gives the normed features of several blocks."""
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **args).eval()
    pictures = [torch.randn(4, 3, 16, 16)]
    alone = output_sensitivity(model, *captured(model, pictures))
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, y: seen.append(model.norm(y)))
    beside = output_sensitivity(model, *captured(model, pictures))
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


@torch.no_grad()
def test_samples_beyond_those_that_gradients_are_taken_on_do_not_count():
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **args).double().eval()
    pictures = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    few = output_sensitivity(model, *captured(model, [pictures[:4]]))
    structure, linears, calls = captured(model, [pictures])
    calls.gradient_samples = 4
    found = output_sensitivity(model, structure, linears, calls)
    for name in few:
        torch.testing.assert_close(found[name], few[name])


def test_correlations_are_those_of_gradients_through_the_whole_model():
    """With the same random signs; a fused weight's parts apart."""
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **args).double().eval()
    batches = list(torch.randn(6, 3, 16, 16, dtype=torch.float64).split(4))
    structure, linears, calls = captured(model, batches)
    parts = {}
    for block, names in linears.items():
        rows = {name: model.get_submodule(f"{block}.{name}").out_features for name in names}
        parts[block] = {name: [12] * 3 if name == "attn.qkv" else [count] for name, count in rows.items()}
    with torch.no_grad():
        found = OutputGradients(model, structure, parts, calls, memory=1e9, working=0.0)  # hidden states on disk

    outputs = {}
    for block, names in linears.items():
        for name in names:
            full = f"{block}.{name}"
            model.get_submodule(full).register_forward_hook(lambda module, x, y, full=full: outputs.update({full: y}))
    signs = [
        torch.randint(0, 2, (5, 12), generator=torch.Generator().manual_seed(number)) * 2 - 1 for number in range(6)
    ]
    with torch.enable_grad():
        y = model.forward_features(torch.cat(batches).requires_grad_())  # after the final norm
        gradients = torch.autograd.grad((y * torch.stack(signs)).sum(), list(outputs.values()))
    for full, gradient in zip(outputs, gradients, strict=True):
        rows = gradient.flatten(0, -2)
        torch.testing.assert_close(found.squares[full], rows.square().sum(0) / 6, rtol=1e-4, atol=1e-9)
        size = 12 if full.endswith("qkv") else rows.shape[1]
        for of_part, known in zip(rows.split(size, 1), found.correlations(full), strict=True):
            G = of_part.T @ of_part
            G = G / G.diagonal().mean() + FLOOR * torch.eye(size)
            d = G.diagonal().sqrt()
            torch.testing.assert_close(known.d.double(), d, rtol=1e-4, atol=1e-6)
            C = known.C.times(torch.eye(size)).double()
            torch.testing.assert_close(C, G / d / d[:, None] + DAMPING * torch.eye(size), rtol=1e-4, atol=1e-5)
