"""Causal language models by the same core: every family, tiny and randomly initialised, of its real class."""

import copy
import json
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import oats_vision as ov
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import capture_block_calls
from oats_vision.compression.slicing import plan_slicing, slice_blocks
from oats_vision.errors import DataError, ModelError
from oats_vision.models.loading.load import save_plain, source_of
from oats_vision.models.record import structure_of

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OPT = SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 48}
CASES = {
    "llama": ("lm_llama", hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED | {"attention_bias": True}),
    "llama tied": ("lm_llama", hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("lm_mistral", hf.MistralForCausalLM, hf.MistralConfig, GROUPED | {"sliding_window": 6}),
    "qwen2": ("lm_qwen2", hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED),
    "qwen3": ("lm_qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED | {"head_dim": 16}),
    "phi3": ("lm_phi3", hf.Phi3ForCausalLM, hf.Phi3Config, GROUPED),
    "gemma": ("lm_gemma", hf.GemmaForCausalLM, hf.GemmaConfig, GROUPED | {"head_dim": 16}),
    "opt": ("lm_opt", hf.OPTForCausalLM, hf.OPTConfig, OPT),
    "gpt2": ("lm_gpt2", hf.GPT2LMHeadModel, hf.GPT2Config, GPT2),
    "mixtral": ("lm_mixtral", hf.MixtralForCausalLM, hf.MixtralConfig, GROUPED | {"num_local_experts": 4}),
    "qwen3 moe": ("lm_qwen3_moe", hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, EXPERTS),
    "olmoe": ("lm_olmoe", hf.OlmoeForCausalLM, hf.OlmoeConfig, GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "pythia": ("lm_gpt_neox", hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, SIZES),
}
SLICED = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"]


def _build(case: str) -> nn.Module:
    _, kind, config, args = CASES[case]
    torch.manual_seed(0)
    model = kind(config(**args)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # not at the zeros of an untrained model
            nn.init.normal_(parameter, std=0.3)
        elif "norm" in name or "ln_" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


@pytest.fixture
def texts() -> list[torch.Tensor]:
    """Two batches of token ids."""
    return list(torch.randint(3, 101, (8, 12), generator=torch.Generator().manual_seed(1)).split(4))


@pytest.mark.parametrize("case", CASES)
def test_family_finds_all_linears_of_the_blocks_and_none_else(case):
    model = _build(case)
    structure = structure_of(model)
    assert structure.family.name == CASES[case][0]
    structure.prepare(model)
    blocks = structure.named_blocks(model)
    found = {f"{path}.{name}" for path, block in blocks for name, _ in structure.named_linears(block)}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(blocks) == 2
    assert linears - found == {"lm_head"}
    parts = {
        name: dict(structure.parts(blocks[0][1], name, linear))
        for name, linear in structure.named_linears(blocks[0][1])
    }
    if case == "phi3":
        assert parts["self_attn.qkv_proj"] == {"q": 48, "k": 24, "v": 24}
        assert parts["mlp.gate_up_proj"] == {"gate": 96, "up": 96}
    if case == "mixtral":
        assert parts["mlp.experts.3.gate_up_proj"] == {"gate": 96, "up": 96}
        assert parts["mlp.experts.3.down_proj"] == {"down_proj": 48}
    if case == "gpt2":
        assert parts["attn.c_attn"] == {"q": 48, "k": 48, "v": 48}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_block_by_block_run_is_the_models_own_forward(case, texts):
    model = _build(case)
    padding = torch.ones_like(texts[1])
    padding[:2, :3] = 0
    batches = [texts[0], {"input_ids": texts[1], "attention_mask": padding}]
    with torch.no_grad():
        expected = [
            model(texts[0], output_hidden_states=True).hidden_states,
            model(**batches[1], output_hidden_states=True).hidden_states,
        ]
    structure = structure_of(model)
    structure.prepare(model)
    blocks = structure.named_blocks(model)
    with ActivationStore(1e9) as hidden:
        calls = capture_block_calls(model, blocks, batches, hidden)
        for b, states in enumerate(expected):
            torch.testing.assert_close(hidden[b], states[0], rtol=1e-5, atol=1e-5)
            x = calls.run(blocks[0][1], 0, b, hidden[b])
            torch.testing.assert_close(x, states[1], rtol=1e-5, atol=1e-5)
            x = calls.run(blocks[1][1], 1, b, x)
            logits = model.lm_head(_final_norm(model)(x))
            reference = model(texts[0]).logits if b == 0 else model(**batches[1]).logits
            torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)
        assert torch.equal(calls.masks[1], padding.bool())


def _final_norm(model: nn.Module) -> nn.Module:
    names = ("model.norm", "model.decoder.final_layer_norm", "transformer.ln_f", "gpt_neox.final_layer_norm")
    modules = dict(model.named_modules())
    return next(modules[name] for name in names if name in modules)


@pytest.mark.parametrize("trust", [False, True])
def test_code_that_lies_beside_a_model_of_transformers_own_is_not_needed(texts, tmp_path, trust):
    """As in Phi-3's repositories, whose `auto_map` names the classes that transformers has by now."""
    directory, model = tmp_path / "phi3", _build("phi3")
    model.save_pretrained(directory)
    fields = json.loads((directory / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (directory / "config.json").write_text(json.dumps(fields))
    loaded, _ = ov.load_model(directory, trust_remote_code=trust)
    ov.compress(loaded, texts, rate=0.5, iterations=2)
    ov.save(loaded, tmp_path / "half")
    again = ov.load(tmp_path / "half")
    assert torch.equal(again(texts[0]).logits, loaded(texts[0]).logits)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_round_trip_generation_with_cache_and_merge(case, texts, tmp_path):
    model = _build(case)
    names = set(model.state_dict())
    report = ov.compress(model, texts, rate=0.5, iterations=5, storage_dtype="float16").report
    assert 0.4 < report.parameters / report.dense_parameters <= 0.5
    expected = model(texts[0]).logits
    ov.save(model, tmp_path / "out")
    loaded = ov.load(tmp_path / "out")
    assert torch.equal(loaded(texts[0]).logits, expected)
    if "tied" in case or loaded.config.tie_word_embeddings:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight

    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = loaded.generate(texts[0], use_cache=True, **options)
    without = loaded.generate(texts[0], use_cache=False, **options)
    assert with_cache.shape == (4, 20)
    assert torch.equal(with_cache, without)

    source = source_of(loaded)
    save_plain(ov.merge(loaded), source, torch.float32, tmp_path / "merged")
    plain = CASES[case][1].from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert set(plain.state_dict()) == names
    torch.testing.assert_close(plain(texts[0]).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_hardly_any_compression_leaves_the_outputs(case, texts):
    model = _build(case)
    expected = model(texts[0]).logits
    ov.compress(model, texts, rate=1e-6, rank_ratio=0, pattern="layer", iterations=1)
    torch.testing.assert_close(model(texts[0]).logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("case", SLICED)
def test_rotated_unsliced_model_computes_the_same(case, texts):
    """SliceGPT, Theorem 1: without a cut the rotations change nothing."""
    model = _build(case).double()
    expected = model(texts[0]).logits
    structure = structure_of(model)
    structure.prepare(model)
    with ActivationStore(1e9) as hidden:
        blocks = structure.named_blocks(model)
        calls = capture_block_calls(model, blocks, texts, hidden)
        slice_blocks(model, structure, plan_slicing(blocks, structure, None), hidden, calls)
    # the norms of transformers compute in float32, whatever the model's dtype
    torch.testing.assert_close(model(texts[0]).logits, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_sliced_language_model_is_smaller_and_generates(texts, tmp_path):
    model = _build("llama")
    report = ov.compress(model, texts, rate=0.3, method="slicegpt").report
    assert report.parameters <= 0.7 * report.dense_parameters
    ov.save(model, tmp_path / "out")
    loaded = ov.load(tmp_path / "out")
    assert torch.equal(loaded(texts[0]).logits, model(texts[0]).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = loaded.generate(texts[0], use_cache=True, **options)
    assert torch.equal(cached, loaded.generate(texts[0], use_cache=False, **options))


@pytest.mark.parametrize("case", sorted(set(CASES) - set(SLICED) - {"llama tied"}))
def test_families_that_slicegpt_cannot_take_say_so(case, texts):
    with pytest.raises(ModelError, match="does not describe"):
        ov.compress(_build(case), texts, rate=0.3, method="slicegpt")


def test_models_that_are_no_causal_decoders_are_refused(texts):
    args = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    for model in (hf.T5ForConditionalGeneration(hf.T5Config(**args)), hf.LlamaModel(hf.LlamaConfig(**GROUPED))):
        with pytest.raises(ModelError, match="no model family fits"):
            ov.compress(model, texts)
    compressed = copy.deepcopy(_build("llama"))
    ov.compress(compressed, texts, rate=0.5, iterations=2)
    with pytest.raises(ModelError, match="compressed already"):
        ov.compress(compressed, texts)


@torch.no_grad()
def test_experts_have_statistics_of_their_own(texts):
    """Only the tokens that are routed to an expert count for it, as its own inputs show."""
    model = _build("mixtral")
    seen: list[torch.Tensor] = []
    reference = copy.deepcopy(model)
    structure = structure_of(reference)
    structure.prepare(reference)
    expert = reference.model.layers[0].mlp.experts[1]["gate_up_proj"]
    expert.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in texts:
        reference(batch)
    report = ov.compress(model, texts, rate=0.5, iterations=3, quality="fast").report
    layers = {layer.name: layer for layer in report.layers}
    name = "model.layers.0.mlp.experts.1.gate_up_proj"
    assert layers[name].tokens == sum(map(len, seen))
    moment = torch.cat(seen).square().mean(0)
    W, compressed = expert.weight, model.get_submodule(name).dense_weight()
    for part, rows in {"gate": slice(0, 96), "up": slice(96, 192)}.items():
        difference = ((W - compressed)[rows].square() * moment).sum().sqrt() / (W[rows].square() * moment).sum().sqrt()
        assert layers[name].errors[part] == pytest.approx(float(difference), rel=1e-3)
    per_block = [layers[f"model.layers.0.mlp.experts.{e}.down_proj"].tokens for e in range(4)]
    assert sum(per_block) == 2 * 8 * 12  # two experts for each token


@torch.no_grad()
@pytest.mark.parametrize("budget", ["measured", "owl"])
def test_an_expert_that_no_token_goes_to_is_said_and_still_compressed(texts, caplog, budget):
    model = _build("mixtral")
    model.model.layers[0].mlp.gate.weight.zero_()  # all experts alike: the first two are taken
    report = ov.compress(model, texts, rate=0.5, iterations=3, budget=budget).report
    tokens = {layer.name: layer.tokens for layer in report.layers}
    unseen = [e for e in range(4) if not tokens[f"model.layers.0.mlp.experts.{e}.down_proj"]]
    assert len(unseen) == 2
    assert "model.layers.0: 4 of 12 linears saw fewer than 256 tokens" in caplog.text
    assert model(texts[0]).logits.isfinite().all()


def test_padding_is_refused_where_experts_see_a_part_of_the_tokens(texts):
    padding = torch.ones_like(texts[0])
    padding[0, :3] = 0
    with pytest.raises(DataError, match="give batches without padding"):
        ov.compress(_build("mixtral"), [{"input_ids": texts[0], "attention_mask": padding}], rate=0.5, iterations=2)
