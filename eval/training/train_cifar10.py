"""Train a small ViT on CIFAR-10, for the studies: 75% or better on two cores in under an hour.

    python eval/training/train_cifar10.py --train cifar10/train --test cifar10/test --out cifar10_vit

The data are folders of pictures, one folder per class. The last 2,500 pictures of a shuffled training set are
held out to watch the training; the test pictures are touched once, at the end.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder

from vit_training import accuracy, parser, start, train, write_model

log = logging.getLogger("train")


def read_folder(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """All pictures of a folder, uint8 (n, 3, height, width), their labels and the names of the classes."""
    folder = ImageFolder(str(path))
    pictures = np.stack([np.asarray(picture) for picture, _ in folder])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.tensor(folder.targets), folder.classes


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--train", type=Path, required=True)
    flags.add_argument("--test", type=Path, required=True)
    flags.add_argument("--out", type=Path, required=True)
    flags.set_defaults(epochs=8, width=256, heads=4, depth=6, padding=4)
    args = flags.parse_args()
    start(args)
    pictures, labels, classes = read_folder(args.train)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
    kept, held_out = order[:-2500], order[-2500:]
    model, model_args = train(pictures[kept], labels[kept], (pictures[held_out], labels[held_out]), args)
    test, test_labels, _ = read_folder(args.test)
    log.info("top-1 on all %d test pictures, fp16 weights: %.2f%%", len(test), accuracy(model, test, test_labels))
    write_model(model, model_args, classes, args.out)


if __name__ == "__main__":
    main()
