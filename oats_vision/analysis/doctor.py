"""What `oats-vision doctor` looks at: whether this machine has what compression and its kernels need."""

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement

from oats_vision import logs, network
from oats_vision.core.oats import Factors
from oats_vision.errors import ConfigError
from oats_vision.kernels import native
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from oats_vision.timing import side_by_side

GROUPS = ("versions", "machine", "kernels", "folders", "network")
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "datasets", "safetensors", "numpy")
EXTRAS = ("llm", "notebooks")
LITTLE_SPACE = 5e9  # bytes, less than a large model and its activations take
PATIENCE = 2.0  # seconds that the network and the sizes of the caches have
# largest relative error of a product, |y - y'| / |y|: that of its inputs' and sums' rounding, with room
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    value: what was found. advice: what to do about it, empty if it is ok.
    """

    group: str
    name: str
    value: str
    status: Literal["ok", "warning", "failed"] = "ok"
    advice: str = ""


@dataclass(frozen=True)
class Examination:
    """All that was looked at, in order."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        return any(check.status == "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"failed": self.failed, "checks": [asdict(check) for check in self.checks]}


def examine() -> Examination:
    """Look at everything; takes a few seconds."""
    parts = (_versions, _machine, _kernels, _folders, _network)
    return Examination(tuple(check for part in parts for check in part()))


def _versions() -> Iterator[Check]:
    check = partial(Check, "versions")
    yield check("oats_vision", version("oats_vision"))
    yield check("Python", f"{platform.python_version()} ({sys.executable})")
    yield check("system", platform.platform())
    for name in LIBRARIES:
        yield check(name, _version(name))
    needed = [Requirement(line) for line in requires("oats_vision") or ()]
    wrong = [
        f"{need.name}{need.specifier}, here {_version(need.name)}"
        for need in needed
        if need.marker is None and not _fits(need)
    ]
    if wrong:
        yield check("requirements", "; ".join(wrong), "failed", "reinstall oats_vision with its dependencies")
    for extra in EXTRAS:
        names = [n.name for n in needed if n.marker and n.marker.evaluate({"extra": extra}) and n.name != "oats_vision"]
        missing = [name for name in names if _version(name) == "missing"]
        how = f"not installed ({', '.join(missing)} missing): pip install {' '.join(missing)}"
        yield check(f"extra {extra}", how if missing else "installed")


