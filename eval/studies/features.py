"""What a study on features measures: a compressed backbone's tokens, and a decoder's maps of them, against dense."""

import argparse
import hashlib
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches import Row, console, load_dense, run_config
from oats_vision.data.pictures import load_pictures
from oats_vision.evaluation.fingerprint import tensor_bytes
from oats_vision.machine import choose_device
from oats_vision.models.record import structure_of
from oats_vision.nn.outputs import first_output

APART = 2024  # seed of the pictures to measure on, which no draw of calibration pictures uses
INSIDE = 0.5  # of a map, from where on a pixel belongs to what it marks


class Features:
    """Relative error of the last hidden state, cosine of patch tokens, and overlap of maps, on pictures kept apart."""

    KEYS: ClassVar = [
        "model",
        "data",
        "pictures",
        "samples",
        "seed",
        "eval_data",
        "eval_samples",
        "decoder",
        "precision",
    ]
    RESULTS: ClassVar = ["error", "cosine", "iou"]

    def __init__(self, args: argparse.Namespace) -> None:
        config = run_config(args, "pictures")
        self.config = config.model_copy(update={"data": config.data or "demo"})
        self.decoder = None if args.decoder is None else Decoder(args.decoder)
        self.measured, self.batch = self.config.eval_samples or 256, self.config.batch_size or 1
        self.pictures = args.pictures
        self.targets = ["others of data"]
        self.about = {
            "model": self.config.model,
            "data": self.config.data,
            "pictures": self.pictures,
            "samples": self.config.samples,
            "eval_samples": self.measured,
            "decoder": args.decoder or "",
            "precision": self.config.dtype,
        }

    def load(self) -> nn.Module:
        """The dense model, after it was measured."""
        model, transform = load_dense(self.config)
        if transform is None:
            raise SystemExit(f"{self.config.model} says nothing about its preprocessing")
        self.device = choose_device(self.config.device)
        self._read(transform)
        self.expected = [(tokens, self._map(tokens, i)) for i, tokens in enumerate(self._tokens(model))]
        return model

    def _read(self, transform: Any) -> None:
        """Every picture of the study, once: those to measure on, and those that calibration sets are drawn from."""
        found = load_pictures(
            str(self.config.data),
            transform,
            batch_size=self.batch,
            samples=self.pictures,
            seed=APART,
            split=self.config.split,
            workers=self.config.workers,
        )
        pictures = torch.cat([images for images, _ in found])
        self.test, self.rest = pictures[: self.measured], pictures[self.measured :]
        if len(self.rest) < (self.config.samples or 1):
            raise SystemExit(
                f"{self.config.data} has {len(pictures)} pictures: too few for {self.config.samples} to calibrate with "
                f"and {self.measured} others (--samples, --eval-samples)"
            )
        apart = {_digest(picture): name for picture, name in zip(self.test, found.names, strict=False)}
        for picture, name in zip(self.rest, found.names[self.measured :], strict=True):
            if same := apart.get(_digest(picture)):
                raise SystemExit(f"{name} is the same picture as {same}, which is measured on: leave one of them out")
        console.print(f"{len(self.test)} pictures to measure on, {len(self.rest)} others to draw from")

    def calibration(self, seed: int) -> list[Tensor]:
        """Pictures of none that are measured on."""
        order = torch.randperm(len(self.rest), generator=torch.Generator().manual_seed(seed))
        return list(self.rest[order[: self.config.samples]].split(self.batch))

    @torch.inference_mode()
    def _tokens(self, model: nn.Module) -> list[Tensor]:
        """The last hidden state after the final norm, (batch, tokens, width) of each batch to measure on."""
        structure, found = structure_of(model), list[Tensor]()
        norm = model.get_submodule(structure.final_norm) if structure.final_norm else nn.Identity()
        block = structure.named_blocks(model)[-1][1]
        handle = block.register_forward_hook(lambda block, args, output: found.append(norm(first_output(output))))
        try:
            for images in self.test.split(self.batch):
                model(images.to(self.device, getattr(torch, self.config.dtype)))
        finally:
            handle.remove()
        self.prefix = structure.prefix_tokens
        return found

    def _map(self, tokens: Tensor, batch: int) -> Tensor | None:
        return None if self.decoder is None else self.decoder(tokens, self.test.split(self.batch)[batch])

    def measure(self, model: nn.Module, target: str) -> Row:
        """Over all pictures; the overlap is the mean of each picture's."""
        difference = size = 0.0
        cosines, overlaps = [], []
        for i, (tokens, (dense, marked)) in enumerate(zip(self._tokens(model), self.expected, strict=True)):
            difference += float((tokens - dense).double().square().sum())
            size += float(dense.double().square().sum())
            cosines.append(F.cosine_similarity(tokens, dense, dim=-1)[:, self.prefix :].double().mean(1).cpu())
            if marked is not None:
                ours = self._map(tokens, i)
                assert ours is not None
                overlaps.append(overlap(ours, marked))
        values = {"error": (difference / size) ** 0.5, "cosine": float(torch.cat(cosines).mean())}
        found = {name: f"{value:.5f}" for name, value in values.items()}
        return found | {"iou": f"{torch.cat(overlaps).mean():.5f}" if overlaps else ""}


class Decoder:
    """What turns tokens into a map of the picture, an ONNX file with inputs (tokens, pictures)."""

    def __init__(self, file: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise SystemExit("--decoder needs the package onnxruntime: pip install onnxruntime") from None
        if not file.exists():
            raise SystemExit(f"--decoder: {file} does not exist (eval/models/dinov2_small.py makes one)")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.names = [one.name for one in self.session.get_inputs()]

    def __call__(self, tokens: Tensor, pictures: Tensor) -> Tensor:
        """Which pixels a picture's map marks: bool, (batch, pixels)."""
        inputs = (tensor.float().cpu().numpy() for tensor in (tokens, pictures))
        (found,) = self.session.run(None, dict(zip(self.names, inputs, strict=True)))
        return torch.from_numpy(found).flatten(1) > INSIDE


def overlap(ours: Tensor, dense: Tensor) -> Tensor:
    """Intersection over union of each row of two bool matrices; 1 where both are empty.

    >>> overlap(torch.tensor([[1, 1, 0], [0, 0, 0]]).bool(), torch.tensor([[0, 1, 1], [0, 0, 0]]).bool())
    tensor([0.3333, 1.0000], dtype=torch.float64)
    """
    both, either = (ours & dense).sum(1).double(), (ours | dense).sum(1)
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def _digest(picture: Tensor) -> bytes:
    return hashlib.sha256(tensor_bytes(picture)).digest()
