"""Datasets of the `datasets` library: how they are opened, and which of their columns hold pictures and labels."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oats_vision.errors import DataError

log = logging.getLogger(__name__)

# a column of such a name is taken before others of its kind
PICTURES = ("image", "img", "picture", "pixel_values", "jpg", "jpeg", "png", "webp", "image_path")
LABELS = ("label", "labels", "fine_label", "cls")


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` wrote the directory."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def open_dataset(source: str, split: str, streaming: bool) -> Any:
    """One split of a dataset of the `datasets` library: `hf:name[:config]`, or a directory that it wrote.

    No code of the dataset runs: the library refuses loading scripts, and a directory is read as arrow tables.

    Raises:
        DataError: it cannot be loaded, or has no such split.
    """
    dataset = _load(source, split, streaming)
    if not source.startswith("hf:"):
        if isinstance(dataset, dict):
            if split not in dataset:
                raise DataError(f"{source} has no split {split!r}, only {', '.join(dataset)}")
            dataset = dataset[split]
        dataset = dataset.with_format(None)  # plain values, whatever a directory says of their format
        if streaming:
            dataset = dataset.to_iterable_dataset()
    return dataset


def _load(source: str, split: str, streaming: bool) -> Any:
    import datasets

    name, _, config = source.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(f"{source!r} names no dataset: give hf:name or hf:name:config")
    try:
        if source.startswith("hf:"):
            return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
        return datasets.load_from_disk(source)
    except Exception as problem:  # whatever its readers, the hub and the network raise
        raise DataError(f"{source} (split {split!r}) cannot be loaded: {_one_line(problem)}") from problem


def rows(dataset: Any, source: str) -> Iterator[dict[str, Any]]:
    """A dataset's rows, one by one.

    Raises:
        DataError: it breaks, which would look like its end.
    """
    iterator = iter(dataset)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as problem:  # as above
            raise DataError(f"{source} cannot be read any further: {_one_line(problem)}") from problem
        yield row


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def picture_column(dataset: Any, source: str) -> str:
    """The column of pictures: of the library's own type, or files' bytes or paths under a picture's name.

    Raises:
        DataError: there is none.
    """
    import datasets

    features = dataset.features or {}
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name in PICTURES if name in features and _holds_files(features[name])]
    if not found:
        raise DataError(f"{source} has no column of pictures, only {', '.join(features) or 'unknown ones'}")
    return _choose("pictures", found, PICTURES, source)


def _holds_files(feature: Any) -> bool:
    if isinstance(feature, dict):
        return {"bytes", "path"} >= set(feature)
    return str(getattr(feature, "dtype", "")).removeprefix("large_") in ("binary", "string")


def label_column(dataset: Any, source: str) -> str:
    """The column of labels: by its name, or else the first of the library's class labels.

    Raises:
        DataError: there is none.
    """
    import datasets

    features = dataset.features or {}
    found = [name for name in LABELS if name in features]
    found = found[:1] or [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        raise DataError(
            f"{source} has no column of labels, only {', '.join(features) or 'unknown ones'}: name it `label`"
        )
    return _choose("labels", found, LABELS, source)


def _choose(what: str, found: list[str], names: tuple[str, ...], source: str) -> str:
    """The first of the known names, or else the first of all."""
    known = [name for name in names if name in found]
    if not known and len(found) > 1:
        log.warning("%s has several columns of %s (%s): the first is taken", source, what, ", ".join(found))
    return (known or found)[0]


def undecoded(dataset: Any, column: str, *others: str | None) -> Any:
    """These columns alone, the pictures as files: a stream that decodes ends at the first broken one."""
    import datasets

    dataset = dataset.select_columns([column, *filter(None, others)])
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def class_names(dataset: Any, column: str) -> list[str] | None:
    """Of a column of the library's class labels."""
    names = getattr(dataset.features[column], "names", None)
    return list(names) if names else None


def read_labels(dataset: Any, column: str, source: str) -> tuple[list[int], list[str] | None]:
    """Each row's label, and the classes' names: of the library's class labels, or the texts themselves, sorted.

    Raises:
        DataError: rows without a label, or labels that are neither whole numbers nor text.
    """
    values = list(dataset.select_columns([column])[:][column])
    names = class_names(dataset, column)
    if values and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        places = {name: i for i, name in enumerate(names)}
        return [places[value] for value in values], names
    missing = sum(_is_missing(value) for value in values)
    if missing:
        raise DataError(
            f"{source}: {missing:,} of {len(values):,} rows have no label in column {column!r} (null or below 0): "
            "take a split that has labels, as the test splits of many datasets have none"
        )
    return [check_label(value, column, f"{source}, row {row}") for row, value in enumerate(values)], names


def check_label(value: Any, column: str, where: str) -> int:
    """The label as a number.

    Raises:
        DataError: it is missing or no whole number.
    """
    if _is_missing(value):
        raise DataError(f"{where}: there is no label in column {column!r} (null or below 0): take a labelled split")
    if isinstance(value, str):
        raise DataError(
            f"{where}: column {column!r} holds text, which numbers no classes in a stream: do not stream it"
        )
    if not isinstance(value, int):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}: labels are whole numbers or names")
    return value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value < 0)
