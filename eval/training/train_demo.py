"""Train the demo ViT on Fashion-MNIST and write everything that the package ships for the demo.

The data are the four gzip files of Fashion-MNIST (Xiao et al., 2017, MIT licence), for example from
the Debian package `dataset-fashion-mnist`. The last 5,000 training pictures are held out to watch the
training; the 10,000 test pictures are touched once, at the end.

    python eval/training/train_demo.py --data /usr/share/datasets/fashion-mnist

The flags of the architecture make other models of the kind, for studies of the solver:

    python eval/training/train_demo.py --width 1024 --heads 16 --depth 1 --patch-size 7 --epochs 2 --out wide
"""

import gzip
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_training import accuracy, parser, start, train, write_model

CLASSES = [
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
DEMO = Path(__file__).resolve().parents[2] / "oats_vision" / "demo"

log = logging.getLogger("train")


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes (the format of MNIST) as a uint8 tensor."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    header = 4 + 4 * dimensions
    shape = np.frombuffer(raw[4:header], dtype=">i4").astype(int)
    return torch.from_numpy(np.frombuffer(raw[header:], dtype=np.uint8).reshape(shape).copy())


def pick(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` pictures, the same number of each class, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    by_class = [order[labels[order] == c][: count // len(CLASSES)] for c in range(len(CLASSES))]
    index = torch.cat(by_class)
    return index[torch.randperm(len(index), generator=generator)]


def save_pictures(path: Path, pictures: Tensor, labels: Tensor) -> None:
    np.savez_compressed(path, images=pictures.numpy(), labels=labels.numpy().astype(np.uint8))


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    flags.add_argument("--out", type=Path, default=DEMO)
    flags.add_argument("--calibration-pictures", type=int, default=1000)
    flags.add_argument("--test-pictures", type=int, default=4000)
    args = flags.parse_args()
    start(args)
    train_x, train_y = (read_idx(args.data / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    test_x, test_y = (read_idx(args.data / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    train_y, test_y = train_y.long(), test_y.long()
    held_out = train_x[-5000:], train_y[-5000:]
    train_x, train_y = train_x[:-5000], train_y[:-5000]
    model, model_args = train(train_x, train_y, held_out, args)
    log.info("top-1 on all 10,000 test pictures, from the stored fp16 weights: %.2f%%", accuracy(model, test_x, test_y))
    write_model(model, model_args, CLASSES, args.out)
    calibration, test = pick(train_y, args.calibration_pictures, 1), pick(test_y, args.test_pictures, 2)
    save_pictures(args.out / "calibration.npz", train_x[calibration], train_y[calibration])
    save_pictures(args.out / "test.npz", test_x[test], test_y[test])
    log.info("top-1 on the %d shipped test pictures: %.2f%%", len(test), accuracy(model, test_x[test], test_y[test]))
    log.info("%.1f MB in %s", sum(f.stat().st_size for f in args.out.iterdir()) / 1e6, args.out)


if __name__ == "__main__":
    main()
