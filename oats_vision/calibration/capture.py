"""What a model gives its blocks: the first one's inputs, and the extras that all of them are called with."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.origin import NotFiniteError, origin_of
from oats_vision.data.batches import Inputs, Reader, expected_samples, read_mine
from oats_vision.errors import DataError, ModelError, OatsVisionError, one_line
from oats_vision.models.structure import floating
from oats_vision.models.values import all_finite
from oats_vision.nn.outputs import first_output

# pictures (or sequences) that gradients are taken on: this part of all, but at least so many, with so many tokens
GRADIENT_SHARE, GRADIENT_SAMPLES, GRADIENT_TOKENS = 0.25, 32, 8_192
Form = Callable[[Tensor], Any]  # hidden states -> what a block returns


def gradient_samples(tokens: float, samples: int | None, samples_before: int = 0, tokens_before: int = 0) -> int:
    """How many samples of `tokens` tokens each gradients are taken on, after those that came before.

    Args:
        samples: that there are in all, if known.
    """
    least = max(GRADIENT_SAMPLES, int(GRADIENT_SHARE * (samples or 0)))
    return max(least - samples_before, math.ceil((GRADIENT_TOKENS - tokens_before) / tokens), 0)


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden states.

    name: of the argument that the hidden states are, if they are given by name.
    listed: whether they are given as a list of one tensor, as DINOv3 does.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str = ""
    listed: bool = False

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """What the block returns for these hidden states."""
        given = [hidden] if self.listed else hidden
        if self.name:
            return block(*self.args, **{self.name: given}, **self.kwargs)
        return block(given, *self.args, **self.kwargs)

    def to(self, dtype: torch.dtype) -> "Call":
        """With all floating tensors in another precision."""
        return replace(self, args=_cast(self.args, dtype), kwargs=_cast(self.kwargs, dtype))


@dataclass
class BlockCalls:
    """How a model calls its blocks: with rotary tables, attention masks, ... besides the hidden states.

    calls[b][i]: of batch b for block i; one entry serves all blocks when the model passes each the same.
    masks[b]: true for tokens that are no padding, (batch, tokens); None if there is none.
    inputs[b]: what the model was called with, of the first batches only.
    names[b]: of the samples in batch b, if they have any: files, or rows of a table.

    With several ranks these are the batches of one of them. samples: in all batches of all ranks. before[b]: samples,
    and tokens, in the batches that come before batch b among all. gradient_samples: how many samples of all, the first
    ones, gradients are taken on.
    """

    device: torch.device
    calls: list[list[Call]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    inputs: list[Inputs] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    samples: int = 0
    before: list[tuple[int, int]] = field(default_factory=list)
    gradient_samples: int = 0

    def place(self, sizes: dict[int, tuple[int, int]], expected: int | None) -> None:
        """Find where these batches stand among those of all ranks.

        Args:
            sizes: samples and tokens of each of these batches, by its number among all.
            expected: samples in all, as far as the data said so beforehand.
        """
        before, tokens = {}, 0
        for number, (samples, of_batch) in ranks.in_order({number: (number, size) for number, size in sizes.items()}):
            before[number] = (self.samples, tokens)
            counted = gradient_samples(of_batch / samples, expected, self.samples, tokens)
            self.gradient_samples += min(samples, counted)
            self.samples, tokens = self.samples + samples, tokens + of_batch
        self.before = [before[number] for number in sizes]
        places = zip(self.inputs, self.before, strict=False)
        self.inputs = [one for one, (first, _) in places if first < self.gradient_samples]

    def call(self, index: int, batch: int) -> Call:
        """How block `index` is called in batch `batch`."""
        calls = self.calls[batch]
        return calls[index] if len(calls) > 1 else calls[0]

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The block's output hidden states; `hidden` stays as it is, whatever the block does to its input."""
        copy = torch.empty_like(hidden, device=self.device).copy_(hidden)
        return first_output(self.call(index, batch).run(block, copy))


