import gzip
import json

import datasets
import pytest
import torch

import oats_vision as ov
from oats_vision import demo
from oats_vision.data import text
from oats_vision.data.text import DATASETS, load_sequences, load_tokens
from oats_vision.errors import DataError, ModelError


@pytest.fixture(scope="module")
def tokenizer(language_directory):
    return ov.load_tokenizer(str(language_directory))


def test_rows_are_packed_seeded_and_do_not_depend_on_the_batch_size(tokenizer):
    options = {"samples": 20, "sequence_length": 32}
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


@pytest.mark.parametrize("documents", [1, 400])
def test_samples_are_the_same_whether_or_not_others_are_held_out(tokenizer, tmp_path, documents):
    lines = load_text().splitlines()
    texts = ["\n".join(lines[i::documents]) for i in range(documents)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"samples": 20, "sequence_length": 32, "seed": 3}
    alone = load_sequences(tmp_path / "texts.jsonl", tokenizer, **options)
    both = load_sequences(tmp_path / "texts.jsonl", tokenizer, held_out=80, **options)
    assert torch.equal(both.ids, alone.ids)
    assert both.held_out.total == 80
    rows = [tuple(row) for row in torch.cat([both.ids, both.held_out.ids]).tolist()]
    assert len(set(rows)) == 100


def load_text() -> str:
    return (demo.DIRECTORY / "alice.txt").read_text()


def test_documents_are_joined_by_the_end_of_text_token(tokenizer, tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"mat {i}"}) for i in range(50)) + "\n")
    ids = load_sequences(str(file), tokenizer, samples=4, sequence_length=16).ids
    pieces = tokenizer.decode(ids[0]).split("<end>")
    assert len(pieces) > 2
    assert all(piece.startswith("mat ") for piece in pieces[1:-1])
    first = load_sequences(str(file), tokenizer, samples=1, sequence_length=16, seed=1).ids
    assert not torch.equal(first, load_sequences(str(file), tokenizer, samples=1, sequence_length=16, seed=2).ids)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets(tokenizer, tmp_path, streaming):
    dataset = datasets.Dataset.from_dict({"text": [f"the cat {i}" for i in range(40)]})
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "set")
    ids = load_sequences(str(tmp_path / "set"), tokenizer, samples=3, sequence_length=10, streaming=streaming).ids
    assert ids.shape == (3, 10)
    whole = load_tokens(str(tmp_path / "set"), tokenizer, split="train", streaming=streaming)
    assert tokenizer.decode(whole) == "\n\n".join(dataset["text"])


def test_no_more_of_a_text_is_read_than_is_asked_for(tokenizer, tmp_path, monkeypatch):
    given = datasets.Dataset.from_dict({"text": [f"the cat {i}" for i in range(40)]})
    given.save_to_disk(tmp_path / "set")
    read, before = [], text.rows
    monkeypatch.setattr(text, "rows", lambda *source: (read.append(row) or row for row in before(*source)))
    whole = load_tokens(tmp_path / "set", tokenizer, split="train")
    assert len(read) == 40
    for tokens in (1, 20, 33, len(whole), len(whole) + 1):
        read.clear()
        assert torch.equal(load_tokens(tmp_path / "set", tokenizer, split="train", tokens=tokens), whole[:tokens])
        assert len(read) <= min(tokens, 40)
    with pytest.raises(DataError, match=r"fineweb is too large to be read whole: .*`samples`"):
        load_tokens("fineweb", tokenizer)


def test_wikitext_is_read_article_by_article(tokenizer, tmp_path):
    lines = ["", " = Cat = \n", "", " sat on the mat 0 \n", " = = Mat = = \n", " mat 1 \n", " = Best = \n", " mat 2 \n"]
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(tmp_path / "wikitext-2")
    ids = load_sequences(str(tmp_path / "wikitext-2"), tokenizer, samples=2, sequence_length=40).ids
    documents = tokenizer.decode(ids.flatten()).split("<end>")
    first = " = Cat = \n sat on the mat 0 \n = = Mat = = \n mat 1 \n"
    assert first in documents or first.startswith(documents[-1])  # the order is the seed's
    assert len(documents) == 2


def test_fewer_rows_than_asked_for_are_taken_and_said(tokenizer, tmp_path, caplog):
    (tmp_path / "short.txt").write_text("the cat sat on the mat " * 20)
    assert 0 < len(load_sequences(str(tmp_path / "short.txt"), tokenizer, samples=99, sequence_length=10)) < 99
    assert "fewer than the 99 asked for" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", "the cat", "fewer than one sequence of 64"),
        ("empty.txt", " \n", "is empty"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        ("a.jsonl", '{"text": "x"}\n{"words": 3}\n', "a field `text` in each line"),
        ("a.jsonl", "text\n", "a field `text` in each line"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"\n', "a field `text` in each line: line 2: "),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "a field `text` in each line: line 2 is list"),
        ("a.json", '[{"text": "x"}, {"title": "y", "url": "z"}]', "each line: entry 2 has title, url"),
        ("a.json", '{"data": []}', "each line: entry 1 has data"),
        ("a.json", "no JSON", "a field `text` in each line: line 1: "),
        ("a.json", "[" * 100_000, "a field `text` in each line: line 1: "),
        ("a.ndjson", '{"text": "x"}\n{"text": 12.5}\n', "the text of row 2 is float, 12.5"),
        ("a.jsonl", '{"text": null}\n{"text": " "}\n', "is empty"),
        ("a.json.gz", b"\x1f\x8bno", "cannot be read as UTF-8 text"),
        ("a.txt", gzip.compress(b"the cat" * 90, mtime=0)[:-20], "cannot be read as UTF-8 text"),
        (None, "", "does not exist: give a text or .jsonl file, c4, wikitext, fineweb"),
    ],
)
def test_bad_text_is_a_clear_error(tokenizer, tmp_path, name, content, message):
    file = tmp_path / (name or "missing.txt")
    if name:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_sequences(str(file), tokenizer, samples=2, sequence_length=64)


