"""RTN: each weight rounded to the nearest level, the plainest quantisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oats_vision.compression.methods import register
from oats_vision.compression.methods.base import RoundingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from oats_vision.calibration.statistics import Statistic
    from oats_vision.compression.settings import CompressionSettings
    from oats_vision.core.budget import Budget
    from oats_vision.core.oats import Factors


@register
class RTN(RoundingMethod):
    """All weights, rounded to the nearest level of their group's range."""

    name = "rtn"
    citation = "Round to nearest, as in Dettmers & Zettlemoyer, The case for 4-bit precision, ICML 2023"

    def decompose(self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
        from oats_vision.core.quantise import nearest, rounded

        assert budget.grid is not None
        return rounded(weight, nearest(weight, budget.grid), None, statistic.scale())
