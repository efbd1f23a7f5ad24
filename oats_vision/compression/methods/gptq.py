"""GPTQ: weights rounded column by column, with each loss made up for by the columns still to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oats_vision.compression.methods import register
from oats_vision.compression.methods.base import RoundingMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from oats_vision.calibration.statistics import Statistic
    from oats_vision.compression.settings import CompressionSettings
    from oats_vision.core.budget import Budget
    from oats_vision.core.oats import Factors


@register
class GPTQ(RoundingMethod):
    """All weights, rounded with the inputs' full second moments; see `core/quantise.py`."""

    name = "gptq"
    citation = "Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Transformers, ICLR 2023"
    orders_columns = True

    def statistic(self, settings: CompressionSettings, in_features: int, device: torch.device) -> Statistic:
        from oats_vision.calibration.statistics import Gram

        return Gram(in_features, device)

    def decompose(self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
        from oats_vision.calibration.statistics import Gram
        from oats_vision.core.quantise import gptq, rounded

        assert isinstance(statistic, Gram)
        assert budget.grid is not None
        gram = statistic.compute()
        known = None if settings.act_order else statistic.inverse_factor()
        found = gptq(weight, gram, budget.grid, act_order=settings.act_order, factor=known, damping=statistic.damping)
        return rounded(weight, found, gram, statistic.scale())

    def working_set(self, settings: CompressionSettings) -> tuple[int, int]:
        return 6, 5 * 8 + 4  # as of SparseGPT
