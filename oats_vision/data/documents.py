"""The documents of a text file: plain text, JSON lines or a JSON list, compressed by gzip or not."""

import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from oats_vision.errors import DataError

log = logging.getLogger(__name__)

FIELDS = ("text", "content")  # where a row of a dataset or a JSON object has its text
JSON = (".json", ".jsonl", ".ndjson")
HEADING = re.compile(r" = [^=].* = $")


def read_documents(path: Path, source: str) -> list[str]:
    """One document, or one for each object of JSON lines or of a JSON list, which the content shows.

    Raises:
        DataError: it is not UTF-8 text, no JSON in spite of its name, or has objects without text.
    """
    if path.suffix.lower() in IMG_EXTENSIONS:
        raise DataError(f"{source} is a picture: a language model needs a text or .jsonl file")
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()  # any line ends, with a mark or without
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise DataError(f"{source} cannot be read as UTF-8 text: {problem}") from None
    named_json = path.name.lower().removesuffix(".gz").endswith(JSON)
    documents = list(texts(_json_texts(text, source), source)) if named_json or _starts_as_json(text) else [text]
    if not any(map(str.strip, documents)):
        raise DataError(f"{source} is empty")
    return documents


def texts(values: Iterable[Any], source: str) -> Iterator[str]:
    """The texts among the values of a column; nulls are skipped and counted.

    Raises:
        DataError: a value is something else.
    """
    nulls = 0
    try:
        for row, value in enumerate(values, 1):
            if value is None:
                nulls += 1
            elif isinstance(value, str):
                yield value
            else:
                raise DataError(f"{source}: the text of row {row} is {type(value).__name__}, {value!r:.40}: give text")
    finally:  # also where the reader had enough
        if nulls:
            log.warning("%s: %d rows without text (null) were skipped", source, nulls)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """The articles of WikiText, whose rows are lines: each begins with a heading of the first level.

    >>> list(articles([" = Fish = \\n", "", " = = Fins = = \\n", " Many . \\n", " = Fowl = \\n"]))
    [' = Fish = \\n = = Fins = = \\n Many . \\n', ' = Fowl = \\n']
    """
    article: list[str] = []
    for line in lines:
        if article and HEADING.match(line):
            yield "".join(article)
            article.clear()
        article.append(line)
    yield "".join(article)


def _starts_as_json(text: str) -> bool:
    """Whether the first thing in a file, or in its list, is an object with a text."""
    begin = re.match(r"\s*\[?\s*", text)
    try:
        first, _ = json.JSONDecoder().raw_decode(text, begin.end() if begin else 0)
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and any(field in first for field in FIELDS)


def _json_texts(text: str, source: str) -> Iterator[Any]:
    for place, entry in _entries(text, source):
        if isinstance(entry, str):
            value = entry
        else:
            fields = list(entry) if isinstance(entry, dict) else []
            field = next((name for name in FIELDS if name in fields), None)
            if field is None:
                has = f"has {', '.join(map(str, fields[:8]))}" if fields else f"is {type(entry).__name__}"
                raise DataError(f"{source} must have a JSON object with a field `text` in each line: {place} {has}")
            value = entry[field]
        # half a surrogate pair, which JSON can write and no tokenizer reads
        yield value.encode(errors="replace").decode() if isinstance(value, str) else value


def _entries(text: str, source: str) -> Iterator[tuple[str, Any]]:
    """What a JSON file has: its list, its only object, or its lines."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, (list, dict)):
        yield from ((f"entry {i}", entry) for i, entry in enumerate(whole if isinstance(whole, list) else [whole], 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # JSON allows other line ends inside its strings
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise DataError(
                    f"{source} must have a JSON object with a field `text` in each line: line {number}: {problem}"
                ) from None
            yield f"line {number}", entry
