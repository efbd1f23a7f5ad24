"""Causal language models of Hugging Face: decoders and mixtures of experts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from oats_vision.models.adapters.base import Adapter, Residual, blocks_of_class
from oats_vision.models.adapters.experts import fuse_experts, separate_experts
from oats_vision.models.aliases import SERVES

LLAMA = Residual(
    "input_layernorm", "self_attn", ("self_attn.o_proj",), "post_attention_layernorm", "mlp", ("mlp.down_proj",)
)
GPT2 = Residual("ln_1", "attn", ("attn.c_proj",), "ln_2", "mlp", ("mlp.c_proj",))


@dataclass(frozen=True)
class Family:
    """One family, known by the class of its blocks.

    residual: for SliceGPT; None where its algebra does not hold (Gemma's norms add 1 to their weights, GPT-NeoX
        runs attention and MLP side by side, OPT's MLP is no module of its own).
    prepare, restore: as in `Adapter`.
    fused: as in `Adapter`. GPT-NeoX's query_key_value is not here: its q, k and v alternate head by head.
    """

    name: str
    residual: Residual | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] = lambda model: None
    restore: Callable[[nn.Module], None] = lambda model: None


def _qkv_rows(block: nn.Module, linear: str) -> tuple[int, ...] | None:
    """Phi-3's q is higher than its k and v where several queries share a key."""
    if linear != "self_attn.qkv_proj":
        return None
    attention: Any = block.get_submodule("self_attn")
    queries = attention.config.num_attention_heads * attention.head_dim
    keys = attention.config.num_key_value_heads * attention.head_dim
    return queries, keys, keys


@torch.no_grad()
def _linears(model: nn.Module) -> None:
    """GPT-2 stores its weights transposed, in a class of its own."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.in_features, linear.out_features = module.weight.shape
            linear.weight = nn.Parameter(module.weight.T.contiguous(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)


@torch.no_grad()
def _transposed(model: nn.Module) -> None:
    """The inverse of `_linears`, for a checkpoint that transformers reads."""
    from transformers.pytorch_utils import Conv1D

    for _, block in model.get_submodule(_path(model, "GPT2Block")).named_children():
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                conv = Conv1D(module.out_features, module.in_features)
                conv.weight = nn.Parameter(module.weight.T.contiguous(), requires_grad=False)
                conv.bias = module.bias
                block.set_submodule(name, conv)


def _path(model: nn.Module, block_class: str) -> str:
    return blocks_of_class(model, block_class) or ""


def _mixture(name: str) -> Family:
    """A family whose MLPs are experts that share two parameters."""
    fused = {"mlp.experts.gate_up_proj": ("gate", "up")}
    return Family(name, None, fused, separate_experts, fuse_experts)


FAMILIES = {
    "LlamaDecoderLayer": Family("lm_llama", LLAMA),
    "MistralDecoderLayer": Family("lm_mistral", LLAMA),
    "Qwen2DecoderLayer": Family("lm_qwen2", LLAMA),
    "Qwen3DecoderLayer": Family("lm_qwen3", LLAMA),
    "Phi3DecoderLayer": Family(
        "lm_phi3",
        LLAMA,
        {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
    ),
    "GemmaDecoderLayer": Family("lm_gemma"),
    "OPTDecoderLayer": Family("lm_opt"),
    "GPT2Block": Family("lm_gpt2", GPT2, {"attn.c_attn": ("q", "k", "v")}, _linears, _transposed),
    "GPTNeoXLayer": Family("lm_gpt_neox"),
    "MixtralDecoderLayer": _mixture("lm_mixtral"),
    "Qwen3MoeDecoderLayer": _mixture("lm_qwen3_moe"),
    "OlmoeDecoderLayer": _mixture("lm_olmoe"),
}


def _adapter(block_class: str, family: Family) -> Adapter:
    return Adapter(
        name=family.name,
        serves=SERVES[family.name],
        matches=lambda model: hasattr(model, "lm_head") and blocks_of_class(model, block_class) is not None,
        blocks=lambda model: _path(model, block_class),
        fused=family.fused,
        rows=_qkv_rows if block_class == "Phi3DecoderLayer" else lambda block, linear: None,
        prepare=family.prepare,
        restore=family.restore,
        residual=family.residual,
        unit="sequences",
    )


ADAPTERS = [_adapter(block_class, family) for block_class, family in FAMILIES.items()]
