"""What a compression will come to, before it begins: bytes and memory."""

from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oats_vision.calibration.capture import first_block_input, gradient_samples
from oats_vision.calibration.sensitivity import LARGEST
from oats_vision.checkpoint import Sizes, measure
from oats_vision.compression import methods
from oats_vision.compression.blocks import GRADIENTS, STREAM
from oats_vision.compression.budgets import planned
from oats_vision.compression.methods import LinearMethod
from oats_vision.compression.plan import Plan, plan_model
from oats_vision.compression.record import CompressionReport, LayerReport
from oats_vision.compression.recover import BATCH
from oats_vision.compression.settings import CompressionSettings
from oats_vision.compression.slicing import empty_sliced_blocks
from oats_vision.evaluation.reference import MEMORY
from oats_vision.machine import available_memory, memory_in_use, peak_memory
from oats_vision.models.families import Structure
from oats_vision.models.record import record_of
from oats_vision.models.structure import floating, in_experts
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from oats_vision.progress import Unit, count

STARTED = 100 << 20  # bytes of the CPU's threads, compiled products and allocator, once they have worked


@dataclass(frozen=True)
class Memory:
    """Bytes that a compression needs at its peak, of the process or of the GPU.

    libraries: code and data that are there already, and what threads will take. activations: what the first block is
    given on all calibration data, in memory and on disk. block: beside these, for the work on one block. held_out: the
    dense model's features of the inputs that are held out. so_far: the most that was needed before.
    """

    libraries: int
    model: int
    activations: int
    disk: int
    block: int
    held_out: int
    so_far: int

    @property
    def peak(self) -> int:
        return max(self.so_far, self.libraries + self.model + self.activations + self.block + self.held_out)


@dataclass(frozen=True)
class Recovery:
    """What training after the compression takes: steps of each block, and bytes.

    twin: of the dense model, loaded again. streams: hidden states of both models, in memory or on disk. gradients: of
    all blocks, their values and means, and what a step on a batch keeps for its way back.
    """

    steps: int
    twin: int
    streams: int
    gradients: int

    def __str__(self) -> str:
        return (
            f"then {count(self.steps, 'step')} a block towards the dense outputs, and as many of all together, beside "
            f"the model: the dense one {_gigabytes(self.twin)}, activations of both {_gigabytes(self.streams)}, "
            f"training {_gigabytes(self.gradients)}"
        )


@dataclass(frozen=True)
class BlockByBlock:
    """What it takes to read a model's weights when they are needed: bytes of them, and how often they are read.

    disk: bytes of finished blocks, beside the checkpoint. allowed: of memory, for all of the run.
    """

    weights: int
    times: int
    disk: int
    allowed: int

    def __str__(self) -> str:
        return (
            f"read from their files block by block, {_gigabytes(self.weights)} about {count(self.times, 'time')}; "
            f"finished blocks take {_gigabytes(self.disk)} on disk until the end"
        )


