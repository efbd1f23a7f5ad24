"""One block of a model: what its linears see, what they are decomposed into, and what comes out of it."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from torch import Tensor, dtype, nn

from oats_vision import ranks
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls, check_finite_states
from oats_vision.calibration.collect import check_called, collect_statistics, warn_of_few
from oats_vision.calibration.sensitivity import OutputGradients, output_correlations
from oats_vision.calibration.statistics import Gram, Statistic
from oats_vision.compression import methods
from oats_vision.compression.budgets import PartBudget, candidates, fastest
from oats_vision.compression.methods import LinearMethod
from oats_vision.compression.record import CompressionReport, LayerReport
from oats_vision.compression.settings import CompressionSettings
from oats_vision.compression.stream import linear_of
from oats_vision.errors import DataError
from oats_vision.models.families import Residual, Structure
from oats_vision.models.values import check_storable, round_to
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from oats_vision.progress import Clock

# of the memory for activations, where there are two streams: the share of each, and that of the gradients
STREAM, GRADIENTS = 0.4, 0.2


@dataclass(frozen=True)
class Job:
    """What all blocks of a compression share.

    storage: precision that weights are rounded to. hidden: what the next block is given, one tensor a batch. calls:
    what blocks are called with besides. report: each layer is added to it. dense: what the next block is given in the
    dense model, where targets are propagated. residual: how blocks use their residual stream, if the family says so.
    gradients: of the dense model's output, where errors are weighed by it.
    """

    settings: CompressionSettings
    storage: dtype
    hidden: ActivationStore
    calls: BlockCalls
    clock: Clock
    report: CompressionReport
    dense: ActivationStore | None
    residual: Residual | None
    gradients: OutputGradients | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        structure: Structure,
        linears: Mapping[str, Collection[str]],
        settings: CompressionSettings,
        storage: dtype,
        hidden: ActivationStore,
        calls: BlockCalls,
        clock: Clock,
        report: CompressionReport,
    ) -> "Job":
        """A job at its first block, whose inputs are those of the dense model.

        Args:
            linears: to compress, by their names in the block, by the block's name.
        """
        gradients = dense = None
        if settings.sensitivity:
            memory = GRADIENTS / STREAM * hidden.memory_limit
            gradients = OutputGradients(model, structure, linears, calls, memory=memory, tell=clock.gradients)
        if settings.targets:
            dense = ActivationStore(hidden.memory_limit)
            for b in range(len(hidden)):
                dense.append(hidden[b])
        residual = structure.family.residual
        return cls(settings, storage, hidden, calls, clock, report, dense, residual, gradients)

    def output_moments(self, index: int, name: str, block: nn.Module, linears: Collection[str]) -> dict[str, Gram]:
        """What the model's output asks of the outputs of a dense block's linears; nothing where it is not asked."""
        if self.gradients is None:
            return {}
        return self.gradients.of_linears(block, name, index, linears, self.dense or self.hidden)

    @property
    def method(self) -> LinearMethod:
        method = methods.find(self.settings.method)
        assert isinstance(method, LinearMethod)
        return method

    @property
    def last_error(self) -> float | None:
        """Of the layer that was decomposed last."""
        return self.report.layers[-1].error if self.report.layers else None

    def tokens_at_once(self, tokens: int) -> int:
        """How many tokens a layer is timed with: those of a picture, of all that the layer saw; one of text."""
        if self.settings.latency_tokens:
            return self.settings.latency_tokens
        return max(tokens // self.report.samples, 1) if self.report.unit == "pictures" else 1


def compress_at_once(
    job: Job,
    index: int,
    name: str,
    block: nn.Module,
    parts: Mapping[str, list[PartBudget]],
    begun: Callable[[], object],
) -> None:
    """Replace a block's linears by what they are decomposed into, all by what they read in the dense block (OATS, 3.3).

    Args:
        parts: of each linear to compress.
        begun: called once a linear is replaced, and what would undo earlier steps is of no use any more.
    """
    clock, report = job.clock, job.report
    clock.at("statistics", index, 0.0)
    round_to(block.state_dict().values(), job.storage)
    statistics, tokens = collect_statistics(
        block,
        parts,
        partial(job.method.statistic, job.settings),
        job.hidden,
        job.calls,
        index,
        name,
        lambda share: clock.at("statistics", index, share),
    )
    if any(tokens.values()):  # else decomposing says so
        for linear_name, statistic in statistics.items():
            check_called(f"{name}.{linear_name}", linear_of(block, linear_name), statistic, tokens[linear_name])
        warn_of_few(name, tokens)
    asked = job.output_moments(index, name, block, parts)
    before = dict(zip(parts, shares_before(block, parts, report.layers), strict=True))

    def decomposed(linear_name: str) -> tuple[LayerReport, nn.Module]:
        clock.at("decomposing", index, before[linear_name], linear_name, job.last_error)
        given = Given(statistics[linear_name], tokens[linear_name], outputs=asked.get(linear_name))
        layer = compress_linear(job, block, name, linear_name, parts[linear_name], given)
        return layer, block.get_submodule(linear_name)

    found = ranks.each(decomposed, list(parts), costs_of(block, parts, report.layers))
    for linear_name, (layer, module) in zip(parts, found, strict=True):
        block.set_submodule(linear_name, module)
        report.layers.append(layer)
        begun()
    clock.at("decomposing", index, 1.0, error=job.last_error)


def shares_before(
    block: nn.Module, parts: Mapping[str, list[PartBudget]], layers: Sequence[LayerReport]
) -> list[float]:
    """The share of a block's decompositions that is done when that of each linear begins.

    Args:
        layers: that were decomposed so far: where the last are the same ones of another block, by their times.
    """
    done = [0.0, *accumulate(costs_of(block, parts, layers))]
    return [cost / max(done[-1], 1e-9) for cost in done[:-1]]


def costs_of(block: nn.Module, parts: Mapping[str, list[PartBudget]], layers: Sequence[LayerReport]) -> Sequence[float]:
    """What each of a block's decompositions will take, in no unit: see `shares_before`."""
    before = layers[-len(parts) :] if parts else []
    if len(before) == len(parts) and all(map(str.endswith, (layer.name for layer in before), parts)):
        return [layer.seconds for layer in before]
    return [float(block.get_submodule(name).weight.numel()) for name in parts]  # type: ignore[operator]


