"""`budget`: one rate for the whole model, shared out over its linears; they keep as much as all would at that rate.

uniform: each linear has that rate. measured: each loses what costs the model's output least, by sensitivities and
error curves. owl, alphapruning: each block has a rate of its own, as published.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls
from oats_vision.calibration.collect import collect_statistics
from oats_vision.calibration.gradients import output_sensitivity
from oats_vision.calibration.sensitivity import OutputGradients
from oats_vision.calibration.statistics import SecondMoment, Statistic
from oats_vision.compression import methods
from oats_vision.compression.allocation import allocate, refined
from oats_vision.compression.block_rates import alpha_rates, hill_exponent, outlier_ratio, owl_rates
from oats_vision.compression.blocks import spare
from oats_vision.compression.budgets import PartBudget
from oats_vision.compression.common import Common
from oats_vision.compression.curves import HIGHEST, LOWEST, Seen, Weight, error_curve
from oats_vision.compression.exceptions import UNUSABLE, UnusableLayerError
from oats_vision.compression.formats import TRUST, in_formats, offered
from oats_vision.compression.inputs import statistic_of
from oats_vision.compression.methods import LinearMethod
from oats_vision.compression.plan import Plan
from oats_vision.compression.settings import CompressionSettings
from oats_vision.core.budget import Allocation, Budget
from oats_vision.models.families import Structure
from oats_vision.models.record import bring
from oats_vision.models.structure import linear_of
from oats_vision.nn.outputs import first_output

log = logging.getLogger(__name__)

TOKENS = 8192  # that the dense model's inputs are judged by, to the batch
SEED = 0  # of the random projections
SHARE_OF_GRADIENTS = 0.3  # of the time that measuring takes, about
Parts = dict[str, dict[str, list[PartBudget]]]
Tell = Callable[[float], None]
T = TypeVar("T")


def share_out(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    settings: CompressionSettings,
    hidden: ActivationStore,
    calls: BlockCalls,
    gradients: OutputGradients | None = None,
    tell: Tell = lambda share: None,
    common: Common | None = None,
) -> Parts:
    """The budgets of all parts, by block and linear: those of the plan, or others that add up to the same.

    Args:
        model: dense, and prepared.
        hidden: what its first block is given; stays as it is. calls: how its blocks are called.
        gradients: of its output, if they were computed.
        tell: called with the share of the work that is done.
        common: what earlier compressions found; what is found here is added.

    Raises:
        ModelError: the model's values or gradients are not finite.
        UnusableLayerError: its inputs are such that a linear cannot be decomposed.
    """
    if settings.budget == "uniform":
        return plan.parts
    with torch.no_grad():
        measured = partial(_measured, model, structure, plan, settings, hidden, calls, gradients, tell)
        if settings.bits:
            common = common or Common()
            if common.costs is None:
                common.costs = measured(lambda weight, method: offered(weight, method, settings))
            widths = {
                block: {name: _weight(model, f"{block}.{name}").shape[1] for name in linears}
                for block, linears in plan.parts.items()
            }
            trust = TRUST[structure.family.unit]
            return in_formats(plan.parts, widths, settings.bits, common.costs, trust)
        if settings.budget == "measured":
            curves_found = measured(lambda weight, method: error_curve(weight, method, settings))
            given = [
                [(part.budget.parameters(part.out_features, width), 0.0)] for _, part, width in _each(model, plan.parts)
            ]
            curves = [own if curve is None else curve for curve, own in zip(curves_found, given, strict=True)]
            wanted = allocate([refined(curve) for curve in curves], _total(model, plan.parts))
        else:
            wanted = _by_block(model, plan, settings, hidden, calls, tell)
    shapes = [(part.out_features, width) for _, part, width in _each(model, plan.parts)]
    together = [len(of_linear) for linears in plan.parts.values() for of_linear in linears.values()]
    budgets = iter(fitted(shapes, together, wanted, settings.allocation, _total(model, plan.parts)))
    shared = {
        block: {name: [replace(part, budget=next(budgets)) for part in parts] for name, parts in linears.items()}
        for block, linears in plan.parts.items()
    }
    rates = [1 - p.budget.parameters(p.out_features, w) / (p.out_features * w) for _, p, w in _each(model, shared)]
    log.info("budget %s: rates from %.3f to %.3f", settings.budget, min(rates), max(rates))
    return shared


def fitted(
    shapes: list[tuple[int, int]], together: list[int], wanted: list[float], allocation: Allocation, total: int
) -> list[Budget]:
    """Whole ranks and non-zeros for what each part should keep, that come to the total but for one step.

    Budgets are rounded down as uniform ones are; what that leaves over goes to those that lost most by it, in steps:
    a non-zero in each row, or one anywhere, or a rank where there is no sparse term.

    Args:
        shapes: of the parts. together: how many parts each linear has, which get one rank: U is stored as one matrix.
        wanted: parameters that each keeps; scaled down if they add up to more than the total.
    """
    least = [_least(m, n, allocation) for m, n in shapes]
    above = [max(kept - low, 0.0) for kept, low in zip(wanted, least, strict=True)]
    scale = min(1.0, max(total - sum(least), 0.0) / max(sum(above), 1e-9))
    wanted = [low + scale * more for low, more in zip(least, above, strict=True)]
    budgets = [
        replace(allocation, rate=1 - kept / (m * n)).budget(m, n) for (m, n), kept in zip(shapes, wanted, strict=True)
    ]
    first = 0
    for count in together:
        budgets[first : first + count] = _of_one_rank(budgets[first : first + count], shapes[first : first + count])
        first += count
    sizes = [budget.parameters(m, n) for budget, (m, n) in zip(budgets, shapes, strict=True)]
    lost = [kept - size for kept, size in zip(wanted, sizes, strict=True)]
    order = sorted(range(len(shapes)), key=lambda i: -lost[i] / math.prod(shapes[i]))
    left, sparse = total - sum(sizes), allocation.rank_ratio < 1
    for i in order:
        m, n = shapes[i]
        step = m + n if not sparse else m if allocation.pattern.kind == "row" else 1
        count = min(left // step, math.ceil(lost[i] / step))
        if count < 1 or sizes[i] + count * step > m * n:
            continue
        left -= count * step
        if sparse:
            budgets[i] = replace(budgets[i], nonzeros=budgets[i].nonzeros + count * step)
        else:
            budgets[i] = replace(budgets[i], rank=budgets[i].rank + count)
    return budgets


def _least(m: int, n: int, allocation: Allocation) -> float:
    """Parameters that leave a weight (m, n) a rank and a non-zero, in each row if they are by row."""
    ratio = allocation.rank_ratio
    rank = (m + n) / ratio if ratio > 0 else 0.0
    nonzeros = (m if allocation.pattern.kind == "row" else 1) / (1 - ratio) if ratio < 1 else 0.0
    return max(rank, nonzeros)


def _of_one_rank(budgets: list[Budget], shapes: list[tuple[int, int]]) -> list[Budget]:
    """The parts of one linear with their mean rank; what that takes or gives goes to, or comes from, the non-zeros."""
    rank = sum(budget.rank for budget in budgets) // len(budgets)
    changed = []
    for budget, (m, n) in zip(budgets, shapes, strict=True):
        step = m if budget.pattern.kind == "row" else 1
        nonzeros = budget.nonzeros + (budget.rank - rank) * (m + n) // step * step
        if not 0 < nonzeros <= m * n or (rank == 0) != (budget.rank == 0):
            return budgets
        changed.append(replace(budget, rank=rank, nonzeros=nonzeros))
    return changed


def _measured(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    settings: CompressionSettings,
    hidden: ActivationStore,
    calls: BlockCalls,
    gradients: OutputGradients | None,
    tell: Tell,
    look: Callable[[Weight, LinearMethod], T],
) -> list[T | None]:
    """What is found out by a look at each part, in order; None where nothing is known, or the part is unusable."""
    method = methods.find(settings.method)
    assert isinstance(method, LinearMethod)
    first = 0.0 if gradients else SHARE_OF_GRADIENTS
    sensitivities = (
        gradients.squares
        if gradients
        else output_sensitivity(
            model,
            structure,
            plan.parts,
            calls,
            seed=SEED,
            memory=spare(hidden, settings),
            tell=lambda share: tell(SHARE_OF_GRADIENTS * share),
        )
    )
    found: list[T | None] = []

    def new_statistic(in_features: int, device: torch.device) -> Statistic:
        own = statistic_of(method, settings, structure.family.unit, in_features, device)
        return Seen(own, in_features, device)

    def of_part(job: tuple[str, Weight, bool]) -> T | None:
        full, weight, known = job
        try:
            return look(weight, method) if known else None
        except UNUSABLE as unusable:
            if settings.on_bad_layer == "stop":
                raise UnusableLayerError(full, str(unusable)) from None
            return None

    for done, (block_name, block, statistics) in enumerate(_dense_pass(plan, hidden, calls, new_statistic)):
        jobs = []
        for name, seen in statistics.items():
            assert isinstance(seen, Seen)
            full = f"{block_name}.{name}"
            rows = [part.out_features for part in plan.parts[block_name][name]]
            weights, s = _weight(block, name).split(rows), sensitivities[full].split(rows)
            # of an expert nothing may be known
            known = bool(seen.gram.tokens and sensitivities[full].any())
            moments = seen.gram.compute() if known else torch.empty(0)
            jobs += [(full, Weight(W, own, seen.own, moments), known) for W, own in zip(weights, s, strict=True)]
        found += ranks.each(of_part, jobs, [job[1].W.numel() for job in jobs])
        tell(first + (1 - first) * (done + 1) / len(plan.blocks))
    return found


def _by_block(
    model: nn.Module,
    plan: Plan,
    settings: CompressionSettings,
    hidden: ActivationStore,
    calls: BlockCalls,
    tell: Tell,
) -> list[float]:
    """The parameters that each part keeps where each block has a rate of its own."""
    names = [name for name, _ in plan.blocks if plan.parts[name]]
    if settings.budget == "alphapruning":
        alphas = []
        for done, name in enumerate(names):
            bring(model, name)
            exponents = [hill_exponent(_weight(model, f"{name}.{linear}")) for linear in plan.parts[name]]
            alphas.append(sum(exponents) / len(exponents))
            tell((done + 1) / len(names))
        sizes = [sum(_weight(model, f"{name}.{linear}").numel() for linear in plan.parts[name]) for name in names]
        rates = alpha_rates(alphas, sizes, settings.rate)
    else:
        ratios = []
        for done, (name, block, statistics) in enumerate(_dense_pass(plan, hidden, calls, SecondMoment)):
            scores = []
            for linear, seen in statistics.items():
                assert isinstance(seen, SecondMoment)
                if seen.tokens:  # of an expert nothing may be known
                    scores.append(_weight(block, linear).float().abs() * seen.scale())
            ratios += [outlier_ratio(scores)] if name in names else []
            tell((done + 1) / len(plan.blocks))
        rates = owl_rates(ratios, settings.rate)
    density = {name: 1 - min(max(rate, LOWEST), HIGHEST) for name, rate in zip(names, rates, strict=True)}
    return [density[block] * part.out_features * width for block, part, width in _each(model, plan.parts)]


def _dense_pass(
    plan: Plan, hidden: ActivationStore, calls: BlockCalls, new_statistic: Callable[[int, torch.device], Statistic]
) -> Iterator[tuple[str, nn.Module, dict[str, Statistic]]]:
    """Each block's name and itself, and statistics of its linears' inputs in the dense model, on the first batches."""
    with ActivationStore(hidden.memory_limit) as states:
        for b, (_, tokens) in enumerate(calls.before):
            if tokens < TOKENS:
                states.append(hidden[b])
        for index, (name, block) in enumerate(plan.blocks):
            outputs: list[Tensor] = []
            with _noting(block, outputs):
                statistics, _ = collect_statistics(
                    block, plan.parts[name], new_statistic, states, calls, index, name, lambda share: None
                )
            last = outputs[-len(states) :]  # of the second time, where all batches had to be run twice
            for b, output in enumerate(last):
                states[b] = output
            yield name, block, statistics


@contextmanager
def _noting(block: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """Keep what a block returns."""
    handle = block.register_forward_hook(lambda module, args, output: outputs.append(first_output(output)))
    try:
        yield
    finally:
        handle.remove()


def _each(model: nn.Module, parts: Parts) -> Iterator[tuple[str, PartBudget, int]]:
    """All parts in order, each with its block's name and how many inputs it has."""
    for block, linears in parts.items():
        for name, of_linear in linears.items():
            width = _weight(model, f"{block}.{name}").shape[1]
            yield from ((block, part, width) for part in of_linear)


def _total(model: nn.Module, parts: Parts) -> int:
    """Parameters that all parts keep."""
    return sum(part.budget.parameters(part.out_features, width) for _, part, width in _each(model, parts))


def _weight(module: nn.Module, name: str) -> Tensor:
    """The weight of a linear in a model or a block."""
    return linear_of(module, name).weight.detach()
