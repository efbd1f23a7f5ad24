"""SliceGPT: transformer blocks with a narrower residual stream (Ashkboos et al., ICLR 2024).

A norm without weights does not see a rotation of its input. So each norm's weights, and its subtraction of the
mean, move into the linears around it; the stream between two norms is rotated to the principal components of what
the norm gives on calibration data; and the last components are cut off. Where the rotation changes, the skip
connection gets a small matrix. The first block takes the stream at its full width and the last one gives it back,
so that embeddings, final norm and head stay as they are.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls, check_finite_states
from oats_vision.calibration.statistics import Gram
from oats_vision.compression.stream import described, eps_of, fold, gain_of, halves, norm_of, subtracts_mean
from oats_vision.errors import ConfigError, ModelError
from oats_vision.models.families import Residual, Structure
from oats_vision.models.structure import linear_of
from oats_vision.nn.outputs import first_output
from oats_vision.nn.sliced import SlicedBlock, SlicedNorm, SlicedReader, Slicing
from oats_vision.progress import Stage


@torch.no_grad()
def slice_blocks(
    model: nn.Module,
    structure: Structure,
    plan: Slicing,
    hidden: ActivationStore,
    calls: BlockCalls,
    tell: Callable[[Stage, int, float], None] = lambda stage, block, share: None,
) -> Slicing:
    """Slice a model's blocks, in place; each one's rotations come from the sliced blocks before it.

    On a copy of each block it is seen first that a rotation without a cut leaves what it computes.

    Args:
        plan: what `plan_slicing` found.
        hidden: the first block's inputs, one tensor a batch; overwritten.
        calls: what else the blocks are called with.
        tell: called with what is going on, the block's number from 0, and the share of its work of that kind done.

    Returns:
        The plan, with the share of the signal kept at each cut.

    Raises:
        ModelError: a block is not of the kind that can be rotated, or its outputs are not finite.
    """
    check_rotation(structure, structure.named_blocks(model), hidden, calls)

    def components(gram: Gram) -> tuple[Tensor, float]:
        return principal_components(gram.compute(), plan.sliced_width)

    return _slice(model, structure, plan, hidden, calls, components, tell)


def check_rotation(
    structure: Structure, blocks: Sequence[tuple[str, nn.Module]], hidden: ActivationStore, calls: BlockCalls
) -> None:
    """See on the first batch that each block, rotated and not cut, computes what it did; the blocks stay as they are.

    Raises:
        ModelError: one does not: its norms are not before its attention and its MLP, or it does more than `residual`
            says.
    """
    dtype = torch.promote_types(hidden[0].dtype, torch.float32)
    x = hidden[0].to(calls.device, dtype)
    width, residual = x.shape[-1], described(structure)
    centre = subtracts_mean(norm_of(blocks[0][1], residual.norm1))
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q.to(x.device)
    for i, (name, block) in enumerate(blocks):
        call = calls.call(i, 0).to(dtype)
        copy = deepcopy(block).to(dtype)
        y = first_output(call.run(copy, x.clone()))
        check_finite_states(y, calls.masks[0], f"the outputs of {name}", 0)
        alone, states = nn.ModuleList([copy]), ActivationStore(math.inf)
        states.append(x)
        uncut = Slicing(width, width, 0, 0)
        one = BlockCalls(calls.device, [[call]], [None])
        _slice(alone, replace(structure, blocks=""), uncut, states, one, lambda gram: (rotation, 1.0))
        before, want, got = x, y, alone[0](x, *call.args, **call.kwargs)
        if centre:
            before, want = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
        change, allowed = (got - want).norm(), 1e-2 * (want - before).norm() + 1e-5 * before.norm()
        if not change <= allowed:
            raise ModelError(
                f"slicegpt: {name} ({type(block).__name__}), rotated and not cut, computes something else (off by "
                f"{float(change / want.norm()):.2g} of its output): its norms must come before attention and MLP, and "
                "nothing else in it may see single features of the stream"
            )
        x = y


def _slice(
    model: nn.Module,
    structure: Structure,
    plan: Slicing,
    hidden: ActivationStore,
    calls: BlockCalls,
    components: Callable[[Gram], tuple[Tensor, float]],
    tell: Callable[[Stage, int, float], None] = lambda stage, block, share: None,
) -> Slicing:
    """Slice to the basis that `components` gives for what a norm passes on, with the share of it that is kept."""
    blocks, residual = structure.named_blocks(model), described(structure)
    width, sliced = plan.width, plan.sliced_width
    centre = subtracts_mean(norm_of(blocks[0][1], residual.norm1))
    if centre:
        for b in range(len(hidden)):
            hidden[b] = hidden[b] - hidden[b].mean(-1, keepdim=True)
    kept: list[float] = []
    open_shortcut: tuple[nn.Linear, nn.Linear] | None = None  # the last block's, and its MLP's last linear
    for i, (name, block) in enumerate(blocks):
        parts = halves(block, residual)
        fold(block, residual)
        bases = []
        for half, (norm_name, submodule, readers, _) in enumerate(parts):
            norm = SlicedNorm(width, eps_of(block.get_submodule(norm_name)))
            gram = Gram(width, calls.device)
            tell("statistics", i, half / 2)
            for b in range(len(hidden)):
                gram.update(norm(hidden[b].to(calls.device)), calls.masks[b])
                tell("statistics", i, (half + (b + 1) / len(hidden)) / 2)
            tell("decomposing", i, half / 2)
            basis, share = components(gram)
            kept.append(share)
            bases.append(basis)
            P = basis.to(calls.device, hidden[0].dtype)
            for reader in readers:
                block.set_submodule(reader, _rotated_reader(linear_of(block, reader), basis, half == 0))
            module = block.get_submodule(submodule)
            tell("applying", i, half / 2)
            for b in range(len(hidden)):
                x = hidden[b].to(calls.device) @ P
                if half == 0:
                    call = calls.call(i, b)
                    update = first_output(module(F.pad(norm(x), (0, width - sliced)), *call.args, **call.kwargs))
                else:
                    update = first_output(module(norm(x)))
                hidden[b] = x @ P.T + update
                check_finite_states(hidden[b], calls.masks[b], f"the outputs of {name}.{submodule}", b)
                tell("applying", i, (half + (b + 1) / len(hidden)) / 2)
            tell("decomposing", i, (half + 1) / 2)
            if half == 1:
                _rotate_writer(linear_of(block, parts[0][3]), basis)
            elif open_shortcut is not None:
                skip, last = open_shortcut
                skip.weight.data = (basis.T @ skip.weight.data.to(basis)).to(skip.weight.dtype)
                skip.out_features = sliced
                _rotate_writer(last, basis)
        last_of_attention, last_of_mlp = (linear_of(block, writer) for *_, writer in parts)
        weight, entry = last_of_attention.weight, None
        if i == 0:
            centred = bases[0] - bases[0].mean(0) if centre else bases[0]  # P^T M
            entry = _matrix(centred.T, weight)
        shortcuts = [_matrix(bases[1].T @ bases[0], weight), _matrix(bases[1], weight)]
        model.set_submodule(name, _sliced(block, residual, entry, shortcuts, width))
        open_shortcut = shortcuts[1], last_of_mlp
    return replace(plan, kept=tuple(kept))


def empty_sliced_blocks(model: nn.Module, structure: Structure, slicing: Slicing) -> None:
    """Give a rebuilt model blocks of the sliced shapes, to load a state dict into.

    Raises:
        ModelError: the family does not describe the residual stream.
    """
    blocks, residual = structure.named_blocks(model), described(structure)
    full, cut = slicing.width, slicing.sliced_width
    for i, (name, block) in enumerate(blocks):
        parts = halves(block, residual)
        out = (cut, full if i + 1 == len(blocks) else cut)
        for half, (norm, _, readers, writer) in enumerate(parts):
            shifted = getattr(block.get_submodule(norm), "bias", None) is not None
            for reader in readers:
                linear = linear_of(block, reader)
                kind = SlicedReader if half == 0 else nn.Linear
                bias = shifted or linear.bias is not None
                block.set_submodule(reader, kind(cut, linear.out_features, bias=bias, device="meta"))
            linear = linear_of(block, writer)
            new = nn.Linear(linear.in_features, out[half], bias=linear.bias is not None, device="meta")
            block.set_submodule(writer, new)
        entry = nn.Linear(full, cut, bias=False, device="meta") if i == 0 else None
        shortcuts = [nn.Linear(cut, rows, bias=False, device="meta") for rows in out]
        model.set_submodule(name, _sliced(block, residual, entry, shortcuts, full))


def plan_slicing(blocks: Sequence[tuple[str, nn.Module]], structure: Structure, rate: float | None) -> Slicing:
    """The largest width of the residual stream that meets the rate; None keeps the full width.

    Widths from 64 on are multiples of 8, as fast matrix products like them.

    Raises:
        ModelError: the family does not describe the residual stream, or the norms are of an unknown kind.
        ConfigError: no width meets the rate.
    """
    residual = described(structure)
    width = gain_of(norm_of(blocks[0][1], residual.norm1)).numel()
    dense = per_column = last = 0
    for _, block in blocks:
        for norm, _, readers, writer in halves(block, residual):
            gain_of(norm_of(block, norm))  # raises for norms that cannot be folded
            linears = [linear_of(block, name) for name in (*readers, writer)]
            dense += sum(linear.weight.numel() for linear in linears)
            per_column += sum(linear.out_features for linear in linears[:-1]) + linears[-1].in_features
            last = linears[-1].in_features

    def parameters(cut: int) -> int:
        # the last MLP writes at the full width; entry and exit are width x cut, the other skips cut x cut
        return cut * per_column + (width - cut) * last + 2 * width * cut + (2 * len(blocks) - 1) * cut * cut

    if rate is None:
        return Slicing(width, width, parameters(width), dense)
    for cut in range(width, 0, -1):
        if parameters(cut) <= (1 - rate) * dense and (cut < 64 or cut % 8 == 0):
            return Slicing(width, cut, parameters(cut), dense)
    raise ConfigError(f"rate {rate:g} leaves nothing of a residual stream {width} wide: use a lower rate")


def principal_components(gram: Tensor, count: int) -> tuple[Tensor, float]:
    """The first eigenvectors of a second moment, float64 (width, count), and their share of its trace."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.flip(0).clamp_min(0)
    return vectors.flip(1)[:, :count].contiguous(), float(values[:count].sum() / values.sum())


