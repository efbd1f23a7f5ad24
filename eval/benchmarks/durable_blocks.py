"""What it costs that each finished block is durable: a compression with and without a folder to go on from.

    python eval/benchmarks/durable_blocks.py --model vit_large_patch14_reg4_dinov2 --blocks 3

A few blocks of the model do, with random weights: the time of a block does not depend on its place. The runs take
turns, so that what else the machine does touches both alike. Beside the whole difference, which is mostly noise, the
seconds are given that keeping blocks took itself: making the digests of the weights and the data, and writing and
syncing the files.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

from oats_vision.compression import resume
from oats_vision.compression.journal import Journal
from oats_vision.compression.pipeline import compress
from oats_vision.compression.settings import resolve


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Add up what everything takes that keeps blocks."""
    places: list[tuple[Any, str]] = [
        (Journal, "note"),
        (Journal, "add"),
        (resume, "digest_of"),
        (resume, "dense_digest"),
    ]
    own = [getattr(place, name) for place, name in places]

    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    for (place, name), function in zip(places, own, strict=True):
        setattr(place, name, measured(function))
    try:
        yield
    finally:
        for (place, name), function in zip(places, own, strict=True):
            setattr(place, name, function)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="vit_large_patch14_reg4_dinov2", help="a timm ViT")
    flags.add_argument("--image-size", type=int, default=224)
    flags.add_argument("--blocks", type=int, default=3)
    flags.add_argument("--samples", type=int, default=32)
    flags.add_argument("--quality", choices=["best", "fast", "plain"], default="fast")
    flags.add_argument("--repeats", type=int, default=3)
    flags.add_argument("--folder", type=Path, help="on the disk to measure [default: that of TMPDIR]")
    args = flags.parse_args()
    model = timm.create_model(args.model, img_size=args.image_size, depth=args.blocks).eval()
    pictures = torch.randn(args.samples, 3, args.image_size, args.image_size).split(16)
    settings = resolve(rate=0.5, quality=args.quality)
    times: dict[bool, list[float]] = {False: [], True: []}
    keeping: list[float] = []
    size = 0
    for _ in range(args.repeats):
        for durable in (False, True):
            one, spent = copy.deepcopy(model), list[float]()
            with tempfile.TemporaryDirectory(dir=args.folder) as folder, timed(spent):
                journal = Journal(Path(folder) / "kept") if durable else None
                start = time.perf_counter()
                compress(one, pictures, settings, journal=journal)
                times[durable].append(time.perf_counter() - start)
                size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) or size
            if durable:
                keeping.append(sum(spent))
    without, kept, own = statistics.median(times[False]), statistics.median(times[True]), statistics.median(keeping)
    threads = torch.get_num_threads()
    table = Table(
        title=f"{args.blocks} blocks of {args.model}, {args.samples} pictures, {args.quality}, {threads} threads"
    )
    for name in ("without, s", "durable, s", "difference", "keeping blocks, s", "of the run", "written, MB"):
        table.add_column(name, justify="right")
    figures = (f"{without:.1f}", f"{kept:.1f}", f"{kept / without - 1:+.1%}", f"{own:.2f}", f"{own / kept:.1%}")
    table.add_row(*figures, f"{size / 1e6:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
