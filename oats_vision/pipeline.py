"""Compress a model block by block: the inputs of a block come from the compressed blocks before it."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.activations import ActivationStore
from oats_vision.adapters import Adapter, find_adapter
from oats_vision.calibration import Statistic
from oats_vision.config import CompressionSettings, validated
from oats_vision.core.budget import Budget, layer_budget
from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.layers import LayerSpec, SparseLowRankLinear
from oats_vision.methods import decompose, statistic_of

log = logging.getLogger(__name__)

# What a model is called with: a tensor, a sequence whose first entry is it (labels are ignored), or keywords
# such as a Hugging Face processor gives; a 2-d `attention_mask` (batch, tokens) among these marks padding tokens.
Batch = Tensor | list[Any] | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """Where the run stands: share done in [0, 1], block number from 1, and the last layer's relative error."""

    done: float
    block: int
    blocks: int
    activity: str
    error: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear: its shapes and parts, and each part's relative error and rounds."""

    name: str
    spec: LayerSpec
    errors: dict[str, float]
    rounds: dict[str, int]
    seconds: float

    @property
    def error(self) -> float:
        """The largest relative error of a part, |(W - S - U V) D| / |W D|."""
        return max(self.errors.values())


@dataclass
class CompressionReport:
    """What was done to a model, layer by layer."""

    adapter: str
    settings: CompressionSettings
    samples: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # calibration, solver, total

    @property
    def parameters(self) -> int:
        """Parameters of the compressed layers: non-zeros, U and V."""
        return sum(layer.spec.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Parameters that these layers had."""
        return sum(layer.spec.dense_parameters for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "error": layer.error} for layer in self.layers]
        return {**asdict(self), "settings": self.settings.model_dump(), "layers": layers}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CompressionReport":
        """The inverse of `to_dict`; other fields are ignored. Raises KeyError, TypeError or ValueError."""
        names = ("name", "errors", "rounds", "seconds")
        return cls(
            adapter=fields["adapter"],
            settings=CompressionSettings(**fields["settings"]),
            samples=fields["samples"],
            layers=[
                LayerReport(spec=LayerSpec.from_dict(layer["spec"]), **{name: layer[name] for name in names})
                for layer in fields["layers"]
            ],
            seconds=dict(fields["seconds"]),
        )


@torch.no_grad()
def compress(
    model: nn.Module,
    calibration: Iterable[Batch],
    *,
    adapter: Adapter | None = None,
    settings: CompressionSettings | None = None,
    activation_memory: float = 8.0,
    progress: Callable[[Step], None] = lambda step: None,
    **options: Any,
) -> CompressionReport:
    """Compress the linears of a model's blocks, in place, as OATS does it (section 3.3).

    Args:
        model: of a family that an adapter knows; put in eval mode and changed in place.
        calibration: batches, iterated once: tensors, (tensor, ...) or mappings of keyword arguments.
        adapter: of the model's family; found by itself if not given.
        settings: or its fields as `options`: `rate`, `rank_ratio`, `pattern`, `iterations`, `solver`, ...
        activation_memory: GB of activations to keep in memory; what is beyond lives in temporary files.
        progress: called with each step.

    Returns:
        The settings, and each layer's budget and error.

    Raises:
        ConfigError: a setting is out of range, or leaves a layer without rank or non-zeros.
        ModelError: no adapter knows the model, or it does not run block by block.
        DataError: no calibration batch.
    """
    start = time.perf_counter()
    if settings is None:
        settings = validated(CompressionSettings, options)
    elif options:
        raise ConfigError(f"give either settings or single options, got settings and {', '.join(options)}")
    adapter = adapter or find_adapter(model)
    blocks = adapter.named_blocks(model)
    plan = {name: plan_block(adapter, name, block, settings) for name, block in blocks}
    if not any(plan.values()):
        raise ModelError("the model's blocks have no linear to compress: is it compressed already?")
    model.eval()
    adapter.prepare(model)
    report = CompressionReport(adapter.name, settings)
    dtype = next(model.parameters()).dtype
    storage = getattr(torch, settings.storage_dtype) if settings.storage_dtype else dtype
    if storage != dtype:  # what is not compressed is stored rounded too, and must be calibrated so
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(storage))

    with ActivationStore(activation_memory * 1e9) as hidden:
        progress(Step(0.0, 0, len(blocks), "capturing the first block's inputs"))
        calls = capture_block_calls(model, blocks, calibration, hidden)
        report.samples = sum(len(hidden[b]) for b in range(len(hidden)))
        report.seconds = {"calibration": time.perf_counter() - start, "solver": 0.0}
        for i, (name, block) in enumerate(blocks):

            def tell(share: float, activity: str, error: float | None = None, block_number: int = i) -> None:
                done = (block_number + share) / len(blocks)
                progress(Step(done, block_number + 1, len(blocks), activity, error))

            tick = time.perf_counter()
            statistics = collect_statistics(block, plan[name], settings, hidden, calls, i, tell)
            tock = time.perf_counter()
            for j, (linear_name, parts) in enumerate(plan[name].items()):
                tell(0.3 + 0.5 * j / len(plan[name]), linear_name, report.layers[-1].error if report.layers else None)
                layer = _compress_linear(block, name, linear_name, parts, statistics[linear_name], settings, storage)
                report.layers.append(layer)
            report.seconds["solver"] += time.perf_counter() - tock
            if i + 1 < len(blocks):
                for b in range(len(hidden)):
                    tell(0.8 + 0.2 * b / len(hidden), "outputs of the compressed block", report.layers[-1].error)
                    hidden[b] = calls.run(block, i, b, hidden[b])
            report.seconds["calibration"] = time.perf_counter() - start - report.seconds["solver"]
            log.info("block %d/%d: %.1f s of calibration and solver", i + 1, len(blocks), time.perf_counter() - tick)
    progress(Step(1.0, len(blocks), len(blocks), "done", report.layers[-1].error))
    report.seconds["total"] = time.perf_counter() - start
    model._oats_vision_report = report  # type: ignore[assignment]  # travels with the model to `save`
    return report


Parts = list[tuple[str, int, Budget]]  # name, out_features, budget


def plan_block(adapter: Adapter, block_name: str, block: nn.Module, settings: CompressionSettings) -> dict[str, Parts]:
    """The parts of each linear of a block and their budgets, before any work is done.

    Raises:
        ConfigError: the settings leave a layer without rank or non-zeros, or a fused weight does not divide.
    """
    plan: dict[str, Parts] = {}
    for name, linear in adapter.named_linears(block):
        parts = adapter.fused.get(name, ()) if settings.fused_qkv == "split" else ()
        names = parts or (name.rsplit(".", 1)[-1],)
        if linear.out_features % len(names):
            raise ModelError(f"{block_name}.{name}: {linear.out_features} rows do not divide into {len(names)} parts")
        rows = linear.out_features // len(names)
        try:
            budget = layer_budget(rows, linear.in_features, *settings.terms)
        except ValueError as impossible:
            raise ConfigError(f"{block_name}.{name}: {impossible}") from None
        plan[name] = [(part, rows, budget) for part in names]
    return plan


def _compress_linear(
    block: nn.Module,
    block_name: str,
    name: str,
    parts: Parts,
    statistic: Statistic,
    settings: CompressionSettings,
    storage: torch.dtype,
) -> LayerReport:
    """Decompose one linear of the block and put the compressed layer in its place."""
    start = time.perf_counter()
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    rows = linear.weight.split([out_features for _, out_features, _ in parts])
    try:
        factors = [
            (part, decompose(weight, statistic, budget, settings))
            for weight, (part, _, budget) in zip(rows, parts, strict=True)
        ]
    except ValueError as unusable:
        raise DataError(f"{block_name}.{name}: {unusable}") from None
    layer = SparseLowRankLinear.from_factors(factors, linear.bias, storage)
    block.set_submodule(name, layer.to(linear.weight.dtype))
    return LayerReport(
        name=f"{block_name}.{name}",
        spec=layer.spec,
        errors={part: f.error for part, f in factors},
        rounds={part: f.rounds for part, f in factors},
        seconds=time.perf_counter() - start,
    )


def collect_statistics(
    block: nn.Module,
    linears: Mapping[str, Parts],
    settings: CompressionSettings,
    hidden: ActivationStore,
    calls: "BlockCalls",
    index: int,
    tell: Callable[[float, str], None],
) -> dict[str, Statistic]:
    """Run all batches through the block and gather each linear's input statistics."""
    statistics: dict[str, Statistic] = {}
    handles = []
    mask: Tensor | None = None  # of the batch that is running

    for name in linears:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        statistic = statistic_of(settings, linear.in_features, linear.weight.device)
        statistics[name] = statistic

        def update(_: nn.Module, args: tuple[Any, ...], statistic: Statistic = statistic) -> None:
            x = args[0]
            statistic.update(x, mask.to(x.device).view(x.shape[:-1]) if mask is not None else None)

        handles.append(linear.register_forward_pre_hook(update))
    try:
        for b in range(len(hidden)):
            tell(0.3 * b / len(hidden), "second moments")
            mask = calls.masks[b]
            calls.run(block, index, b, hidden[b])
    finally:
        for handle in handles:
            handle.remove()
    return statistics


@dataclass
class BlockCalls:
    """What the model passes to its blocks besides the hidden states: rotary tables, attention masks, ...

    extras[b][i]: positional and keyword arguments of batch b for block i; one entry serves all blocks when
    the model passes each the same.
    """

    device: torch.device
    extras: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        extras = self.extras[batch]
        args, kwargs = extras[index] if len(extras) > 1 else extras[0]
        return _first(block(hidden.to(self.device), *args, **kwargs))


def capture_block_calls(
    model: nn.Module, blocks: list[tuple[str, nn.Module]], batches: Iterable[Batch], hidden: ActivationStore
) -> BlockCalls:
    """Run the embedding of every batch, and keep the first block's inputs and what all blocks are given.

    The first batch runs through the whole model, to see whether the blocks are given the same extras and
    whether each block's output is the next one's input; if so the other batches stop at the first block.

    Raises:
        ModelError: something happens to the hidden states between two blocks.
        DataError: no batch, or one that the model cannot take.
    """
    first = next(model.parameters())
    calls = BlockCalls(first.device)
    same_extras = False
    for batch in batches:
        with _record(blocks, stop_at_first=same_extras) as record, suppress(_FirstBlockReached):
            _call(model, batch, first.device, first.dtype)
        if record.changed_after:
            raise ModelError(f"the model changes the hidden states after {record.changed_after}: not block by block")
        if record.hidden is None or len(record.extras) != (1 if same_extras else len(blocks)):
            raise ModelError(f"a forward pass ran {len(record.extras)} of {len(blocks)} blocks; each should run once")
        if not same_extras:
            same_extras = all(_equal(extras, record.extras[0]) for extras in record.extras[1:])
        extras = record.extras[:1] if same_extras else record.extras
        if calls.extras and _equal(extras, calls.extras[0]):
            extras = calls.extras[0]  # one rotary table for all batches
        calls.extras.append(extras)
        calls.masks.append(_padding_mask(batch))
        hidden.append(record.hidden)
    if not len(hidden):
        raise DataError("the calibration data gave no batch")
    return calls


class _FirstBlockReached(Exception):
    """Stops a forward pass once the first block's inputs are known."""


@dataclass
class _Record:
    hidden: Tensor | None = None  # the first block's input
    extras: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    last_output: Tensor | None = None
    changed_after: str = ""


@contextmanager
def _record(blocks: list[tuple[str, nn.Module]], stop_at_first: bool) -> Iterator[_Record]:
    """Record what the blocks are given during a forward pass of the model."""
    record = _Record()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:  # transformers may pass the hidden states by name
            kwargs = dict(kwargs)
            args = (kwargs.pop("hidden_states"),)
        if record.hidden is None:
            record.hidden = args[0]
        elif record.last_output is None or not _equal(args[0], record.last_output):
            record.changed_after = record.changed_after or blocks[len(record.extras) - 1][0]
        record.last_output = None
        record.extras.append((args[1:], kwargs))
        if stop_at_first:
            raise _FirstBlockReached

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record.last_output = _first(output)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for _, block in blocks]
    handles += [block.register_forward_hook(after) for _, block in blocks]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _call(model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> Any:
    """Call the model on a batch, moved to its device; floating tensors in its dtype."""

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    if isinstance(batch, Mapping):
        return model(**{name: placed(value) for name, value in batch.items() if name != "labels"})
    return model(placed(batch[0] if isinstance(batch, (list, tuple)) else batch))


def _padding_mask(batch: Batch) -> Tensor | None:
    """True for tokens that are no padding, (batch, tokens), if the batch says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _first(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _equal(a: Any, b: Any) -> bool:
    """Whether two blocks (or batches) were given the same."""
    if a is b:
        return True
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b) if isinstance(a, (int, float, str, bool)) else False
