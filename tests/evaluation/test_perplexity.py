import copy

import pytest
import torch
import transformers as hf
from torchmetrics.text import Perplexity as Reference

from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.evaluation.paired import paired_ratio
from oats_vision.evaluation.perplexity import Perplexity, perplexity


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LlamaConfig(**sizes, intermediate_size=48, max_position_embeddings=64)
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(61, (333,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4])
def test_windows_without_overlap_are_torchmetrics_perplexity(model, ids, batch_size):
    score = perplexity(model, ids, sequence_length=50, batch_size=batch_size)
    reference = Reference()
    for start in range(0, 300, 50):
        window = ids[None, start : start + 50]
        reference.update(model(window).logits[:, :-1], window[:, 1:])
    assert score.value == pytest.approx(float(reference.compute()), rel=1e-4)
    assert score.tokens.tolist() == [49] * 6


@torch.no_grad()
def test_a_stride_scores_each_token_once_with_the_context_before_it(model, ids):
    score = perplexity(model, ids, sequence_length=40, stride=10, batch_size=3)
    assert score.tokens.tolist() == [39] + [10] * 29
    losses = []
    for token in range(1, 40 + 29 * 10):
        window = 0 if token < 40 else 10 * ((token - 40) // 10 + 1)
        logits = model(ids[None, window:token]).logits[0, -1]
        losses.append(-float(logits.log_softmax(-1)[ids[token]]))
    assert score.value == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)


def test_ratio_and_its_interval(model, ids):
    dense = perplexity(model, ids, sequence_length=20)
    worse = copy.deepcopy(model)
    with torch.no_grad():
        worse.lm_head.weight.add_(torch.randn(61, 32, generator=torch.Generator().manual_seed(2)))
    ours = perplexity(worse, ids, sequence_length=20)
    ratio = paired_ratio(dense, ours)
    assert ratio.value == pytest.approx(ours.value / dense.value)
    assert ratio.low < ratio.value < ratio.high
    same = paired_ratio(dense, dense)
    assert str(same) == "1.0000 x [1.0000, 1.0000]"
    # of windows that all change by the same factor the ratio is certain
    shifted = Perplexity(0.0, 1.0, dense.losses + 0.1, dense.tokens)
    assert paired_ratio(dense, shifted).high == pytest.approx(float(torch.tensor(0.1).exp()), rel=1e-6)
    with pytest.raises(ValueError, match="the same windows"):
        paired_ratio(dense, perplexity(model, ids, sequence_length=30))


def test_bad_input(model, ids):
    with pytest.raises(DataError, match="333 tokens, fewer than one window of 2048"):
        perplexity(model, ids)
    with pytest.raises(ConfigError, match="at most the model's 64 positions, got 65"):
        perplexity(model, ids, sequence_length=65)
    for stride in (0, 41):
        with pytest.raises(ConfigError, match=r"`stride` must be in \[1, 40\]"):
            perplexity(model, ids, sequence_length=40, stride=stride)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.inf
    with pytest.raises(ModelError, match="not finite"):
        perplexity(broken, ids, sequence_length=40)
