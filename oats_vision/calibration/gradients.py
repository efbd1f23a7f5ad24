"""How much a model's output moves when those of its linears do: gradients, block by block from the last."""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls, call_model, no_cache, split_call
from oats_vision.calibration.statistics import SecondMoment, Statistic
from oats_vision.data.batches import Inputs
from oats_vision.models.families import Structure
from oats_vision.models.head import class_logits, has_head
from oats_vision.models.structure import floating, linear_of
from oats_vision.models.values import all_finite
from oats_vision.nn.outputs import first_output, with_hidden_states

log = logging.getLogger(__name__)

FORWARD_AND_BACK = 2  # what a block's passes take, beside one forward
S = TypeVar("S", bound=Statistic)


def output_sensitivity(
    model: nn.Module,
    structure: Structure,
    linears: Mapping[str, Collection[str]],
    calls: BlockCalls,
    *,
    projections: int = 2,
    seed: int = 0,
    memory: float = math.inf,
    tell: Callable[[float], None] = lambda share: None,
) -> dict[str, Tensor]:
    """What an error at each output of each linear does to the dense model's output, by backward passes.

    With J the Jacobian of the model's output y by the linear's outputs at one token, s_i is the sum over a sample's
    tokens of (J^T J)_ii, estimated from J^T v with random v. An error E of the weight then adds about
    sum_i s_i (E G E^T)_ii to a sample's |y' - y|^2, where G is the mean of x x^T over the linear's inputs. It is exact
    to the first order if errors at two outputs or two tokens do not add up or cancel.

    Args:
        linears: names in the block, by the block's name. The others are those of `backwards`.

    Returns:
        s, float64 (out_features,), by the linears' full names; zero for an expert that no token went to.
    """
    whole = {
        block: {name: [linear_of(model, f"{block}.{name}").out_features] for name in names}
        for block, names in linears.items()
    }
    runs = calls.gradient_samples * projections
    return {
        f"{block}.{name}": moment.total.value() / runs
        for block, found in backwards(
            model, structure, whole, calls, SecondMoment, projections=projections, seed=seed, memory=memory, tell=tell
        )
        for name, (moment,) in found.items()
    }


def backwards(
    model: nn.Module,
    structure: Structure,
    parts: Mapping[str, Mapping[str, Sequence[int]]],
    calls: BlockCalls,
    new: Callable[[int, torch.device], S],
    *,
    projections: int = 1,
    seed: int = 0,
    memory: float = math.inf,
    tell: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[str, dict[str, list[S]]]]:
    """Gradients of a random projection of the dense model's output, at the outputs of its linears, block by block.

    The output y are the hidden states after the final norm, and gradients those of v^T y with v of independent signs.
    Of a model with a head y are its logits, and v such that the mean of v v^T is diag(p) - p p^T, p the probabilities:
    J^T J is then the Fisher information, and half of the change the Kullback-Leibler divergence of the probabilities.

    The model runs once on the batches whose inputs `calls` kept, and each block once more for each projection: one
    block's graph is in memory at a time.

    Args:
        model: prepared, as it was when `calls` were captured.
        parts: the rows of each matrix of a linear, by the block's name and the linear's in it.
        new: an empty statistic for a number of outputs, on a device.
        projections: random v for each batch. seed: of these.
        memory: bytes of hidden states and gradients to keep there; the rest is on disk.
        tell: called with the share of the work that is done.

    Returns:
        Each block's name, from the last to the first, and what was gathered of each linear's parts: of no token where
        it is an expert that none went to.

    What is not finite is left out: the pass through the blocks says where it comes from.
    """
    blocks, batches = structure.named_blocks(model), range(len(calls.inputs))
    work, done = len(batches) * len(blocks) * (1 + FORWARD_AND_BACK * projections), 0
    with ActivationStore(memory / 2) as states, ActivationStore(memory / 2) as gradients:
        flowing: list[int] = []  # the batch of each gradient
        for batch, inputs in enumerate(calls.inputs):
            dense = run_dense(model, structure, blocks, inputs, batch)
            for of_block in dense.inputs:
                states.append(of_block)
            first, _ = calls.before[batch]
            for projection in range(projections):
                drawn = seed * projections + projection
                gradient = dense.gradient(drawn, first, calls.gradient_samples, calls.masks[batch])
                if gradient is not None:
                    flowing.append(batch)
                    gradients.append(gradient)
            del dense  # whose logits would lie beside the next one's
            done += len(blocks)
            tell(done / work)
        for index in reversed(range(len(blocks))):
            name, block = blocks[index]
            found = {
                linear: [new(count, calls.device) for count in rows] for linear, rows in parts.get(name, {}).items()
            }
            for place, batch in enumerate(flowing):
                hidden, gradient = (
                    one.to(calls.device, copy=True) for one in (states[batch * len(blocks) + index], gradients[place])
                )
                gradients[place], at = backward_through(block, found, calls, index, batch, hidden, gradient)
                for linear, of_linear in at.items():
                    rows = of_linear.flatten(0, -2)
                    if not all_finite(rows):
                        log.warning("%s.%s: gradients at its outputs are not finite: left out", name, linear)
                        continue
                    for statistic, of_part in zip(
                        found[linear], rows.split(list(parts[name][linear]), dim=1), strict=True
                    ):
                        statistic.update(of_part)
                done += FORWARD_AND_BACK
                tell(min(done / work, 1.0))
            for statistics in found.values():
                for statistic in statistics:
                    statistic.over_ranks()
            yield name, found