def capture_block_calls(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    data: Any,
    hidden: ActivationStore,
    unit: Literal["pictures", "sequences"] = "pictures",
    tell: Callable[[int], None] = lambda samples: None,
    seen: Callable[[int, Inputs], None] = lambda number, inputs: None,
) -> BlockCalls:
    """Run the embedding of every batch, and keep the first block's inputs and what all blocks are given.

    The first batch runs through the whole model, to see that each block's output is the next one's input. In the
    others the blocks hand on the hidden states as they come, and the model stops after the last one: what it gives
    each block is seen for every batch, at little more than the cost of the embedding. Where that gives the blocks of
    the first batch something else, every batch runs through the whole model.

    With several ranks, each keeps its share of the batches.

    Args:
        data: batches; see `read_batches`.
        tell: called after each batch with how many pictures (or sequences) were read so far, by all ranks about.
        seen: called with each of these batches, and its number among those of all ranks.

    Raises:
        ModelError: something happens to the hidden states between two blocks, or blocks do not run once and in order.
        NotFiniteError: activations are not finite; of the first batch those of all blocks are looked at.
        DataError: no batch, or one that the model cannot take.
    """
    first = floating(model)
    expected = expected_samples(data)
    found = BlockCalls(first.device)
    shortcut: list[Form] | None = None  # in what form each block returned the hidden states of the first batch

    def run(inputs: Inputs, number: int) -> Any:
        return call_model(model, inputs, number, first.device, first.dtype)

    def record(inputs: Inputs, number: int, forms: list[Form] | None) -> _Record:
        with _recording(blocks, forms, inputs.padding_mask) as done, suppress(_LastBlockReached):
            run(inputs, number)
        done.check(blocks)
        return done

    number, samples, tokens, read, sizes = -1, 0, 0, 0, dict[int, tuple[int, int]]()
    for number, inputs in read_mine(data, Reader.of(model, unit)):
        seen(number, inputs)
        mask, read = inputs.padding_mask, read + len(inputs.tensor)
        names = list(getattr(data, "names", ()))[read - len(inputs.tensor) : read]
        if mask is not None and not mask.any():
            continue  # nothing to learn from, and attention over nothing may not be finite
        with no_cache(model):
            done = record(inputs, number, shortcut)
            if done.broken:
                origin = origin_of(model, partial(run, inputs, number), len(inputs.tensor), mask)
                begins = origin.of_sample(names) if origin else ""
                raise NotFiniteError(done.broken, number, first.dtype, leaves=True, origin=begins)
            forms = [form for form in done.forms if form is not None]
            if not found.calls and len(forms) == len(blocks):
                handed_on = record(inputs, number, forms)
                shortcut = forms if _equal(handed_on.calls, done.calls) else None
        calls = done.calls[:1] if all(_equal(call, done.calls[0]) for call in done.calls[1:]) else done.calls
        if found.calls and _equal(calls, found.calls[-1]):
            calls = found.calls[-1]  # one rotary table for all batches
        assert done.hidden is not None
        found.calls.append(calls)
        found.masks.append(mask)
        found.names.append(names)
        sizes[number] = len(done.hidden), done.hidden.shape[:-1].numel()
        if gradient_samples(1, expected, samples, tokens):  # with several ranks `place` leaves those that come too late
            found.inputs.append(inputs)
        hidden.append(done.hidden)
        samples, tokens = samples + sizes[number][0], tokens + sizes[number][1]
        tell(samples * ranks.count())
    if max(ranks.everyones(number)) < 0:
        raise DataError("the calibration data gave no batch (a generator can be read only once)")
    found.place(sizes, expected)
    if not found.samples:
        raise DataError("all tokens of the calibration data are padding")
    return found


@torch.no_grad()
def first_block_input(model: nn.Module, block: nn.Module, example: Tensor) -> Tensor:
    """What the model gives its first block for a batch, (batch, tokens, width); what comes after it is not run.

    Raises:
        DataError: the model cannot take the batch.
        ModelError: it does not call the block.
    """
    found: Tensor | None = None

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal found
        found = split_call(module, module.forward, args, kwargs)[1]
        raise _LastBlockReached

    first, hook = floating(model), block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_LastBlockReached):
            call_model(model, Inputs({"": example}, "", by_name=False), 0, first.device, first.dtype)
    finally:
        hook.remove()
    if found is None:
        raise ModelError(f"{type(model).__name__} does not call its first block in a forward pass")
    return found


class _LastBlockReached(Exception):
    """Stops a forward pass once all blocks that matter have been called."""


@dataclass
class _Record:
    hidden: Tensor | None = None  # the first block's input
    calls: list[Call] = field(default_factory=list)
    forms: list[Form | None] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    last: Tensor | None = None  # the last block's output, as it was
    changed_after: str = ""
    mask: Tensor | None = None  # true for tokens that are no padding
    broken: str = ""  # what is the first that is not finite

    def enter(self, index: int, blocks: list[tuple[str, nn.Module]], call: Call, hidden: Tensor) -> None:
        """Note that a block is called."""
        if self.hidden is None:
            self.hidden = hidden.detach().clone()
            if not finite_states(self.hidden, self.mask):
                self.broken = f"the inputs of {blocks[index][0]}"
        elif self.last is None or not _same_states(hidden, self.last):
            self.changed_after = self.changed_after or blocks[self.order[-1]][0]
        self.last = None
        self.order.append(index)
        self.calls.append(call)

    def leave(self, name: str, output: Any, computed: bool) -> None:
        """Note what a block returns, and see that it is finite if the block has computed it."""
        self.forms.append(_form(output))
        self.last = first_output(output).detach().clone()  # a copy: the model may change it in place
        if computed and not self.broken and not finite_states(self.last, self.mask):
            self.broken = f"the outputs of {name}"

    def check(self, blocks: list[tuple[str, nn.Module]]) -> None:
        """Raises ModelError unless each block ran once, in order, on the output of the one before."""
        if sorted(self.order) != list(range(len(blocks))):
            raise ModelError(
                f"a forward pass ran {len(self.order)} times one of {len(blocks)} blocks; each must run once, as a "
                "module of its own"
            )
        if self.order != list(range(len(blocks))):
            names = ", ".join(blocks[index][0] for index in self.order[:4])
            raise ModelError(f"the model runs its blocks in another order than it holds them: {names}, ...")
        if self.changed_after:
            raise ModelError(f"the model changes the hidden states after {self.changed_after}: not block by block")


