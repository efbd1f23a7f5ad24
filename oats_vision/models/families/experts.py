"""Mixture-of-experts layers of transformers, with linears that can be seen and replaced one by one."""

from typing import Any

import torch
from torch import Tensor, nn


class SeparateExperts(nn.ModuleList):
    """Experts that transformers holds in two 3-d parameters, each with linears of its own.

    Expert e has `gate_up_proj` (2 x intermediate, hidden), gate above up, and `down_proj` (hidden, intermediate).
    """

    def __init__(self, fused: Any) -> None:
        """Take the weights over; `fused` is left without any."""
        super().__init__(
            nn.ModuleDict({"gate_up_proj": _linear(gate_up), "down_proj": _linear(down)})
            for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True)
        )
        for name in ("gate_up_proj", "down_proj"):
            setattr(fused, name, nn.Parameter(getattr(fused, name).to("meta"), requires_grad=False))
        self._fused = [fused]  # in a list, so that it is not a submodule

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden), each token through its experts (tokens, k), their outputs weighted and summed."""
        out, activation = torch.zeros_like(hidden_states), self._fused[0].act_fn
        for e in top_k_index.unique().tolist():
            if e >= len(self):  # transformers' mark for a token that goes nowhere
                continue
            expert: Any = self[e]
            token, k = torch.where(top_k_index == e)
            gate, up = expert["gate_up_proj"](hidden_states[token]).chunk(2, dim=-1)
            y = expert["down_proj"](activation(gate) * up) * top_k_weights[token, k, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def fuse(self) -> nn.Module:
        """The module of transformers again, with the weights of (merged) linears."""
        fused: nn.Module = self._fused[0]
        for name in ("gate_up_proj", "down_proj"):
            experts: list[Any] = list(self)
            weight = torch.stack([expert[name].weight.detach() for expert in experts])
            setattr(fused, name, nn.Parameter(weight, requires_grad=False))
        return fused


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return linear


def are_fused(module: nn.Module) -> bool:
    """Whether a module holds its experts in two parameters, as transformers does."""
    return type(module).__name__.endswith("Experts") and isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
