"""One block of a model: what its linears see, what they are decomposed into, and what comes out of it."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

from torch import Tensor, dtype, nn

from oats_vision import ranks
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls, check_finite_states
from oats_vision.calibration.collect import check_called, collect_statistics, warn_of_few
from oats_vision.calibration.sensitivity import OutputGradients
from oats_vision.calibration.statistics import Statistic
from oats_vision.compression import methods
from oats_vision.compression.budgets import PartBudget, candidates, fastest
from oats_vision.compression.common import Common
from oats_vision.compression.exceptions import UNUSABLE, UnusableLayerError, no_better_than_zeros, oddity
from oats_vision.compression.inputs import statistic_of
from oats_vision.compression.methods import LinearMethod
from oats_vision.compression.record import CompressionReport, LayerException, LayerReport
from oats_vision.compression.settings import CompressionSettings
from oats_vision.compression.stream import Kind
from oats_vision.core.correlations import Correlations
from oats_vision.core.oats import Factors
from oats_vision.errors import ConfigError
from oats_vision.models.families import Residual, Structure
from oats_vision.models.structure import linear_of
from oats_vision.models.values import all_finite, check_storable, round_to
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from oats_vision.progress import Clock

log = logging.getLogger(__name__)

LayerDone = Callable[[str, LayerReport | LayerException], object]  # with the block's name
# of the memory for activations, where there are two streams: the share of each, and that of the gradients
STREAM, GRADIENTS = 0.4, 0.2


def spare(hidden: ActivationStore, settings: CompressionSettings) -> float:
    """Bytes of the memory for activations that are free before the first block: there is no dense stream yet."""
    return hidden.memory_limit if settings.targets else max(hidden.memory_limit - hidden.in_memory, 0.0)


def nobody(block: str, layer: LayerReport | LayerException) -> None:
    """Is told of layers where no one wants to know."""


@dataclass(frozen=True)
class Job:
    """What all blocks of a compression share.

    storage: precision that weights are rounded to. hidden: what the next block is given, one tensor a batch. calls:
    what blocks are called with besides. report: each layer is added to it. dense: what the next block is given in the
    dense model, where targets are propagated. residual: how blocks use their residual stream, if the family says so.
    gradients: of the dense model's output, where errors are weighed by it. layer_done: called with what became of each
    linear. joined: kinds of blocks whose linears were seen to write to that stream.
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
    layer_done: LayerDone = nobody
    joined: set[Kind] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        structure: Structure,
        parts: Mapping[str, Mapping[str, list[PartBudget]]],
        settings: CompressionSettings,
        storage: dtype,
        hidden: ActivationStore,
        calls: BlockCalls,
        clock: Clock,
        report: CompressionReport,
        finished: bool = False,
        layer_done: LayerDone = nobody,
        common: Common | None = None,
    ) -> "Job":
        """A job at its first block, whose inputs are those of the dense model.

        Args:
            parts: of each linear to compress, by the block's name and the linear's in it.
            finished: whether all blocks were, before the run was stopped: no gradient is asked for then.
            common: what earlier compressions found; what is found here is added.
        """
        dense, common = None, common or Common()
        if settings.sensitivity and not finished and common.gradients is None:
            rows = {
                block: {name: [part.out_features for part in of_linear] for name, of_linear in linears.items()}
                for block, linears in parts.items()
            }
            common.gradients = OutputGradients(
                model,
                structure,
                rows,
                calls,
                memory=GRADIENTS / STREAM * hidden.memory_limit,
                working=spare(hidden, settings),
                tell=clock.gradients,
            )
        if settings.targets:
            dense = ActivationStore(hidden.memory_limit)
            for b in range(len(hidden)):
                dense.append(hidden[b])
        residual = structure.family.residual
        return cls(settings, storage, hidden, calls, clock, report, dense, residual, common.gradients, layer_done)

    def asked(self, linear: str, parts: Sequence[PartBudget]) -> Sequence[Correlations | None]:
        """What the model's output asks of the outputs of a linear's parts, by its full name; None: all alike."""
        return self.gradients.correlations(linear) if self.gradients else [None] * len(parts)

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
        partial(statistic_of, job.method, job.settings, job.report.unit),
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
    before = dict(zip(parts, shares_before(block, parts, report.layers), strict=True))

    def decompose(linear_name: str) -> Outcome:
        clock.at("decomposing", index, before[linear_name], linear_name, job.last_error)
        given = Given(statistics[linear_name], tokens[linear_name])
        return outcome_of(job, f"{name}.{linear_name}", linear_of(block, linear_name), parts[linear_name], given)

    found = ranks.each(decompose, list(parts), costs_of(block, parts, report.layers))
    for linear_name, outcome in zip(parts, found, strict=True):
        put(job, block, name, linear_name, outcome, begun)
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
        output = calls.run(block, index, b, hidden[b])
        check_finite_states(output, calls.masks[b], f"the outputs of {name}", b)
        hidden[b] = output
        job.clock.at("applying", index, (b + 1) / len(hidden))


@dataclass(frozen=True)
class Given:
    """What a linear is decomposed by.

    statistic: of its inputs, and tokens: that it has seen. target: from its weight the one that is aimed at in place of
    it, (out_features, in_features), if there is one.
    """

    statistic: Statistic
    tokens: int
    target: Callable[[Tensor], Tensor | None] = lambda weight: None


