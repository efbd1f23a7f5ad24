"""What a model must be for its linears to be replaced: seen before any of them is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from oats_vision import ranks
from oats_vision.errors import ModelError

WEIGHTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def floating(model: nn.Module) -> nn.Parameter:
    """The model's first floating parameter: it has the dtype and the device that batches are given in.

    Raises:
        ModelError: there is none.
    """
    for parameter in model.parameters():
        if parameter.dtype in WEIGHTS:
            return parameter
    raise ModelError(f"{type(model).__name__} has no floating parameters")


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """One of a model's, or a block's, linears."""
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def check_device(model: nn.Module) -> None:
    """See that the model's parameters are on one device, which can add up statistics in float64.

    Raises:
        ModelError: they are not, or it cannot. Those that are read later are on none.
    """
    devices = {str(parameter.device) for parameter in model.parameters() if not parameter.is_meta}
    if len(devices) > 1:
        raise ModelError(f"the model's parameters are on {', '.join(sorted(devices))}: move it to one device")
    for device in devices:
        try:
            torch.zeros(1, dtype=torch.float64, device=device)
        except (TypeError, RuntimeError) as problem:  # mps, some xpu
            why = str(problem).splitlines()[0]
            raise ModelError(
                f"device {device} has no float64, in which statistics are added up: use cpu ({why})"
            ) from None


def check_replaceable(linears: Mapping[str, nn.Linear], blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """See that each linear does what nn.Linear does, and that no two share a weight.

    Args:
        linears: to be replaced, by full name.
        blocks: of the model, with their names.

    Raises:
        ModelError: one is of a class of its own or has hooks, which a replacement would lose; or is used twice.
    """
    names: dict[int, str] = {}  # of a module's or a weight's first user, by identity
    for block_name, block in blocks:
        for name, module in block.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Linear):
                full = f"{block_name}.{name}"
                first = names.setdefault(id(module), names.setdefault(id(module.weight), full))
                if first != full and (full in linears or first in linears):
                    raise ModelError(f"{first} and {full} share one weight, and each must have its own")
            if isinstance(module, nn.TransformerEncoderLayer) and any(n.startswith(block_name) for n in linears):
                raise ModelError(f"{block_name} is an nn.TransformerEncoderLayer, which reads weights past its linears")
    for name, linear in linears.items():
        kind = type(linear)
        if kind.forward is not nn.Linear.forward or "forward" in vars(linear):
            raise ModelError(
                f"{name} is a {kind.__module__}.{kind.__qualname__} with a forward of its own, not a plain nn.Linear: "
                f"replace it by one, or leave it dense with skip={name!r}"
            )
        if linear._forward_hooks or linear._forward_pre_hooks:
            raise ModelError(
                f"{name} has forward hooks (of weight_norm, prune or your own), which would be lost: remove them, or "
                f"leave it dense with skip={name!r}"
            )
        if linear.weight.dtype not in WEIGHTS:
            raise ModelError(f"{name} has weights of {linear.weight.dtype}: compress the model before it is quantised")


@contextmanager
def all_called(blocks: Iterable[nn.Module], linears: Mapping[str, nn.Linear], *, once: bool = False) -> Iterator[None]:
    """See that every linear is called as a module, but for those of experts, to which no token may have gone.

    Args:
        blocks: that the linears are in. once: see that none is called again in one pass through its block.

    Raises:
        ModelError: one is not; its weight may be read past the module.
    """
    called: set[str] = set()
    in_pass: set[str] = set()
    again: list[str] = []

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        in_pass.clear()

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(begin).remove)
        for name, linear in linears.items():

            def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if name in in_pass:
                    again.append(name)
                in_pass.add(name)
                called.add(name)

            hooks.callback(linear.register_forward_pre_hook(note).remove)
        yield
    if once and again:
        raise ModelError(
            f"{again[0]} is called more than once in a pass, and targets, sensitivity, measured budgets and bits "
            "follow one call of each linear: give a rate with `quality` fast or plain, or leave it dense with "
            f"skip={again[0]!r}"
        )
    called = set().union(*ranks.everyones(called))  # a rank may have no batch
    unused = [name for name in linears if name not in called and not in_experts(name)]
    if unused:
        raise ModelError(
            f"{unused[0]} was never called ({len(unused)} linears were not): its weight is not used, or is read past "
            f"the module as nn.MultiheadAttention does. Leave it dense with skip={unused[0]!r}"
        )


def in_experts(name: str) -> bool:
    """Whether a module's name says that it belongs to an expert."""
    return any("expert" in part for part in name.lower().split("."))


def sharing_weights(block: nn.Module) -> nn.Module:
    """A copy of a block with the same tensors, in which linears can be called as they are now."""
    return deepcopy(block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())})
