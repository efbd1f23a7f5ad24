import pytest
import torch

import oats_vision as ov
from oats_vision.compression.methods.sparsegpt import sparsegpt
from oats_vision.core.budget import Allocation, Pattern
from oats_vision.core.grid import Grid
from oats_vision.core.quantise import gptq
from tests.helpers.on_ranks import tiny_llama, tiny_vit


@torch.no_grad()
def _weight_and_inputs(model, name, batch):
    """Of a linear: (out_features, in_features), and (tokens, in_features) in float64."""
    layer, seen = model.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).double()))
    model(batch)
    handle.remove()
    return layer.weight.clone(), seen[0]


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("targets", [False, True])
def test_gptq_is_damped_ten_times_as_much_on_text(text, act_order, targets):
    model, name = (tiny_llama(), "model.layers.0.self_attn.q_proj") if text else (tiny_vit(), "blocks.0.attn.qkv")
    batch = torch.randint(0, 50, (4, 64)) if text else torch.randn(16, 3, 32, 32)
    W, x = _weight_and_inputs(model, name, batch)
    result = ov.compress(
        model, [batch], method="gptq", values="int3", group_size=16, act_order=act_order, targets=targets
    )
    found = ov.merge(result.model).get_submodule(name).weight
    G, grid = x.T @ x / len(x), Grid(3, 16)
    G.diagonal().add_(0.01 * G.diagonal().median())
    equal = {
        share: (found - gptq(W, G, grid, act_order=act_order, damping=share).dense()).abs().lt(1e-5).double().mean()
        for share in (0.01, 0.1)
    }
    right, wrong = (0.1, 0.01) if text else (0.01, 0.1)
    assert equal[right] > 0.9 > equal[wrong]  # the layer's moments are summed in float32: single values may differ


@pytest.mark.parametrize(("values", "right", "wrong"), [("int4", 0.1, 0.01), (None, 0.01, 0.1)])
def test_sparsegpt_is_damped_as_gptq_where_it_rounds(values, right, wrong):
    model, name, batch = tiny_llama(), "model.layers.0.self_attn.q_proj", torch.randint(0, 50, (4, 64))
    W, x = _weight_and_inputs(model, name, batch)
    G, grid = x.T @ x / len(x), Grid(4, 16) if values else None
    if grid:
        G.diagonal().add_(0.01 * G.diagonal().median())
    options = {"values": values, "group_size": 16} if values else {}
    result = ov.compress(model, [batch], method="sparsegpt", rate=0.5, pattern="row", **options)
    found = ov.merge(result.model).get_submodule(name).weight
    budget = Allocation(0.5, 0.0, Pattern.parse("row"), grid).budget(*W.shape)
    equal = {
        share: (found - sparsegpt(W, G, budget, damping=share).S).abs().lt(1e-5).double().mean()
        for share in (right, wrong)
    }
    assert equal[right] > 0.9 > equal[wrong]


@pytest.mark.parametrize("method", ["gptq", "sparsegpt", "oats"])
def test_an_input_that_is_hardly_active_does_not_take_the_levels_of_its_group(method):
    """One that goes with the others could make up for what they lose, by weights many times as large as theirs."""
    model, name = tiny_llama(), "model.layers.0.mlp.gate_proj"
    W = model.get_submodule(name).weight.detach().clone()
    table, block = model.model.embed_tokens.weight.data, model.model.layers[0]
    table[:, 31] = table[:, :31].sum(1)
    block.self_attn.o_proj.weight.data.zero_()
    block.post_attention_layernorm.weight.data[31] = 1e-4
    batch = torch.randint(0, 50, (4, 64))
    rate = {} if method == "gptq" else {"rate": 0.3}
    result = ov.compress(model, [batch], method=method, values="int4", group_size=16, **rate)
    found = ov.merge(result.model).get_submodule(name).weight.detach()
    assert found[:, 31].abs().max() < 3 * W.abs().max()