def apply_block(job: Job, index: int, name: str, block: nn.Module) -> None:
    """What the compressed block makes of its inputs takes their place: it is what the next block gets."""
    hidden, calls = job.hidden, job.calls
    job.clock.at("applying", index, 0.0)
    for b in range(len(hidden)):
        hidden[b] = calls.run(block, index, b, hidden[b])
        check_finite_states(hidden[b], calls.masks[b], f"the outputs of {name}", b)
        job.clock.at("applying", index, (b + 1) / len(hidden))


@dataclass(frozen=True)
class Given:
    """What a linear is decomposed by.

    statistic: of its inputs, and tokens: that it has seen. weight: (out_features, in_features), what is aimed at in
    place of its own. outputs: of the gradients at its outputs.
    """

    statistic: Statistic
    tokens: int
    weight: Tensor | None = None
    outputs: Gram | None = None


def compress_linear(
    job: Job, block: nn.Module, block_name: str, name: str, parts: list[PartBudget], given: Given
) -> LayerReport:
    """Decompose one linear of the block and put the compressed layer in its place."""
    start, settings = time.perf_counter(), job.settings
    linear = linear_of(block, name)
    full = f"{block_name}.{name}"
    rows = [part.out_features for part in parts]
    weights = (linear.weight if given.weight is None else given.weight).split(rows)
    asked = [
        output_correlations(given.outputs, slice(end - n, end)) for n, end in zip(rows, accumulate(rows), strict=True)
    ]
    choices = [parts]
    if settings.rank_ratio == "auto":
        choices = candidates(parts, linear.in_features, settings.allocation)
    layers, factors_of = [], []
    for choice in choices:
        try:
            found = ranks.each(
                lambda one: job.method.decompose_for_output(one[0], given.statistic, one[1].budget, settings, one[2]),
                list(zip(weights, choice, asked, strict=True)),
                rows,
            )
            factors = [(part.name, f) for part, f in zip(parts, found, strict=True)]
        except ValueError as unusable:
            raise DataError(f"{full}: {unusable}") from None
        factors_of.append(factors)
        layers.append(SparseLowRankLinear.from_factors(factors, linear.bias, job.storage))
    best = 0
    if len(layers) > 1:
        errors = [max(f.error if f.output_error is None else f.output_error for _, f in fs) for fs in factors_of]
        limits = settings.error_tolerance, job.tokens_at_once(given.tokens), linear.weight.dtype
        best = ranks.on_main(partial(fastest, layers, errors, *limits))  # by times, which are each rank's own
    layer, factors = layers[best], factors_of[best]
    check_storable(((f"{full} ({part})", factor) for part, f in factors for factor in (f.S, f.U, f.V)), job.storage)
    block.set_submodule(name, layer.to(linear.weight.dtype))
    return LayerReport(
        name=full,
        spec=layer.spec,
        errors={part: f.error for part, f in factors},
        output_errors={part: f.output_error for part, f in factors if f.output_error is not None},
        iterations={part: f.iterations for part, f in factors},
        seconds=time.perf_counter() - start,
        tokens=given.tokens,
    )
