"""k-nearest-neighbour classification of frozen features, as DINOv2 does it."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from oats_vision import ranks
from oats_vision.errors import DataError
from oats_vision.evaluation.features import Features, check_pair

K = (10, 20, 100, 200)
TEMPERATURE = 0.07
QUERIES, BANK = 1024, 8192  # pictures of both sets that are compared at a time


@torch.inference_mode()
def knn(
    train: Features,
    val: Features,
    *,
    k: Sequence[int] = K,
    temperature: float = TEMPERATURE,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[int, Tensor]:
    """Whether each picture is classified right by a vote of its neighbours (Wu et al., 2018; DINOv2).

    With several ranks each classifies its share, and all are given the result. The class token of the last block is
    normalised; a neighbour votes for its class with exp(cosine / temperature).

    Args:
        k: numbers of neighbours; those above the number of training pictures are left out.

    Returns:
        For each k: bool (pictures of `val`,).

    Raises:
        DataError: the splits do not go together, or no k is possible.
    """
    classes = check_pair(train, val)
    ks = [count for count in k if count <= len(train)]
    if not ks:
        raise DataError(f"`k` must be at most the number of training pictures, {len(train)}, got {min(k)}")
    correct: dict[int, list[Tensor]] = {}  # for each k, by the number of the chunk
    for number, start in ranks.mine(range(0, len(val), QUERIES)):
        rows = slice(start, start + QUERIES)
        similarity, nearest = _nearest(F.normalize(val.select(1, False, rows)), train, max(ks))
        # the largest weight is 1: the sum over hundreds of neighbours cannot overflow
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        correct[number] = []
        for count in ks:
            voters = train.labels[nearest[:, :count]]
            votes = torch.zeros(len(weight), classes).scatter_add_(1, voters, weight[:, :count])
            correct[number].append(votes.argmax(1) == val.labels[rows])
        progress(start + len(weight))
    return {k: torch.cat(parts) for k, parts in zip(ks, zip(*ranks.in_order(correct), strict=True), strict=True)}


def _nearest(query: Tensor, train: Features, k: int) -> tuple[Tensor, Tensor]:
    """Cosines with the k nearest training pictures, the largest first, and their indices: (queries, k).

    Args:
        query: normalised, (queries, width).
    """
    similarity, nearest = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)
    for start in range(0, len(train), BANK):  # the whole set's in float32 would take more than the features
        bank = F.normalize(train.select(1, False, slice(start, start + BANK)))  # (chunk, width)
        found, place = (query @ bank.T).topk(min(k, len(bank)), dim=1)
        similarity, nearest = torch.cat([similarity, found], 1), torch.cat([nearest, place + start], 1)
        similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
        nearest = nearest.gather(1, best)
    return similarity, nearest
