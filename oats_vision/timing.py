"""Calls timed in turns, so that what else the machine does meets all alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FEWEST = 3  # rounds of a measurement


def side_by_side(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, see `in_turns`."""
    return {name: statistics.median(taken) for name, taken in in_turns(calls, repeats).items()}


@torch.inference_mode()
def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    progress: Callable[[int], None] = lambda done: None,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each call in each round; the calls take turns, so that what else the machine does meets all alike.

    Args:
        repeats: rounds; after `limit` seconds no more than `FEWEST`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + limit
    for repeat in range(-1, repeats):  # the first round warms up
        if repeat >= FEWEST and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            _synchronize()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
        progress(repeat + 1)
    return seconds


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
