"""What an error of a linear's outputs does to the dense model's output, with all correlations: M = E[g g^T].

g is the gradient at the linear's output of a random projection of the model's output: see `gradients`. The gradients at
the outputs of the blocks are computed once, for a few inputs, and kept; those of a block's linears follow from these
when the block's turn comes, so that the matrices of one block alone are in memory.
"""

import logging
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.calibration.activations import ActivationStore
from oats_vision.calibration.capture import BlockCalls
from oats_vision.calibration.gradients import backward_through, output_sensitivity
from oats_vision.calibration.statistics import Gram
from oats_vision.core.joint import Correlations
from oats_vision.models.families import Structure
from oats_vision.models.values import all_finite

log = logging.getLogger(__name__)

DAMPING = 0.1  # of the gradients' correlations, which few inputs tell
LARGEST = 1024  # outputs that weigh together: beyond, eigenvectors would take most of the time
FLOOR = 1e-3  # share of the mean that each output weighs at least: other inputs may ask for it


class OutputGradients:
    """Gradients at the outputs of a dense model's blocks, for the first batches.

    squares: what an error at each output of each linear does by itself, by full names: see `output_sensitivity`.

    Args:
        model: prepared, as it was when `calls` were captured.
        linears: names in the block, by the block's name.
        calls: how its blocks are called, and the inputs of these batches.
        memory: bytes of gradients to keep there; the rest is on disk.
        seed: of the random projections.
        tell: called with the share of the work that is done.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        linears: Mapping[str, Collection[str]],
        calls: BlockCalls,
        *,
        memory: float,
        seed: int = 0,
        tell: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.calls = calls
        self._store, self._places = ActivationStore(memory), dict[tuple[int, int], int]()

        def keep(index: int, batch: int, gradient: Tensor) -> None:
            self._places[index, batch] = len(self._store)
            self._store.append(gradient)

        self.squares = output_sensitivity(
            model, structure, linears, calls, projections=1, seed=seed, keep=keep, tell=tell
        )

    def of_linears(
        self, block: nn.Module, name: str, index: int, linears: Collection[str], hidden: ActivationStore
    ) -> dict[str, Gram]:
        """The second moments of the gradients at the outputs of a block's linears, by their names in it.

        Args:
            block: dense; index: its number; name: its full name.
            hidden: its inputs in the dense model.
        """
        found: dict[str, Gram] = {}
        for batch in range(len(self.calls.inputs)):
            place = self._places.get((index, batch))
            if place is None:
                continue
            gradient = self._store[place].to(self.calls.device)
            states = hidden[batch].to(self.calls.device, copy=True)
            _, at = backward_through(block, linears, self.calls, index, batch, states, gradient)
            for linear, of_linear in at.items():
                rows = of_linear.flatten(0, -2)
                if not all_finite(rows):
                    log.warning("%s.%s: gradients at its outputs are not finite: not weighed by these", name, linear)
                    continue
                found.setdefault(linear, Gram(rows.shape[1], rows.device)).update(rows)
        known = {linear for of_rank in ranks.everyones(set(found)) for linear in of_rank}
        for linear in filter(known.__contains__, linears):
            weight = block.get_submodule(linear).weight
            assert isinstance(weight, Tensor)
            found.setdefault(linear, Gram(len(weight), weight.device)).over_ranks()
        return found


def output_correlations(gram: Gram | None, rows: slice) -> Correlations | None:
    """Those of some of a linear's outputs; None where nothing is known of them."""
    if gram is None or not gram.tokens:
        return None
    moments = gram.compute()[rows, rows]
    level = moments.diagonal().mean()
    if not level > 0:
        return None
    moments = moments / level
    moments.diagonal().add_(FLOOR)
    return Correlations(moments, torch.float32, DAMPING, LARGEST)
