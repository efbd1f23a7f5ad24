import pytest
import torch

import oats_vision as ov
from oats_vision.core.grid import Grid
from oats_vision.core.quantise import gptq
from tests.helpers.on_ranks import tiny_llama, tiny_vit


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("targets", [False, True])
def test_gptq_is_damped_ten_times_as_much_on_text(text, act_order, targets):
    model, name = (tiny_llama(), "model.layers.0.self_attn.q_proj") if text else (tiny_vit(), "blocks.0.attn.qkv")
    batch = torch.randint(0, 50, (4, 64)) if text else torch.randn(16, 3, 32, 32)
    layer, seen = model.get_submodule(name), []
    W = layer.weight.detach().clone()
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        model(batch)
    handle.remove()
    x = seen[0].double()
    result = ov.compress(
        model, [batch], method="gptq", values="int3", group_size=16, act_order=act_order, targets=targets
    )
    found = ov.merge(result.model).get_submodule(name).weight
    G, grid = x.T @ x / len(x), Grid(3, 16)
    equal = {
        share: (found - gptq(W, G, grid, act_order=act_order, damping=share).dense()).abs().lt(1e-5).double().mean()
        for share in (0.01, 0.1)
    }
    right, wrong = (0.1, 0.01) if text else (0.01, 0.1)
    assert equal[right] > 0.9 > equal[wrong]  # the layer's moments are summed in float32: single values may differ
