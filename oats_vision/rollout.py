"""Attention rollout of the whole, the sparse-only and the low-rank-only model: what each term looks at."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from oats_vision.adapters import find_adapter
from oats_vision.errors import ModelError
from oats_vision.layers import SparseLowRankLinear

DISCARDED = 0.4  # share of the smallest attentions that are dropped (OATS, section 5)
VIEWS = {"whole": "S + U V", "sparse": "S only", "low_rank": "U V only"}


def views(model: nn.Module) -> dict[str, nn.Module]:
    """The model itself (`whole`), and copies with its `sparse` and with its `low_rank` term alone.

    Args:
        model: compressed by `oats`, so that it has both terms.

    Raises:
        ModelError: a term is missing.
    """
    parts = [
        part for module in model.modules() if isinstance(module, SparseLowRankLinear) for part in module.spec.parts
    ]
    if not any(part.rank for part in parts) or not any(part.nonzeros for part in parts):
        raise ModelError("a rollout of both terms needs a model with a sparse and a low-rank one: method oats")
    return {view: one_term(model, view) for view in VIEWS}


def one_term(model: nn.Module, view: str) -> nn.Module:
    """A copy of the model whose compressed layers keep S only (`sparse`) or U V only (`low_rank`)."""
    if view == "whole":
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, SparseLowRankLinear):
            (module.low_rank.U if view == "sparse" else module.sparse.values).data.zero_()
    return model


@torch.no_grad()
def rollout_map(model: nn.Module, images: Tensor) -> Tensor:
    """How much the class token (or, without one, the mean of all tokens) depends on each patch, from 0 to 1.

    Args:
        images: preprocessed, (pictures, 3, height, width).

    Returns:
        (pictures, rows, columns of patches).

    Raises:
        ModelError: the model shows no attention.
    """
    first = next(model.parameters())
    with record_attention(model) as attentions:
        model(images.to(first.device, first.dtype))
    joint = rollout(attentions)
    prefix = find_adapter(model).prefix_tokens(model)
    patches = (joint[:, 0] if prefix else joint.mean(1))[:, prefix:]
    height, width = images.shape[-2:]
    rows = round(math.sqrt(patches.shape[1] * height / width))
    grid = patches.unflatten(1, (rows, -1))
    low, high = grid.amin((1, 2), keepdim=True), grid.amax((1, 2), keepdim=True)
    return ((grid - low) / (high - low).clamp_min(1e-12)).cpu()


def rollout(attentions: list[Tensor], discarded: float = DISCARDED) -> Tensor:
    """Multiply the attentions of all blocks (Abnar & Zuidema, 2020): (pictures, tokens, tokens).

    Heads are averaged, the smallest entries of each picture's map dropped, and half of each token kept for the
    skip connection.

    Args:
        attentions: of each block in order, (pictures, heads, tokens, tokens), rows sum to 1.
        discarded: share of the entries of a map that are dropped.
    """
    joint: Tensor | None = None
    for attention in attentions:
        fused = attention.float().mean(1)
        flat = fused.flatten(1)
        drop = flat.topk(int(flat.shape[1] * discarded), largest=False).indices
        fused = flat.scatter(1, drop, 0.0).view_as(fused) + torch.eye(fused.shape[-1], device=fused.device)
        fused = fused / fused.sum(-1, keepdim=True)
        joint = fused if joint is None else fused @ joint
    if joint is None:
        raise ModelError("the model shows no attention")
    return joint


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """The attention probabilities of each block in the forward passes within, (pictures, heads, tokens, tokens).

    Raises:
        ModelError: the family's adapter does not say where its attention is, or the attention cannot be seen.
    """
    adapter = find_adapter(model)
    if adapter.residual is None:
        raise ModelError(f"adapter {adapter.name} does not say where the blocks' attention is")
    seen: list[Tensor] = []
    handles, fused = [], []
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    for _, block in adapter.named_blocks(model):
        attention: Any = block.get_submodule(adapter.residual.attention)
        if implementation is not None:  # transformers gives the probabilities back beside the output
            handles.append(attention.register_forward_hook(lambda _, args, output: seen.append(output[1])))
            continue
        if not hasattr(attention, "attn_drop"):
            raise ModelError(f"the attention of {type(block).__name__} cannot be seen")
        if getattr(attention, "fused_attn", False):  # timm: the fused kernel never forms the probabilities
            attention.fused_attn = False
            fused.append(attention)
        handles.append(attention.attn_drop.register_forward_hook(lambda _, args, output: seen.append(output)))
    try:
        if implementation is not None:
            model.set_attn_implementation("eager")  # type: ignore[operator]  # of every transformers model
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for attention in fused:
            attention.fused_attn = True
        if implementation is not None:
            model.set_attn_implementation(implementation)  # type: ignore[operator]


def draw(picture: Image.Image, maps: dict[str, Tensor], file: Path) -> None:
    """Write a PNG: the picture, and the maps of the views over it, side by side.

    Args:
        picture: as the model sees it, in RGB.
        maps: for each view (rows, columns), from 0 to 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * (1 + len(maps)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(maps))
    extent = (0.0, float(picture.width), float(picture.height), 0.0)
    for axis, name in zip(axes, ["picture", *maps], strict=True):
        axis.imshow(picture, extent=extent)
        if name != "picture":
            axis.imshow(maps[name], extent=extent, cmap="jet", alpha=0.5, interpolation="bilinear", vmin=0, vmax=1)
        axis.set_title(VIEWS.get(name, name), fontsize=11)
        axis.set_axis_off()
    figure.savefig(file, dpi=110, format="png", bbox_inches="tight")
