"""Compare the fast solver with the exact one: relative error and time, side by side in one run.

    python eval/benchmarks/solver.py                                     # fc1 of the demo model, 1536 x 384
    python eval/benchmarks/solver.py --model DIR --layer blocks.0.mlp.fc1  # any model that `compress` takes

Second moments come from the calibration pictures, so that the matrices are those of a real run.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import oats_vision as ov
from oats_vision.calibration.statistics import SecondMoment
from oats_vision.core.budget import Allocation, Pattern
from oats_vision.core.oats import Factors, oats
from oats_vision.data.pictures import load_pictures
from oats_vision.kernels.thresholding import sparse_term


@torch.no_grad()
def layer_and_scale(model_name: str, data: str, layer_name: str, samples: int) -> tuple[Tensor, Tensor]:
    """The weight of a linear and the scale of its inputs, from the dense model."""
    model, transform = ov.load_model(model_name)
    if transform is None:
        sys.exit(f"{model_name} says nothing about its preprocessing")
    layer = model.get_submodule(layer_name)
    if not isinstance(layer, nn.Linear):
        sys.exit(f"{layer_name} is no nn.Linear of {model_name}")
    moment = SecondMoment(layer.in_features)
    handle = layer.register_forward_pre_hook(lambda _, args: moment.update(args[0]))
    for pictures, _ in load_pictures(data, transform, batch_size=64, samples=samples):
        model(pictures)
    handle.remove()
    return layer.weight.detach(), moment.scale()


def timed(repeats: int, **options) -> tuple[Factors, float]:
    """The factors, and the median time in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        factors = oats(**options)
        seconds.append(time.perf_counter() - start)
    return factors, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo", help="calibration pictures")
    parser.add_argument("--layer", nargs="+", default=["blocks.1.mlp.fc1"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--rank-ratio", type=float, default=0.2)
    parser.add_argument("--pattern", default="row")
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=5, help="of the fast solver; the exact one runs once")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    threads = torch.get_num_threads()
    table = Table(
        title=f"rate {args.rate}, rank ratio {args.rank_ratio}, {args.pattern}, float32, {threads} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; medians of {args.repeats}"
    )
    headings = [
        "layer",
        "shape",
        "rank",
        "solver",
        "iterations",
        "relative error",
        "to exact's",
        "seconds",
        "times faster",
    ]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("layer", "solver") else "right")
    rows = []
    for name in args.layer:
        weight, scale = layer_and_scale(args.model, args.data, name, args.samples)
        budget = Allocation.of(args.rate, args.rank_ratio, Pattern.parse(args.pattern)).budget(*weight.shape)
        problem = {
            "weight": weight,
            "scale": scale,
            "budget": budget,
            "iterations": args.iterations,
            "sparse_term": sparse_term,
        }
        exact, exact_seconds = timed(1, **problem, solver="exact")
        solvers = {
            "exact": (exact, exact_seconds),
            "fast, no extrapolation": timed(args.repeats, **problem, extrapolation=0.0),
            "fast": timed(args.repeats, **problem),
            "fast, tolerance 1e-3 (default)": timed(args.repeats, **problem, tolerance=1e-3),
            "fast, tolerance 1e-2": timed(args.repeats, **problem, tolerance=1e-2),
        }
        shape = f"{weight.shape[0]} x {weight.shape[1]}"
        for solver, (factors, seconds) in solvers.items():
            values = [factors.error / exact.error, seconds, exact_seconds / seconds]
            rows.append([name, shape, budget.rank, solver, factors.iterations, factors.error, *values])
            ratio, seconds, speed = values
            numbers = (f"{factors.error:.5f}", f"{ratio:.4f}", f"{seconds:.3f}", f"{speed:.1f}")
            table.add_row(name, shape, str(budget.rank), solver, str(factors.iterations), *numbers)
    Console(width=140).print(table)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([headings, *rows])


if __name__ == "__main__":
    main()
