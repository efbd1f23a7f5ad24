"""What came out worse than it should, and what to do about it."""

from collections.abc import Sequence

import torch

from oats_vision.compression.record import CompressionReport
from oats_vision.compression.settings import CompressionSettings
from oats_vision.data.pictures import ENOUGH
from oats_vision.evaluation.results import Cost
from oats_vision.evaluation.speed import Timing
from oats_vision.kernels import native

# a layer is named whose error is so many times the median of the model's layers, and so large
FAR, NOTABLE = 3.0, 0.1
SLOWER = 0.97  # times as fast: below it the difference is no noise
WIDE = 0.3  # between the quartiles of a speedup: beyond it the machine did something else too


# how lines of advice on speed begin
SLOW = "Slower than dense"
BUSY = "The timings vary much from round to round"
UNTIMED = "The speed could not be measured"


def advice_on_speed(timings: Sequence[Timing], settings: CompressionSettings, device: torch.device) -> list[str]:
    """What slows a model down, and what would help on the device that it was timed on."""
    wide = [timing for timing in timings if timing.low and timing.high and timing.high - timing.low > WIDE]
    if wide:
        return [f"{BUSY}: time again on an idle machine with `oats-vision bench`."]
    slow = [timing for timing in timings if timing.speedup < SLOWER]
    if not slow:
        return []
    what = f"{SLOW}: " + ", ".join(f"{timing.speedup:.2f} x ({timing.what})" for timing in slow) + "."
    if device.type != "cpu":
        return [f"{what} GPUs spread weights out for each product; what is saved for certain is memory."]
    if not native.available():
        return [f"{what} The compiled kernels are missing: `oats-vision doctor` says why."]
    if settings.grid:
        return [f"{what} Values of few bits are fast for up to 16 tokens at once; what is saved for certain is memory."]
    auto = settings.method == "oats" and settings.rank_ratio != "auto" and settings.allocation.pattern.kind != "n:m"
    ways = ["rank ratio auto (for each layer the ratio that is fastest here)"] * auto + ["a higher rate"]
    return [f"{what} Try {' or '.join(ways)}; what is saved for certain is memory."]


def advice_on_layers(report: CompressionReport) -> list[str]:
    """Which layers stand out, where all got the same share of the budget: other budgets let some err on purpose."""
    if report.settings.budget != "uniform":
        return []
    errors = torch.tensor([layer.error for layer in report.layers])
    if not len(errors):
        return []
    median = float(errors.median())
    far = [layer for layer in report.layers if layer.error > max(FAR * median, NOTABLE)]
    far.sort(key=lambda layer: -layer.error)
    if not far:
        return []
    less = "take a lower rate" if report.settings.density is None else "give more bits"
    named = ", ".join(f"{layer.name} {layer.error:.3f}" for layer in far[:3]) + ", ..." * (len(far) > 3)
    return [
        f"{len(far)} of {len(errors)} layers have more than {FAR:g} times the median error of {median:.3f}: {named}. "
        f"Leave the worst dense (skip {far[0].name}), or {less}."
    ]


def advice_on_cost(cost: Cost | None) -> list[str]:
    if cost is None or cost.samples >= ENOUGH:
        return []
    return [f"Only {cost.samples} {cost.unit} were held out, so the intervals are wide: give more calibration data."]