@contextmanager
def _recording(blocks: list[tuple[str, nn.Module]], forms: list[Form] | None, mask: Tensor | None) -> Iterator[_Record]:
    """Record what the blocks are given during a forward pass of the model.

    Args:
        forms: if given, blocks compute nothing: each returns its input, in its form.
        mask: true for tokens that are no padding.
    """
    record = _Record(mask=mask)
    with ExitStack() as undo:
        for index, (_, block) in enumerate(blocks):
            undo.enter_context(_forward_replaced(block, index, record, blocks, forms))
        yield record


@contextmanager
def _forward_replaced(
    block: nn.Module, index: int, record: _Record, blocks: list[tuple[str, nn.Module]], forms: list[Form] | None
) -> Iterator[None]:
    forward: Callable[..., Any] = block.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        call, hidden = split_call(block, forward, args, kwargs)
        record.enter(index, blocks, call, hidden)
        output = forward(*args, **kwargs) if forms is None else forms[index](hidden)
        record.leave(blocks[index][0], output, forms is None)
        if forms is not None and len(record.order) == len(blocks):
            raise _LastBlockReached
        return output

    own = vars(block).get("forward")
    block.forward = recorded
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def split_call(
    block: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Call, Tensor]:
    """The hidden states among a block's arguments, and the others: they are the first of its `forward`."""
    name = ""
    if args:
        given, args = args[0], args[1:]
    else:
        name = next(iter(signature(forward).parameters), "")
        if name not in kwargs:  # behind *args, **kwargs
            floating = [n for n, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]
            name = "hidden_states" if "hidden_states" in kwargs else floating[0] if floating else ""
        kwargs = dict(kwargs)
        given = kwargs.pop(name, None)
    listed = isinstance(given, (list, tuple)) and len(given) == 1
    given = given[0] if listed else given
    if not isinstance(given, Tensor):
        raise ModelError(f"{type(block).__name__} is called with {type(given).__name__} for hidden states")
    return Call(args, kwargs, name, listed), given


def _form(output: Any) -> Form | None:
    """How to return other hidden states as a block did; None if it returned more than those."""
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    if type(output) in (list, tuple) and isinstance(output[0], Tensor) and all(rest is None for rest in output[1:]):
        kind, rest = type(output), output[1:]
        return lambda hidden: kind([hidden, *rest])
    return None


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Without a cache of keys and values, which would grow with each run of a block."""
    configs: list[Any] = []
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            configs.append(config)
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


def call_model(
    model: nn.Module,
    inputs: Inputs,
    number: int,
    device: torch.device,
    dtype: torch.dtype,
    what: str = "calibration batch",
) -> Any:
    """What the model makes of a batch. Raises DataError if it cannot take it."""
    try:
        return inputs.call(model, device, dtype)
    except (OatsVisionError, _LastBlockReached, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # models raise what they like
        shape = tuple(inputs.tensor.shape)
        raise DataError(
            f"{type(model).__name__} cannot take {what} {number}, {shape} of {inputs.tensor.dtype}: "
            f"{one_line(problem, 300)}"
        ) from problem


def check_finite_states(hidden: Tensor, mask: Tensor | None, what: str, batch: int) -> None:
    """Raises NotFiniteError if hidden states (batch, tokens, width) are not finite, but for those of padding."""
    if not finite_states(hidden, mask):
        raise NotFiniteError(what, batch, hidden.dtype, leaves=True)


def finite_states(hidden: Tensor, mask: Tensor | None) -> bool:
    """Whether hidden states (batch, tokens, width) are finite, but for those of padding."""
    if mask is not None and hidden.shape[:2] == mask.shape:
        hidden = hidden[mask.to(hidden.device)]
    return all_finite(hidden)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors among arguments in another precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_cast(entry, dtype) for entry in value)
    return {name: _cast(entry, dtype) for name, entry in value.items()} if isinstance(value, dict) else value


def _same_states(a: Tensor, b: Tensor) -> bool:
    """Whether hidden states are equal; those of padding may be NaN."""
    return a.shape == b.shape and (torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()))


def _equal(a: Any, b: Any) -> bool:
    """Whether two blocks (or batches) were given the same."""
    if a is b:
        return True
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Call):
        return isinstance(b, Call) and _equal(vars(a), vars(b))
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b) if isinstance(a, (int, float, str, bool)) else False
