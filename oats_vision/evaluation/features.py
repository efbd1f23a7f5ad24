"""Frozen features of a backbone: extracted once, cached under what they are made of."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from oats_vision.adapters import find_adapter
from oats_vision.block_calls import first_output
from oats_vision.data import Batches
from oats_vision.errors import DataError, ModelError
from oats_vision.evaluation.top1 import autocast
from oats_vision.files import replacing

log = logging.getLogger(__name__)

FORMAT = 1  # of what is extracted and of the cache's files


@dataclass(frozen=True)
class Features:
    """What probes are trained on, float16.

    class_tokens: after the final norm, of the last blocks, the last one last: (pictures, blocks, width); for a
        model without a class token the mean of the patch tokens.
    patch_mean: mean patch token of the last block, (pictures, width).
    labels: (pictures,), int64. classes: their names, if known.
    seconds: that extraction took, reading of pictures included; 0 if read from the cache.
    """

    class_tokens: Tensor
    patch_mean: Tensor
    labels: Tensor
    classes: list[str] | None
    skipped: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, blocks: int, patch_mean: bool) -> Tensor:
        """Class tokens of the last `blocks` blocks, and the mean patch token: (pictures, width of all), float32."""
        parts = [self.class_tokens[:, -blocks:].flatten(1)] + ([self.patch_mean] if patch_mean else [])
        return torch.cat(parts, 1).float()

    @property
    def class_count(self) -> int:
        return len(self.classes) if self.classes else int(self.labels.max()) + 1


@torch.inference_mode()
def extract_features(
    model: nn.Module,
    batches: Batches,
    *,
    blocks: int = 4,
    mixed_precision: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Features:
    """Run the backbone over labelled pictures and keep what DINOv2's linear evaluation reads.

    Args:
        model: of a family that an adapter knows, dense or compressed.
        blocks: how many of the last blocks' class tokens to keep; fewer if the model has fewer.

    Raises:
        ModelError: the inner blocks of a sliced model, whose streams have a basis of their own, are asked for.
        DataError: no picture could be read, or there are fewer than two classes.
    """
    adapter = find_adapter(model)
    modules = [block for _, block in adapter.named_blocks(model)][-blocks:]
    norm = model.get_submodule(adapter.final_norm(model)) if adapter.final_norm(model) else nn.Identity()
    prefix = adapter.prefix_tokens(model)
    first = next(model.parameters())
    outputs: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _, args, out: outputs.append(first_output(out))) for m in modules]
    tokens, means, labels = [], [], []
    start = time.perf_counter()
    model.eval()
    try:
        for images, targets in batches:
            outputs.clear()
            with autocast(first.device, mixed_precision):
                model(images.to(first.device, first.dtype))
                if any(output.shape[-1] != outputs[-1].shape[-1] for output in outputs):
                    raise ModelError("the inner blocks of a sliced model have no features: use the last block only")
                # one norm for what is needed of all blocks; without a class token that is all tokens
                states = [output if prefix == 0 else output[:, :1] for output in outputs[:-1]]
                normed = [norm(state) for state in states] + [norm(outputs[-1])]
            patches = normed[-1][:, prefix:].mean(1)
            summaries = [state.mean(1) if prefix == 0 else state[:, 0] for state in normed]
            tokens.append(torch.stack(summaries, 1).half().cpu())
            means.append(patches.half().cpu())
            labels.append(targets)
            progress(sum(map(len, labels)))
    finally:
        for handle in handles:
            handle.remove()
    if not labels:
        raise DataError(f"no picture could be read ({batches.skipped} skipped)")
    features = Features(
        torch.cat(tokens),
        torch.cat(means),
        torch.cat(labels),
        batches.classes,
        batches.skipped,
        time.perf_counter() - start,
    )
    if not features.patch_mean.isfinite().all():
        raise ModelError("the features are not finite in float16: the backbone diverges on these pictures")
    if len(features.labels.unique()) < 2:
        raise DataError("the data has one class: a probe needs pictures of at least two")
    return features


def cached_features(
    model: nn.Module,
    batches: Batches,
    directory: Path | None,
    *,
    blocks: int = 4,
    mixed_precision: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Features:
    """`extract_features`, or what an earlier call with the same model and pictures left in `directory`.

    The key holds the model's weights and structure, the pictures' contents, labels, order and preprocessing, and
    how features were extracted. Streams have no fingerprint and are not cached.

    Raises:
        DataError: a file in the cache is damaged, or is not what its name says.
    """
    options: dict[str, Any] = {"blocks": blocks, "mixed_precision": mixed_precision}
    if directory is None or batches.fingerprint is None:
        return extract_features(model, batches, **options, progress=progress)
    made_of = {"format": FORMAT, "model": model_fingerprint(model), "pictures": batches.fingerprint()}
    key = hashlib.sha256(json.dumps(made_of | {n: str(v) for n, v in options.items()}).encode()).hexdigest()
    file = directory / f"features-{key[:24]}.safetensors"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataError(f"cache folder {directory} cannot be made: {problem}") from None
    if file.exists():
        features = _read(file, key)
        progress(len(features))
        return features
    features = extract_features(model, batches, **options, progress=progress)
    _write(file, key, features)
    return features


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's structure and of all its tensors."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _content(features: Features) -> str:
    digest = hashlib.sha256()
    for tensor in (features.class_tokens, features.patch_mean, features.labels):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _write(file: Path, key: str, features: Features) -> None:
    about = {"key": key, "content": _content(features), "classes": features.classes, "skipped": features.skipped}
    tensors = {name: getattr(features, name) for name in ("class_tokens", "patch_mean", "labels")}
    try:
        with replacing(file) as temporary:
            save_file(tensors, temporary, metadata={"oats_vision_features": json.dumps(about)})
    except (OSError, SafetensorError) as problem:  # the features are there: a full disk must not lose them
        log.warning("features were not cached in %s: %s", file.parent, problem)


def _read(file: Path, key: str) -> Features:
    try:
        with safe_open(file, framework="pt") as stored:
            about = json.loads((stored.metadata() or {})["oats_vision_features"])
            tensors = {name: stored.get_tensor(name) for name in ("class_tokens", "patch_mean", "labels")}
        features = Features(**tensors, classes=about["classes"], skipped=about["skipped"])
        damaged = about["content"] != _content(features)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as problem:
        raise DataError(f"{file} in the feature cache is damaged ({problem}): delete it, or use --no-cache") from None
    if damaged:
        raise DataError(f"{file} in the feature cache is damaged: delete it, or use --no-cache")
    if about["key"] != key:
        raise DataError(f"{file} holds the features of another model or other pictures: delete it, or use --no-cache")
    return features


def check_pair(train: Features, val: Features) -> int:
    """See that two splits go together; return the number of classes.

    Raises:
        DataError: other classes, or labels in one that the other does not have.
    """
    if train.classes and val.classes and train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        what = f"{only[0]} is in one of them only" if only else "they come in another order"
        raise DataError(f"the classes of --train and --val differ: {what}")
    classes = train.class_count
    if int(val.labels.max()) >= classes or int(min(train.labels.min(), val.labels.min())) < 0:
        raise DataError(f"--val has labels outside the {classes} classes of --train")
    return classes
