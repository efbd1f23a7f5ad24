"""Frozen features of a backbone: extracted once, cached under a digest of what they are computed from."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.data.pictures import Batches
from oats_vision.errors import DataError, ModelError
from oats_vision.evaluation.fingerprint import model_fingerprint
from oats_vision.evaluation.top1 import autocast
from oats_vision.files import replacing
from oats_vision.models.families import Structure
from oats_vision.models.loading.load import source_of
from oats_vision.models.record import structure_of
from oats_vision.models.weights import tensor_bytes
from oats_vision.nn.outputs import first_output

log = logging.getLogger(__name__)

CHUNK = 1024  # pictures that are looked at together
FORMAT = 2  # of what is extracted and of the cache's files


@dataclass(frozen=True)
class Features:
    """What probes are trained on, float16.

    class_tokens: after the final norm, of the last blocks, the last one last: (pictures, blocks, width); for a
        model without a class token what stands for `patch_mean` in each block.
    patch_mean: mean patch token of the last block, (pictures, width): after the norm, or, where the model itself
        norms what it has pooled, before it.
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

    def select(self, blocks: int, patch_mean: bool, rows: Tensor | slice = slice(None)) -> Tensor:
        """Class tokens of the last `blocks` blocks, and the mean patch token: (rows, width of all), float32.

        Of the whole set that takes up to as many bytes again as the features: ask for a batch of `rows`.
        """
        parts = [self.class_tokens[rows, -blocks:].flatten(1)] + ([self.patch_mean[rows]] if patch_mean else [])
        return torch.cat(parts, 1).float()

    def to(self, device: torch.device | str) -> "Features":
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("class_tokens", "patch_mean", "labels")}
        return replace(self, **moved)

    @property
    def class_count(self) -> int:
        return len(self.classes) if self.classes else int(self.labels.max()) + 1


@torch.no_grad()
def extract_features(
    model: nn.Module,
    batches: Batches,
    *,
    blocks: int = 4,
    mixed_precision: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Features:
    """Run the backbone over labelled pictures and keep what DINOv2's linear evaluation reads.

    With several ranks each runs its share of the pictures, and all are given the features.

    Args:
        model: of a known family, dense or compressed.
        blocks: how many of the last blocks' class tokens to keep; fewer if the model has fewer.

    Raises:
        ModelError: the inner blocks of a sliced model, whose streams have a basis of their own, are asked for; the
            model reads no pictures; or its features are not finite.
        DataError: no picture could be read, one is not finite, or there are fewer than two classes.
    """
    structure = structure_of(model)
    if structure.family.unit != "pictures":
        raise ModelError(f"features are of pictures, and {source_of(model).name} reads text")
    modules = [block for _, block in structure.named_blocks(model)][-blocks:]
    first = next(model.parameters())
    outputs: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _, args, out: outputs.append(first_output(out))) for m in modules]
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    done = 0
    start = time.perf_counter()
    model.eval()
    try:
        for number, (images, targets) in batches.mine():
            outputs.clear()
            which = f"pictures {done + 1} to {done + len(targets)}"
            if not images.isfinite().all():
                raise DataError(f"{which} of the data are not finite after their preprocessing")
            with autocast(first.device, mixed_precision):
                model(images.to(first.device, first.dtype))
                if len(outputs) != len(modules):
                    raise ModelError(f"{len(outputs)} of the last {len(modules)} blocks ran: each should run once")
                if any(output.shape[-1] != outputs[-1].shape[-1] for output in outputs):
                    raise ModelError("the inner blocks of a sliced model have no features: use the last block only")
                summaries, patches = pooled(model, structure, outputs)
            tokens, means = torch.stack(summaries, 1).half().cpu(), patches.half().cpu()
            if not (tokens.isfinite().all() and means.isfinite().all()):
                raise ModelError(
                    f"the features of {source_of(model).name} are not finite in float16 from {which} of the data: "
                    "its weights are not, or its dtype is too narrow"
                )
            found[number] = tokens, means, targets
            done += len(targets)
            progress(done * ranks.count())
    finally:
        for handle in handles:
            handle.remove()
    all_tokens, all_means, labels = (torch.cat(column) for column in zip(*ranks.in_order(found), strict=True))
    features = Features(
        all_tokens,
        all_means,
        labels,
        batches.classes,
        batches.skipped,
        time.perf_counter() - start,
    )
    if len(features.labels.unique()) < 2:
        raise DataError("the data has one class: a probe needs pictures of at least two")
    return features


