"""A block compressed linear by linear, each aimed at what the dense model would have said.

Each linear's inputs are those that the compressed linears before it give, in its own block too. The dense model's
inputs of the same linear are computed beside them; from both, the linear's target follows: see `core/target.py`.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import check_finite_states
from oats_vision.calibration.collect import check_called, counted, warn_of_few
from oats_vision.calibration.statistics import CrossMoment, Gram, Statistic
from oats_vision.calibration.walk import Walk
from oats_vision.compression.blocks import (
    Given,
    Job,
    apply_block,
    compress_at_once,
    compress_linear,
    shares_before,
)
from oats_vision.compression.budgets import PartBudget
from oats_vision.compression.inputs import statistic_of
from oats_vision.compression.stream import Writer, writers
from oats_vision.core.target import propagated_target
from oats_vision.machine import give_memory_back
from oats_vision.models.structure import in_experts, linear_of, sharing_weights
from oats_vision.models.values import round_to

log = logging.getLogger(__name__)

# how much must be known before it changes the weight, as a share of the features' mean square: texts differ more
DAMPING = {"pictures": 0.03, "sequences": 1.0}


def compress_block(
    job: Job,
    index: int,
    name: str,
    block: nn.Module,
    parts: Mapping[str, list[PartBudget]],
    begun: Callable[[], object],
    last: bool,
) -> None:
    """Replace a block's linears by what they are decomposed into, and make the inputs of the next block.

    Args:
        parts: of each linear to compress.
        begun: called once a linear is replaced, and what would undo earlier steps is of no use any more.
        last: whether there is no next block.
    """
    if job.dense is not None:
        _compress_in_sequence(job, job.dense, index, name, block, parts, begun, last)
        return
    compress_at_once(job, index, name, block, parts, begun)
    if not last:
        apply_block(job, index, name, block)


def _compress_in_sequence(
    job: Job,
    dense_hidden: ActivationStore,
    index: int,
    name: str,
    block: nn.Module,
    parts: Mapping[str, list[PartBudget]],
    begun: Callable[[], object],
    last: bool,
) -> None:
    hidden, calls, clock, report = job.hidden, job.calls, job.clock, job.report
    clock.at("statistics", index, 0.0)
    round_to(block.state_dict().values(), job.storage)
    shares = shares_before(block, parts, report.layers)
    dense_block = sharing_weights(block)
    known = ranks.on_main(
        lambda: writers(
            dense_block,
            job.residual,
            lambda: calls.run(dense_block, index, 0, dense_hidden[0]),
            dense_hidden[0].to(calls.device),  # which may be on disk
            job.joined,
        )
    )
    if job.residual is not None and not known:
        log.info(
            "%s: no linear writes to the residual stream as the family says: losses in it are not made up for", name
        )
    norm = next((writer.norm for writer in known.values() if writer.norm), "")
    own = [linear_of(block, linear) for linear in parts]
    widest = max((one.in_features + one.out_features for one in own), default=0)
    waiting = [int(hidden[b].nbytes * (2 + widest / hidden[b].shape[-1])) for b in range(len(hidden))]
    memory = max(hidden.memory_limit - hidden.in_memory, 0.0)
    with (
        Walk(block, list(parts), lambda b: calls.run(block, index, b, hidden[b]), waiting, memory, norm) as ours,
        Walk(
            dense_block,
            [linear for linear in parts if not in_experts(linear)],
            lambda b: calls.run(dense_block, index, b, dense_hidden[b]),
            waiting,
            memory,
            norm,
        ) as dense,
    ):
        tokens: dict[str, int] = {}
        moments: Moments | None = None
        for linear, share in zip(ours.stops(), shares, strict=True):
            clock.at("statistics", index, share)
            writer = known.get(linear)
            if moments is None or writer is not None or not ranks.broadcast(moments.read_by(ours)):
                moments = gather(job, ours, dense, linear, f"{name}.{linear}", writer, dense_hidden)
            tokens[linear] = moments.tokens
            check_called(f"{name}.{linear}", linear_of(block, linear), moments.statistic, moments.tokens)
            clock.at("decomposing", index, share, linear, job.last_error)
            given = Given(moments.statistic, moments.tokens, moments.target)
            compress_linear(job, block, name, linear, parts[linear], given, begun)
        if tokens:
            warn_of_few(name, tokens)
        clock.at("decomposing", index, 1.0, error=job.last_error)
        if last:
            return
        clock.at("applying", index, 0.0)
        for b, output in dense.outputs():
            dense_hidden[b] = output
        for b, output in ours.outputs():
            check_finite_states(output, calls.masks[b], f"the outputs of {name}", b)
            hidden[b] = output
            clock.at("applying", index, (b + 1) / len(hidden))


@dataclass
class Moments:
    """What was gathered of a linear's inputs in both streams.

    statistic: of the method. gram: of the inputs. wanted: mean of the dense model's inputs with these, or of the
    wanted outputs with these if `direct`; None where the streams cannot be laid side by side.
    damping: of the target. tokens: seen by all ranks.
    inputs: of the first batch, by its number: linears that are given the same tensor share what was gathered.
    """

    statistic: Statistic
    gram: Gram
    wanted: Tensor | None
    direct: bool
    damping: float
    tokens: int
    inputs: tuple[int, Tensor] | None

    def read_by(self, walk: Walk) -> bool:
        """Whether the linear that a walk has stopped at is given the very inputs that these are of."""
        if self.inputs is None or self.direct:
            return False
        batch, tensor = self.inputs
        return walk.runs[batch].inputs is tensor

    def target(self, weight: Tensor) -> Tensor | None:
        """The weight to aim at, in float32 or better; None for its own."""
        if self.wanted is None:
            return None
        target = self._aimed(weight) if self.direct else weight.double() @ self._of_identity
        return target.to(torch.promote_types(weight.dtype, torch.float32))

    @cached_property
    def _of_identity(self) -> Tensor:
        """What makes a weight its target, (in_features, in_features); made once for all that read these inputs."""
        assert self.wanted is not None
        return self._aimed(torch.eye(self.wanted.shape[1], device=self.wanted.device))

    def _aimed(self, weight: Tensor) -> Tensor:
        assert self.wanted is not None
        return propagated_target(weight, self.gram.mean(), self.wanted, self.damping)


def gather(
    job: Job, ours: Walk, dense: Walk, linear: str, name: str, writer: Writer | None, dense_hidden: ActivationStore
) -> Moments:
    """What the linear that both walks come to next reads, over all batches of all ranks.

    Args:
        linear: its name in the block; name: its full name.
        writer: how it writes to the residual stream, if it does.
    """
    give_memory_back()  # what batches have freed on their way here is in gaps: a fifth of the peak
    module = linear_of(ours.block, linear)
    width, device = module.in_features, module.weight.device
    statistic = statistic_of(job.method, job.settings, job.report.unit, width, device)
    gram = statistic if isinstance(statistic, Gram) else Gram(width, device)
    twin = None if in_experts(linear) else linear_of(dense.block, linear)
    cross = None if twin is None else CrossMoment(width if writer is None else module.out_features, width, device)
    side_by_side = twin is not None
    tokens, first = 0, None
    for run in ours.at(linear):
        assert run.inputs is not None
        batch, mask = run.batch, job.calls.masks[run.batch]
        x = counted(run.inputs, mask, name, batch)
        statistic.update(x)
        if statistic is not gram:
            gram.update(x)
        tokens += len(x)
        first = first or (batch, run.inputs)
        if cross is None or twin is None:
            continue
        beside = dense.runs[batch]
        if not beside.go_to(linear):
            side_by_side = False
            continue
        assert beside.inputs is not None
        wanted = counted(beside.inputs, mask, f"{name} of the dense model", batch)
        if writer is not None:
            beside.answer = twin_output = nn.functional.linear(beside.inputs, twin.weight, twin.bias)
            wanted = counted(twin_output if twin.bias is None else twin_output - twin.bias, mask, name, batch)
            in_dense, in_ours = writer.stream(beside, dense_hidden[batch]), writer.stream(run, job.hidden[batch])
            lost = in_dense.to(device) - in_ours.to(device)  # block inputs may be on disk
            wanted = wanted + writer.undone(counted(lost, mask, name, batch))
        cross.update(wanted, x)
        beside.release()
    statistic.over_ranks()
    if gram is not statistic:
        gram.over_ranks()
    mean = _mean(cross if side_by_side else None)
    return Moments(
        statistic, gram, mean, writer is not None, DAMPING[job.report.unit], sum(ranks.everyones(tokens)), first
    )


def _mean(cross: CrossMoment | None) -> Tensor | None:
    """A cross moment's mean over all ranks; None where one of them has none, or nothing was seen."""
    if any(ranks.everyones(cross is None)):
        return None
    assert cross is not None
    cross.over_ranks()
    return cross.compute() if cross.tokens else None
