"""Compress a timm classifier with batches of your own, and compare its top-1 before and after.

    python examples/timm_classifier.py --data imagenet/train --val imagenet/val     # one folder per class
    python examples/timm_classifier.py --tiny                                       # random weights, seconds

The compressed model is written to --out, and is what the second top-1 is of.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import FakeData, ImageFolder

import oats_vision as ov


@torch.inference_mode()
def top1(model: nn.Module, loader: DataLoader) -> float:
    """Share of the pictures whose class is the model's first guess, in percent."""
    right = [model(pictures).argmax(-1) == labels for pictures, labels in loader]
    return 100 * torch.cat(right).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224.fb_in1k", help="a timm name")
    parser.add_argument("--data", help="pictures to calibrate with")
    parser.add_argument("--val", help="labelled pictures")
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--samples", type=int, default=1024, help="pictures to calibrate with")
    parser.add_argument("--out", default="timm_classifier_compressed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, and random pictures")
    args = parser.parse_args()

    model, transform = ov.load_model("test_vit" if args.tiny else args.model, pretrained=not args.tiny)
    train: Dataset
    if args.tiny:
        train = val = FakeData(32, (3, 160, 160), num_classes=1000, transform=transform)
    else:
        train, val = ImageFolder(args.data, transform), ImageFolder(args.val, transform)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: args.samples].tolist()
    loader = DataLoader(val, batch_size=16 if args.tiny else 64)

    before = top1(model, loader)
    result = ov.compress(model, DataLoader(Subset(train, chosen), batch_size=16), rate=args.rate, progress=True)
    result.save(args.out, overwrite=True)
    after = top1(ov.load(args.out), loader)
    print(result)
    print(f"top-1: {before:.2f}% -> {after:.2f}%")


if __name__ == "__main__":
    main()
