r"""Speed of compressed layers against torch's dense linear, in turns in one run.

    python eval/benchmarks/layer_speed.py                                    # float32, the shapes of ViT-B and ViT-L
    python eval/benchmarks/layer_speed.py --rates 0.5 --storage float16 --tokens 1 256 --csv layers.csv
    python eval/benchmarks/layer_speed.py --layers 24 --tokens 1             # weights from memory, as in a model
    python eval/benchmarks/layer_speed.py --device cuda --dtype float16 --pattern 2:4 --shapes 4096x1024 6144x1536

Weights are random: only where the non-zeros lie decides the speed, not what they are. Rank ratio 0 is plain pruning at
the same rate in the same kernel. GFLOP/s count the non-zeros and the low-rank term, of dense all weights.
"""

import argparse
import copy
import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from oats_vision.core.budget import Allocation, Pattern
from oats_vision.core.oats import Factors
from oats_vision.core.threshold import keep_largest
from oats_vision.kernels import native
from oats_vision.nn.semi_structured import SemiStructuredLinear
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from oats_vision.timing import side_by_side


def random_layer(
    rows: int, columns: int, rate: float, rank_ratio: float, pattern: Pattern, storage: torch.dtype
) -> SparseLowRankLinear:
    budget = Allocation.of(rate, rank_ratio, pattern).budget(rows, columns)
    S = keep_largest(torch.randn(rows, columns), budget)
    factors = Factors(S, torch.randn(rows, budget.rank), torch.randn(budget.rank, columns), 0.0, 0)
    return SparseLowRankLinear.from_factors([("weight", factors)], torch.randn(rows), storage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "4096x1024", "1024x4096", "3072x768"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 256, 2048])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 0.6])
    parser.add_argument("--rank-ratios", nargs="+", type=float, default=[0.25, 0.0])
    parser.add_argument("--pattern", default="row", help="2:4 leaves the rate to the rank ratio")
    parser.add_argument("--dtype", default="float32", help="of inputs and of the dense weight")
    parser.add_argument("--storage", nargs="+", default=["float32", "float16"], help="of the compressed weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=1, help="of each shape, run one after the other as in a model")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    pattern, dtype = Pattern.parse(args.pattern), getattr(torch, args.dtype)
    rates = args.rates if pattern.kind != "n:m" else [None]
    rows = []
    for shape in args.shapes:
        m, n = map(int, shape.split("x"))
        b = torch.randn(m, dtype=dtype, device=args.device)
        weights = [torch.randn(m, n, dtype=dtype, device=args.device) for _ in range(args.layers)]
        layers = {
            (rate, ratio, storage): random_layer(m, n, rate, ratio, pattern, getattr(torch, storage)).to(args.device)
            for rate in rates
            for ratio in args.rank_ratios
            for storage in args.storage
        }
        runnable = {
            key: [layer, *(copy.deepcopy(layer) for _ in range(args.layers - 1))] for key, layer in layers.items()
        }
        if args.device != "cpu" and pattern.kind == "n:m":
            runnable = {
                key: [torch.compile(SemiStructuredLinear(layer, dtype)) for layer in copies]
                for key, copies in runnable.items()
            }
        for tokens in args.tokens:
            x = torch.randn(tokens, n, dtype=dtype, device=args.device)
            times = max(1, 50 // tokens // args.layers)  # short calls are timed several at a time
            dense = [partial(F.linear, x, W, b) for W in weights]
            calls = {"dense": partial(repeat, dense, times)}
            for key, copies in runnable.items():
                calls[str(key)] = partial(repeat, [partial(layer, x) for layer in copies], times)
            each = times * args.layers
            taken = {name: seconds / each for name, seconds in side_by_side(calls, args.repeats).items()}
            for (rate, ratio, storage), layer in layers.items():
                seconds = taken[str((rate, ratio, storage))]
                rows.append(
                    {
                        "shape": shape,
                        "tokens": tokens,
                        "rate": rate if rate is not None else args.pattern,
                        "rank_ratio": ratio,
                        "storage": storage,
                        "dense_us": taken["dense"] * 1e6,
                        "compressed_us": seconds * 1e6,
                        "speedup": taken["dense"] / seconds,
                        "dense_gflops": 2 * m * n * tokens / taken["dense"] / 1e9,
                        "compressed_gflops": 2 * layer.spec.parameters * tokens / seconds / 1e9,
                    }
                )
    kernels = native.active() if native.available() else "no compiled kernels"
    where = kernels if args.device == "cpu" else torch.cuda.get_device_name()
    table = Table(
        title=f"{args.dtype} inputs, {args.device} ({where}), {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; {args.layers} of each shape; medians of {args.repeats}"
    )
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            *(
                f"{v:.2f}" if k == "speedup" else f"{v:.0f}" if k[-2:] in ("us", "ps") else str(v)
                for k, v in row.items()
            )
        )
    Console(width=120).print(table)
    if args.csv:
        write_csv(args.csv, rows)


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def repeat(calls: Sequence[Callable[[], Tensor]], times: int) -> None:
    for _ in range(times):
        for call in calls:
            call()


if __name__ == "__main__":
    main()