@dataclass(frozen=True)
class DenseRun:
    """A batch in the dense model.

    inputs: of each block. last: the last block's output, from which `output` follows, with its graph. logits: whether
    the output is one.
    """

    inputs: list[Tensor]
    last: Tensor
    output: Tensor
    logits: bool

    def gradient(self, seed: int, first: int, counted: int, mask: Tensor | None) -> Tensor | None:
        """That of the output's product with a random vector, by the last block's output; None if it is not finite.

        Args:
            seed: of the vector, which is each sample's own: how samples are batched changes nothing.
            first: number of the batch's first sample. counted: from which number on they do not count.
            mask: true for tokens that count, (batch, tokens).
        """
        output = self.output.detach()
        if not all_finite(output):
            return None  # the pass through the blocks says where that comes from
        v = torch.empty_like(output)
        for i, one in enumerate(output):  # of a large vocabulary two samples' logits may fill the memory
            v[i] = self._vector(one.float().cpu(), seed, first + i, counted)
        if mask is not None and mask.shape == v.shape[:2]:
            v *= mask.to(v)[..., None]
        (gradient,) = torch.autograd.grad(self.output, self.last, v, retain_graph=True)
        return gradient

    def _vector(self, output: Tensor, seed: int, number: int, counted: int) -> Tensor:
        """For one sample's output."""
        if number >= counted:
            return torch.zeros_like(output)
        generator = torch.Generator().manual_seed(seed * counted + number)
        if not self.logits:
            return torch.randint(0, 2, output.shape, generator=generator).mul_(2).sub_(1).to(output)
        p = output.softmax(-1)
        drawn = torch.multinomial(p.view(-1, p.shape[-1]), 1, generator=generator).view(*p.shape[:-1], 1)
        return torch.zeros_like(p).scatter_(-1, drawn, 1.0).sub_(p)


def run_dense(
    model: nn.Module, structure: Structure, blocks: Sequence[tuple[str, nn.Module]], inputs: Inputs, batch: int
) -> DenseRun:
    """Run the model on a batch, with a graph of what comes after its last block."""
    states: list[Tensor] = []
    normed: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(split_call(module, module.forward, args, kwargs)[1].detach().clone())

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(True)  # until no_grad below sets it back
        states.append(first_output(output).detach().clone().requires_grad_())
        return with_hidden_states(output, states[-1].clone())  # which may be changed in place

    def norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        normed.append(output)

    first = floating(model)
    with torch.no_grad(), no_cache(model), ExitStack() as hooks:
        for _, block in blocks:
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(blocks[-1][1].register_forward_hook(leave).remove)
        if structure.final_norm:
            hooks.callback(model.get_submodule(structure.final_norm).register_forward_hook(norm).remove)
        output = call_model(model, inputs, batch, first.device, first.dtype)
    logits = _logits(model, structure, output)
    if logits is None:
        following = [y for y in normed if y.requires_grad]  # not those of earlier blocks
        return DenseRun(states[:-1], states[-1], following[0] if following else states[-1], logits=False)
    return DenseRun(states[:-1], states[-1], logits, logits=True)


def _logits(model: nn.Module, structure: Structure, output: Any) -> Tensor | None:
    """What a model with a head says of classes, or of the next token."""
    if structure.family.unit == "sequences":
        logits: Tensor | None = getattr(output, "logits", None)
        return logits
    return class_logits(model, output) if has_head(model, output) else None


def backward_through(
    block: nn.Module,
    linears: Collection[str],
    calls: BlockCalls,
    index: int,
    batch: int,
    hidden: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Take a gradient back through a block.

    Returns:
        The gradient at its input, and those at its linears' outputs.
    """
    outputs: dict[str, Tensor] = {}
    with torch.enable_grad(), ExitStack() as hooks:
        for name in linears:

            def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> Tensor:
                outputs[name] = output
                return output.clone()  # which the block may change in place

            hooks.callback(block.get_submodule(name).register_forward_hook(keep).remove)
        hidden = hidden.requires_grad_()
        result = calls.run(block, index, batch, hidden)
        gradients = torch.autograd.grad(result, [hidden, *outputs.values()], gradient, allow_unused=True)
    assert gradients[0] is not None
    # none of the last block perhaps: the logits may follow from one token
    of_linears = {name: found for name, found in zip(outputs, gradients[1:], strict=True) if found is not None}
    return gradients[0], of_linears
