r"""One token through layers whose values have few bits, against torch's dense linears, in turns in one run.

    python eval/benchmarks/few_bits.py                                       # int8, int4, int3, int2, dense and sparse
    python eval/benchmarks/few_bits.py --instruction-set avx2 --threads 1    # as on a CPU that has no better one
    python eval/benchmarks/few_bits.py --rank 64 --tokens 1 8 16 17 --csv few_bits.csv

Several layers of a shape run one after the other, so that weights come from memory as in a model. Values are random:
only how many there are decides the speed. Bytes are those of the packed weight. PyTorch's kernel for int4 weights,
which torchao's layers call on CPUs, joins in, and torchao's int8 layer where torchao is installed.
"""

import argparse
import copy
import importlib.util
import platform
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from layer_speed import repeat, write_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from oats_vision.core.grid import LEVELS, Grid, Quantised, Scales
from oats_vision.core.oats import Factors
from oats_vision.core.quantise import FACTORS, nearest
from oats_vision.kernels import native
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from oats_vision.timing import side_by_side


def random_layer(rows: int, columns: int, grid: Grid, density: float, rank: int) -> SparseLowRankLinear:
    groups = rows, grid.groups(columns)
    codes = torch.randint(grid.levels, (rows, columns), dtype=torch.uint8)
    zero = None if grid.symmetric else torch.randint(grid.levels, groups, dtype=torch.uint8)
    kept = torch.rand(rows, columns) < density if density < 1 else None
    values = Quantised(codes, kept, Scales(grid, torch.randn(groups).bfloat16(), zero))
    U, V = torch.randn(rows, rank), torch.randn(rank, columns)
    low_rank = (nearest(U, FACTORS), nearest(V, FACTORS)) if rank else None
    factors = Factors(values.dense(), U, V, 0.0, 0, quantised=values, low_rank=low_rank)
    return SparseLowRankLinear.from_factors([("weight", factors)], None, torch.float16)


def others(W: Tensor, group_size: int) -> dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype, float]]:
    """PyTorch's kernel for int4 weights, which torchao's layers call on CPUs, and torchao's int8 layer where it is.

    Returns:
        Of each what it runs, the dtype of its inputs, and bytes a weight.
    """
    rows, columns = W.shape
    codes = torch.randint(16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_and_zeros = torch.randn(columns // group_size, rows, 2).bfloat16()

    def int4(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)

    made: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype, float]] = {
        "torch int4": (
            partial(int4, packed=packed, scales_and_zeros=scales_and_zeros),
            torch.bfloat16,
            0.5 + 4 / group_size,
        )
    }
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        linear = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        linear.weight.data = W.bfloat16()
        quantize_(linear, Int8WeightOnlyConfig())
        made["torchao int8"] = linear, torch.bfloat16, 1.0
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x4096"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2])
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--zeros", action="store_true", help="levels that are not symmetric")
    parser.add_argument("--normal", action="store_true", help="nf4, nf3 and nf2 in place of int4, int3 and int2")
    parser.add_argument("--rank", type=int, default=0, help="of U and V, in int8")
    parser.add_argument("--layers", type=int, default=12, help="of each shape, run one after the other as in a model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--instruction-set", choices=native.instruction_sets())
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with native.instruction_set(args.instruction_set) if args.instruction_set else nullcontext():
        for shape in args.shapes:
            rows += measure(*map(int, shape.split("x")), args)
        kernels = native.active()
    title = (
        f"{processor()}, {args.threads} threads, {kernels}, torch {torch.__version__}; groups of {args.group_size}, "
        f"rank {args.rank}, {args.layers} of each shape; medians of {args.repeats}"
    )
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "), justify="left" if heading == "layer" else "right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)
    if args.csv:
        write_csv(args.csv, rows)


def measure(m: int, n: int, args: argparse.Namespace) -> list[dict]:
    """One row for each layer and number of tokens."""
    W = torch.randn(m, n)
    copies = range(args.layers)
    layers: dict[str, tuple[list[Callable[[Tensor], Tensor]], torch.dtype, float]] = {
        "dense float32": ([partial(F.linear, weight=W.clone()) for _ in copies], torch.float32, 4.0),
        "dense bfloat16": ([partial(F.linear, weight=W.bfloat16()) for _ in copies], torch.bfloat16, 2.0),
    }
    for name, (layer, dtype, size) in others(W, args.group_size).items():
        layers[name] = [copy.deepcopy(layer) for _ in copies], dtype, size
    for bits in args.bits:
        for density in args.densities:
            grid = Grid(bits, args.group_size, not args.zeros, args.normal and bits in LEVELS)
            ours = random_layer(m, n, grid, density, args.rank)
            size = ours.spec.stored_bytes(itemsize=2) / (m * n)
            name = grid.values + (f", density {density:g}" if density < 1 else "")
            layers[name] = [copy.deepcopy(ours) for _ in copies], torch.float32, size
    rows = []
    for tokens in args.tokens:
        times = max(1, 8 // tokens)  # short calls are timed several at a time
        calls = {
            name: partial(repeat, [partial(layer, torch.randn(tokens, n, dtype=dtype)) for layer in same], times)
            for name, (same, dtype, _) in layers.items()
        }
        taken = {name: t / (times * args.layers) for name, t in side_by_side(calls, args.repeats).items()}
        rows += [
            {
                "shape": f"{m}x{n}",
                "tokens": tokens,
                "layer": name,
                "bits_a_weight": 8 * layers[name][2],
                "us": seconds * 1e6,
                "times_float32": taken["dense float32"] / seconds,
                "times_bfloat16": taken["dense bfloat16"] / seconds,
                "GB/s": layers[name][2] * m * n / seconds / 1e9,
            }
            for name, seconds in taken.items()
        ]
    return rows


def processor() -> str:
    """Its name, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