@dataclass(frozen=True)
class Forecast:
    """What is known of a compression before it begins.

    name, family: of the model. skipped, outside: linears that stay dense, as the settings say so and as they are in no
    block. sizes: of the stored tensors, `exact` if they will be so to the byte. tokens, width: of what a block is given
    for one sample. data: where the samples are from; held_out: others from there, to measure what it costs.
    """

    name: str
    family: str
    blocks: int
    parameters: tuple[int, int]
    linears: int
    skipped: tuple[str, ...]
    outside: tuple[str, ...]
    settings: CompressionSettings
    storage: str
    sizes: Sizes
    exact: bool
    unit: Unit
    data: str
    samples: int | None
    held_out: int
    batch_size: int
    tokens: int
    width: int
    memory: Memory
    recovery: Recovery | None = None
    block_by_block: BlockByBlock | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "settings": self.settings.model_dump(), "peak_memory": self.memory.peak}

    def lines(self) -> dict[str, str]:
        """For people, by what each is about."""
        dense, ours = self.parameters
        about = "" if self.exact else "about "
        sizes, memory = self.sizes, self.memory
        data = f" from {self.data}" if self.data else ""
        held_out = f"; {self.held_out:,} others are held out to measure what it costs" if self.held_out else ""
        samples = f"all {self.unit}" if self.samples is None else f"{self.samples:,} {self.unit}"
        features = f", held-out features {_gigabytes(memory.held_out)}" if memory.held_out >= 5e7 else ""
        disk = f"; {_gigabytes(memory.disk)} of activations on disk" if memory.disk else ""
        if self.block_by_block and memory.peak > self.block_by_block.allowed:
            there = _gigabytes(self.block_by_block.allowed)
            disk += f". That is more than the {there} that there are: allow activations less, or take smaller batches"
        return {
            "model": f"{self.name}{', ' * bool(self.name)}{self.family}: {count(self.blocks, 'block')}, "
            f"{dense / 1e6:.1f} M parameters, {about}{ours / 1e6:.1f} M afterwards",
            "linears": f"{self.linears:,} compressed by {self.settings.summary}{self._dense()}",
            "bytes": f"{about}{_change(sizes.dense_total, sizes.total)} in {self.storage}; the compressed layers "
            f"{about}{_change(sizes.dense_layers, sizes.layers)}",
            "calibration": f"{samples}{data} in batches of {self.batch_size}, {self.tokens:,} tokens each{held_out}",
            "memory": f"about {_gigabytes(memory.peak)} at the peak: libraries {_gigabytes(memory.libraries)}, model "
            f"{_gigabytes(memory.model)}, activations {_gigabytes(memory.activations)}, work on a block "
            f"{_gigabytes(memory.block)}{features}{disk}",
            **({"weights": str(self.block_by_block)} if self.block_by_block else {}),
            **({"recovery": str(self.recovery)} if self.recovery else {}),
            "time": "known after the first block" + ", without the recovery" * bool(self.recovery),
        }

    def _dense(self) -> str:
        """Which linears are left dense, and why."""
        why = []
        if self.skipped:
            why.append(f"{len(self.skipped):,} that match skip")
        if self.outside:
            some = ", ".join(self.outside[:3]) + ", ..." * (len(self.outside) > 3)
            why.append(f"{len(self.outside):,} in no block ({some})")
        return f"; left dense: {' and '.join(why)}" if why else ""


def forecast(
    model: nn.Module,
    structure: Structure,
    settings: CompressionSettings,
    example: Tensor,
    *,
    name: str = "",
    data: str = "",
    samples: int | None = None,
    held_out: int = 0,
    batch_size: int = 1,
    activation_memory: float = 8.0,
    recover: int = 0,
) -> Forecast:
    """What `compress` will come to; the model stays as it is, and of it only the embedding of the example is run.

    Args:
        example: one picture (1, channels, height, width), or one sequence of token ids (1, tokens), as the model takes
            them: what they hold does not matter.
        data: where the calibration data are from, in words. samples: how many there are. held_out: and how many more.
        activation_memory: GB of activations kept in memory.
        recover: steps for each block afterwards.

    Raises:
        ConfigError: the settings leave a layer without rank or non-zeros, or skip what is not there.
        ModelError: the model is of no kind that the method can compress.
        DataError: the model cannot take the example.
    """
    storage = getattr(torch, settings.storage_dtype) if settings.storage_dtype else floating(model).dtype
    shell, plan, report, everything = planned_shell(model, structure, settings)
    inside = tuple(f"{block}." for block, _ in plan.blocks)
    first = structure.named_blocks(model)[0][1]
    hidden = first_block_input(model, first, example)
    few = gradient_samples(hidden.shape[1:-1].numel(), samples)
    features = 4 * held_out * hidden[0].numel() if structure.family.unit == "pictures" else 0
    memory = _memory(model, plan, settings, example, hidden, samples or 0, batch_size, activation_memory, features)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = measure(shell.state_dict(keep_vars=True).values(), report, storage)
    if settings.bits:
        sizes = sizes.with_bits(settings.bits, report.dense_parameters)
    return Forecast(
        name=name,
        family=structure.family.serves.partition(":")[0],
        blocks=len(plan.blocks),
        parameters=(parameters, parameters - report.dense_parameters + report.parameters),
        linears=len(plan.linears),
        skipped=tuple(sorted(n for n in everything if n.startswith(inside) and n not in plan.linears)),
        outside=tuple(sorted(n for n in everything if not n.startswith(inside))),
        settings=settings,
        storage=str(storage).removeprefix("torch."),
        sizes=sizes,
        exact=settings.rank_ratio != "auto" and settings.budget == "uniform",
        unit=structure.family.unit,
        data=data,
        samples=samples,
        held_out=held_out,
        batch_size=batch_size,
        tokens=hidden.shape[1:-1].numel(),
        width=hidden.shape[-1],
        memory=memory,
        recovery=_recovery(recover, plan, hidden, samples or 0, memory) if recover else None,
        block_by_block=_block_by_block(model, settings, min(samples or few, few), held_out, batch_size, sizes),
    )


