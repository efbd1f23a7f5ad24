"""What the linears of a block see on the calibration batches."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls
from oats_vision.calibration.explained import explained
from oats_vision.calibration.origin import NotFiniteError
from oats_vision.calibration.statistics import Statistic
from oats_vision.errors import DataError, ModelError
from oats_vision.models.structure import in_experts
from oats_vision.models.values import all_finite

log = logging.getLogger(__name__)

ENOUGH_TOKENS = 256  # a second moment of that many is known to about 10%


def collect_statistics(
    block: nn.Module,
    linears: Iterable[str],
    new_statistic: Callable[[int, torch.device], Statistic],
    hidden: ActivationStore,
    calls: BlockCalls,
    index: int,
    block_name: str,
    tell: Callable[[float], None],
) -> tuple[dict[str, Statistic], dict[str, int]]:
    """Run all batches through the block and gather each linear's input statistics, and how many tokens it saw.

    With several ranks each runs its own batches; what is returned is of all.

    Args:
        linears: by name in the block.
        new_statistic: an empty one for a number of input features, on a device.
        tell: called with the share of the batches that are done.

    Raises:
        DataError: batches are padded, and a linear sees a part of the tokens only.
        NotFiniteError: a linear's inputs are not finite.
    """
    statistics: dict[str, Statistic] = {}
    tokens: dict[str, int] = {}
    handles = []
    mask: Tensor | None = None  # of the batch that is running
    b = 0  # its number

    for name in linears:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        statistic = new_statistic(linear.in_features, calls.device)
        statistics[name], tokens[name] = statistic, 0

        def update(_: nn.Module, args: tuple[Any, ...], name: str = name, statistic: Statistic = statistic) -> None:
            x = counted(args[0], mask, f"{block_name}.{name}", b)
            statistic.update(x)
            tokens[name] += len(x)

        handles.append(linear.register_forward_pre_hook(update))
    with explained(block, block_name, calls, index, hidden):
        try:
            for b in range(len(hidden)):
                mask = calls.masks[b]
                calls.run(block, index, b, hidden[b])
                tell((b + 1) / len(hidden))
        finally:
            for handle in handles:
                handle.remove()
    for statistic in statistics.values():
        statistic.over_ranks()
    counts = ranks.everyones(tokens)
    return statistics, {name: sum(count[name] for count in counts) for name in tokens}


def counted(x: Tensor, mask: Tensor | None, name: str, batch: int) -> Tensor:
    """The inputs of a linear that count, (tokens, in_features).

    Args:
        x: (..., in_features). mask: true for tokens that are no padding. name: of the linear. batch: its number.

    Raises:
        DataError: batches are padded, and the linear sees a part of the tokens only.
        NotFiniteError: the inputs are not finite.
    """
    if mask is not None:
        count = x.shape[:-1].numel()
        if mask.numel() != count:
            raise DataError(f"{name} sees {count} of {mask.numel()} tokens: give batches without padding")
        x = x[mask.to(x.device).view(x.shape[:-1])]
    if not all_finite(x):
        raise NotFiniteError(f"the inputs of {name}", batch, x.dtype)
    return x.flatten(0, -2)


def check_called(name: str, linear: nn.Linear, statistic: Statistic, tokens: int) -> None:
    """A linear that saw no token counts every input feature alike, if it is an expert's; another one is an error."""
    if tokens:
        return
    if not in_experts(name):
        raise ModelError(f"{name} was never called, and is not an expert: leave it dense by skip")
    statistic.update(torch.eye(linear.in_features, device=linear.weight.device))


def warn_of_few(block_name: str, tokens: Mapping[str, int]) -> None:
    """Say which linears of a block (experts) saw few tokens."""
    few = {name: count for name, count in tokens.items() if count < min(ENOUGH_TOKENS, max(tokens.values()))}
    if few:
        least = min(few, key=few.__getitem__)
        log.warning(
            "%s: %d of %d linears saw fewer than %d tokens (%s saw %d), too few to tell what they read: "
            "calibrate with more text",
            block_name,
            len(few),
            len(tokens),
            ENOUGH_TOKENS,
            least,
            few[least],
        )
