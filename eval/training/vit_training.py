"""Train a small ViT on pictures held in memory, for the demo and for the studies; imported by `train_*.py`."""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import set_fused_attn
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchvision.transforms import v2

ARCHITECTURE = "vit_small_patch16_224"

log = logging.getLogger("train")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every training script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--padding", type=int, default=1, help="pixels that training pictures are shifted by at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def start(args: argparse.Namespace) -> None:
    """Make the output directory, and log to the terminal and to `training.log` in it."""
    args.out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(args.out / "training.log", mode="w")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def normalise(pictures: Tensor) -> Tensor:
    """uint8 grey (n, h, w) or RGB (n, 3, h, w) -> float32 RGB (n, 3, h, w), as the stored pretrained_cfg says."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    pictures = pictures[:, None] if pictures.ndim == 3 else pictures
    return (pictures.float() / 255 - mean) / std


@torch.inference_mode()
def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent, in float32."""
    model.eval()
    device = next(model.parameters()).device
    batches = zip(pictures.split(500), labels.split(500), strict=True)
    hits = sum(int((model(normalise(x).to(device)).argmax(1).cpu() == y).sum()) for x, y in batches)
    return 100 * hits / len(labels)


def train(
    pictures: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], args: argparse.Namespace
) -> tuple[nn.Module, dict[str, int]]:
    """Train with Muon, a cosine schedule with warm-up, shifts and flips; bf16 matrix products.

    Args:
        pictures: uint8, (n, h, w) or (n, 3, h, w); labels: (n,).
        held_out: pictures and labels whose accuracy is logged after each epoch.

    Returns:
        The model, its weights rounded to float16, and its timm arguments.
    """
    set_fused_attn(False)  # the CPU's fused attention is slow in the backward pass
    size, classes = pictures.shape[-1], int(labels.max()) + 1
    model_args = {"img_size": size, "patch_size": args.patch_size, "depth": args.depth, "num_classes": classes}
    if (args.width, args.heads) != (384, 6):  # the architecture's own
        model_args |= {"embed_dim": args.width, "num_heads": args.heads}
    device = torch.device(args.device)
    model = timm.create_model(ARCHITECTURE, pretrained=False, drop_path_rate=0.1, **model_args).to(device)
    log.info(
        "%s %s, %.2f million parameters; torch %s, timm %s, %s, %d threads, seed %d",
        ARCHITECTURE,
        model_args,
        sum(p.numel() for p in model.parameters()) / 1e6,
        torch.__version__,
        timm.__version__,
        device,
        args.threads,
        args.seed,
    )
    log.info("%d epochs of %d pictures, batch %d, lr %g", args.epochs, len(labels), args.batch_size, args.lr)
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(size, padding=args.padding)])
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
            # one draw of the augmentation per small group: cheap, and varied enough
            x = normalise(torch.cat([augment(group) for group in pictures[index].split(8)])).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(model(x), labels[index].to(device), label_smoothing=0.05)
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
    model.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})
    return model, model_args


def write_model(model: nn.Module, model_args: dict[str, int], classes: list[str], directory: Path) -> None:
    """Write the weights in float16 and a config, as a directory that `timm.create_model("local-dir:...")` loads."""
    stored = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    size = model_args["img_size"]
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(classes),
        "num_features": model.num_features,
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
        },
        "label_names": classes,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
