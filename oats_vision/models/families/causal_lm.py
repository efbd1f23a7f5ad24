"""Causal language models of Hugging Face: decoders and mixtures of experts.

SliceGPT's algebra does not hold for those without a `residual`: Gemma's norms add 1 to their weights, GPT-NeoX runs
attention and MLP side by side, OPT's MLP is not a module of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from oats_vision.models.families.base import Fused, Residual
from oats_vision.models.families.hf_family import HuggingFaceFamily
from oats_vision.models.families.registry import shipped

if TYPE_CHECKING:
    from torch import nn

SERVES = "Hugging Face causal language models: "
LLAMA = Residual(
    "input_layernorm", "self_attn", ("self_attn.o_proj",), "post_attention_layernorm", "mlp", ("mlp.down_proj",)
)


class CausalLM(HuggingFaceFamily):
    """What all have in common."""

    unit = "sequences"

    def matches(self, model: nn.Module) -> bool:
        return hasattr(model, "lm_head") and super().matches(model)


@shipped
class Llama(CausalLM):
    name = "lm_llama"
    serves = f"{SERVES}Llama, SmolLM and others of class Llama*"
    block_class = "LlamaDecoderLayer"
    residual = LLAMA


@shipped
class Mistral(CausalLM):
    name = "lm_mistral"
    serves = f"{SERVES}Mistral"
    block_class = "MistralDecoderLayer"
    residual = LLAMA


@shipped
class Qwen2(CausalLM):
    name = "lm_qwen2"
    serves = f"{SERVES}Qwen2 and Qwen2.5"
    block_class = "Qwen2DecoderLayer"
    residual = LLAMA


@shipped
class Qwen3(CausalLM):
    name = "lm_qwen3"
    serves = f"{SERVES}Qwen3"
    block_class = "Qwen3DecoderLayer"
    residual = LLAMA


@shipped
class Phi3(CausalLM):
    name = "lm_phi3"
    serves = f"{SERVES}Phi-3 and Phi-4"
    block_class = "Phi3DecoderLayer"
    fused: ClassVar[Fused] = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
    residual = LLAMA

    def rows(self, block: nn.Module, linear: str) -> tuple[int, ...] | None:
        """q is higher than k and v where several queries share a key."""
        if linear != "self_attn.qkv_proj":
            return None
        attention: Any = block.get_submodule("self_attn")
        queries = attention.config.num_attention_heads * attention.head_dim
        keys = attention.config.num_key_value_heads * attention.head_dim
        return queries, keys, keys


@shipped
class Gemma(CausalLM):
    name = "lm_gemma"
    serves = f"{SERVES}Gemma"
    block_class = "GemmaDecoderLayer"


@shipped
class Opt(CausalLM):
    name = "lm_opt"
    serves = f"{SERVES}OPT"
    block_class = "OPTDecoderLayer"


@shipped
class GPT2(CausalLM):
    """It stores its weights transposed, in a class of its own."""

    name = "lm_gpt2"
    serves = f"{SERVES}GPT-2"
    block_class = "GPT2Block"
    fused: ClassVar[Fused] = {"attn.c_attn": ("q", "k", "v")}
    residual = Residual("ln_1", "attn", ("attn.c_proj",), "ln_2", "mlp", ("mlp.c_proj",))

    def to_replace(self, model: nn.Module) -> list[str]:
        from transformers.pytorch_utils import Conv1D

        return [name for name, module in model.named_modules() if isinstance(module, Conv1D)]

    def replacement(self, module: nn.Module) -> nn.Module:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        if not isinstance(module, Conv1D):
            return module
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = module.weight.shape
        linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
        linear.bias = module.bias
        return linear

    def original(self, replacement: nn.Module, model: nn.Module) -> nn.Module:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        if type(replacement) is not nn.Linear:
            return replacement
        conv: nn.Module = Conv1D(replacement.out_features, replacement.in_features)
        conv.weight = nn.Parameter(replacement.weight.detach().T.contiguous(), requires_grad=False)
        conv.bias = replacement.bias
        return conv


@shipped
class GPTNeoX(CausalLM):
    """Its query_key_value is not `fused`: its q, k and v alternate head by head."""

    name = "lm_gpt_neox"
    serves = f"{SERVES}GPT-NeoX and Pythia"
    block_class = "GPTNeoXLayer"


class Mixture(CausalLM):
    """A family whose MLPs are experts that share two parameters."""

    fused: ClassVar[Fused] = {"mlp.experts.gate_up_proj": ("gate", "up")}

    def to_replace(self, model: nn.Module) -> list[str]:
        from oats_vision.models.families.experts import are_fused

        return [name for name, module in model.named_modules() if are_fused(module)]

    def replacement(self, module: nn.Module) -> nn.Module:
        from oats_vision.models.families.experts import SeparateExperts, are_fused

        return SeparateExperts(module) if are_fused(module) else module

    def original(self, replacement: nn.Module, model: nn.Module) -> nn.Module:
        from oats_vision.models.families.experts import SeparateExperts

        return replacement.fuse() if isinstance(replacement, SeparateExperts) else replacement


@shipped
class Mixtral(Mixture):
    name = "lm_mixtral"
    serves = f"{SERVES}Mixtral"
    block_class = "MixtralDecoderLayer"


@shipped
class Qwen3Moe(Mixture):
    name = "lm_qwen3_moe"
    serves = f"{SERVES}Qwen3 mixtures of experts"
    block_class = "Qwen3MoeDecoderLayer"


@shipped
class Olmoe(Mixture):
    name = "lm_olmoe"
    serves = f"{SERVES}OLMoE"
    block_class = "OlmoeDecoderLayer"
