"""Which family a model belongs to, also one that is wrapped in other modules."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from oats_vision.errors import ModelError
from oats_vision.models.families.base import Family, Structure
from oats_vision.models.families.registry import families, is_shipped

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def find_structure(model: nn.Module) -> Structure:
    """What the model's family finds in it; which family that is, its modules say.

    A model that wraps one of a family (a backbone under a head of the user's own) belongs to that family.

    Raises:
        ModelError: no family fits the model, or several fit parts of it, or it is wrapped for replicas or compiled.
    """
    refuse_wrappers(model)
    matching = [family for family in families() if family.matches(model)]
    if matching and (len(matching) == 1 or not is_shipped(matching[0])):
        return matching[0].structure(model)
    if matching:
        raise _several(model, {family.blocks(model): family for family in matching})
    inside = outermost(model, lambda module: any(family.matches(module) for family in families()))
    if not inside:
        known = ", ".join(f"{family.name} ({family.serves})" for family in families())
        raise ModelError(
            f"no model family fits {type(model).__module__}.{type(model).__name__}; known: {known}. "
            "Others: oats_vision.register_family, see the documentation"
        )
    parts = {path: find_structure(model.get_submodule(path)) for path in inside}
    if len(parts) > 1:
        raise _several(model, {path: part.family for path, part in parts.items()})
    return parts[inside[0]].within(inside[0])


def structure_as(model: nn.Module, family: Family) -> Structure:
    """What a given family finds in a model, or in the part of it that belongs to the family."""
    if not family.matches(model):
        inside = outermost(model, family.matches)
        if len(inside) == 1:
            return family.structure(model.get_submodule(inside[0])).within(inside[0])
    return family.structure(model)


def refuse_wrappers(model: nn.Module) -> None:
    """See that every block is called as the module that it is.

    Raises:
        ModelError: the model, or a part of it, is replicated, compiled, scripted or holds adapters of PEFT.
    """
    for name, module in model.named_modules():
        where, path = (f"{name} of the model", f"model.{name}") if name else ("the model", "model")
        if isinstance(module, PARALLEL):
            raise ModelError(f"{where} is wrapped in {type(module).__name__}: compress {path}.module and wrap that")
        if hasattr(module, "_orig_mod"):
            raise ModelError(f"{where} is wrapped by torch.compile: compress {path}._orig_mod, then compile that")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(f"{where} is compiled: compress the model first, then compile it")
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{where} is TorchScript, which cannot be changed: give the model that it was made from")
        if type(module).__module__.startswith("peft."):
            raise ModelError(f"{where} is a module of PEFT (LoRA): merge it first, model = model.merge_and_unload()")


def outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """Paths of the submodules that are wanted and lie in no other that is."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if path and not any(path.startswith(f"{outer}.") for outer in paths) and wanted(module):
            paths.append(path)
    return paths


def _several(model: nn.Module, parts: Mapping[str, Family]) -> ModelError:
    found = ", ".join(f"{family.name} at {path}" for path, family in parts.items())
    return ModelError(f"{type(model).__name__} holds models of several families ({found}): compress one part by itself")
