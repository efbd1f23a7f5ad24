"""What is gathered of a linear's inputs, for the method that decomposes it."""

import torch

from oats_vision.calibration.statistics import Gram, Statistic
from oats_vision.compression.methods import LinearMethod
from oats_vision.compression.settings import CompressionSettings

# share by which each input's second moment grows before rounding makes up for losses by them. A text's first token, on
# which all others rest their attention, makes most of some moments: docs/results.md has what each choice gives
DAMPING: dict[str, float] = {"pictures": 0.01, "sequences": 0.1}
# where values are rounded. An input that is hardly ever active could make up for losses in others by values so large
# that their group has no levels left for the rest
NOISE = 0.01


def statistic_of(
    method: LinearMethod, settings: CompressionSettings, unit: str, in_features: int, device: torch.device
) -> Statistic:
    """An empty statistic of what the method asks for; unit: of the calibration data."""
    statistic = method.statistic(settings, in_features, device)
    if isinstance(statistic, Gram):
        statistic.damping = DAMPING[unit]
        statistic.noise = NOISE if settings.grid or settings.bits else 0.0
    return statistic
