"""The device that a run uses, and what is said of the machine beside every timing."""

import resource
import sys
from typing import Any

import torch

from oats_vision.errors import ConfigError


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
        raise ConfigError(f"device: {name!r} is not there: {str(problem).splitlines()[0]}") from None
    return device


def peak_memory(device: torch.device) -> int:
    """Bytes: of the process, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine(device: torch.device) -> dict[str, Any]:
    """What timings were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def machine_line(device: torch.device) -> str:
    """`machine` in words."""
    about = machine(device)
    return f"{about['device']} ({about['name']}), {about['threads']} threads, PyTorch {about['torch']}"
