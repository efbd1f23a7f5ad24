"""What many devices give, by a model: one device's work, measured on this CPU, and stated rates of others.

    python eval/benchmarks/many_devices.py --measure     # how much work a decomposition is, on this machine
    python eval/benchmarks/many_devices.py               # the table of docs/distributed.md, from figures stated below

A decomposition of a weight (m, n) is taken for `work` times m n (m + n) operations, as many as the products of one core
do in the seconds that it takes there. Everything else is counted: the blocks' forward passes, the products of the
moments, and the bytes between ranks. Batches are split over ranks; linears too in quality fast, and the parts of one
linear in quality best.
"""

import argparse
import csv
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from oats_vision.calibration.capture import gradient_samples
from oats_vision.calibration.statistics import Gram
from oats_vision.compression import methods
from oats_vision.compression.settings import resolve
from oats_vision.core.correlations import Correlations

# measured by --measure on one core of an EPYC (Zen 5, AVX-512), PyTorch 2.14: see docs/distributed.md
WORK = {"fast": 41.0, "best": 70.0}
SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (1536, 768), (768, 1536))


@dataclass(frozen=True)
class Device:
    """rate: float32 operations a second in products. near, far: bytes a second between devices, and machines."""

    rate: float
    near: float
    far: float


# stated, not measured: a third of an H100's 67 TFLOP/s; NVLink 4 and 400 Gb/s a GPU, each one way, at 70%
H100 = Device(rate=22e12, near=0.7 * 450e9, far=0.7 * 50e9)
PER_MACHINE = 8


@dataclass(frozen=True)
class Linear:
    """A weight (m, n) of `parts` parts; input: what it reads, so that those which read the same are known."""

    m: int
    n: int
    input: str
    parts: int = 1
    writes: bool = False


@dataclass(frozen=True)
class Model:
    blocks: int
    width: int
    samples: int
    tokens: int  # of a sample
    batch: int
    linears: tuple[Linear, ...]


def _lm(width: int, keys: int, inner: int) -> tuple[Linear, ...]:
    return (
        Linear(width, width, "a"),
        Linear(keys, width, "a"),
        Linear(keys, width, "a"),
        Linear(width, width, "o", writes=True),
        Linear(inner, width, "m"),
        Linear(inner, width, "m"),
        Linear(width, inner, "d", writes=True),
    )


def _vit(width: int, inner: int, gate: int = 1) -> tuple[Linear, ...]:
    return (
        Linear(3 * width, width, "a", parts=3),
        Linear(width, width, "o", writes=True),
        Linear(gate * inner, width, "m"),
        Linear(width, inner, "d", writes=True),
    )


MODELS = {
    "DINOv2-g": Model(40, 1536, 2048, 257, 32, _vit(1536, 4096, gate=2)),
    "ViT-22B": Model(48, 6144, 2048, 257, 32, _vit(6144, 24576)),
    "70B language model": Model(80, 8192, 128, 2048, 4, _lm(8192, 1024, 28672)),
}


def decomposing(linear: Linear, quality: str) -> float:
    """Operations of one part's decomposition."""
    m = linear.m / linear.parts
    return WORK[quality] * m * linear.n * (m + linear.n)


def batches(model: Model, quality: str) -> float:
    """Operations of a block on all samples: forward passes and moments, which are split over ranks."""
    tokens = model.samples * model.tokens
    forward = tokens * (sum(2 * one.m * one.n for one in model.linears) + 4 * model.tokens * model.width)
    if quality == "fast":
        return 2 * forward + tokens * sum(one.n**2 for one in model.linears)
    inputs = {one.input: one for one in model.linears}.values()
    grams = sum(one.n**2 for one in inputs)
    crosses = sum(2 * one.n * (one.m if one.writes else one.n) for one in inputs)
    return 2 * forward + tokens * (grams + crosses)


