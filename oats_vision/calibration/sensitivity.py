"""What an error of a linear's outputs does to the dense model's output, with all correlations: M = E[g g^T].

g is the gradient at the linear's output of a random projection of the model's output: see `gradients`. One pass back
through the blocks finds these matrices, of a few inputs; what `joint` asks of them is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls
from oats_vision.calibration.gradients import backwards
from oats_vision.calibration.statistics import Gram
from oats_vision.core.correlations import Blocks, Correlations
from oats_vision.models.families import Structure

DAMPING = 0.1  # of the gradients' correlations, which few inputs tell
LARGEST = 1024  # outputs that weigh together: beyond, eigenvectors would take most of the time
FLOOR = 1e-3  # share of the mean that each output weighs at least: other inputs may ask for it


class OutputGradients:
    """What is known of the gradients at the outputs of a dense model's linears, on the first batches.

    squares: what an error at each output of each linear does by itself, by full names: see `output_sensitivity`.

    Args:
        model: prepared, as it was when `calls` were captured.
        parts: the rows of each matrix of a linear, by the block's name and the linear's in it.
        calls: how its blocks are called, and the inputs of these batches.
        memory: bytes of correlations to keep there; the rest is on disk. working: the same of hidden states, which are
            gone afterwards.
        seed: of the random projections.
        tell: called with the share of the work that is done.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        parts: Mapping[str, Mapping[str, Sequence[int]]],
        calls: BlockCalls,
        *,
        memory: float,
        working: float,
        seed: int = 0,
        tell: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.squares: dict[str, Tensor] = {}
        self._kept: dict[str, list[_Kept | None]] = {}
        self._store, samples = ActivationStore(memory), calls.gradient_samples
        for block, found in backwards(model, structure, parts, calls, Gram, seed=seed, memory=working, tell=tell):
            for name, grams in found.items():
                self.squares[f"{block}.{name}"] = torch.cat([gram.squares() for gram in grams]) / samples
                self._kept[f"{block}.{name}"] = [self._keep(gram) for gram in grams]

    def _keep(self, gram: Gram) -> "_Kept | None":
        correlations = _correlations(gram)
        if correlations is None:
            return None
        self._store.append(correlations.C.blocks)
        return _Kept(correlations.d, correlations.C.order, len(self._store) - 1)

    def correlations(self, linear: str) -> list[Correlations | None]:
        """Of the gradients at the outputs of each part of a linear, by its full name; None where nothing is known."""
        return [self._read(kept) if kept else None for kept in self._kept[linear]]

    def _read(self, kept: "_Kept") -> Correlations:
        return Correlations(kept.d, Blocks(self._store[kept.place].to(kept.d.device), kept.order))


@dataclass(frozen=True)
class _Kept:
    """Correlations whose blocks are in a store, at a place."""

    d: Tensor
    order: Tensor | None
    place: int


def _correlations(gram: Gram) -> Correlations | None:
    """None where nothing is known."""
    if not gram.tokens:
        return None
    moments = gram.compute()
    level = moments.diagonal().mean()
    if not level > 0:
        return None
    moments = moments / level
    moments.diagonal().add_(FLOOR)
    return Correlations.of(moments, torch.float32, DAMPING, LARGEST)