@dataclass(frozen=True)
class Outcome:
    """What became of a linear: the layer to put in its place, unless it stays dense, and what was odd about it."""

    layer: SparseLowRankLinear | None
    report: LayerReport | None
    exception: LayerException | None


def compress_linear(
    job: Job,
    block: nn.Module,
    block_name: str,
    name: str,
    parts: list[PartBudget],
    given: Given,
    begun: Callable[[], object],
) -> None:
    """Decompose one linear of the block and put the compressed layer in its place, or leave it dense.

    Args:
        begun: called once it is replaced.

    Raises:
        UnusableLayerError: it cannot be decomposed.
        ConfigError: what it is decomposed into cannot be stored.
    """
    outcome = outcome_of(job, f"{block_name}.{name}", linear_of(block, name), parts, given)
    put(job, block, block_name, name, outcome, begun)


def outcome_of(job: Job, full: str, linear: nn.Linear, parts: list[PartBudget], given: Given) -> Outcome:
    """Decompose a linear, whose full name this is; errors as of `compress_linear`."""
    why = ""
    try:
        layer, done, why = decomposed(job, full, linear, parts, given)
    except (UnusableLayerError, ConfigError) as unusable:
        if job.settings.on_bad_layer == "stop":
            raise
        why = unusable.reason if isinstance(unusable, UnusableLayerError) else str(unusable)
    if why:
        return Outcome(None, None, LayerException(full, why, dense=True, parameters=linear.weight.numel()))
    odd = oddity(linear.weight, given.statistic, given.tokens)
    return Outcome(layer, done, LayerException(full, odd) if odd else None)


def put(job: Job, block: nn.Module, block_name: str, name: str, outcome: Outcome, begun: Callable[[], object]) -> None:
    """Put the compressed layer in its linear's place, if there is one, and note what became of it."""
    exception = outcome.exception
    if exception:
        job.report.exceptions.append(exception)
    if outcome.layer is None or outcome.report is None:
        assert exception is not None
        log.warning("%s stays dense: %s", exception.name, exception.reason)
        job.layer_done(block_name, exception)
        return
    if exception and outcome.report.tokens:  # of experts without tokens there is one warning for all
        log.warning("%s: %s", exception.name, exception.reason)
    block.set_submodule(name, outcome.layer.to(linear_of(block, name).weight.dtype))
    job.report.layers.append(outcome.report)
    begun()
    job.layer_done(block_name, outcome.report)


def decomposed(
    job: Job, full: str, linear: nn.Linear, parts: list[PartBudget], given: Given
) -> tuple[SparseLowRankLinear, LayerReport, str]:
    """What a linear is decomposed into, what is known of it, and why it is better left dense; empty if it is not.

    Raises:
        UnusableLayerError: what is known of its inputs or outputs is not finite, or what follows from it.
        ConfigError: what it is decomposed into cannot be stored.
    """
    start, settings = time.perf_counter(), job.settings
    rows = [part.out_features for part in parts]
    choices = [parts]
    if settings.rank_ratio == "auto":
        choices = candidates(parts, linear.in_features, settings.allocation)
    factors_of: list[list[tuple[str, Factors]]] = []

    def decompose(one: tuple[Tensor, PartBudget, Correlations | None]) -> Factors | str:
        """A part's factors, or why there are none: one rank alone must not leave where others wait for it."""
        weight, part, outputs = one
        try:
            return job.method.decompose_for_output(weight, given.statistic, part.budget, settings, outputs)
        except UNUSABLE as problem:
            return str(problem) or type(problem).__name__

    try:
        target = given.target(linear.weight)
        weights = (linear.weight if target is None else target).split(rows)
        asked = job.asked(full, parts)
        for choice in choices:
            found = ranks.each(decompose, list(zip(weights, choice, asked, strict=True)), rows)
            of_parts = [(part.name, factors) for part, factors in zip(parts, found, strict=True)]
            if reason := next((factors for _, factors in of_parts if isinstance(factors, str)), ""):
                raise UnusableLayerError(full, reason)
            factors_of.append([(name, factors) for name, factors in of_parts if isinstance(factors, Factors)])
    except UNUSABLE as problem:
        raise UnusableLayerError(full, str(problem)) from None
    layers = [SparseLowRankLinear.from_factors(factors, linear.bias, job.storage) for factors in factors_of]
    best = 0
    if len(layers) > 1:
        errors = [max(f.error if f.output_error is None else f.output_error for _, f in fs) for fs in factors_of]
        limits = settings.error_tolerance, job.tokens_at_once(given.tokens), linear.weight.dtype
        best = ranks.on_main(partial(fastest, layers, errors, *limits))  # by times, which are each rank's own
    layer, factors = layers[best], factors_of[best]
    matrices = [(f"{full} ({part})", factor) for part, f in factors for factor in (f.S, f.U, f.V)]
    if bad := next((part for part, factor in matrices if not all_finite(factor)), ""):
        raise UnusableLayerError(bad, "what it is decomposed into is not finite")
    check_storable(matrices, job.storage)
    why = no_better_than_zeros(zip(weights, [f for _, f in factors], asked, strict=True), given.statistic)
    done = LayerReport(
        name=full,
        spec=layer.spec,
        errors={part: f.error for part, f in factors},
        output_errors={part: f.output_error for part, f in factors if f.output_error is not None},
        iterations={part: f.iterations for part, f in factors},
        seconds=time.perf_counter() - start,
        tokens=given.tokens,
    )
    return layer, done, why
