"""The device that a run uses, and what is said of the machine beside every timing."""

import ctypes
import logging
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from oats_vision import ranks
from oats_vision.errors import ConfigError

log = logging.getLogger(__name__)

SLOW = 1.5  # times; below, a model in 16 bits may still gain by what it saves of memory traffic


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name that was checked."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA if it is there.

    Raises:
        ConfigError: the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise ConfigError(f"`device` {name!r} is not available: {str(problem).splitlines()[0]}") from None
    return device


def peak_memory(device: torch.device) -> int:
    """Bytes: of the process, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_in_use(device: torch.device) -> int:
    """Bytes: of the process, or of the GPU; where the system does not say, the most that it was so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return peak_memory(device)
    return pages * resource.getpagesize()


def available_memory(device: torch.device) -> float:
    """Bytes that are free: of the GPU; of the machine, or of what the process's control group may use.

    Of a machine that several ranks share, it is the share of one.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = min(float(psutil.virtual_memory().available), _group_limit() - memory_in_use(device))
    return max(free, 0.0) / ranks.beside()


def _group_limit() -> float:
    """Bytes that the process's control group may use (containers, SLURM), of version 1 or 2; infinite without one."""
    limits = [math.inf]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            one = controllers == "memory"
            root, file = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if one else ("/sys/fs/cgroup", "memory.max")
            if not one and controllers:
                continue
            for place in (path, "/"):  # within a container its own group is the root
                with suppress(OSError, ValueError):  # there is none, or it says "max"
                    limits.append(float(int(Path(f"{root}{place}/{file}").read_text())))
    return min(limits)


def give_memory_back() -> None:
    """Return what was freed to the system, where the C library would keep it (glibc)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def slow_dtype_warning(dtype: torch.dtype, device: torch.device, remedy: str = "use float32") -> str | None:
    """What to say of a 16-bit dtype whose products this processor computes slower than float32's; None if it does not.

    Measured, in a few hundredths of a second: flags and versions of libraries do not tell.

    Args:
        remedy: what to do about it.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return None
    times = _product_seconds(dtype) / _product_seconds(torch.float32)
    if times < SLOW:
        return None
    return f"{str(dtype).removeprefix('torch.')} is {times:.2g} x slower than float32 on this processor: {remedy}"


def warn_if_slow(dtype: str | None, device: torch.device, remedy: str) -> None:
    """Log `slow_dtype_warning` of a dtype by its name, if there is something to say."""
    if dtype and (warning := slow_dtype_warning(dtype_of(dtype), device, remedy)):
        log.warning(warning)


@torch.inference_mode()
def _product_seconds(dtype: torch.dtype) -> float:
    """Of a linear of 512 features on 64 tokens, at best."""
    x, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    taken = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        F.linear(x, weight)
        taken.append(time.perf_counter() - start)
    return min(taken)


def machine(device: torch.device) -> dict[str, Any]:
    """What timings were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def machine_line(about: dict[str, Any]) -> str:
    """`machine` in words."""
    return f"{about['device']} ({about['name']}), {about['threads']} threads, PyTorch {about['torch']}"
