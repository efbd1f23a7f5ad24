import gc
import mmap
from types import SimpleNamespace

import psutil
import pytest
import torch

from oats_vision import machine, ranks
from oats_vision.machine import memory_in_use, peak_memory, slow_dtype_warning

CPU = torch.device("cpu")


@pytest.mark.parametrize(("seconds", "warned"), [(12.4, True), (1.2, False), (0.5, False)])
def test_a_dtype_that_is_slower_than_float32_is_warned_of(seconds, warned, monkeypatch):
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype: 1.0 if dtype == torch.float32 else seconds)
    warning = slow_dtype_warning(torch.bfloat16, CPU, "leave --mixed-precision out")
    said = "bfloat16 is 12 x slower than float32 on this processor: leave --mixed-precision out"
    assert warning == (said if warned else None)
    assert slow_dtype_warning(torch.float32, CPU) is None
    assert slow_dtype_warning(torch.float16, torch.device("cuda")) is None


def test_products_are_timed():
    assert 0 < machine._product_seconds(torch.float32) < 0.1


def test_memory_in_use_follows_what_is_allocated():
    gc.collect()
    size = 100_000_000
    before = memory_in_use(CPU)
    with mmap.mmap(-1, size) as held:  # new memory of the system, not what the process had and freed
        held.write(b"x" * size)
        after = memory_in_use(CPU)
    assert 0.9 * size < after - before < 2.5 * size  # with what was written
    assert after <= peak_memory(CPU) * 1.01


def test_what_is_free_is_within_what_there_is():
    free = machine.available_memory(CPU)
    assert 0 < free <= psutil.virtual_memory().total


def test_ranks_of_one_machine_share_what_is_free(monkeypatch):
    monkeypatch.setattr(machine, "_group_limit", lambda: float(9 << 30))
    monkeypatch.setattr(machine, "memory_in_use", lambda device: 1 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 << 30))
    assert machine.available_memory(CPU) == 8 << 30
    monkeypatch.setattr(ranks, "beside", lambda: 4)
    assert machine.available_memory(CPU) == 2 << 30


def test_a_control_group_limits_what_is_free(monkeypatch):
    limit = 3 << 30
    monkeypatch.setattr(machine, "_group_limit", lambda: float(limit))
    monkeypatch.setattr(machine, "memory_in_use", lambda device: 1 << 30)
    assert machine.available_memory(CPU) <= 2 << 30
    monkeypatch.setattr(machine, "memory_in_use", lambda device: 4 << 30)
    assert machine.available_memory(CPU) == 0