def pooled(model: nn.Module, structure: Structure, outputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What stands for a picture in each block's output, and the mean patch token of the last one.

    Args:
        outputs: of the blocks, (pictures, tokens, width).

    Returns:
        Of each block (pictures, width): the class token, or the mean patch token of models without one; and the
        mean patch token. All after the final norm, which follows the mean if it does so in the model itself.
    """
    path, prefix = structure.final_norm, structure.prefix_tokens
    norm = model.get_submodule(path) if path else nn.Identity()

    def patch_mean(output: Tensor) -> Tensor:
        patches = output[:, prefix:]
        mean: Tensor = norm(patches.mean(1)) if structure.pooled_before_norm else norm(patches).mean(1)
        return mean

    mean = patch_mean(outputs[-1])
    if structure.class_token:
        return [norm(output[:, :1])[:, 0] for output in outputs], mean
    return [*map(patch_mean, outputs[:-1]), mean], mean


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

    The key holds all of the model that decides its outputs, the pictures' contents, labels, order and preprocessing,
    and how features were extracted. Names of classes are those of the pictures now. Streams have no fingerprint and
    are not cached.

    Raises:
        DataError: a file in the cache is damaged, or is not what its name says.
    """
    options: dict[str, Any] = {"blocks": blocks, "mixed_precision": mixed_precision}
    if directory is None or batches.fingerprint is None:
        return extract_features(model, batches, **options, progress=progress)
    fingerprint = batches.fingerprint

    def key_of_all() -> str:
        made_of = {"format": FORMAT, "model": model_fingerprint(model), "pictures": fingerprint()}
        return hashlib.sha256(json.dumps(made_of | {n: str(v) for n, v in options.items()}).encode()).hexdigest()

    key = ranks.on_main(key_of_all)  # which reads all pictures
    file = directory / f"features-{key[:24]}.safetensors"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataError(f"cache folder {directory} cannot be made: {problem}") from None
    if ranks.on_main(file.exists):
        features = ranks.on_main(lambda: _read(file, key))  # other machines may have a cache of their own
        progress(len(features))
        return replace(features, classes=batches.classes)
    features = extract_features(model, batches, **options, progress=progress)
    if ranks.is_main():
        _write(file, key, features)
    return features


def _content(features: Features) -> str:
    digest = hashlib.sha256()
    for tensor in (features.class_tokens, features.patch_mean, features.labels):
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _write(file: Path, key: str, features: Features) -> None:
    about = {"key": key, "content": _content(features), "skipped": features.skipped}
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
        features = Features(**tensors, classes=None, skipped=about["skipped"])
        damaged = about["content"] != _content(features)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as problem:
        raise DataError(f"{file} in the feature cache is damaged ({problem}): delete it, or use `no_cache`") from None
    if damaged:
        raise DataError(f"{file} in the feature cache is damaged: delete it, or use `no_cache`")
    if about["key"] != key:
        raise DataError(f"{file} holds the features of another model or other pictures: delete it, or use `no_cache`")
    return features


def check_pair(train: Features, val: Features) -> int:
    """See that two splits go together and are finite; return the number of classes.

    Raises:
        DataError: other classes, labels in one that the other does not have, or a feature that is not finite.
    """
    if train.classes and val.classes and train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        what = f"{only[0]} is in one of them only" if only else "they come in another order"
        raise DataError(f"the classes of `train` and `val` differ: {what}")
    classes = train.class_count
    if int(val.labels.max()) >= classes or int(min(train.labels.min(), val.labels.min())) < 0:
        raise DataError(f"`val` has labels outside the {classes} classes of `train`")
    for name, features in (("train", train), ("val", val)):
        for tensor in (features.class_tokens, features.patch_mean):
            for i, part in enumerate(tensor.split(CHUNK)):
                if not part.isfinite().all():
                    raise DataError(f"the features of `{name}` are not finite (pictures from {i * CHUNK + 1} on)")
    return classes
