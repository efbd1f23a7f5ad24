"""Text for calibration and evaluation: files, Hugging Face datasets, the embedded demo text, as token ids."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oats_vision import demo
from oats_vision.data.documents import FIELDS, articles, read_documents, texts
from oats_vision.data.pictures import shared_out
from oats_vision.data.tables import described, open_dataset, rows
from oats_vision.errors import DataError, did_you_mean, near

log = logging.getLogger(__name__)

# name -> dataset, configuration, and whether it is so large that it is streamed
DATASETS = {
    "c4": ("allenai/c4", "en", True),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", False),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", True),
}
WINDOWS, WINDOW = 64, 512  # of text that is held out: how many at least, if there are, and how long
BUFFER = 10_000  # documents of a stream that are shuffled at a time


@dataclass
class Sequences:
    """Token ids in rows of equal length, without padding: (sequences, length), int64; iterates over batches.

    held_out: windows of other rows of the same source.
    """

    ids: Tensor
    batch_size: int
    held_out: "Sequences | None" = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def total(self) -> int:
        """How many sequences there are."""
        return len(self.ids)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.ids.split(self.batch_size)


def load_sequences(
    source: str | Path,
    tokenizer: Any,
    *,
    samples: int = 128,
    sequence_length: int = 2048,
    batch_size: int = 8,
    seed: int = 42,
    split: str = "train",
    streaming: bool = False,
    held_out: int = 0,
) -> Sequences:
    """Calibration text: documents in an order chosen by the seed, joined by the end-of-text token, cut into rows.

    Documents without text are left out. Where there is text for both, the samples are the same whether or not others
    are held out.

    Args:
        source: a text file (one document), JSON lines or a JSON list (objects with a `text`), compressed by gzip or
            not, `c4`, `wikitext`, `fineweb`, `hf:name[:config]`, a directory written by `datasets`, or `demo`.
        tokenizer: of the model, see `oats_vision.load_tokenizer`.
        samples: rows to take; fewer, with a warning, if the text is too short.
        sequence_length: tokens in a row.
        split: of a dataset.
        streaming: a dataset; `c4` and `fineweb` always are.
        held_out: keep that many other rows apart; fewer if the text is too short for both. `held_out` has as many
            windows of them, or 64 if that is more, of 512 tokens at most.

    Raises:
        DataError: missing, without text, or shorter than one row.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    wanted, ids = (samples + held_out) * sequence_length, list[int]()
    source, mixed = str(source), 0  # rows of the documents that samples are drawn from
    for document in _documents(source, split, streaming, seed):
        if document.strip():
            ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
        if not mixed and len(ids) >= samples * sequence_length:
            mixed = len(ids) // sequence_length
        if len(ids) >= wanted:
            break
    rows = len(ids) // sequence_length
    if not rows:
        raise DataError(
            f"{source} has {len(ids)} tokens, fewer than one sequence of {sequence_length}: "
            "give more text or a smaller `sequence_length`"
        )
    table = torch.tensor(ids[: rows * sequence_length]).view(rows, sequence_length)
    drawn = torch.randperm(mixed or rows, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([drawn, torch.arange(len(drawn), rows)])
    count, apart = shared_out(rows, samples, held_out)
    if count < samples:
        log.warning(
            "%s has %d sequences of %d tokens, of which %d are held out: fewer than the %d asked for",
            source,
            rows,
            sequence_length,
            apart,
            samples,
        )
    last = rows - apart
    others = Sequences(_windows(table[order[last:]], max(WINDOWS, apart)), batch_size) if apart else None
    return Sequences(table[order[:count]], batch_size, others)


def _windows(rows: Tensor, most: int) -> Tensor:
    """So many windows at most, of at most `WINDOW` tokens, of the rows (rows, length): enough to tell a difference."""
    length = min(rows.shape[1], WINDOW)
    whole = rows[:, : rows.shape[1] // length * length].reshape(len(rows), -1, length)
    return whole.transpose(0, 1).flatten(0, 1)[:most]  # the first of every row before any second one


def load_tokens(
    source: str | Path, tokenizer: Any, *, split: str = "test", streaming: bool = False, tokens: int | None = None
) -> Tensor:
    """A text as one sequence of token ids, (tokens,), int64, for perplexity.

    Documents are joined by two line ends and tokenised as one text, with the special tokens that the tokenizer
    puts around a text: the convention of published WikiText-2 figures.

    Args:
        tokens: of its beginning alone; no more documents are read than these take.

    Raises:
        DataError: missing, without text, or too large to be read whole.
    """
    if tokens is None and DATASETS.get(str(source), ("", "", False))[2]:
        raise DataError(f"{source} is too large to be read whole: give `samples` (`eval_samples` of a run)")
    documents, seen = list[str](), 0
    for document in _documents(str(source), split, streaming, None):
        documents.append(document)
        if tokens is not None:  # joined, two documents may have one token less than by themselves
            seen += len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]) - 1
            if seen > tokens:
                break
    text = "\n\n".join(documents)
    if not text.strip():
        raise DataError(f"{source} has no text in split {split!r}")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens])


def _documents(source: str, split: str, streaming: bool, seed: int | None) -> Iterable[str]:
    """The documents of a source, shuffled if there is a seed.

    Raises:
        DataError: missing, not text, or empty.
    """
    name, config, large = DATASETS.get(source, (None, "", False))
    path = demo.DIRECTORY / "alice.txt" if source == "demo" else Path(source)
    if name is None and not source.startswith("hf:") and not path.is_dir():
        if not path.exists():
            close = near(path) or did_you_mean(source, DATASETS)
            raise DataError(
                f"{source} does not exist: give a text or .jsonl file, {', '.join(DATASETS)}, hf:name or demo.{close}"
            )
        return _shuffled(read_documents(path, source), seed)
    streaming = streaming or large
    dataset = open_dataset(f"hf:{name}:{config}" if name else source, split, streaming)
    column = _text_column(dataset.features or {}, source)
    if seed is not None and "wikitext" in source.lower():  # lines, which make no documents one by one
        return _shuffled(list(articles(texts((row[column] for row in rows(dataset, source)), source))), seed)
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=BUFFER) if streaming else dataset.shuffle(seed=seed)
    return texts((row[column] for row in rows(dataset, source)), source)


def _shuffled(documents: list[str], seed: int | None) -> list[str]:
    if seed is None:
        return documents
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return [documents[i] for i in order.tolist()]


def _text_column(features: Mapping[str, Any], source: str) -> str:
    column = next((column for column in FIELDS if column in features), None)
    if column is None:
        raise DataError(f"{source} has no column of text, {described(features, FIELDS)}")
    kind = getattr(features[column], "dtype", "a list or a structure")
    if kind not in ("string", "large_string"):
        raise DataError(f"{source}: column {column!r} holds {kind}: it must hold text")
    return column
