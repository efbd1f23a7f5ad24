"""A compression that goes on where it was stopped: what is kept of each finished block, and how it is put back.

The hidden states are not kept: what they take would be written anew for each block. They follow from the finished
blocks, in far less time than these took.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.compression.blocks import Job, apply_block
from oats_vision.compression.budgets import PartBudget
from oats_vision.compression.journal import Block, Journal
from oats_vision.compression.record import LayerException, LayerReport
from oats_vision.compression.settings import CompressionSettings
from oats_vision.compression.sharing import Parts
from oats_vision.core.budget import Budget, Pattern
from oats_vision.core.grid import Grid
from oats_vision.data.batches import Inputs
from oats_vision.machine import machine
from oats_vision.models.record import record_of
from oats_vision.models.structure import floating, sharing_weights
from oats_vision.models.values import round_to
from oats_vision.models.weights import tensor_bytes, weights_digest
from oats_vision.nn.sparse_low_rank import LayerSpec, SparseLowRankLinear, layer_tensors

WEIGHTS, DATA = "SHA-256 of the dense weights", "SHA-256 of the calibration data"


class Noted:
    """Digests of the calibration data, which are made as they are read."""

    def __init__(self) -> None:
        self.digests: dict[int, str] = {}

    def note(self, number: int, inputs: Inputs) -> None:
        """Take in a batch, by its number among those of all ranks."""
        self.digests[number] = digest_of(inputs)

    def digest(self) -> str:
        """Of all batches of all ranks, in their order: that of the sums' terms."""
        return hashlib.sha256(" ".join(ranks.in_order(self.digests)).encode()).hexdigest()


def begin(
    journal: Journal, model: nn.Module, settings: CompressionSettings, data: Noted, blocks: int, weights: str
) -> None:
    """Note what decides the result, or see that it is the same as before the run was stopped.

    Args:
        data: once they are read. weights: the digest of the dense model's.

    Raises:
        ConfigError: it is not; the message says what differs.
        CheckpointError: the journal cannot be written.
    """
    first = floating(model)
    facts = {
        **settings.model_dump(mode="json", exclude={"on_bad_layer"}),  # by which a run that was stopped may go on
        "dtype": str(first.dtype).removeprefix("torch."),
        WEIGHTS: weights,
        DATA: data.digest(),
    }
    journal.begin(facts, blocks, machine(first.device))


def dense_digest(model: nn.Module) -> str:
    """The digest of a dense model's weights, once `record_weights` has noted it where it can."""
    source, whole = record_of(model).source, floating(model).dtype in (torch.float32, torch.float64)
    return source.dense_sha256 if source and source.dense_sha256 and whole else weights_digest(model)


def shared_out(journal: Journal | None, share_out: Callable[[], Parts]) -> Parts:
    """The budgets of all parts: those that were measured before the run was stopped, or now."""
    if journal is None:
        return share_out()
    if (kept := journal.noted("budgets")) is not None:
        return {
            block: {n: [_part(*p) for p in parts] for n, parts in linears.items()} for block, linears in kept.items()
        }
    found = share_out()
    plain = {block: {n: [_plain(p) for p in parts] for n, parts in linears.items()} for block, linears in found.items()}
    journal.note(budgets=plain)
    return found


def keep(
    journal: Journal,
    job: Job,
    index: int,
    block: nn.Module,
    layers: Sequence[LayerReport],
    exceptions: Sequence[LayerException],
) -> None:
    """Keep a block that is finished.

    Args:
        layers: what became of its linears. exceptions: that were made.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = {name: _stored(tensor, job.storage) for name, tensor in layer_tensors(block).items()}
    figures = {
        "layers": [layer.to_dict() for layer in layers],
        "exceptions": list(map(asdict, exceptions)),
        "seconds": job.clock.of_block(index),
    }
    journal.add(index, tensors, figures)


def put_back(
    job: Job, index: int, name: str, block: nn.Module, kept: Block, begun: Callable[[], object], last: bool
) -> None:
    """Give a block the layers that it had when it was finished, and make the inputs of the next one.

    Args:
        begun: called once a linear is replaced. last: whether no next block is to be compressed.
    """
    job.clock.went_on(index, kept.figures["seconds"])
    round_to(block.state_dict().values(), job.storage)
    dense_block = None if job.dense is None or last else sharing_weights(block)
    layers = [LayerReport.from_dict(fields) for fields in kept.figures["layers"]]
    for layer in layers:
        own = layer.name.removeprefix(f"{name}.")
        linear = block.get_submodule(own)
        assert isinstance(linear, nn.Linear)
        tensors = {k.removeprefix(f"{own}."): t for k, t in kept.tensors.items() if k.startswith(f"{own}.")}
        block.set_submodule(own, _layer(layer.spec, tensors).to(linear.weight.device, linear.weight.dtype))
        begun()
    job.report.layers += layers
    job.report.exceptions += [LayerException(**fields) for fields in kept.figures["exceptions"]]
    if last:
        return
    if dense_block is not None:
        assert job.dense is not None
        for b in range(len(job.dense)):
            job.dense[b] = job.calls.run(dense_block, index, b, job.dense[b])
    apply_block(job, index, name, block)


def _layer(spec: LayerSpec, tensors: Mapping[str, Tensor]) -> SparseLowRankLinear:
    floating = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    layer = SparseLowRankLinear.empty(spec, next(floating, torch.float32))
    layer.load_state_dict(tensors, assign=True)
    return layer


def _stored(tensor: Tensor, storage: torch.dtype) -> Tensor:
    """In the storage precision, which the values were rounded to, unless that would change them."""
    exact = tensor.is_floating_point() and torch.promote_types(tensor.dtype, storage) == tensor.dtype
    return tensor.to(storage) if exact else tensor


def _plain(part: PartBudget) -> list[Any]:
    budget = part.budget
    grid = asdict(budget.grid) if budget.grid else None
    return [part.name, part.out_features, budget.rank, budget.nonzeros, str(budget.pattern), grid, budget.int8_factors]


def _part(
    name: str,
    out_features: int,
    rank: int,
    nonzeros: int,
    pattern: str,
    grid: dict[str, Any] | None = None,
    int8_factors: bool = False,
) -> PartBudget:
    known = Grid(**grid) if grid else None
    return PartBudget(name, out_features, Budget(rank, nonzeros, Pattern.parse(pattern), known, int8_factors))


def digest_of(inputs: Inputs) -> str:
    """SHA-256 of a batch: the tensors that the model is called with, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(inputs.values.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
    return digest.hexdigest()
