"""What the linears of a block see on the calibration batches."""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
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
from oats_vision.models.structure import in_experts, linear_of
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

    Linears that are given the very same tensor, as q, k and v are, have one statistic together. With several ranks each
    runs its own batches; what is returned is of all.

    Args:
        linears: by name in the block.
        new_statistic: an empty one for a number of input features, on a device.
        tell: called with the share of the batches that are done.

    Raises:
        DataError: batches are padded, and a linear sees a part of the tokens only.
        NotFiniteError: a linear's inputs are not finite.
    """
    names = list(linears)

    def new(name: str) -> Statistic:
        return new_statistic(linear_of(block, name).in_features, calls.device)

    for together in (True, False):
        found = _Gathered(new, block_name, together)
        with explained(block, block_name, calls, index, hidden), ExitStack() as hooks:
            for name in names:
                hooks.callback(block.get_submodule(name).register_forward_pre_hook(found.hook(name)).remove)
            for b in range(len(hidden)):
                found.begin(b, calls.masks[b])
                calls.run(block, index, b, hidden[b])
                tell((b + 1) / len(hidden))
        leaders = found.agreed(names)
        if leaders is not None:
            break
    assert leaders is not None
    counts = ranks.everyones(found.tokens)
    for name in names:
        if leaders[name] == name:
            found.statistic(name).over_ranks()
    tokens = {name: sum(count.get(leaders[name], 0) for count in counts) for name in names}
    return {name: found.statistic(leaders[name]) for name in names}, tokens


class _Gathered:
    """What a block's linears see, batch by batch.

    Args:
        new: an empty statistic, for a linear. together: whether linears with the same inputs share one.
    """

    def __init__(self, new: Callable[[str], Statistic], block_name: str, together: bool) -> None:
        self.new, self.block_name, self.together = new, block_name, together
        self.tokens: dict[str, int] = {}
        self._statistics: dict[str, Statistic] = {}
        self._leaders: dict[str, str] = {}  # whose statistic has a linear's inputs, of those that were called
        self._called: dict[str, int] = {}  # how often
        self._differ = False  # whether linears were given the same at first, and something else later
        self.begin(0, None)

    def begin(self, batch: int, mask: Tensor | None) -> None:
        """A batch, by its number, and which of its tokens count."""
        self._batch, self._mask = batch, mask
        self._begun: set[str] = set()  # leaders of which it is the first
        self._given: dict[str, Callable[[Tensor], bool]] = {}  # whether a tensor is what a leader was given

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Before a linear is called."""
        return lambda module, args: self._see(name, args[0])

    def _see(self, name: str, x: Tensor) -> None:
        self._called[name] = self._called.get(name, 0) + 1
        if name not in self._leaders:
            same = (other for other in self._begun if self._given[other](x)) if self.together else ()
            self._leaders[name] = next(iter(same), name)
            if self._leaders[name] == name:
                self._begun.add(name)
        leader = self._leaders[name]
        if leader != name:
            self._differ |= leader not in self._given or not self._given[leader](x)
            return
        self._given[name] = _is_still(x)
        inputs = counted(x, self._mask, f"{self.block_name}.{name}", self._batch)
        self.statistic(name).update(inputs)
        self.tokens[name] = self.tokens.get(name, 0) + len(inputs)

    def statistic(self, name: str) -> Statistic:
        """Of a leader; an empty one if it was not called."""
        if name not in self._statistics:
            self._statistics[name] = self.new(name)
        return self._statistics[name]

    def agreed(self, names: Iterable[str]) -> dict[str, str] | None:
        """Whose statistic has each linear's inputs, on all ranks; None if that is not the same everywhere."""
        uneven = any(self._called[name] != self._called[leader] for name, leader in self._leaders.items())
        found: dict[str, str] = {}
        for leaders, differ in ranks.everyones((self._leaders, self._differ or uneven)):
            if differ or any(found.setdefault(name, leader) != leader for name, leader in leaders.items()):
                return None
        return {name: found.get(name, name) for name in names}


def _is_still(x: Tensor) -> Callable[[Tensor], bool]:
    """Whether a tensor is this one, and unchanged; keeps nothing in memory."""
    reference, version = weakref.ref(x), x._version
    return lambda other: reference() is other and other._version == version


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
