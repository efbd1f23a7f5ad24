"""Train the demo ViT on Fashion-MNIST and write everything that the package ships for the demo.

The data are the four gzip files of Fashion-MNIST (Xiao et al., 2017, MIT licence), for example from
the Debian package `dataset-fashion-mnist`. The last 5,000 training pictures are held out to watch the
training; the 10,000 test pictures are touched once, at the end.

    python eval/train_demo.py --data /usr/share/datasets/fashion-mnist

The flags of the architecture make other models of the kind, for studies of the solver:

    python eval/train_demo.py --width 1024 --heads 16 --depth 1 --patch-size 7 --epochs 2 --out wide
"""

import argparse
import gzip
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchvision.transforms import v2

CLASSES = (
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
)
ARCHITECTURE = "vit_small_patch16_224"
DEMO = Path(__file__).resolve().parents[1] / "oats_vision" / "demo"

log = logging.getLogger("train_demo")


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes (the format of MNIST) as a uint8 tensor."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    header = 4 + 4 * dimensions
    shape = np.frombuffer(raw[4:header], dtype=">i4").astype(int)
    return torch.from_numpy(np.frombuffer(raw[header:], dtype=np.uint8).reshape(shape).copy())


def normalise(pictures: Tensor) -> Tensor:
    """uint8 grey (n, 28, 28) -> float32 RGB (n, 3, 28, 28), as the shipped pretrained_cfg does it."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    return (pictures[:, None].float() / 255 - mean) / std


@torch.inference_mode()
def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent, in float32."""
    model.eval()
    batches = zip(pictures.split(500), labels.split(500), strict=True)
    hits = sum(int((model(normalise(x)).argmax(1) == y).sum()) for x, y in batches)
    return 100 * hits / len(labels)


def train(model: nn.Module, pictures: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], args) -> None:
    """Muon, cosine schedule with warm-up, shifts and flips; bf16 matrix products."""
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(28, padding=1)])
    optimizer = create_optimizer_v2(model, opt="muon", lr=args.lr, weight_decay=0.05)
    steps_per_epoch = math.ceil(len(labels) / args.batch_size)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=args.epochs * steps_per_epoch,
        warmup_t=steps_per_epoch // 4,
        warmup_lr_init=args.lr / 100,
        lr_min=args.lr / 1000,
        t_in_epochs=False,
    )
    for epoch in range(args.epochs):
        model.train()
        start, total = time.perf_counter(), 0.0
        for i, index in enumerate(torch.randperm(len(labels)).split(args.batch_size)):
            schedule.step_update(epoch * steps_per_epoch + i)
            # one draw of the augmentation per group of 16: cheap, and varied enough
            x = normalise(torch.cat([augment(group) for group in pictures[index].split(16)]))
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
        log.info(
            "epoch %2d/%d  loss %.4f  held-out top-1 %.2f%%  %.0f s",
            epoch + 1,
            args.epochs,
            total / steps_per_epoch,
            accuracy(model, *held_out),
            time.perf_counter() - start,
        )


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=DEMO)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration-pictures", type=int, default=1000)
    parser.add_argument("--test-pictures", type=int, default=4000)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(args.out / "training.log", mode="w")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train_x, train_y = (read_idx(args.data / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    test_x, test_y = (read_idx(args.data / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    train_y, test_y = train_y.long(), test_y.long()
    held_out = train_x[-5000:], train_y[-5000:]
    train_x, train_y = train_x[:-5000], train_y[:-5000]

    model_args = {"img_size": 28, "patch_size": args.patch_size, "depth": args.depth, "num_classes": len(CLASSES)}
    if (args.width, args.heads) != (384, 6):  # the architecture's own
        model_args |= {"embed_dim": args.width, "num_heads": args.heads}
    model = timm.create_model(ARCHITECTURE, pretrained=False, drop_path_rate=0.1, **model_args)
    log.info(
        "%s %s, %.2f million parameters; torch %s, timm %s, %d threads, seed %d",
        ARCHITECTURE,
        model_args,
        sum(p.numel() for p in model.parameters()) / 1e6,
        torch.__version__,
        timm.__version__,
        args.threads,
        args.seed,
    )
    log.info("%d epochs of %d pictures, batch %d, lr %g", args.epochs, len(train_y), args.batch_size, args.lr)
    train(model, train_x, train_y, held_out, args)

    stored = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict(stored)  # the accuracy below is that of the file that ships
    log.info("top-1 on all 10,000 test pictures, from the stored fp16 weights: %.2f%%", accuracy(model, test_x, test_y))

    save_file(stored, args.out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(CLASSES),
        "num_features": model.num_features,
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [3, 28, 28],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
            "num_classes": len(CLASSES),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
        },
        "label_names": list(CLASSES),
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    calibration, test = pick(train_y, args.calibration_pictures, 1), pick(test_y, args.test_pictures, 2)
    save_pictures(args.out / "calibration.npz", train_x[calibration], train_y[calibration])
    save_pictures(args.out / "test.npz", test_x[test], test_y[test])
    log.info("top-1 on the %d shipped test pictures: %.2f%%", len(test), accuracy(model, test_x[test], test_y[test]))
    log.info("%.1f MB in %s", sum(f.stat().st_size for f in args.out.iterdir()) / 1e6, args.out)


if __name__ == "__main__":
    main()
