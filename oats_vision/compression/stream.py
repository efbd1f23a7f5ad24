"""A block's residual stream: its norms, the linears that read and write it, and how norms are folded into these."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.calibration.walk import Run
from oats_vision.errors import ModelError
from oats_vision.models.families import Residual, Structure
from oats_vision.models.structure import linear_of


def fold(block: nn.Module, residual: Residual) -> None:
    """Move the norms' weights into the linears that read them, scales and the mean's subtraction into the writers.

    Afterwards the block is that of a stream without mean, under norms without weights.
    """
    for (norm_name, _, readers, writer), scale_name in zip(
        halves(block, residual), (residual.scale1, residual.scale2), strict=True
    ):
        norm, out = norm_of(block, norm_name), linear_of(block, writer)
        gain, shift = gain_of(norm).double(), getattr(norm, "bias", None)
        for reader in readers:
            linear = linear_of(block, reader)
            W = linear.weight.double()
            if shift is not None:
                bias = W @ shift.double() + (0 if linear.bias is None else linear.bias.double())
                linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
            linear.weight.copy_(W * gain)
        W, b = out.weight.double(), None if out.bias is None else out.bias.double()
        scale = _scale(block, scale_name)
        if scale is not None:
            W, b = W * scale[:, None], None if b is None else b * scale
        if subtracts_mean(norm):
            W, b = W - W.mean(0), None if b is None else b - b.mean()
        out.weight.copy_(W)
        if b is not None:
            out.bias.copy_(b)


Half = tuple[str, str, list[str], str]  # norm, submodule, linears that read, linear that writes; names in the block


def halves(block: nn.Module, residual: Residual) -> tuple[Half, Half]:
    """The attention's half of a block, and the MLP's."""
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    halves: list[Half] = []
    for norm, submodule, candidates in (
        (residual.norm1, residual.attention, residual.attention_out),
        (residual.norm2, residual.mlp, residual.mlp_out),
    ):
        writer = next((name for name in candidates if name in names), None)
        readers = [name for name in names if name.startswith(f"{submodule}.") and name != writer]
        if writer is None or not readers:
            raise ModelError(f"slicegpt: {type(block).__name__} has no linears {submodule}.* that end in {candidates}")
        halves.append((norm, submodule, readers, writer))
    return halves[0], halves[1]


def described(structure: Structure) -> Residual:
    if structure.family.residual is None:
        raise ModelError(
            f"slicegpt needs to know the residual stream, and model family {structure.family.name} does not describe it"
        )
    return structure.family.residual


def norm_of(block: nn.Module, name: str) -> nn.Module:
    norm: nn.Module | None = dict(block.named_modules()).get(name)
    if norm is None:
        raise ModelError(f"slicegpt: {type(block).__name__} has no norm {name}")
    return norm


def gain_of(norm: nn.Module) -> Tensor:
    """The weights of a norm. Raises ModelError for norms without, or of another kind."""
    subtracts_mean(norm)
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(f"slicegpt: a {type(norm).__name__} of the model has no weights")
    return weight


def subtracts_mean(norm: nn.Module) -> bool:
    """LayerNorm does, RMSNorm does not. Raises ModelError for other norms."""
    if isinstance(norm, nn.LayerNorm):
        return True
    if isinstance(norm, nn.RMSNorm) or type(norm).__name__.endswith("RMSNorm"):
        return False
    raise ModelError(f"slicegpt knows LayerNorm and RMSNorm, not {type(norm).__name__}")


def eps_of(norm: nn.Module) -> float:
    eps: Any = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    return float(eps or torch.finfo(torch.float32).eps)


def _scale(block: nn.Module, name: str) -> Tensor | None:
    """A LayerScale's factors, float64 (width,), if the block has one."""
    if not name:
        return None
    owner: Any = block
    for part in name.split("."):
        owner = getattr(owner, part, None)
    if isinstance(owner, nn.Module):
        owner = next(owner.parameters(), None)
    return owner.detach().double() if isinstance(owner, Tensor) else None


@dataclass(frozen=True)
class Writer:
    """How a linear's output joins the residual stream: stream + gain * output.

    norm: of the block, that reads the stream as it is before that; "" where it is the block's input. gain:
    (out_features,), if there is one.
    """

    norm: str
    gain: Tensor | None

    def stream(self, run: Run, block_input: Tensor) -> Tensor:
        """The stream that the output is added to, on a pass through the block that is stopped at the linear."""
        stream = run.stream if self.norm else block_input
        assert stream is not None
        return stream

    def undone(self, change: Tensor) -> Tensor:
        """The output that adds a change to the stream; none where a gain of 0 adds nothing, whatever the output."""
        if self.gain is None:
            return change
        change = change.to(torch.promote_types(change.dtype, torch.float32))  # which a small gain would overflow
        gain = self.gain.to(change)
        nothing = gain.abs() < torch.finfo(gain.dtype).tiny
        return change * torch.where(nothing, 0.0, gain.reciprocal())


Kind = tuple[tuple[str, type[nn.Module]], ...]  # of a block: its modules


def writers(
    block: nn.Module, residual: Residual | None, run: Callable[[], Tensor], x: Tensor, seen_of: set[Kind]
) -> dict[str, Writer]:
    """The linears of a block that write to its residual stream, by name, as far as the family describes it.

    That they do is seen on one batch, once for blocks of the same modules: what the family says need not be true of
    every model of it.

    Args:
        run: gives the block's output for a batch; x: its input.
        seen_of: kinds of blocks of which that was seen; this one's is added.
    """
    if residual is None:
        return {}
    modules = dict(block.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    attention, mlp = (
        next((name for name in candidates if name in linears), None)
        for candidates in (residual.attention_out, residual.mlp_out)
    )
    if attention is None or mlp is None or residual.norm2 not in modules:
        return {}
    found = {
        attention: Writer("", _scale(block, residual.scale1)),
        mlp: Writer(residual.norm2, _scale(block, residual.scale2)),
    }
    kind = tuple((name, type(module)) for name, module in modules.items())
    if kind in seen_of:
        return found
    seen: dict[str, Tensor] = {}

    def note(name: str, value: Tensor) -> None:
        seen[name] = value.detach().clone()

    hooks = [
        modules[name].register_forward_hook(lambda module, args, output, name=name: note(name, output))
        for name in (attention, mlp)
    ]
    hooks.append(modules[residual.norm2].register_forward_pre_hook(lambda module, args: note("between", args[0])))
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {attention, mlp, "between"}:
        return {}
    stages = ((x, attention, seen["between"]), (seen["between"], mlp, output))
    if all(_joins(before, seen[name], found[name].gain, after) for before, name, after in stages):
        seen_of.add(kind)
        return found
    return {}


def _joins(before: Tensor, output: Tensor, gain: Tensor | None, after: Tensor) -> bool:
    """Whether after = before + gain * output."""
    if not before.shape == output.shape == after.shape:
        return False
    added, output = (after - before).double(), output.double()
    rest = added - (output if gain is None else output * gain)
    rounding = 8 * torch.finfo(after.dtype).eps * (before.double().norm() + after.double().norm())
    return bool(rest.norm() <= 1e-3 * added.norm() + rounding)
