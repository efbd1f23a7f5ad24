"""Datasets of the `datasets` library: how they are opened, and which of their columns hold pictures and labels."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from oats_vision import network
from oats_vision.data.documents import FIELDS
from oats_vision.errors import DataError, did_you_mean, one_line

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
    if source.startswith("hf:"):
        return _load(source, split, streaming)
    import datasets

    if not is_saved_dataset(Path(source)):
        raise DataError(
            f"{source} is a folder that `datasets` did not write: give a text or .jsonl file, or hf:{source} if it "
            "holds data files such as .parquet"
        )
    try:
        dataset = datasets.load_from_disk(source)
    except Exception as problem:  # whatever its readers raise
        raise DataError(f"{source} cannot be loaded: {one_line(problem, 300)}") from problem
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(_no_split(source, split, list(dataset)))
        dataset = dataset[split]
    dataset = dataset.with_format(None)  # plain values, whatever a directory says of their format
    return dataset.to_iterable_dataset() if streaming else dataset


def _load(source: str, split: str, streaming: bool) -> Any:
    """A dataset of the hub, or a folder of data files."""
    import datasets

    name, _, config = source.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(f"{source!r} names no dataset: give hf:name or hf:name:config")
    failed = f"{source} (split {split!r}) cannot be loaded"
    local = Path(name).is_dir()
    with nullcontext() if local else network.hub(failed, "give a local folder or file", DataError, "dataset"):
        try:
            return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
        except ValueError as problem:
            raise DataError(_unknown_part(name, config, split) or f"{failed}: {one_line(problem, 300)}") from problem
        except Exception as problem:  # whatever its readers, the hub and the network raise
            raise DataError(f"{failed}: {one_line(problem, 300)}") from problem


def _unknown_part(name: str, config: str, split: str) -> str | None:
    """What is said of a configuration or a split that a dataset does not have; None if it has both."""
    import datasets

    try:
        configs = datasets.get_dataset_config_names(name)
        if config and config not in configs:
            return f"hf:{name} has no configuration {config!r}, only {_list(configs)}.{did_you_mean(config, configs)}"
        default = config or datasets.get_dataset_default_config_name(name)
        if default is None:
            return f"hf:{name} has several configurations: give one, as hf:{name}:{configs[0]} ({_list(configs)})"
        splits = datasets.get_dataset_split_names(name, default)
    except Exception as problem:  # as above; what was found first is said
        log.debug("the parts of %s are not known: %s", name, problem)
        return None
    return None if split.partition("[")[0] in splits else _no_split(f"hf:{name}", split, splits)


def _no_split(source: str, split: str, splits: list[str]) -> str:
    return f"{source} has no split {split!r}, only {_list(splits)}.{did_you_mean(split, splits)}"


def _list(names: Iterable[str], most: int = 12) -> str:
    """Names with commas, the first of many."""
    first = list(names)
    return ", ".join(first[:most]) + f" and {len(first) - most} more" * (len(first) > most)


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
            raise DataError(f"{source} could not be read to the end: {one_line(problem, 300)}") from problem
        yield row


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
        raise DataError(f"{source} has no column of pictures, {described(features, PICTURES)}")
    return _choose("pictures", found, PICTURES, source)


def described(features: Iterable[str], names: tuple[str, ...]) -> str:
    """The columns that a dataset has where none of the names is among them, and what to do."""
    columns = list(features)
    has = f"only {_list(columns) or 'unknown ones'}"
    meant = [column for column in columns if did_you_mean(column, names)]
    for others, what in ((FIELDS, "text, for a language model"), (PICTURES, "pictures, for a vision model")):
        if not meant and names is not LABELS and set(others) & set(columns):
            return f"{has}: it is {what}"
    return f"{has}: " + (f"rename `{meant[0]}` to `{names[0]}`" if meant else f"name it `{names[0]}`")


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
        raise DataError(f"{source} has no column of labels, {described(features, LABELS)}")
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
            f"{where}: column {column!r} holds text, whose classes cannot be numbered in a stream: do not stream it"
        )
    if not isinstance(value, int):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}: labels are whole numbers or names")
    return value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value < 0)
