"""Compress a ViT whose weights are three times the memory that is allowed, and compare with the ordinary way.

    python eval/benchmarks/low_memory.py --depth 60 --quality fast

A ViT-S with random weights and many blocks is written as a local directory, and compressed by the whole command
(calibration on pictures of noise, checkpoint, measurement) in processes of their own: block by block, in a control
group (version 1 or 2) whose limit is what is charged to it after a run of the demo, which loads all libraries, and a
third of the weights; in the ordinary way within the same limit, which must be killed; and in the ordinary way without a
limit. A group's charge counts page cache too, which the kernel takes back when it must; `peak` is the process's own
(resident set, libraries included). The two checkpoints' weights must be equal to the byte.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # of version 1, of version 2
NAME = "oats_vision_low_memory"


def make_model(directory: Path, depth: int) -> int:
    """Write a ViT-S of so many blocks in timm's format; returns the bytes of its weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    name, size = "vit_small_patch16_224", 64
    model = timm.create_model(name, pretrained=False, img_size=size, depth=depth, num_classes=10)
    directory.mkdir()
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": name,
        "num_classes": 10,
        "model_args": {"img_size": size, "depth": depth},
        "pretrained_cfg": {"num_classes": 10, "input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return sum(parameter.nbytes for parameter in model.parameters())


def make_pictures(directory: Path, count: int) -> None:
    """Write pictures of noise, without labels: what is scored is how close the compressed model comes."""
    import numpy as np
    from PIL import Image

    directory.mkdir()
    numbers = np.random.default_rng(0)
    for index in range(count):
        pixels = numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{index:04}.png")


def enter_group() -> tuple[Path, str, str]:
    """Move this process to a control group of its own: its folder, and its files of usage and limit."""
    one = (GROUPS[0] / "memory.limit_in_bytes").exists()
    group = (GROUPS[0] if one else GROUPS[1]) / f"{NAME}_{os.getpid()}"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    if one:
        return group, "memory.usage_in_bytes", "memory.limit_in_bytes"
    (group / "memory.swap.max").write_text("0")
    return group, "memory.current", "memory.max"


def child(wanted: dict[str, Any]) -> None:
    """One run, within a limit above what the libraries take if there is one; prints a JSON object."""
    room = wanted.pop("room")
    group = enter_group() if room else None
    import torch
    from rich.console import Console

    from oats_vision.display import Display
    from oats_vision.machine import memory_in_use
    from oats_vision.runs.config import RunConfig
    from oats_vision.runs.run import run

    display = Display(Console(stderr=True, quiet=True))
    with tempfile.TemporaryDirectory() as folder:  # the demo's run loads what any run needs
        demo = {"samples": 16, "quality": wanted["quality"], "iterations": 2, "eval_samples": 16}
        run(RunConfig(out=Path(folder) / "demo", **demo), display)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the demo's run has freed is not to be counted as the libraries'
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    bare = memory_in_use(torch.device("cpu"))
    found: dict[str, Any] = {"bare": bare}
    if group:
        place, usage, limit = group
        found["limit"] = int((place / usage).read_text()) + room
        (place / limit).write_text(str(found["limit"]))
    start = time.perf_counter()
    finished = run(RunConfig(**wanted), display)
    found |= {
        "seconds": time.perf_counter() - start,
        "planned": finished.planned_memory,
        "peak": resident_peak(),
        "cost": [[metric.name, metric.value] for metric in finished.result.cost.metrics]
        if finished.result.cost
        else [],
    }
    print(json.dumps(found))


def resident_peak() -> int:
    """Bytes of the process's largest resident set since that was reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(options: dict[str, Any], room: int) -> dict[str, Any] | None:
    """Run a child; None if it was killed."""
    command = [sys.executable, __file__, "--child", json.dumps(options | {"room": room})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate()
    for root in GROUPS:
        if (root / f"{NAME}_{process.pid}").is_dir():
            (root / f"{NAME}_{process.pid}").rmdir()
    if process.returncode == -9:
        return None
    if process.returncode:
        sys.exit(f"a run ended with status {process.returncode}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=60, help="blocks, of 7.1 MB each")
    parser.add_argument("--quality", default="fast", choices=["best", "fast", "plain"])
    parser.add_argument("--samples", type=int, default=64, help="calibration pictures")
    parser.add_argument("--iterations", type=int, default=80, help="of alternating thresholding, at most")
    parser.add_argument("--share", type=float, default=3.0, help="weights, as a multiple of the memory allowed")
    parser.add_argument("--no-limit", action="store_true", help="measure only: to limit a control group takes root")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    folder = Path(tempfile.mkdtemp(prefix="oats_vision_low_memory_"))
    try:
        weights = make_model(folder / "dense", args.depth)
        make_pictures(folder / "pictures", 2 * args.samples)
        options = {
            "model": str(folder / "dense"),
            "data": str(folder / "pictures"),
            "batch_size": 16,
            "samples": args.samples,
            "quality": args.quality,
            "iterations": args.iterations,
            "activation_memory": 0.02,
        }
        room = int(weights / args.share)
        print(f"weights {weights / 1e6:.0f} MB, allowed above the libraries {room / 1e6:.0f} MB", flush=True)
        runs = {
            "block by block": (True, 0 if args.no_limit else room),
            **({} if args.no_limit else {"ordinary, limited": (False, room)}),
            "ordinary": (False, 0),
        }
        for name, (low_memory, limit) in runs.items():
            found = measure(options | {"low_memory": low_memory, "out": str(folder / name.replace(" ", "_"))}, limit)
            if found is None:
                print(f"{name:24} killed", flush=True)
                continue
            above = found["peak"] - found["bare"]
            limited = f", limit {found['limit'] / 1e6:.0f} MB" if limit else ""
            print(
                f"{name:24} {found['seconds']:6.1f} s, peak {found['peak'] / 1e6:.0f} MB (planned "
                f"{found['planned'] / 1e6:.0f}), {above / 1e6:.0f} MB above the libraries{limited}; {found['cost']}",
                flush=True,
            )
        files = [path / "model.safetensors" for path in sorted(folder.iterdir()) if path.name != "dense"]
        contents = {file.read_bytes() for file in files if file.is_file()}
        print("weights are equal to the byte" if len(contents) == 1 else "weights DIFFER")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
