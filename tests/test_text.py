import json

import datasets
import pytest
import torch

import oats_vision as ov
from oats_vision.errors import DataError, ModelError
from oats_vision.text import DATASETS, load_sequences, load_tokens


@pytest.fixture(scope="module")
def tokenizer(language_directory):
    return ov.load_tokenizer(str(language_directory))


def test_rows_are_packed_seeded_and_do_not_depend_on_the_batch_size(tokenizer):
    options = {"samples": 20, "length": 32}
    sequences = load_sequences("demo", tokenizer, batch_size=8, **options)
    batches = list(sequences)
    assert [tuple(batch.shape) for batch in batches] == [(8, 32), (8, 32), (4, 32)]
    again = load_sequences("demo", tokenizer, batch_size=3, **options)
    assert torch.equal(torch.cat(list(again)), torch.cat(batches))
    other = load_sequences("demo", tokenizer, batch_size=8, seed=7, **options)
    assert not torch.equal(other.ids, sequences.ids)
    assert len({tuple(row) for row in sequences.ids.tolist()}) == 20
    words = tokenizer.decode(sequences.ids[0])
    assert words in load_text()  # a piece of the book, to the letter


def load_text() -> str:
    return (ov.models.demo_directory() / "alice.txt").read_text()


def test_documents_are_joined_by_the_end_of_text_token(tokenizer, tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"mat {i}"}) for i in range(50)) + "\n")
    ids = load_sequences(str(file), tokenizer, samples=4, length=16).ids
    pieces = tokenizer.decode(ids[0]).split("<end>")
    assert len(pieces) > 2
    assert all(piece.startswith("mat ") for piece in pieces[1:-1])
    first = load_sequences(str(file), tokenizer, samples=1, length=16, seed=1).ids
    assert not torch.equal(first, load_sequences(str(file), tokenizer, samples=1, length=16, seed=2).ids)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets(tokenizer, tmp_path, streaming):
    dataset = datasets.Dataset.from_dict({"text": [f"the cat {i}" for i in range(40)]})
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "set")
    ids = load_sequences(str(tmp_path / "set"), tokenizer, samples=3, length=10, streaming=streaming).ids
    assert ids.shape == (3, 10)
    whole = load_tokens(str(tmp_path / "set"), tokenizer, split="train", streaming=streaming)
    assert tokenizer.decode(whole) == "\n\n".join(dataset["text"])


def test_fewer_rows_than_asked_for_are_taken_and_said(tokenizer, tmp_path, caplog):
    (tmp_path / "short.txt").write_text("the cat sat on the mat " * 20)
    assert 0 < len(load_sequences(str(tmp_path / "short.txt"), tokenizer, samples=99, length=10)) < 99
    assert "fewer than the 99 asked for" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", "the cat", "fewer than one sequence of 64"),
        ("empty.txt", " \n", "is empty"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        ("a.jsonl", '{"text": "x"}\n{"words": 3}\n', "a field `text` in each line"),
        ("a.jsonl", "text\n", "a field `text` in each line"),
        (None, "", "does not exist: give a text or .jsonl file, c4, wikitext, fineweb"),
    ],
)
def test_bad_text_is_a_clear_error(tokenizer, tmp_path, name, content, message):
    file = tmp_path / (name or "missing.txt")
    if name:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_sequences(str(file), tokenizer, samples=2, length=64)


def test_data_without_text_and_unreachable_data_are_clear_errors(tokenizer, tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"number": [1]}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="no column of text, only number"):
        load_sequences(str(tmp_path / "set"), tokenizer)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in DATASETS:
        with pytest.raises(DataError, match="cannot be loaded"):
            load_sequences(name, tokenizer)


def test_models_without_a_tokenizer_say_so(tmp_path):
    with pytest.raises(ModelError, match="has no tokenizer"):
        ov.load_tokenizer(str(tmp_path))
