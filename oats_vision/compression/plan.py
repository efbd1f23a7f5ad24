"""Which linears are compressed, and what each of their parts may keep: fixed before any work is done."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from oats_vision.compression import methods
from oats_vision.compression.budgets import PartBudget
from oats_vision.compression.formats import check_bits
from oats_vision.compression.methods import BlockMethod
from oats_vision.compression.settings import CompressionSettings
from oats_vision.core.budget import Allocation
from oats_vision.errors import ConfigError, ModelError, did_you_mean
from oats_vision.models.families import Structure
from oats_vision.models.structure import check_replaceable
from oats_vision.nn.sliced import SlicedBlock, Slicing
from oats_vision.nn.sparse_low_rank import compressed_layers


@dataclass(frozen=True)
class Plan:
    """What is to be done to a model.

    linears: to compress, by their full names. parts: of each linear, by block and by its name there; empty where
    blocks are sliced.
    """

    blocks: list[tuple[str, nn.Module]]
    linears: dict[str, nn.Linear]
    parts: dict[str, dict[str, list[PartBudget]]]
    slicing: Slicing | None

    @property
    def work(self) -> list[int]:
        """Weights to decompose, of each block."""
        return [
            sum(linear.weight.numel() for name, linear in self.linears.items() if name.startswith(f"{block}."))
            for block, _ in self.blocks
        ]


def plan_model(model: nn.Module, structure: Structure, settings: CompressionSettings) -> Plan:
    """The plan of a model that is prepared.

    Raises:
        ConfigError: the settings leave a layer without rank or non-zeros, skip what is not there, or skip all.
        ModelError: the model is compressed already, or is not of a kind that the method can compress.
    """
    blocks = structure.named_blocks(model)
    if any(isinstance(block, SlicedBlock) for _, block in blocks):
        raise ModelError("the model is sliced already")
    linears = chosen_linears(structure, blocks, settings)
    check_replaceable(linears, blocks)
    method = methods.find(settings.method)
    if isinstance(method, BlockMethod):
        return Plan(blocks, linears, {}, method.plan(blocks, structure, settings))
    parts = {name: plan_block(structure, name, block, settings) for name, block in blocks}
    if settings.bits:
        widths = {
            block: {name: linears[f"{block}.{name}"].in_features for name in of_block}
            for block, of_block in parts.items()
        }
        check_bits(settings.bits, parts, widths)
    return Plan(blocks, linears, parts, None)


def chosen_linears(
    structure: Structure, blocks: Sequence[tuple[str, nn.Module]], settings: CompressionSettings
) -> dict[str, nn.Linear]:
    """The linears to compress, by their full names.

    Raises:
        ModelError: the blocks have no linear.
        ConfigError: what is skipped is not there, or is all there is.
    """
    linears = {f"{block_name}.{n}": m for block_name, block in blocks for n, m in structure.named_linears(block)}
    before = [f"{block_name}.{name}" for block_name, block in blocks for name in compressed_layers(block)]
    if before:
        raise ModelError(
            f"the model is compressed already, or a part of it ({before[0]}): load the dense model and compress that"
        )
    if not linears:
        raise ModelError("the model's blocks have no linear to compress: is it compressed already?")
    for pattern in settings.skip:
        if not any(_matches(name, pattern) for name in linears):
            first = blocks[0][0]
            some = ", ".join([first, *(name for name in linears if name.startswith(f"{first}."))])
            close = did_you_mean(pattern, [name for name, _ in blocks] + list(linears))
            raise ConfigError(f"`skip` {pattern!r} is the name of no linear or block: names are such as {some}.{close}")
    chosen = {name: linear for name, linear in linears.items() if not skipped(name, settings)}
    if not chosen:
        raise ConfigError(f"`skip` {' '.join(settings.skip)} leaves no linear to compress: all {len(linears)} match")
    return chosen


def plan_block(
    structure: Structure, block_name: str, block: nn.Module, settings: CompressionSettings
) -> dict[str, list[PartBudget]]:
    """The parts of each linear of a block and their budgets, before any work is done.

    Raises:
        ConfigError: the settings leave a layer without rank or non-zeros, or a fused weight does not divide.
    """
    plan: dict[str, list[PartBudget]] = {}
    for name, linear in structure.named_linears(block):
        if skipped(f"{block_name}.{name}", settings):
            continue
        try:
            parts = structure.parts(block, name, linear)
        except ValueError as wrong:
            raise ModelError(f"{block_name}.{name}: {wrong}") from None
        if settings.fused_qkv == "joint":
            parts = [(name.rsplit(".", 1)[-1], linear.out_features)]
        try:
            guessed = settings.rank_ratio == "auto"
            plan[name] = _budgets(parts, linear.in_features, settings.allocation, guessed)
        except ValueError as impossible:
            raise ConfigError(f"{block_name}.{name}: {impossible}") from None
    return plan


def _budgets(
    parts: Sequence[tuple[str, int]], in_features: int, allocation: Allocation, guessed: bool
) -> list[PartBudget]:
    """Of a linear's parts; without a rank where a guessed rank ratio is too high for it.

    Raises:
        ValueError: one is left without rank or non-zeros.
    """
    try:
        return [PartBudget(part, rows, allocation.budget(rows, in_features)) for part, rows in parts]
    except ValueError:
        if not guessed:
            raise
        return _budgets(parts, in_features, replace(allocation, rank_ratio=0.0), guessed=False)


def skipped(name: str, settings: CompressionSettings) -> bool:
    """Whether a linear, by its full name, is left dense."""
    return any(_matches(name, pattern) for pattern in settings.skip)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is that of a linear, or of a module that it is in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
