"""Does a compressed DINOv2 still tell classes apart? A linear classifier on its features, before and after.

    python examples/dinov2_probe.py --train train/ --val val/       # one folder per class
    python examples/dinov2_probe.py --tiny                          # random weights, the demo's pictures, seconds

`oats-vision eval linear-probe` is the whole protocol; this is the idea in a screen.
"""

import argparse
from collections.abc import Iterable

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import oats_vision as ov

Labelled = Iterable[tuple[Tensor, Tensor]]  # pictures (batch, 3, height, width) and labels (batch,)


@torch.inference_mode()
def features(model: nn.Module, pictures: Labelled) -> tuple[Tensor, Tensor]:
    """The model's features of labelled pictures, (pictures, width), and their labels."""
    found = [(model.forward_head(model.forward_features(batch), pre_logits=True), labels) for batch, labels in pictures]
    return torch.cat([one for one, _ in found]), torch.cat([labels for _, labels in found])


def accuracy(model: nn.Module, train: Labelled, val: Labelled) -> float:
    """Top-1 in percent of a logistic regression on the features."""
    probe = LogisticRegression(max_iter=2000).fit(*features(model, train))
    return 100 * probe.score(*features(model, val))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2_vits14")
    parser.add_argument("--train", default="demo", help="labelled pictures to learn from, and to calibrate with")
    parser.add_argument("--val", default="demo", help="labelled pictures to evaluate on")
    parser.add_argument("--samples", type=int, default=512, help="pictures of each")
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--out", default="dinov2_probe_compressed")
    parser.add_argument("--tiny", action="store_true", help="a tiny ViT with random weights, few pictures")
    args = parser.parse_args()

    name, size = ("test_vit", 64) if args.tiny else (args.model, 224)
    model, transform = ov.load_model(name, pretrained=not args.tiny, image_size=size)
    reading = {"batch_size": 32, "samples": 64 if args.tiny else args.samples}
    train = ov.load_pictures(args.train, transform, labelled=True, **reading)
    val = ov.load_pictures(args.val, transform, labelled=True, split="test", **reading)

    before = accuracy(model, train, val)
    print(ov.compress(model, train, rate=args.rate, progress=True))
    ov.save(model, args.out, overwrite=True)
    after = accuracy(ov.load(args.out), train, val)
    print(f"linear probe: {before:.2f}% -> {after:.2f}%")


if __name__ == "__main__":
    main()
