"""Perplexity of a causal language model on a text."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision import ranks
from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.evaluation.paired import paired_ratio
from oats_vision.evaluation.results import Figure, Ratio


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token.

    losses: mean negative log-likelihood of each window, float64 (windows,); tokens: scored in each, (windows,).
    """

    value: float
    seconds: float
    losses: Tensor = field(repr=False, compare=False)
    tokens: Tensor = field(repr=False, compare=False)

    def figure(self, name: str) -> Figure:
        return Figure(name=name, kind="number", value=self.value, lower_is_better=True)

    def beside(self, dense: "Perplexity") -> Ratio:
        """What compression changed."""
        return paired_ratio(dense, self)

    def to_dict(self) -> dict[str, Any]:
        count = int(self.tokens.sum())
        return {
            "perplexity": self.value,
            "windows": len(self.tokens),
            "tokens": count,
            "seconds": self.seconds,
            "tokens_per_second": count / self.seconds,
        }


@torch.no_grad()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    sequence_length: int = 2048,
    stride: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Perplexity:
    """Score a text window by window; with several ranks each scores its share, and all are given the result.

    Windows that do not overlap are the convention of published WikiText-2 figures: each is scored by itself but for
    its first token, and an incomplete last window is left out. With a stride each window after the first scores
    only its last `stride` tokens, so that every one has at least `sequence_length - stride` tokens before it.

    Args:
        model: token ids (batch, length) -> an output with `.logits` (batch, length, vocabulary).
        ids: the text, (tokens,), int64.
        sequence_length: tokens in a window.
        stride: tokens that windows move by, in [1, sequence_length]; `sequence_length` (no overlap) if None.
        progress: called with the number of windows done.

    Raises:
        DataError: the text is shorter than a window.
        ConfigError: the stride is out of range, or the window does not fit the model's positions.
        ModelError: the loss is not finite.
    """
    stride = sequence_length if stride is None else stride
    if not 1 <= stride <= sequence_length or sequence_length < 2:
        raise ConfigError(f"`stride` must be in [1, {sequence_length}] and `sequence_length` at least 2, got {stride}")
    if len(ids) < sequence_length:
        raise DataError(
            f"the text has {len(ids)} tokens, fewer than one window of {sequence_length}: "
            "use a smaller `sequence_length`"
        )
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ConfigError(f"`sequence_length` must be at most the model's {positions} positions, got {sequence_length}")
    windows = ids.unfold(0, sequence_length, stride)  # (windows, length)
    scored = torch.full((len(windows),), sequence_length - 1 if stride == sequence_length else stride)
    scored[0] = sequence_length - 1
    device = next(model.parameters()).device
    losses: dict[int, Tensor] = {}
    start = time.perf_counter()
    model.eval()
    for number, (batch, counts) in ranks.mine(zip(windows.split(batch_size), scored.split(batch_size), strict=True)):
        batch = batch.to(device)
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")  # (batch, length - 1)
        kept = torch.arange(sequence_length - 1, device=device) >= sequence_length - 1 - counts[:, None].to(device)
        losses[number] = ((loss * kept).sum(1, dtype=torch.float64) / counts.to(device)).cpu()
        progress(sum(map(len, losses.values())) * ranks.count())
    nll = torch.cat(ranks.in_order(losses))
    if not nll.isfinite().all():
        raise ModelError("the model's loss is not finite on this text: it diverges, or its dtype is too narrow")
    value = float(torch.exp((nll * scored).sum() / scored.sum()))
    return Perplexity(value, time.perf_counter() - start, nll, scored)