DOCUMENTS = ["one\u2028line", "two\x85lines\r\nof it", 'a "third"\u2029']
OBJECTS = [{"text": text, "url": "https://example.org"} for text in DOCUMENTS]
LINES = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in OBJECTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES.replace("\n", "\r\n")),
        ("a.ndjson", "\n" + LINES + "\n\n"),
        ("a.json", LINES),
        ("a.json", "\ufeff" + LINES),
        ("a.json", json.dumps(OBJECTS, indent=1)),
        ("a.json", json.dumps(DOCUMENTS)),
        ("a.jsonl", LINES.replace('"text"', '"content"')),
        ("a", LINES),
        ("a.txt", " " + json.dumps(OBJECTS)),
        ("a.json.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.JSON.GZ", gzip.compress(json.dumps(OBJECTS).encode(), mtime=0)),
    ],
)
def test_json_is_read_as_json_by_name_or_content(tokenizer, tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert tokenizer.decode(load_tokens(tmp_path / name, tokenizer)) == "\n\n".join(DOCUMENTS)
    ids = load_sequences(tmp_path / name, tokenizer, samples=9, sequence_length=4).ids
    assert "https" not in tokenizer.decode(ids.flatten())


@pytest.mark.parametrize("content", ["{the cat}\n", '[1] {"text": 3}\n', '{"title": "mat"}\n', '{"text": '])
def test_text_that_looks_like_json_is_text(tokenizer, tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert tokenizer.decode(load_tokens(tmp_path / "a.txt", tokenizer)) == content


def test_a_mark_of_utf8_is_no_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe cat\r\nsat")
    assert tokenizer.decode(load_tokens(tmp_path / "a.txt", tokenizer)) == "the cat\nsat"


def test_half_a_surrogate_pair_is_replaced(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the \ud83d cat \U0001f600"}))
    assert tokenizer.decode(load_tokens(tmp_path / "a.jsonl", tokenizer)) == "the ? cat \U0001f600"


ROWS = ["the cat sat", "", None, " \n", "the mat and the cat"]


@pytest.mark.parametrize("form", ["lines", "dataset", "stream"])
def test_rows_without_text_are_no_documents(tokenizer, tmp_path, caplog, form):
    source = tmp_path / "rows"
    if form == "lines":
        source.write_text("\n".join(json.dumps({"text": row}) for row in ROWS))
    else:
        features = datasets.Features({"text": datasets.Value("string")})
        datasets.Dataset.from_dict({"text": ROWS}, features=features).save_to_disk(source)
    streaming = form == "stream"
    length = sum(len(tokenizer(row)["input_ids"]) + 1 for row in (ROWS[0], ROWS[4]))
    ids = load_sequences(source, tokenizer, samples=1, sequence_length=length, streaming=streaming).ids
    assert sorted(tokenizer.decode(ids[0]).split("<end>")) == ["", ROWS[0], ROWS[4]]
    with pytest.raises(DataError, match=f"has {length} tokens"):
        load_sequences(source, tokenizer, samples=1, sequence_length=length + 1, streaming=streaming)
    assert "1 rows without text (null) were skipped" in caplog.text
    # the convention of published figures joins all rows, empty ones too
    whole = load_tokens(source, tokenizer, split="train", streaming=streaming)
    assert tokenizer.decode(whole) == "\n\n".join(row for row in ROWS if row is not None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "title": ["b"]}, "no column of text, only body, title: name it `text`"),
        ({"text": [1, 2]}, "column 'text' holds int64: it must hold text"),
        ({"text": [["a"], ["b"]]}, "column 'text' holds"),
        ({"text": ["", " "]}, "has no text in split 'train'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_hold_no_text_are_clear_errors(tokenizer, tmp_path, columns, message, streaming):
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=message):
        load_tokens(tmp_path / "set", tokenizer, split="train", streaming=streaming)


def test_a_stream_of_text_that_breaks_is_an_error(tokenizer, tmp_path, monkeypatch):
    def rows(self):
        yield {"text": "the cat"}
        raise ConnectionError("the line is dead")

    datasets.Dataset.from_dict({"text": ["the cat"]}).save_to_disk(tmp_path / "set")
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", rows)
    with pytest.raises(DataError, match="could not be read to the end: the line is dead"):
        load_tokens(tmp_path / "set", tokenizer, split="train", streaming=True)


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