def _sliced(
    block: nn.Module, residual: Residual, entry: nn.Linear | None, shortcuts: Sequence[nn.Linear], width: int
) -> SlicedBlock:
    """The block of a block's sliced attention and MLP."""
    norms = (
        SlicedNorm(width, eps_of(block.get_submodule(residual.norm1))),
        SlicedNorm(width, eps_of(block.get_submodule(residual.norm2))),
    )
    attention, mlp = block.get_submodule(residual.attention), block.get_submodule(residual.mlp)
    return SlicedBlock(norms, attention, mlp, entry, shortcuts, width)


def _matrix(weight: Tensor, like: Tensor) -> nn.Linear:
    """A linear without bias that holds the matrix, in the dtype and on the device of `like`."""
    linear = nn.Linear(1, 1, bias=False)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.to(like).contiguous(), requires_grad=False)
    return linear


def _rotated_reader(linear: nn.Linear, basis: Tensor, padded: bool) -> nn.Linear:
    """W -> W P."""
    kind = SlicedReader if padded else nn.Linear
    new = kind(1, 1, bias=False)
    new.out_features, new.in_features = linear.out_features, basis.shape[1]
    weight = (linear.weight.to(basis) @ basis).to(linear.weight.dtype)
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    new.bias = linear.bias
    return new


def _rotate_writer(linear: nn.Linear, basis: Tensor) -> None:
    """W -> P^T W, b -> P^T b, in place."""
    weight = (basis.T @ linear.weight.to(basis)).to(linear.weight.dtype)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter((basis.T @ linear.bias.to(basis)).to(linear.weight.dtype), requires_grad=False)
    linear.out_features = basis.shape[1]
