"""Models that are wrapped in other modules: which wrappers must be taken off, and adapters for what is inside."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from oats_vision.errors import ModelError
from oats_vision.models.adapters.base import Adapter

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


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


def within(adapter: Adapter, path: str) -> Adapter:
    """The adapter of a model that has a model of the family at `path`."""

    def inside(answer: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
        return lambda model: answer(model.get_submodule(path))

    def joined(place: Callable[[nn.Module], str]) -> Callable[[nn.Module], str]:
        return lambda model: ".".join(filter(None, (path, place(model.get_submodule(path)))))

    norm = joined(adapter.final_norm)
    return replace(
        adapter,
        matches=inside(adapter.matches),
        blocks=joined(adapter.blocks),
        final_norm=lambda model: norm(model) if adapter.final_norm(model.get_submodule(path)) else "",
        prefix_tokens=inside(adapter.prefix_tokens),
        class_token=inside(adapter.class_token),
        pooled_before_norm=inside(adapter.pooled_before_norm),
        prepare=inside(adapter.prepare),
        restore=inside(adapter.restore),
    )


def outermost(model: nn.Module, matches: Callable[[nn.Module], bool]) -> list[str]:
    """Paths of the submodules that match and lie in no other that does."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if path and not any(path.startswith(f"{outer}.") for outer in paths) and matches(module):
            paths.append(path)
    return paths