def _fits(need: Requirement) -> bool:
    here = _version(need.name)
    return here != "missing" and need.specifier.contains(here, prereleases=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _machine() -> Iterator[Check]:
    check = partial(Check, "machine")
    cores, threads = _cores(), torch.get_num_threads()
    yield check("processor", f"{_processor()}, {cores:g} of {os.cpu_count()} cores for this process")
    forced = os.environ.get("OMP_NUM_THREADS")
    said = f"{threads}" + f" (OMP_NUM_THREADS={forced})" * bool(forced)
    if threads > cores:
        yield check("threads", said, "warning", f"set OMP_NUM_THREADS={max(int(cores), 1)}: more than the cores wait")
    elif threads <= cores / 2 and forced:
        yield check("threads", said, "warning", f"unset OMP_NUM_THREADS to use all of {cores:g} cores")
    else:
        yield check("threads", said)
    total, free = _memory()
    low = free < 2e9
    yield check(
        "memory",
        f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB",
        "warning" if low else "ok",
        "end other programs, or give a smaller --batch-size" if low else "",
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            memory = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
            yield check(f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {memory}, CUDA {torch.version.cuda}")
    elif Path("/proc/driver/nvidia/version").exists():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        advice = "install the PyTorch build that fits the driver (nvidia-smi shows it)"
        yield check("GPU", f"there is a driver of NVIDIA, but PyTorch {built} and sees none", "warning", advice)
    else:
        yield check("GPU", "none")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> float:
    """Cores that this process may use: of its affinity, and of its container's share."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = _control_group("cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() else cores


def _memory() -> tuple[int, int]:
    """Bytes in all and free, of the machine or of the container."""
    memory = psutil.virtual_memory()
    limit, used = _control_group("memory.max"), _control_group("memory.current")
    if limit.isdigit() and used.isdigit() and int(limit) < memory.total:
        return int(limit), min(memory.available, int(limit) - int(used))
    return memory.total, memory.available


def _control_group(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""


def _kernels() -> Iterator[Check]:
    check = partial(Check, "kernels")
    try:
        there = native.available()
    except ConfigError as wrong:
        yield check("instruction set", str(wrong), "failed", f"unset {native.FORCED}")
        return
    if there:
        used, best = native.active(), native.instruction_sets()[0]
        less = used != best
        yield check("compiled", f"yes, for {', '.join(native.instruction_sets())}")
        yield check(
            "instruction set",
            f"{used}" + f" ({native.FORCED} forces it)" * bool(os.environ.get(native.FORCED)),
            "warning" if less else "ok",
            f"unset {native.FORCED} to use {best}, which is faster" if less else "",
        )
    else:
        yield _why_not_compiled()
    yield _self_test()
    yield _speed(there)


def _why_not_compiled() -> Check:
    slow = "compressed layers work, by PyTorch, and are no faster than dense ones"
    try:
        import_module("oats_vision.kernels._native")
    except ModuleNotFoundError:
        advice = (
            "install a C++ compiler (g++ or clang), then in the checkout: pip install --force-reinstall --no-deps ."
        )
        return Check(
            "kernels", "compiled", f"no, there was no working compiler at the install: {slow}", "warning", advice
        )
    except ImportError as problem:
        advice = "build them on this machine, in the checkout: pip install --force-reinstall --no-deps ."
        return Check("kernels", "compiled", f"yes, but they cannot be loaded ({problem}): {slow}", "failed", advice)
    raise AssertionError("the kernels can be imported")


def _self_test() -> Check:
    """Products of small random layers of several shapes and dtypes, against those in float64."""
    worst, where, largest, count = 0.0, "", 0.0, 0
    for out_features, in_features in ((64, 96), (33, 210), (384, 1536)):
        for dtype, tolerance in TOLERANCE.items():
            layer = _random_layer(out_features, in_features, dtype)
            weight = layer.merge(torch.float64).weight
            for tokens in (1, 7, 64, 197):
                x = torch.randn(tokens, in_features, generator=_generator()).to(dtype)
                with torch.inference_mode():
                    expected, ours = F.linear(x.double(), weight), layer(x).double()
                error = float((ours - expected).norm() / expected.norm())
                count, largest = count + 1, max(largest, error if dtype == torch.float32 else 0)
                if not error / tolerance <= worst:  # NaN too
                    worst, where = error / tolerance, f"{out_features} x {in_features}, {tokens} tokens, {dtype}"
    said = f"{count} products against float64, largest relative error in float32 {largest:.1e}"
    if worst <= 1:
        return Check("kernels", "self-test", said)
    advice = f"report it; {native.FORCED}=portable may help until then"
    return Check("kernels", "self-test", f"{said}; wrong for {where}", "failed", advice)


def _speed(compiled: bool) -> Check:
    """A layer of ViT-B at half of its parameters on one picture, against dense."""
    layer = _random_layer(3072, 768, torch.float32)
    dense, x = layer.merge(), torch.randn(197, 768, generator=_generator())
    seconds = side_by_side({"dense": partial(dense, x), "compressed": partial(layer, x)}, repeats=15)
    ratio = seconds["dense"] / seconds["compressed"]
    times = ", ".join(f"{name} {taken * 1e3:.1f} ms" for name, taken in seconds.items())
    slow = ratio < 0.9
    advice = "expect smaller models, not faster ones, in float32; higher rates are faster" if slow and compiled else ""
    said = f"{ratio:.2f} x dense at rate 0.5, 3072 x 768, 197 tokens ({times})"
    return Check("kernels", "speed", said, "warning" if slow else "ok", advice)


def _random_layer(out_features: int, in_features: int, dtype: torch.dtype) -> SparseLowRankLinear:
    """At rate 0.5 and rank ratio 0.2."""
    generator = _generator()
    rank = max(round(0.1 * out_features * in_features / (out_features + in_features)), 1)
    S = torch.randn(out_features, in_features, generator=generator)
    S = S * (torch.rand(S.shape, generator=generator) < 0.4)
    U, V = torch.randn(out_features, rank, generator=generator), torch.randn(rank, in_features, generator=generator)
    return SparseLowRankLinear.from_factors([("weight", Factors(S, U / rank, V, error=0.0, iterations=0))], None, dtype)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _folders() -> Iterator[Check]:
    from huggingface_hub import constants

    caches = {
        "Hugging Face hub": (Path(constants.HF_HUB_CACHE), "HF_HOME"),
        "datasets": (_datasets_cache(), "HF_HOME"),
        "torch.hub": (Path(torch.hub.get_dir()), "TORCH_HOME"),
        "logs": (logs.folder(), "XDG_CACHE_HOME"),
        "temporary files": (Path(tempfile.gettempdir()), "TMPDIR"),
    }
    for name, (folder, variable) in caches.items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        size = f", {_size(folder)}" if folder.is_dir() and name != "temporary files" else ""
        said = f"{folder}{size}, {free / 1e9:.1f} GB free"
        if not os.access(there, os.W_OK | os.X_OK):
            yield Check("folders", name, f"{said}, not writable", "warning", f"set {variable} to a folder that is")
        elif free < LITTLE_SPACE:
            yield Check("folders", name, said, "warning", f"free some space, or set {variable} to another disk")
        else:
            yield Check("folders", name, said)


def _datasets_cache() -> Path:
    """As the library says, which takes seconds to import."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()


def _size(folder: Path) -> str:
    """Bytes of the files below a folder, as far as they can be counted in a moment."""
    total, end = 0, time.monotonic() + PATIENCE
    for place, _, files in os.walk(folder):
        if time.monotonic() > end:
            return f"more than {total / 1e9:.1f} GB"
        for file in files:
            try:
                total += os.lstat(os.path.join(place, file)).st_size  # noqa: PTH118  # of a million files
            except OSError:  # gone by now
                continue
    return f"{total / 1e9:.1f} GB"


def _network() -> Iterator[Check]:
    from huggingface_hub import constants

    name, endpoint = "Hugging Face hub", constants.ENDPOINT + " (HF_ENDPOINT)" * bool(os.environ.get("HF_ENDPOINT"))
    if constants.is_offline_mode():
        yield Check("network", name, f"{endpoint} is not asked: HF_HUB_OFFLINE is set, and what is cached is used")
        return
    down = network.unreachable(constants.ENDPOINT, PATIENCE)
    if down:
        advice = "without a network use local directories, what is cached, or the demo"
        yield Check("network", name, f"{endpoint} cannot be reached ({down})", "warning", advice)
    else:
        yield Check("network", name, f"{endpoint} answers")
