"""Attention rollout of the whole, the sparse-only and the low-rank-only model: what each term looks at."""

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from oats_vision.errors import ModelError
from oats_vision.evaluation.finite import is_finite
from oats_vision.files import replacing
from oats_vision.models.families import Family
from oats_vision.models.loading.load import source_of
from oats_vision.models.record import structure_of
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear

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
            if view == "sparse":
                module.low_rank.clear()
            else:
                module.sparse.clear()
    return model


@torch.no_grad()
def rollout_map(model: nn.Module, images: Tensor) -> Tensor:
    """How much the class token (or, without one, the mean of the patch tokens) depends on each patch, from 0 to 1.

    Args:
        images: preprocessed, (pictures, 3, height, width).

    Returns:
        (pictures, rows, columns of patches).

    Raises:
        ModelError: the model's attention cannot be seen or is not over a grid of patches, or it or the model's
            outputs are not finite.
    """
    first = next(model.parameters())
    with record_attention(model) as attentions:
        output = model(images.to(first.device, first.dtype))
    if not is_finite([attentions, output]):
        raise ModelError(
            f"attention or outputs of {source_of(model).name} are not finite on these pictures: its weights are not, "
            "or its dtype is too narrow"
        )
    joint = rollout(attentions)
    structure = structure_of(model)
    prefix = structure.prefix_tokens
    patches = (joint[:, 0] if structure.class_token else joint[:, prefix:].mean(1))[:, prefix:]
    height, width = images.shape[-2:]
    rows = max(round(math.sqrt(patches.shape[1] * height / width)), 1)
    if patches.shape[1] % rows:
        raise ModelError(f"{patches.shape[1]} patches do not form the grid of a picture of {height} x {width}")
    grid = patches.unflatten(1, (rows, -1))
    low, high = grid.amin((1, 2), keepdim=True), grid.amax((1, 2), keepdim=True)
    shares: Tensor = ((grid - low) / (high - low).clamp_min(1e-12)).cpu()
    return shares


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
    """The attention probabilities of each block in the forward pass within, (pictures, heads, tokens, tokens).

    Raises:
        ModelError: the family does not say where its attention is, or the attention cannot be seen.
    """
    structure = structure_of(model)
    attentions = [_attention_of(block, structure.family) for _, block in structure.named_blocks(model)]
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    seen: list[Tensor] = []
    with ExitStack() as stack:
        if implementation is not None:  # transformers gives the probabilities back beside the output
            stack.callback(model.set_attn_implementation, implementation)  # type: ignore[arg-type]
            model.set_attn_implementation("eager")  # type: ignore[operator]  # of every transformers model
        for attention in attentions:
            if implementation is not None:
                handle = attention.register_forward_hook(lambda _, args, output: seen.append(output[1]))
            elif hasattr(attention, "attn_drop"):
                handle = attention.attn_drop.register_forward_hook(lambda _, args, output: seen.append(output))
            else:
                raise _unseen(attention)
            stack.callback(handle.remove)
            if getattr(attention, "fused_attn", False):  # timm: the fused kernel never forms the probabilities
                stack.callback(setattr, attention, "fused_attn", True)
                attention.fused_attn = False
        yield seen
        if len(seen) != len(attentions):
            raise ModelError(f"{len(seen)} of {len(attentions)} blocks show their attention")
        for attention, probabilities in zip(attentions, seen, strict=True):
            _check(attention, probabilities)


def _attention_of(block: nn.Module, family: Family) -> Any:
    """The block's attention."""
    if family.residual is None:
        raise ModelError(f"model family {family.name} does not say where the blocks' attention is")
    attention: Any = dict(block.named_modules()).get(family.residual.attention)
    if attention is None:  # several side by side, or one that is fused with the MLP
        raise ModelError(f"{type(block).__name__} has no {family.residual.attention}: its attention cannot be seen")
    return attention


def _check(attention: Any, probabilities: Any) -> None:
    """See that what a block shows are the probabilities that it attends with, one map a head."""
    if not isinstance(probabilities, Tensor) or probabilities.ndim != 4:
        raise _unseen(attention)
    heads = getattr(attention, "num_heads", probabilities.shape[1])
    if probabilities.shape[1] != heads or probabilities.shape[2] != probabilities.shape[3]:
        shape = " x ".join(map(str, probabilities.shape[1:]))
        raise ModelError(
            f"{type(attention).__name__} shows {shape} probabilities for {heads} heads: not plain attention"
        )


def _unseen(attention: Any) -> ModelError:
    return ModelError(f"the attention of {type(attention).__name__} cannot be seen")


def draw(picture: Image.Image, maps: dict[str, Tensor], file: Path) -> None:
    """Write a PNG, all of it or nothing: the picture, and the maps of the views over it, side by side.

    Args:
        picture: as the model sees it, in RGB.
        maps: for each view (rows, columns), from 0 to 1.

    Raises:
        OSError: the file cannot be written.
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
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png", bbox_inches="tight")
