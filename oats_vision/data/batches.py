"""Calibration data in the forms that users have them, as batches that a model can be called with."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from oats_vision import ranks
from oats_vision.errors import DataError

# A batch is a tensor or an array, a sequence whose first entry is one (labels are ignored), or keywords such as a
# Hugging Face processor gives; a 2-d `attention_mask` (batch, tokens) among these marks padding tokens.
TOGETHER = 64  # single pictures, or the rows of one tensor, that make a batch
LABELS = {"label", "labels", "target", "targets"}
INPUTS = ("pixel_values", "image", "images", "img", "input", "inputs", "x", "input_ids")


@dataclass(frozen=True)
class Reader:
    """What a model reads.

    dimensions: of a batch, if they are known: 4 (pictures, channels, height, width) or 2 (sequences, tokens).
    named: names of the arguments of the model's `forward`.
    any_name: whether it also takes keyword arguments of other names.
    """

    unit: Literal["pictures", "sequences"]
    dimensions: int | None
    named: frozenset[str]
    any_name: bool

    @classmethod
    def of(cls, model: nn.Module, unit: Literal["pictures", "sequences"]) -> "Reader":
        """What `model` reads, by the signature of its `forward` and by whether it embeds patches of pictures."""
        dimensions = 2 if unit == "sequences" else 4 if any(isinstance(m, nn.Conv2d) for m in model.modules()) else None
        parameters = signature(model.forward).parameters.values()
        starred = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        named = frozenset(parameter.name for parameter in parameters if parameter.kind not in starred)
        return cls(unit, dimensions, named, any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters))


@dataclass(frozen=True)
class Inputs:
    """One batch as the model is called with it.

    values: arguments by name; `main` is the pictures' or the tokens'. Without `by_name` it is given alone, by position.
    """

    values: dict[str, Any]
    main: str
    by_name: bool

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.values[self.main]
        return tensor

    @property
    def padding_mask(self) -> Tensor | None:
        """True for tokens that are no padding, (batch, tokens), if the batch says so."""
        mask = self.values.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def call(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
        """Call the model; tensors move to the device, floating ones to the dtype."""

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        if not self.by_name:
            return model(placed(self.tensor))
        return model(**{name: placed(value) for name, value in self.values.items()})

    def of_one(self) -> "Inputs":
        """A single picture (or sequence) as a batch."""
        return replace(self, values={n: v[None] if isinstance(v, Tensor) else v for n, v in self.values.items()})

    def repeated(self, count: int) -> "Inputs":
        """A batch of the first picture (or sequence) alone, `count` times."""
        batch = len(self.tensor)
        values = {
            name: value[:1].expand(count, *value.shape[1:]).contiguous()
            if isinstance(value, Tensor) and value.ndim and len(value) == batch
            else value
            for name, value in self.values.items()
        }
        return replace(self, values=values)

    def fits(self, other: "Inputs") -> bool:
        """Whether two batches can be put together."""
        return self._form() == other._form()

    def _form(self) -> dict[str, Any]:
        return {n: (v.shape[1:], v.dtype) if isinstance(v, Tensor) else v for n, v in self.values.items()}


def read_batches(data: Any, reader: Reader) -> Iterator[Inputs]:
    """Each batch of the data, in order: whole batches as they are, single pictures (or sequences) put together.

    Args:
        data: an iterable of batches or of single pictures, one tensor or array of many, or a Dataset.

    Raises:
        DataError: something in the data is no batch for the model.
    """
    waiting: list[Inputs] = []  # single pictures, as batches of one
    for number, item in enumerate(_items(data, reader)):
        inputs = _inputs(item, number, reader)
        single = reader.dimensions == inputs.tensor.ndim + 1
        inputs = inputs.of_one() if single else inputs
        _check(inputs, number, reader)
        if waiting and not (single and len(waiting) < TOGETHER and inputs.fits(waiting[0])):
            yield _joined(waiting)
            waiting = []
        if single:
            waiting.append(inputs)
        else:
            yield inputs
    if waiting:
        yield _joined(waiting)


def read_mine(data: Any, reader: Reader) -> Iterator[tuple[int, Inputs]]:
    """Those batches of the data that are this rank's, with their numbers; see `read_batches`.

    Of data that can deal its batches out (by a method `mine`), the others are not read.
    """
    if ranks.count() == 1 or not hasattr(data, "mine"):
        yield from ranks.mine(read_batches(data, reader))
        return
    for number, item in data.mine():
        inputs = _inputs(item, number, reader)
        _check(inputs, number, reader)
        yield number, inputs


def expected_samples(data: Any) -> int | None:
    """How many pictures (or sequences) the data holds, as far as it says so without being read."""
    if isinstance(data, (Tensor, np.ndarray)):
        return len(data)
    if isinstance(data, DataLoader):
        data = data.dataset
        return len(data) if hasattr(data, "__len__") else None
    total = getattr(data, "total", None)
    if isinstance(total, int):
        return total
    if isinstance(data, (list, tuple)) and all(isinstance(batch, Tensor) and batch.ndim in (2, 4) for batch in data):
        return sum(map(len, data))
    return None


def _joined(inputs: list[Inputs]) -> Inputs:
    columns = {name: [one.values[name] for one in inputs] for name in inputs[0].values}
    values = {
        name: torch.cat(column) if isinstance(column[0], Tensor) else column[0] for name, column in columns.items()
    }
    return replace(inputs[0], values=values)


def _items(data: Any, reader: Reader) -> Iterator[Any]:
    """What the data consists of: batches or single pictures."""
    data = _tensor(data)
    if isinstance(data, Tensor):
        if reader.dimensions == data.ndim - 1:  # a stack of batches
            yield from data
        elif reader.dimensions == data.ndim + 1:  # a single picture
            yield data
        else:
            yield from data.split(TOGETHER)
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        yield from (data[i] for i in range(len(data)))
    elif isinstance(data, Mapping):
        yield data
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        for item in data:
            if _is_list_of_singles(item, reader):
                yield from item
            else:
                yield item
    else:
        raise DataError(f"calibration data must be an iterable of batches, got {type(data).__name__}")


def _is_list_of_singles(item: Any, reader: Reader) -> bool:
    """Whether a loader gives its batches as lists of pictures, with or without labels, that nobody has stacked."""
    if not isinstance(item, list):
        return False
    entries = [_tensor(entry) for entry in item]
    return bool(entries) and (
        all(isinstance(entry, (Mapping, tuple, list)) for entry in entries)
        or all(isinstance(entry, Tensor) and reader.dimensions == entry.ndim + 1 for entry in entries)
    )


def _inputs(item: Any, number: int, reader: Reader) -> Inputs:
    """The tensor in a batch, and what else the model takes with it."""
    if isinstance(item, (list, tuple)) and item:
        item = item[0]  # labels follow
    item = _tensor(item)
    if isinstance(item, Mapping):
        return _from_mapping({name: _tensor(value) for name, value in item.items()}, number, reader)
    if not isinstance(item, Tensor):
        hint = ": apply the model's transform to the pictures" if hasattr(item, "convert") else ""
        what = type(item).__name__
        raise DataError(
            f"calibration batch {number} must be a tensor, or a tuple or mapping with one, got {what}{hint}"
        )
    return Inputs({"": item}, "", by_name=False)


def _from_mapping(batch: dict[str, Any], number: int, reader: Reader) -> Inputs:
    """By name if the model takes these names; else the one entry that is its input."""
    batch = {name: value for name, value in batch.items() if name not in LABELS}
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if reader.named & tensors.keys() or (reader.any_name and "input_ids" in tensors):
        batch = {n: v for n, v in batch.items() if n in reader.named or (reader.any_name and isinstance(v, Tensor))}
        main = next(name for name in (*INPUTS, *batch) if isinstance(batch.get(name), Tensor))
        return Inputs(batch, main, by_name=True)
    found = [tensors[name] for name in INPUTS if name in tensors] or list(tensors.values())
    if len(found) != 1:
        raise DataError(
            f"calibration batch {number} must have one tensor named {' or '.join(INPUTS)}, and has {', '.join(batch)}"
        )
    return Inputs({"": found[0]}, "", by_name=False)


def _check(inputs: Inputs, number: int, reader: Reader) -> None:
    """Raises DataError for what no model of the kind takes."""
    tensor, what = inputs.tensor, f"calibration batch {number}"
    if not tensor.numel():
        raise DataError(f"{what} is empty: its shape is {tuple(tensor.shape)}")
    if reader.unit == "sequences":
        if tensor.is_floating_point():
            raise DataError(f"{what} must hold token ids, whole numbers, got {tensor.dtype}")
    elif reader.dimensions == 4 and not tensor.is_floating_point():
        raise DataError(
            f"{what} must hold floating numbers, got {tensor.dtype}: apply the model's transform to the pictures"
        )
    elif not tensor.isfinite().all():
        bad = ~tensor.isfinite()
        sample = int(bad.flatten(1).any(1).int().argmax())
        raise DataError(
            f"{what} has {int(bad.sum())} values that are NaN or infinite, the first of them in sample {sample}: "
            "leave it out, or see what its preprocessing makes of it"
        )


def _tensor(value: Any) -> Any:
    """Arrays of numbers as tensors, all else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(value))
    return value
