"""Peak memory of a compression, and the round trip through a checkpoint, for models at full size.

    python eval/benchmarks/memory.py --models vit_base_patch16_224 vit_large_patch14_dinov2

Random weights do: memory and time do not depend on their values much. The bound is three times the dense
model's bytes plus one block's activations: the hidden states of all calibration pictures, and the outputs of
all modules of a block for one batch. Peaks are those of the process (resident set), each model in its own;
`libraries` is what importing PyTorch and the rest takes before there is a model.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import oats_vision as ov
from oats_vision.compression.settings import Quality
from oats_vision.models.record import structure_of


def peak() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def block_activations(model: nn.Module, block: nn.Module, batch: Tensor, batches: int) -> int:
    """Bytes of the stored hidden states and of the outputs of a block's modules for one batch."""
    sizes: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(output.numel() * output.element_size())
        if module is block:
            sizes.append(batches * sizes[-1])

    leaves = [module for module in block.modules() if not list(module.children())]
    handles = [module.register_forward_hook(count) for module in (*leaves, block)]
    model(batch)
    for handle in handles:
        handle.remove()
    return sum(sizes)


@torch.no_grad()
def run(name: str, image_size: int | None, batch_size: int, batches: int, quality: Quality) -> None:
    """Compress, save, load; print one JSON object."""
    baseline = peak()
    model, transform = ov.load_model(name, pretrained=False, image_size=image_size)
    assert transform is not None
    pictures = ov.load_pictures("demo", transform, batch_size=batch_size, samples=batch_size * batches)
    dense = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    start = time.perf_counter()
    report = ov.compress(model, pictures, rate=0.5, rank_ratio=0.2, quality=quality).report
    seconds, top = time.perf_counter() - start, peak()
    batch, _ = next(iter(pictures))
    expected = model(batch)
    with tempfile.TemporaryDirectory() as directory:
        ov.save(model, Path(directory) / "out")
        equal = torch.equal(ov.load(Path(directory) / "out")(batch), expected)
    # measured last, on the first block of a dense copy: it must not raise the peak
    dense_model, _ = ov.load_model(name, pretrained=False, image_size=image_size)
    _, block = structure_of(dense_model).named_blocks(dense_model)[0]
    activations = block_activations(dense_model, block, batch, batches)
    print(
        json.dumps(
            {
                "input": tuple(batch.shape),
                "dense": dense,
                "activations": activations,
                "baseline": baseline,
                "peak": top,
                "seconds": seconds,
                "decomposing": report.seconds["decomposing"],
                "equal": equal,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224", "vit_large_patch14_dinov2"])
    parser.add_argument("--image-size", type=int, help="if not the model's own")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--quality", choices=["best", "fast", "plain"], default="best")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the child process
    args = parser.parse_args()
    if args.one:
        run(args.models[0], args.image_size, args.batch_size, args.batches, args.quality)
        return
    table = Table(
        title=f"rate 0.5, rank ratio 0.2, quality {args.quality}, "
        f"{args.batches} batches of {args.batch_size}, float32, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; MB"
    )
    headings = (
        "model",
        "dense",
        "activations",
        "bound",
        "peak",
        "of which libraries",
        "peak / bound",
        "without libraries",
    )
    for heading in (*headings, "s", "decomposing s", "round trip"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name in args.models:
        command = [sys.executable, __file__, "--one", "--models", name]
        command += ["--batch-size", str(args.batch_size), "--batches", str(args.batches)]
        command += ["--image-size", str(args.image_size)] if args.image_size else []
        command += ["--quality", args.quality]
        seen = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        bound = 3 * seen["dense"] + seen["activations"]
        values = (seen["dense"], seen["activations"], bound, seen["peak"], seen["baseline"])
        table.add_row(
            f"{name} at {seen['input'][-1]}",
            *(f"{value / 1e6:.0f}" for value in values),
            f"{seen['peak'] / bound:.2f}",
            f"{(seen['peak'] - seen['baseline']) / bound:.2f}",
            f"{seen['seconds']:.0f}",
            f"{seen['decomposing']:.0f}",
            "bit-equal" if seen["equal"] else "DIFFERENT",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
