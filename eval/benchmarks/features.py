"""Throughput of feature extraction against the bare model's forward pass, side by side in one run.

    python eval/benchmarks/features.py                                                        # the demo
    python eval/benchmarks/features.py --model vit_base_patch16_224 --no-pretrained --data FOLDER --samples 128

`forward` runs the model over batches in memory. `extraction` is `extract_features` over the same batches;
`with reading` is `extract_features` over the files or arrays, decoding and preprocessing included.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import oats_vision as ov
from oats_vision.evaluation.features import extract_features
from oats_vision.machine import choose_device, machine, machine_line


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", nargs="+", default=["demo"])
    flags.add_argument("--no-pretrained", action="store_true", help="random weights: time does not depend on them")
    flags.add_argument("--image-size", type=int)
    flags.add_argument("--data", default="demo", help="labelled pictures")
    flags.add_argument("--samples", type=int, default=1000)
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--device", default="auto")
    flags.add_argument("--csv", type=Path)
    args = flags.parse_args()
    device = choose_device(args.device)
    headings = ["model", "what", "pictures", "pictures/s", "vs. forward pass"]
    rows: list[list[str]] = []
    for name in args.model:
        pretrained = not args.no_pretrained
        model, transform = ov.load_model(name, pretrained=pretrained, image_size=args.image_size, device=device)
        if transform is None:
            sys.exit(f"{name} says nothing about its preprocessing")
        files = ov.load_pictures(
            args.data,
            transform,
            batch_size=args.batch_size,
            samples=args.samples,
            labelled=True,
            workers=args.workers,
        )
        memory = replace(files, loader=list(files.loader))  # type: ignore[arg-type]  # any iterable of batches will do
        pictures = sum(len(labels) for _, labels in memory)

        @torch.inference_mode()
        def forward(model=model, memory=memory) -> None:
            for images, _ in memory:
                model(images.to(device))

        ways: dict[str, Callable[[], object]] = {
            "forward": forward,
            "extraction": lambda model=model, memory=memory: extract_features(model, memory),
            "with reading": lambda model=model, files=files: extract_features(model, files),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        forward()  # warm up
        for _ in range(args.repeats):
            for way, call in ways.items():  # in turn, so that all see the same machine
                start = time.perf_counter()
                call()
                seconds[way].append(time.perf_counter() - start)
        base = statistics.median(seconds["forward"])
        for way, times in seconds.items():
            median = statistics.median(times)
            rows.append([name, way, str(pictures), f"{pictures / median:.1f}", f"{base / median:.3f}"])
    table = Table(
        *headings, title=f"float32, batch {args.batch_size}, medians of {args.repeats}; {machine_line(machine(device))}"
    )
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    if args.csv:
        with args.csv.open("w", newline="") as stream:
            csv.writer(stream).writerows([headings, *rows])


if __name__ == "__main__":
    main()
