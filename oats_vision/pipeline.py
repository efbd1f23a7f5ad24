"""Compress a model block by block: the inputs of a block come from the compressed blocks before it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.activations import ActivationStore
from oats_vision.adapters import Adapter, find_adapter, refuse_wrappers, remember_adapter
from oats_vision.block_calls import BlockCalls, capture_block_calls, check_finite_states
from oats_vision.calibration import Statistic
from oats_vision.config import CompressionSettings, validated
from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.layers import LayerSpec, SparseLowRankLinear
from oats_vision.methods import decompose
from oats_vision.models import note_weights
from oats_vision.plan import Plan, chosen_linears, plan_block
from oats_vision.slicing import SlicedBlock, Slicing, plan_slicing, slice_blocks
from oats_vision.splits import Parts, candidates, fastest
from oats_vision.statistics import check_tokens, collect_statistics
from oats_vision.structure import all_called, check_device, check_replaceable, floating
from oats_vision.values import check_finite, check_storable, restore, round_to

log = logging.getLogger(__name__)


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
    calibration: Any,
    *,
    adapter: Adapter | None = None,
    settings: CompressionSettings | None = None,
    activation_memory: float = 8.0,
    progress: Callable[[Step], None] = lambda step: None,
    **options: Any,
) -> CompressionReport:
    """Compress the linears of a model's blocks, in place, as OATS does it (section 3.3), or by a baseline.

    Args:
        model: of a family that an adapter knows; put in eval mode and changed in place. An error that comes before
            its first layer is replaced leaves it as it was.
        calibration: batches, iterated once: tensors or arrays, (tensor, ...) or mappings of keyword arguments, or
            single pictures (sequences), in an iterable or a Dataset; or one tensor of many.
        adapter: of the model's family; found by itself if not given.
        settings: or its fields as `options`: `rate`, `rank_ratio`, `pattern`, `iterations`, `method`, ...
        activation_memory: GB of activations to keep in memory; what is beyond lives in temporary files.
        progress: called with each step.

    Returns:
        The settings, and each layer's budget and error.

    Raises:
        ConfigError: a setting is out of range, or leaves a layer without rank or non-zeros.
        ModelError: no adapter knows the model, it does not run block by block, has linears that are more than
            nn.Linear, or values that are not finite.
        DataError: no calibration batch, or one that the model cannot take.
    """
    start = time.perf_counter()
    if not activation_memory > 0:
        raise ConfigError(f"activation_memory must be above 0 GB, got {activation_memory}")
    if settings is None:
        settings = validated(CompressionSettings, options)
    elif options:
        raise ConfigError(f"give either settings or single options, got settings and {', '.join(options)}")
    check_finite(model)
    check_device(model)
    refuse_wrappers(model)
    note_weights(model)
    with _plain_arithmetic(model), _undone_unless_begun(model) as undo:
        adapter = remember_adapter(model, adapter or find_adapter(model))
        model.eval()
        adapter.prepare(model)
        undo.callback(adapter.restore, model)
        blocks = adapter.named_blocks(model)
        if any(isinstance(block, SlicedBlock) for _, block in blocks):
            raise ModelError("the model is sliced already")
        linears = chosen_linears(adapter, blocks, settings)
        check_replaceable(linears, blocks)
        plan: Plan = {}
        slicing: Slicing | None = None
        if settings.method == "slicegpt":
            slicing = plan_slicing(blocks, adapter, settings.rate)
        else:
            plan = {name: plan_block(adapter, name, block, settings) for name, block in blocks}
        dtype = floating(model).dtype
        storage = getattr(torch, settings.storage_dtype) if settings.storage_dtype else dtype
        buffers = {name for name, _ in model.named_buffers()}
        check_storable(model.state_dict().items(), storage, buffers)
        report = CompressionReport(adapter.name, settings, unit=adapter.unit, slicing=slicing)
        with ActivationStore(activation_memory * 1e9) as hidden:
            progress(Step(0.0, 0, len(blocks), "capturing the first block's inputs"))
            # what is not compressed is stored rounded too, and must be calibrated so
            undo.callback(restore, round_to(_before_work(model, blocks), storage))
            with all_called(linears):
                calls = capture_block_calls(model, blocks, calibration, hidden, adapter.unit)
            report.samples = sum(len(hidden[b]) for b in range(len(hidden)))
            report.seconds = {"calibration": time.perf_counter() - start, "solver": 0.0}
            if slicing:

                def tell(share: float, block: int, activity: str) -> None:
                    progress(Step((block + share) / len(blocks), block + 1, len(blocks), activity))

                report.slicing = slice_blocks(model, adapter, slicing, hidden, calls, tell)
                check_storable(model.state_dict().items(), storage, buffers)
                round_to(model.state_dict().values(), storage)
            else:
                _decompose_blocks(blocks, plan, report, storage, hidden, calls, progress, begun=undo.pop_all)
    progress(Step(1.0, len(blocks), len(blocks), "done", report.layers[-1].error if report.layers else None))
    report.seconds["total"] = time.perf_counter() - start
    report.seconds["calibration"] = report.seconds["total"] - report.seconds["solver"]
    model._oats_vision_report = report  # type: ignore[assignment]  # travels with the model to `save`
    return report


@contextmanager
def _plain_arithmetic(model: nn.Module) -> Iterator[None]:
    """Whatever autocast or default dtype the caller has set, results are those without."""
    first, default = floating(model), torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(first.dtype, torch.float32))
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast(first.device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _undone_unless_begun(model: nn.Module) -> Iterator[ExitStack]:
    """Give the model back as it was if something is wrong before its first layer is replaced."""
    training = [module for module in model.modules() if module.training]
    noted = vars(model).get("_oats_vision_adapter")
    with ExitStack() as undo:
        try:
            yield undo
        except BaseException:
            if not any(isinstance(module, (SparseLowRankLinear, SlicedBlock)) for module in model.modules()):
                undo.close()
                for module in training:
                    module.training = True
                if noted is None and "_oats_vision_adapter" in vars(model):
                    del model._oats_vision_adapter
            raise
        finally:
            undo.pop_all()


def _before_work(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> list[Tensor]:
    """The tensors of a model that matter before its second block: those in no other block than the first."""
    later = tuple(f"{name}." for name, _ in blocks[1:])
    return [tensor for name, tensor in model.state_dict().items() if not later or not name.startswith(later)]


def _decompose_blocks(
    blocks: list[tuple[str, nn.Module]],
    plan: Plan,
    report: CompressionReport,
    storage: torch.dtype,
    hidden: ActivationStore,
    calls: BlockCalls,
    progress: Callable[[Step], None],
    begun: Callable[[], object],
) -> None:
    """Replace each block's linears in turn; `hidden` holds the first block's inputs and is overwritten.

    Args:
        begun: called once a linear is replaced, and what would undo earlier steps is of no use any more.
    """
    for i, (name, block) in enumerate(blocks):

        def tell(share: float, activity: str, error: float | None = None, block_number: int = i) -> None:
            done = (block_number + share) / len(blocks)
            progress(Step(done, block_number + 1, len(blocks), activity, error))

        tick = time.perf_counter()
        round_to(block.state_dict().values(), storage)
        statistics, tokens = collect_statistics(block, plan[name], report.settings, hidden, calls, i, name, tell)
        check_tokens(name, block, statistics, tokens)
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
            begun()
        report.seconds["solver"] += time.perf_counter() - tock
        if i + 1 < len(blocks):
            error = report.layers[-1].error if report.layers else None
            for b in range(len(hidden)):
                tell(0.8 + 0.2 * b / len(hidden), "outputs of the compressed block", error)
                hidden[b] = calls.run(block, i, b, hidden[b])
                check_finite_states(hidden[b], calls.masks[b], f"the outputs of {name}", b)
        log.info("block %d/%d: %.1f s of calibration and solver", i + 1, len(blocks), time.perf_counter() - tick)


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
    full = f"{block_name}.{name}"
    check_storable(((f"{full} ({part})", factor) for part, f in factors for factor in (f.S, f.U, f.V)), storage)
    block.set_submodule(name, layer.to(linear.weight.dtype))
    return LayerReport(
        name=full,
        spec=layer.spec,
        errors={part: f.error for part, f in factors},
        output_errors={part: f.output_error for part, f in factors if f.output_error is not None},
        rounds={part: f.rounds for part, f in factors},
        seconds=time.perf_counter() - start,
        tokens=tokens,
    )