def gradients(model: Model, quality: str, ranks: int) -> float:
    """Operations of a block for gradients, of a few samples: those of the rank that has most of their batches."""
    share = -(-gradient_samples(model.tokens, model.samples) // model.batch // ranks) * model.batch
    return 0.0 if quality == "fast" else 4 * share * model.tokens * sum(2 * one.m * one.n for one in model.linears)


def moved(model: Model, quality: str) -> float:
    """Bytes that each rank sends for a block: sums in two parts there, one back, and what was decomposed."""
    read = model.linears if quality == "fast" else {one.input: one for one in model.linears}.values()
    moments = sum(one.n**2 / 2 for one in read)
    if quality == "best":
        moments += sum(one.n * (one.m if one.writes else one.n) for one in read)
        moments += sum(one.m**2 / one.parts / 2 for one in model.linears)
    return 24 * moments + sum(4 * one.m * one.n for one in model.linears)


def seconds(model: Model, quality: str, ranks: int, device: Device) -> tuple[float, float, float]:
    """Of a whole run: on batches, decomposing, and moving."""
    if quality == "fast":  # whole linears, the dearest first, each to the rank with the least to do
        loads = [0.0] * ranks
        for one in sorted((one.parts * decomposing(one, quality) for one in model.linears), reverse=True):
            loads[loads.index(min(loads))] += one
        longest = max(loads)
    else:  # one linear after the other, its parts at the same time
        longest = sum(-(-one.parts // ranks) * decomposing(one, quality) for one in model.linears)
    share = -(-model.samples // model.batch // ranks) * model.batch / model.samples  # of whole batches
    between = device.near if ranks <= PER_MACHINE else device.far
    sent = moved(model, quality) * (ranks > 1)
    work = batches(model, quality) * share + gradients(model, quality, ranks)
    return tuple(model.blocks * part for part in (work / device.rate, longest / device.rate, sent / between))


def measure(repeats: int) -> dict[str, float]:
    """`WORK` of this machine, on one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    console, found = Console(), {}
    for quality in ("fast", "best"):
        settings = resolve(rate=0.5, quality=quality)
        method, ratios = methods.find("oats"), []
        for m, n in SHAPES:
            x = torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
            W = torch.randn(m, n, generator=generator)
            G = torch.randn(4 * m, m, generator=generator)
            rate = _best(repeats, lambda W=W, x=x: W @ x.T, 2 * m * n * len(x))
            outputs = Correlations.of((G.T @ G / len(G)).double(), torch.float32, 0.1) if quality == "best" else None
            budget = settings.allocation.budget(m, n)

            def decompose(W=W, x=x, budget=budget, outputs=outputs, settings=settings, method=method) -> None:
                gram = Gram(x.shape[1])
                gram.update(x)
                method.decompose_for_output(W, gram, budget, settings, outputs)

            took = 1 / _best(repeats, decompose, 1.0)
            ratios.append(rate * took / (m * n * (m + n)))
            console.print(f"{quality}: {m} x {n}: {took:.2f} s, products {rate / 1e9:.0f} GFLOP/s: {ratios[-1]:.0f}")
        found[quality] = statistics.median(ratios)
    return found


def _best(repeats: int, function, amount: float) -> float:
    """Amount a second, at best."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return amount / min(taken)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--measure", action="store_true", help="print what a decomposition takes here, and no table")
    flags.add_argument("--repeats", type=int, default=2)
    flags.add_argument("--rate", type=float, default=H100.rate / 1e12, help="TFLOP/s that products reach on a device")
    flags.add_argument("--near", type=float, default=H100.near / 1e9, help="GB/s between devices of a machine")
    flags.add_argument("--far", type=float, default=H100.far / 1e9, help="GB/s a device between machines")
    flags.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    flags.add_argument("--csv", type=Path)
    args = flags.parse_args()
    if args.measure:
        Console().print({quality: round(work, 1) for quality, work in measure(args.repeats).items()})
        return
    device = Device(args.rate * 1e12, args.near * 1e9, args.far * 1e9)
    columns = ["model", "quality", "devices", "batches s", "decomposing s", "moving s", "total s", "times as fast"]
    table, rows = Table(*columns), []
    for name, model in MODELS.items():
        for quality in WORK:
            single = sum(seconds(model, quality, 1, device))
            for ranks in args.ranks:
                parts = seconds(model, quality, ranks, device)
                total = sum(parts)
                figures = [*(f"{part:.0f}" for part in parts), f"{total:.0f}", f"{single / total:.1f}"]
                rows.append([name, quality, str(ranks), *figures])
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])


if __name__ == "__main__":
    main()
