r"""What an iteration of the fast solver does: operations and bytes of each part, against the machine's rates.

    python eval/benchmarks/iteration_profile.py --shapes 4096x1024 1024x1024

The machine's rates are measured in the same run: a square float32 matrix product, and a copy of the matrix. A part's
floor is the larger of its operations at the one rate and its bytes at the other.
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from oats_vision.core.budget import Allocation
from oats_vision.core.lowrank import orthonormal
from oats_vision.kernels.thresholding import sparse_term
from oats_vision.timing import side_by_side

# name: call, floating-point operations, bytes read and written
Parts = dict[str, tuple[Callable[[], object], int, int]]


def iteration_parts(m: int, n: int, rate: float, rank_ratio: float) -> tuple[Parts, int]:
    """The parts of an iteration on random matrices, and the rank."""
    budget = Allocation.of(rate, rank_ratio).budget(m, n)
    r, matrix = budget.rank, 4 * m * n
    A, L, V, Y = torch.randn(m, n), 0.1 * torch.randn(m, n), torch.randn(r, n), torch.randn(m, r)
    U, sparse, buffer = orthonormal(Y), sparse_term(A, budget), torch.empty(m, n)
    parts: Parts = {
        "A V^T": (lambda: A @ V.T, 2 * m * n * r, matrix),
        "orthonormal basis": (lambda: orthonormal(Y), 8 * m * r * r, 16 * m * r),
        "U^T A": (lambda: U.T @ A, 2 * m * n * r, matrix),
        "U V": (lambda: torch.mm(U, V, out=buffer), 2 * m * n * r, matrix),
        "sparse step": (lambda: sparse.update(L, 0.9, buffer), 6 * m * n, 5 * matrix),
        "copy": (lambda: buffer.copy_(A), 0, 2 * matrix),
    }
    return parts, r


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x1024", "1024x1024", "1536x384"])
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--rank-ratio", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    square = torch.randn(1024, 1024)
    for shape in args.shapes:
        m, n = map(int, shape.split("x"))
        parts, rank = iteration_parts(m, n, args.rate, args.rank_ratio)
        calls = {name: call for name, (call, _, _) in parts.items()} | {"product": lambda: square @ square}
        taken = side_by_side(calls, args.repeats)
        rate, bandwidth = 2 * 1024**3 / taken["product"], parts.pop("copy")[2] / taken["copy"]
        total = sum(taken[name] for name in parts)
        machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        rates = f"products at {rate / 1e9:.0f} GFLOP/s, copies at {bandwidth / 1e9:.0f} GB/s"
        table = Table(title=f"{shape}, rank {rank}, {machine}: {rates}; medians of {args.repeats}")
        for heading in (
            "part",
            "ms",
            "of the iteration",
            "MFLOP",
            "GFLOP/s",
            "MB",
            "GB/s",
            "floor ms",
            "time to floor",
        ):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        for name, (_, operations, moved) in parts.items():
            seconds, floor = taken[name], max(operations / rate, moved / bandwidth)
            cells = (
                f"{seconds * 1e3:.2f}",
                f"{seconds / total:.0%}",
                f"{operations / 1e6:.0f}",
                f"{operations / seconds / 1e9:.0f}",
                f"{moved / 1e6:.1f}",
                f"{moved / seconds / 1e9:.0f}",
                f"{floor * 1e3:.2f}",
                f"{seconds / floor:.1f}",
            )
            table.add_row(name, *cells)
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
