"""SliceGPT: a narrower residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oats_vision.compression.methods import BlockMethod, register

if TYPE_CHECKING:
    from torch import nn

    from oats_vision.calibration.activations import ActivationStore
    from oats_vision.calibration.capture import BlockCalls
    from oats_vision.compression.settings import CompressionSettings
    from oats_vision.models.families import Structure
    from oats_vision.nn.sliced import Slicing
    from oats_vision.progress import Clock


@register
class SliceGPT(BlockMethod):
    """The stream between the blocks, rotated to its principal components and cut; see `compression/slicing.py`."""

    name = "slicegpt"
    citation = "Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns, ICLR 2024"
    keeps_sparse = False
    keeps_shapes = False

    def plan(self, blocks: list[tuple[str, nn.Module]], structure: Structure, settings: CompressionSettings) -> Slicing:
        from oats_vision import ranks
        from oats_vision.compression.slicing import plan_slicing

        ranks.refuse("method slicegpt")
        return plan_slicing(blocks, structure, settings.rate)

    def compress(
        self,
        model: nn.Module,
        structure: Structure,
        plan: Slicing,
        hidden: ActivationStore,
        calls: BlockCalls,
        clock: Clock,
    ) -> Slicing:
        from oats_vision.compression.slicing import slice_blocks

        return slice_blocks(model, structure, plan, hidden, calls, clock.at)
