"""What is known of a model that its modules do not say: one record, which travels with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn

from oats_vision.errors import ModelError
from oats_vision.models.families.base import Family, Structure
from oats_vision.models.families.find import find_structure, outermost, structure_as
from oats_vision.models.on_disk import BlocksOnDisk
from oats_vision.models.source import ModelSource

Self = TypeVar("Self", bound="Record")


@dataclass(frozen=True)
class Record:
    """Kept on a model as `model.oats_vision`: copied, pickled and moved with it.

    source: how the model can be rebuilt and where its dense weights are, as `load_model` noted it.
    structure: what its family found in it, from when its blocks are changed on.
    on_disk: its blocks, if their weights are read when they are called.
    """

    source: ModelSource | None = None
    structure: Structure | None = None
    on_disk: BlocksOnDisk | None = None

    def within(self: Self, path: str, model: nn.Module) -> Self:
        """The record of a model of the user's own that has this one's at `path`."""
        structure = self.structure and self.structure.within(path)
        return replace(self, source=ModelSource.of_module(model), structure=structure)


def record_of(model: nn.Module) -> Record:
    """A model's record: its own, else that of the compressed model that it wraps, else an empty one.

    Raises:
        ModelError: it wraps several compressed models.
    """
    known = getattr(model, "oats_vision", None)  # which a compiled model passes on
    if isinstance(known, Record):
        return known
    inside = outermost(model, _is_changed)
    if len(inside) > 1:
        raise ModelError(
            f"{type(model).__name__} wraps several compressed models ({', '.join(inside)}): give one of them"
        )
    return record_of(model.get_submodule(inside[0])).within(inside[0], model) if inside else Record()


def read_values(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a model by their full names; one whose values are in a file is read, and not kept."""
    on_disk = record_of(model).on_disk
    for name, tensor in tensors:
        away = tensor.is_meta and on_disk is not None and name in on_disk.places
        yield name, on_disk.read(name, tensor) if away and on_disk else tensor


def bring(model: nn.Module, block: str) -> None:
    """Give a block its weights, by its full name, if they are in a file: to look at them without calling it."""
    on_disk = record_of(model).on_disk
    if on_disk is not None:
        on_disk.bring(block)


def _is_changed(module: nn.Module) -> bool:
    known = vars(module).get("oats_vision")
    return isinstance(known, Record) and known.structure is not None


def set_record(model: nn.Module, record: Record) -> None:
    """Keep a record on its model, in the place of an earlier one."""
    model.oats_vision = record  # type: ignore[assignment]  # a plain attribute


def structure_of(model: nn.Module, family: Family | None = None) -> Structure:
    """The paths and numbers that a model's family found in it: noted on a compressed model, found by it in others.

    Args:
        family: to take it for; found by itself if not given.

    Raises:
        ModelError: no family fits the model, or several fit parts of it, or it is wrapped for replicas or compiled.
    """
    known = record_of(model).structure
    if known is not None and (family is None or family.name == known.family.name):
        return known  # its blocks may be of other classes by now
    return find_structure(model) if family is None else structure_as(model, family)
