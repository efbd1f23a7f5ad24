"""Train all blocks of a compressed model together, to give the final features that the dense one gave.

A block's own error is not the model's: what one block does wrong another can make up for. Each block's graph is made
again on the way back (gradient checkpointing), so that one block's activations are in memory at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oats_vision.compression.block_training import Streams, Trained, train_block
from oats_vision.nn.outputs import first_output


@dataclass
class WholeStreams(Streams):
    """Here `hidden` is what the first block is given, and `wanted` what the dense model's last block gave."""

    def run(self, block: nn.Module, index: int, batch: int, dtype: torch.dtype) -> Tensor:
        """What all blocks, one after the other, make of a batch."""
        x = self.hidden[batch].to(self.calls.device, dtype, copy=True)
        assert isinstance(block, nn.ModuleList)
        for i, one in enumerate(block):
            x = checkpoint(partial(self._block, one, i, batch, dtype), x, use_reentrant=False)
        return x

    def _block(self, block: nn.Module, index: int, batch: int, dtype: torch.dtype, x: Tensor) -> Tensor:
        """One block; its inputs stay as they are, which it is given again on the way back."""
        return first_output(self.calls.call(index, batch).to(dtype).run(block, x.clone()))


def train_together(
    blocks: nn.ModuleList,
    streams: WholeStreams,
    *,
    steps: int,
    storage: torch.dtype,
    seed: int,
    tell: Callable[[int, float], None],
) -> Trained:
    """As `train_block` does it, with all blocks in place of one; judged by the final features on held-out data."""
    return train_block(blocks, streams.last, streams, steps=steps, storage=storage, seed=seed, tell=tell)
