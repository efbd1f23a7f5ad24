"""Whether what a model returns are classes: by what is called its head."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn

HEADS = (
    "head",
    "heads",
    "mlp_head",
    "linear_head",
    "fc",
    "classifier",
)  # what the last layer of a classifier is called


def class_logits(model: nn.Module, output: Any) -> Tensor | None:
    """The logits (batch, classes) in what a model returned; None if it is a backbone, which gives features."""
    logits = getattr(output, "logits", output)
    none = not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2 or _is_backbone(model)
    return None if none else logits


def has_head(model: nn.Module, output: Any) -> bool:
    """Whether a model says that its outputs are classes: by their number, by `logits`, or by a head's usual name."""
    classes = getattr(model, "num_classes", None)
    named = any(isinstance(getattr(model, name, None), nn.Module) for name in HEADS)
    return hasattr(output, "logits") or named or (isinstance(classes, int) and classes > 0)


def _is_backbone(model: nn.Module) -> bool:
    """Whether what is called a head by its usual names holds no matrix; a model may have none of these names."""
    if getattr(model, "num_classes", None) == 0 or _is_clip_tower(model):
        return True
    heads = [getattr(model, name, 0) for name in HEADS]
    heads = [head for head in heads if head is None or isinstance(head, nn.Module)]
    return bool(heads) and not any(tensor.ndim > 1 for head in filter(None, heads) for tensor in _tensors(head))


def _is_clip_tower(model: nn.Module) -> bool:
    """Whether timm's head is CLIP's projection to the space of texts, whose outputs are no classes."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    trained_on_classes = "_ft_" in f"_{cfg.get('tag') or ''}_"
    return (
        "_clip_" in str(cfg.get("architecture"))
        and not trained_on_classes
        and getattr(model, "num_classes", None) == cfg.get("num_classes")
    )


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(), module.buffers())
