"""Compress a model block by block: the inputs of a block come from the compressed blocks before it."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.activations import ActivationStore
from oats_vision.adapters import Adapter, find_adapter, remember_adapter
from oats_vision.block_calls import Batch, BlockCalls, capture_block_calls
from oats_vision.calibration import Statistic
from oats_vision.config import CompressionSettings, validated
from oats_vision.core.budget import layer_budget
from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.layers import LayerSpec, SparseLowRankLinear
from oats_vision.methods import decompose, statistic_of
from oats_vision.slicing import SlicedBlock, Slicing, plan_slicing, slice_blocks
from oats_vision.splits import Parts, candidates, fastest

log = logging.getLogger(__name__)

FEW_TOKENS = 256  # a second moment of that many is known to about 10%


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
    """What became of one linear.

    errors: of each part, |(W - S - U V) D| / |W D|. output_errors: of each part's output, |(W - S - U V) X| / |W X|, if
    the method knows it. rounds: of each part. tokens: that the linear saw.
    """

    name: str
    spec: LayerSpec
    errors: dict[str, float]
    output_errors: dict[str, float]
    rounds: dict[str, int]
    seconds: float
    tokens: int

    @property
    def error(self) -> float:
        """The largest relative error of a part: of its output if that is known, else weighted by D."""
        return max((self.output_errors or self.errors).values())


@dataclass
class CompressionReport:
    """What was done to a model, layer by layer."""

    adapter: str
    settings: CompressionSettings
    samples: int = 0
    unit: str = "pictures"  # that the samples are
    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # calibration, solver, total
    slicing: Slicing | None = None  # of method slicegpt, which has no compressed layers

    @property
    def parameters(self) -> int:
        """Parameters of the compressed layers: non-zeros, U and V (or the linears of sliced blocks)."""
        if self.slicing:
            return self.slicing.parameters
        return sum(layer.spec.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Parameters that these layers had."""
        if self.slicing:
            return self.slicing.dense_parameters
        return sum(layer.spec.dense_parameters for layer in self.layers)

    @property
    def error_name(self) -> str:
        """What the layers' `error` is, in words."""
        known = any(layer.output_errors for layer in self.layers)
        return "relative error of a layer's output" if known else "relative error of a layer"

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "error": layer.error} for layer in self.layers]
        return {**asdict(self), "settings": self.settings.model_dump(), "layers": layers}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CompressionReport":
        """The inverse of `to_dict`; other fields are ignored. Raises KeyError, TypeError or ValueError."""
        names = ("name", "errors", "output_errors", "rounds", "seconds", "tokens")
        return cls(
            adapter=fields["adapter"],
            settings=CompressionSettings(**fields["settings"]),
            samples=fields["samples"],
            unit=fields["unit"],
            layers=[
                LayerReport(spec=LayerSpec.from_dict(layer["spec"]), **{name: layer[name] for name in names})
                for layer in fields["layers"]
            ],
            seconds=dict(fields["seconds"]),
            slicing=Slicing.from_dict(fields["slicing"]) if fields["slicing"] else None,
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
    """Compress the linears of a model's blocks, in place, as OATS does it (section 3.3), or by a baseline.

    Args:
        model: of a family that an adapter knows; put in eval mode and changed in place.
        calibration: batches, iterated once: tensors, (tensor, ...) or mappings of keyword arguments.
        adapter: of the model's family; found by itself if not given.
        settings: or its fields as `options`: `rate`, `rank_ratio`, `pattern`, `iterations`, `method`, ...
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
    remember_adapter(model, adapter)
    model.eval()
    adapter.prepare(model)
    blocks = adapter.named_blocks(model)
    if any(isinstance(block, SlicedBlock) for _, block in blocks):
        raise ModelError("the model is sliced already")
    plan: dict[str, dict[str, Parts]] = {}
    slicing: Slicing | None = None
    if settings.method == "slicegpt":
        slicing = plan_slicing(blocks, adapter, settings.rate)
    else:
        plan = {name: plan_block(adapter, name, block, settings) for name, block in blocks}
        if not any(plan.values()):
            raise ModelError("the model's blocks have no linear to compress: is it compressed already?")
    report = CompressionReport(adapter.name, settings, unit=adapter.unit, slicing=slicing)
    dtype = next(model.parameters()).dtype
    storage = getattr(torch, settings.storage_dtype) if settings.storage_dtype else dtype
    _round(model, dtype, storage)  # what is not compressed is stored rounded too, and must be calibrated so

    with ActivationStore(activation_memory * 1e9) as hidden:
        progress(Step(0.0, 0, len(blocks), "capturing the first block's inputs"))
        calls = capture_block_calls(model, blocks, calibration, hidden)
        report.samples = sum(len(hidden[b]) for b in range(len(hidden)))
        report.seconds = {"calibration": time.perf_counter() - start, "solver": 0.0}
        if slicing:

            def tell(share: float, block: int, activity: str) -> None:
                progress(Step((block + share) / len(blocks), block + 1, len(blocks), activity))

            report.slicing = slice_blocks(model, adapter, slicing, hidden, calls, tell)
            _round(model, dtype, storage)
        else:
            _decompose_blocks(blocks, plan, report, storage, hidden, calls, progress)
    progress(Step(1.0, len(blocks), len(blocks), "done", report.layers[-1].error if report.layers else None))
    report.seconds["total"] = time.perf_counter() - start
    report.seconds["calibration"] = report.seconds["total"] - report.seconds["solver"]
    model._oats_vision_report = report  # type: ignore[assignment]  # travels with the model to `save`
    return report


def _round(model: nn.Module, dtype: torch.dtype, storage: torch.dtype) -> None:
    """Round all weights to the storage precision, in place."""
    if storage != dtype:
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(storage))


def _decompose_blocks(
    blocks: list[tuple[str, nn.Module]],
    plan: dict[str, dict[str, Parts]],
    report: CompressionReport,
    storage: torch.dtype,
    hidden: ActivationStore,
    calls: BlockCalls,
    progress: Callable[[Step], None],
) -> None:
    """Replace each block's linears in turn; `hidden` holds the first block's inputs and is overwritten."""
    for i, (name, block) in enumerate(blocks):

        def tell(share: float, activity: str, error: float | None = None, block_number: int = i) -> None:
            done = (block_number + share) / len(blocks)
            progress(Step(done, block_number + 1, len(blocks), activity, error))

        tick = time.perf_counter()
        statistics, tokens = collect_statistics(block, plan[name], report.settings, hidden, calls, i, tell)
        _check_tokens(name, block, statistics, tokens)
        tock = time.perf_counter()
        for j, (linear_name, parts) in enumerate(plan[name].items()):
            tell(0.3 + 0.5 * j / len(plan[name]), linear_name, report.layers[-1].error if report.layers else None)
            at_once = report.settings.latency_tokens or (
                max(tokens[linear_name] // report.samples, 1) if report.unit == "pictures" else 1
            )
            layer = _compress_linear(
                block,
                name,
                linear_name,
                parts,
                statistics[linear_name],
                tokens[linear_name],
                report.settings,
                storage,
                at_once,
            )
            report.layers.append(layer)
        report.seconds["solver"] += time.perf_counter() - tock
        if i + 1 < len(blocks):
            for b in range(len(hidden)):
                tell(0.8 + 0.2 * b / len(hidden), "outputs of the compressed block", report.layers[-1].error)
                hidden[b] = calls.run(block, i, b, hidden[b])
        log.info("block %d/%d: %.1f s of calibration and solver", i + 1, len(blocks), time.perf_counter() - tick)


def plan_block(adapter: Adapter, block_name: str, block: nn.Module, settings: CompressionSettings) -> dict[str, Parts]:
    """The parts of each linear of a block and their budgets, before any work is done.

    Raises:
        ConfigError: the settings leave a layer without rank or non-zeros, or a fused weight does not divide.
    """
    plan: dict[str, Parts] = {}
    for name, linear in adapter.named_linears(block):
        try:
            parts = adapter.parts(block, name, linear)
        except ValueError as wrong:
            raise ModelError(f"{block_name}.{name}: {wrong}") from None
        if settings.fused_qkv == "joint":
            parts = [(name.rsplit(".", 1)[-1], linear.out_features)]
        try:
            plan[name] = [(part, rows, layer_budget(rows, linear.in_features, *settings.terms)) for part, rows in parts]
        except ValueError as impossible:
            raise ConfigError(f"{block_name}.{name}: {impossible}") from None
    return plan


def _compress_linear(
    block: nn.Module,
    block_name: str,
    name: str,
    parts: Parts,
    statistic: Statistic,
    tokens: int,
    settings: CompressionSettings,
    storage: torch.dtype,
    tokens_at_once: int,
) -> LayerReport:
    """Decompose one linear of the block and put the compressed layer in its place."""
    start = time.perf_counter()
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    rows = linear.weight.split([out_features for _, out_features, _ in parts])
    choices = [parts]
    if settings.rank_ratio == "auto":
        choices = candidates(parts, linear.in_features, settings.terms[0])
    layers, factors_of = [], []
    for choice in choices:
        try:
            factors = [
                (part, decompose(weight, statistic, budget, settings))
                for weight, (part, _, budget) in zip(rows, choice, strict=True)
            ]
        except ValueError as unusable:
            raise DataError(f"{block_name}.{name}: {unusable}") from None
        factors_of.append(factors)
        layers.append(SparseLowRankLinear.from_factors(factors, linear.bias, storage))
    best = 0
    if len(layers) > 1:
        errors = [max(f.error if f.output_error is None else f.output_error for _, f in fs) for fs in factors_of]
        best = fastest(layers, errors, settings.error_tolerance, tokens_at_once, linear.weight.dtype)
    layer, factors = layers[best], factors_of[best]
    block.set_submodule(name, layer.to(linear.weight.dtype))
    return LayerReport(
        name=f"{block_name}.{name}",
        spec=layer.spec,
        errors={part: f.error for part, f in factors},
        output_errors={part: f.output_error for part, f in factors if f.output_error is not None},
        rounds={part: f.rounds for part, f in factors},
        seconds=time.perf_counter() - start,
        tokens=tokens,
    )


def collect_statistics(
    block: nn.Module,
    linears: Mapping[str, Parts],
    settings: CompressionSettings,
    hidden: ActivationStore,
    calls: BlockCalls,
    index: int,
    tell: Callable[[float, str], None],
) -> tuple[dict[str, Statistic], dict[str, int]]:
    """Run all batches through the block and gather each linear's input statistics, and how many tokens it saw.

    Raises:
        DataError: batches are padded, and a linear sees a part of the tokens only.
    """
    statistics: dict[str, Statistic] = {}
    tokens: dict[str, int] = dict.fromkeys(linears, 0)
    handles = []
    mask: Tensor | None = None  # of the batch that is running

    for name in linears:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        statistic = statistic_of(settings, linear.in_features, linear.weight.device)
        statistics[name] = statistic

        def update(_: nn.Module, args: tuple[Any, ...], name: str = name, statistic: Statistic = statistic) -> None:
            x: Tensor = args[0]
            count = x.shape[:-1].numel()
            if mask is None:
                statistic.update(x)
                tokens[name] += count
                return
            if mask.numel() != count:
                raise DataError(f"{name} sees {count} of {mask.numel()} tokens: give batches without padding")
            statistic.update(x, mask.to(x.device).view(x.shape[:-1]))
            tokens[name] += int(mask.sum())

        handles.append(linear.register_forward_pre_hook(update))
    try:
        for b in range(len(hidden)):
            tell(0.3 * b / len(hidden), "second moments")
            mask = calls.masks[b]
            calls.run(block, index, b, hidden[b])
    finally:
        for handle in handles:
            handle.remove()
    return statistics, tokens


def _check_tokens(
    block_name: str, block: nn.Module, statistics: Mapping[str, Statistic], tokens: Mapping[str, int]
) -> None:
    """Say which linears (experts) saw few tokens; one that saw none counts every input feature alike."""
    if not any(tokens.values()):
        return  # decomposing says so
    few = {name: count for name, count in tokens.items() if count < min(FEW_TOKENS, max(tokens.values()))}
    for name, count in few.items():
        if not count:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            statistics[name].update(torch.eye(linear.in_features, device=linear.weight.device))
    if few:
        least = min(few, key=few.__getitem__)
        log.warning(
            "%s: %d of %d linears saw fewer than %d tokens (%s saw %d), too few to tell what they read: "
            "calibrate with more text",
            block_name,
            len(few),
            len(tokens),
            FEW_TOKENS,
            least,
            few[least],
        )
