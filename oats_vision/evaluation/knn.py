"""k-nearest-neighbour classification of frozen features, as DINOv2 does it."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from oats_vision.errors import DataError
from oats_vision.evaluation.features import Features, check_pair

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07


@torch.inference_mode()
def knn(
    train: Features,
    val: Features,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[int, Tensor]:
    """Whether each picture is classified right by a vote of its neighbours (Wu et al., 2018; DINOv2).

    The class token of the last block is normalised; a neighbour votes for its class with exp(cosine / temperature).

    Args:
        neighbours: values of k; those above the number of training pictures are left out.

    Returns:
        For each k: bool (pictures of `val`,).

    Raises:
        DataError: the splits do not go together, or no k is possible.
    """
    classes = check_pair(train, val)
    ks = [k for k in neighbours if k <= len(train)]
    if not ks:
        raise DataError(f"k must be at most the number of training pictures, {len(train)}, got {min(neighbours)}")
    bank = F.normalize(train.select(1, patch_mean=False))  # (train, width)
    queries = F.normalize(val.select(1, patch_mean=False))
    votes = F.one_hot(train.labels, classes).float()  # (train, classes)
    correct: dict[int, list[Tensor]] = {k: [] for k in ks}
    done = 0
    for query, labels in zip(queries.split(1024), val.labels.split(1024), strict=True):
        similarity, nearest = (query @ bank.T).topk(max(ks), dim=1)  # (chunk, k)
        # the largest weight is 1: the sum over hundreds of neighbours cannot overflow
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        for k in ks:
            score = (votes[nearest[:, :k]] * weight[:, :k, None]).sum(1)
            correct[k].append(score.argmax(1) == labels)
        done += len(labels)
        progress(done)
    return {k: torch.cat(parts) for k, parts in correct.items()}