def _block_by_block(
    model: nn.Module, settings: CompressionSettings, few: int, held_out: int, batch_size: int, sizes: Sizes
) -> BlockByBlock | None:
    """Of a model that is read so, with gradients on a few samples."""
    on_disk = record_of(model).on_disk
    if on_disk is None:
        return None
    asked = settings.sensitivity or settings.budget == "measured"
    runs = 2 if settings.budget == "measured" and not settings.sensitivity else 1  # projections of the output
    batches = -(-few // batch_size)
    # each batch through the whole model, and its gradients back; each held-out one; then the looks at all values, the
    # first calibration batch, the search for budgets, and the compression
    times = asked * (1 + runs) * batches + -(-held_out // batch_size) + 5 + (settings.budget != "uniform")
    allowed = available_memory(on_disk.device) + memory_in_use(on_disk.device)
    # finished blocks are there twice: for a stopped run to go on from, and to be read
    return BlockByBlock(on_disk.bytes, times, 2 * sizes.layers, int(allowed))


def _recovery(steps: int, plan: Plan, hidden: Tensor, samples: int, memory: Memory) -> Recovery:
    """Of training all blocks together, which takes more than one."""
    width, tokens = hidden.shape[-1], hidden.shape[1:-1].numel()
    own = [
        [linear for name, linear in plan.linears.items() if name.startswith(f"{block}.")] for block, _ in plan.blocks
    ]
    features = max(sum(linear.in_features + linear.out_features for linear in block) for block in own)
    weights = sum(linear.weight.numel() for block in own for linear in block)
    batch = min(BATCH, samples or BATCH)
    return Recovery(
        steps,
        twin=memory.model,
        streams=3 * samples * hidden.nbytes,
        # float32: the inputs and outputs of one block's linears and what its norms keep, and all blocks' inputs;
        # values, their sizes, gradients, means and the best so far
        gradients=4 * (batch * tokens * (features + (4 + len(own)) * width) + 7 * weights),
    )


class Shell(NamedTuple):
    """A compressed model without values, the plan that it follows, and what a report would say of its shapes.

    linears: all that the model had, by name.
    """

    model: nn.Module
    plan: Plan
    report: CompressionReport
    linears: set[str]


def planned_shell(model: nn.Module, structure: Structure, settings: CompressionSettings) -> Shell:
    """What `compress` will make of a model, in shapes alone; the model stays as it is.

    Raises:
        ConfigError: the settings leave a layer without rank or non-zeros, or skip what is not there.
        ModelError: the model is of no kind that the method can compress.
    """
    shell = _shell(model)
    structure.prepare(shell)
    plan = plan_model(shell, structure, settings)
    linears = {name for name, module in shell.named_modules() if isinstance(module, nn.Linear)}
    return Shell(shell, plan, _emptied(shell, structure, plan, settings), linears)


def _shell(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes and no values."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
    return deepcopy(model, memo)


def _emptied(shell: nn.Module, structure: Structure, plan: Plan, settings: CompressionSettings) -> CompressionReport:
    """Give a copy without values the compressed layers' shapes; returns what a report would say of these."""
    report = CompressionReport(structure.family.name, settings, slicing=plan.slicing)
    if plan.slicing:
        empty_sliced_blocks(shell, structure, plan.slicing)
    for block, linears in plan.parts.items():
        for name, parts in linears.items():
            linear = plan.linears[f"{block}.{name}"]
            spec = planned(linear.in_features, linear.bias is not None, parts)
            report.layers.append(LayerReport(f"{block}.{name}", spec, {}, {}, {}, 0.0, 0))
            shell.set_submodule(f"{block}.{name}", SparseLowRankLinear.empty(spec, linear.weight.dtype))
    return report


def _memory(
    model: nn.Module,
    plan: Plan,
    settings: CompressionSettings,
    example: Tensor,
    hidden: Tensor,
    samples: int,
    batch_size: int,
    activation_memory: float,
    features: int,
) -> Memory:
    """The tensors that are alive together at the fullest moment, counted.

    Args:
        hidden: what the first block is given for the example.
        features: bytes of the dense model's, of all inputs that are held out.
    """
    device = hidden.device
    batch = min(batch_size, samples) if samples else batch_size
    linears = [linear for name, linear in plan.linears.items() if not in_experts(name)] or list(plan.linears.values())
    block, _ = plan.blocks[0]
    own = [linear for name, linear in plan.linears.items() if name.startswith(f"{block}.")] or linears
    widest = max(max(linear.in_features, linear.out_features) for linear in linears)
    side_by_side = sum(linear.out_features == widest for linear in own if linear in linears)  # gate and up
    tokens, width = hidden.shape[1:-1].numel(), hidden.shape[-1]
    # of the attention's half of a block: the stream, its norm, q, k, v and the like; of the MLP's: before and after
    # the activation
    forward = batch * tokens * (4 * width + (1 + min(max(side_by_side, 1), 2)) * widest) * hidden.element_size()
    inputs = batch * example.numel() * example.element_size()
    head = getattr(model, "lm_head", None)
    logits = batch * tokens * head.out_features * hidden.element_size() if isinstance(head, nn.Linear) else 0
    method = methods.find(settings.method)
    if isinstance(method, LinearMethod):
        empty = [_bytes_of(method.statistic(settings, linear.in_features, torch.device("meta"))) for linear in own]
        pairs_of = [8 * linear.in_features * (linear.in_features + linear.out_features) for linear in own]
        # one after another with targets, all of a block at once without
        statistics = max(map(sum, zip(empty, pairs_of, strict=True))) if settings.targets else sum(empty)
        matrices, pairs = method.working_set(settings)
        solver = max(4 * matrices * linear.weight.numel() + pairs * linear.in_features**2 for linear in own)
    else:  # of the stream: its second moments and their eigenvectors, in float64
        statistics, solver = 8 * width**2, 4 * 8 * width**2
    one = hidden.nbytes
    activations, limit = samples * one, int((STREAM if settings.targets else 1.0) * activation_memory * 1e9)
    alone = kept = min(activations, limit)
    if settings.targets:
        activations, kept = 2 * activations, 2 * kept
        waits = 2 + max(linear.in_features + linear.out_features for linear in own) / width
        room = 2 * limit - kept
        waiting = min(int(2 * samples * one * waits), max(room, int(2 * batch * one * waits)))
    else:
        waiting = 0
    passing = correlations = backward = 0
    if settings.sensitivity or settings.budget == "measured":  # gradients come first, when there is no dense stream
        passing = min(samples, gradient_samples(hidden.shape[1:-1].numel(), samples)) * one * (len(plan.blocks) + 1)
    if settings.sensitivity:  # and leave outputs' correlations
        linears_of = [linear for of_block in plan.parts.values() for linear in of_block.values()]
        correlations = sum(4 * p.out_features * min(p.out_features, LARGEST) for parts in linears_of for p in parts)
        of_logits = logits and inputs + forward + 2 * logits + 3 * logits // batch  # and v; of a sample
        backward = max(2 * forward + sum(8 * linear.out_features**2 for linear in own), of_logits)
    in_memory = min(correlations, int(GRADIENTS / STREAM * limit))
    free = limit if settings.targets else limit - alone
    on_disk = record_of(model).on_disk
    if on_disk:
        on_disk.rest()
    weights = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    used = sum(weights.values())
    return Memory(
        libraries=max(memory_in_use(device) - used, 0) + (STARTED if device.type == "cpu" else 0),
        model=used + (on_disk.largest if on_disk else 0),
        activations=max(alone + min(passing, free), kept + waiting) + in_memory,
        disk=max(activations - kept, samples * one - alone + max(passing - free, 0)) + correlations - in_memory,
        block=max(3 * inputs, inputs + forward + logits, backward, statistics + max(forward, solver)),
        held_out=min(features, int(MEMORY)),
        so_far=peak_memory(device),
    )


def _bytes_of(statistic: Any) -> int:
    """Of the tensors that a statistic holds."""
    held = [value for owned in vars(statistic).values() for value in (owned if isinstance(owned, list) else [owned])]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def _change(dense: int, ours: int) -> str:
    return f"{dense / 1e6:.1f} -> {ours / 1e6:.1f} MB ({ours / dense:.3f} x)"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
