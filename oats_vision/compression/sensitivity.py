"""How an error in the hidden states after a block is to be counted: by what it does to the model's final features.

To first order an error e of a token changes the features by J e, of size e^T H e with H the mean of J^T J over tokens.
H is learnt from a few passes back through the dense model, of random directions v: since E[v v^T] = I, it is the mean
of (J^T v) (J^T v)^T. Plain squares would spend the training on what later blocks and norms hardly look at.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls
from oats_vision.nn.outputs import first_output

BATCHES = 4  # whose tokens the mean is taken over
DAMPING = 1e-3  # share of the mean diagonal that is added to it: no direction is of no account


def views(
    blocks: Sequence[nn.Module], norm: nn.Module | None, hidden: ActivationStore, calls: BlockCalls, seed: int
) -> list[Callable[[Tensor], Tensor]]:
    """What to make of the hidden states after each block before their squared error is taken, in float32 or better.

    Args:
        blocks: of the dense model.
        norm: what makes its features of the last block's output.
        hidden: its first block's inputs.
    """
    dtype = torch.promote_types(hidden[0].dtype, torch.float32)
    last = deepcopy(norm).to(dtype).requires_grad_(False) if norm is not None else nn.Identity()
    roots = [torch.linalg.cholesky(_damped(H)) for H in _sensitivities(blocks, norm, hidden, calls, seed)]
    return [*(lambda y, L=L: y @ L for L in roots[:-1]), last]  # type: ignore[misc]  # |y L|^2 = y H y^T


def _sensitivities(
    blocks: Sequence[nn.Module], norm: nn.Module | None, hidden: ActivationStore, calls: BlockCalls, seed: int
) -> list[Tensor]:
    """H after each block, (width, width), in the precision of the hidden states or float32, whichever is better."""
    width, dtype = hidden[0].shape[-1], torch.promote_types(hidden[0].dtype, torch.float32)
    totals = [torch.zeros(width, width, dtype=dtype, device=calls.device) for _ in blocks]
    generator = torch.Generator().manual_seed(seed)
    for b in range(min(BATCHES, len(hidden))):
        states = [hidden[b].to(calls.device)]
        with torch.no_grad():
            for i, block in enumerate(blocks):
                states.append(calls.run(block, i, b, states[-1]))
        y, mask = states.pop(), calls.masks[b]
        probe = torch.randint(2, y.shape, generator=generator).mul_(2).sub_(1).to(y)
        if mask is not None and mask.shape == y.shape[:2]:
            probe *= mask.to(y.device)[..., None]
        gradient = probe if norm is None else _back(norm, y, probe)
        for i in reversed(range(len(blocks))):
            g = gradient.flatten(0, -2).to(dtype)
            totals[i] += g.T @ g
            if i:
                run = partial(calls.call(i, b).run, blocks[i])
                gradient = _back(lambda x, run=run: first_output(run(x)), states.pop(), gradient)  # type: ignore[misc]
    return totals


def _back(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    """J^T g at x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x.clone()), x, gradient)[0]  # a clone, which may be changed in place


def _damped(H: Tensor) -> Tensor:
    size = float(H.diagonal().mean())
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return H / size + DAMPING * eye if 0 < size < torch.inf else eye
