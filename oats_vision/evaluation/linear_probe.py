"""Linear probing of frozen features: DINOv2's protocol, and a quick one by logistic regression."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision.errors import DataError
from oats_vision.evaluation.features import CHUNK, Features, check_pair

# the grid of the DINOv2 evaluation; rates are for batches of 256 and scale with the batch
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
INPUTS = tuple((blocks, patch_mean) for blocks in (1, 4) for patch_mean in (False, True))
REGULARISATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C


@dataclass(frozen=True)
class Probe:
    """The best classifier on the held-out pictures, and what it does on the validation set.

    correct: whether each validation picture was classified right, bool.
    held_out: accuracy of each classifier on the held-out pictures, in percent, by a description of it.
    """

    best: str
    correct: Tensor = field(repr=False)
    held_out: dict[str, float] = field(repr=False)

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * float(self.correct.float().mean())

    def to_dict(self) -> dict[str, Any]:
        return {"top1": self.top1, "best": self.best, "held_out": self.held_out}


def linear_probe(
    train: Features,
    val: Features,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    iterations: int = 12_500,
    batch_size: int = 1024,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Probe:
    """Train a grid of linear classifiers at once, and take the best one on a held-out part of `train` (DINOv2).

    The grid is learning rate x last 1 or 4 blocks x class tokens or class tokens and mean patch token. SGD with
    momentum 0.9, no weight decay, cosine schedule. Unlike DINOv2's the pictures are not augmented, since features
    are extracted once, and the validation set is not what chooses.

    Raises:
        DataError: the splits do not go together, or there are too few pictures.
    """
    classes = check_pair(train, val)
    kept, chosen = _hold_out(train.labels, held_out, seed)
    generator = torch.Generator().manual_seed(seed)
    grid = [(b, p) for b, p in INPUTS if b <= train.class_tokens.shape[1]]
    train, val = train.to(device), val.to(device)
    batch_size = min(batch_size, len(kept))
    groups, heads = [], {}
    for entry in grid:
        width = train.select(*entry, slice(1)).shape[1]
        heads[entry] = [nn.Linear(width, classes, device=device) for _ in learning_rates]
        for head, rate in zip(heads[entry], learning_rates, strict=True):
            with torch.no_grad():
                head.weight.copy_(0.01 * torch.randn(head.weight.shape, generator=generator))
                head.bias.zero_()
            groups.append({"params": list(head.parameters()), "lr": rate * batch_size / 256})
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for i in range(iterations):
        batch = kept[torch.randint(len(kept), (batch_size,), generator=generator)].to(device)
        loss = torch.zeros((), device=device)
        for entry, linears in heads.items():
            logits = _all_logits(train.select(*entry, batch), linears)  # (rates, batch, classes)
            targets = train.labels[batch].expand(len(linears), -1)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(i + 1)
    trials: list[_Trial[tuple[tuple[int, bool], nn.Linear]]] = []
    for entry, linears in heads.items():
        correct, losses = _score(train, chosen.to(device), entry, linears)
        for j, linear in enumerate(linears):
            name = f"{_describe(*entry)}, learning rate {learning_rates[j]:g}"
            trials.append(_Trial(name, float(correct[j].float().mean()), float(losses[j].mean()), (entry, linear)))
    best = _best(trials, len(chosen))
    entry, linear = best.classifier
    correct, _ = _score(val, torch.arange(len(val), device=val.labels.device), entry, [linear])
    return Probe(best.name, correct[0].cpu(), {trial.name: 100 * trial.accuracy for trial in trials})


def quick_probe(train: Features, val: Features, *, held_out: float = 0.1, seed: int = 0) -> Probe:
    """Logistic regression by scikit-learn on standardised features: seconds in place of a grid.

    The inputs are the class token of the last block, alone or with the mean patch token, and the strength of the
    regularisation is chosen on a held-out part of `train`.

    Raises:
        DataError: the splits do not go together, or there are too few pictures.
    """
    from sklearn.exceptions import ConvergenceWarning  # scikit-learn takes a second to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    check_pair(train, val)
    kept, chosen = _hold_out(train.labels, held_out, seed)
    trials: list[_Trial[tuple[bool, Any, Any]]] = []
    for patch_mean in (False, True):
        scaler = StandardScaler(copy=False)  # in place: a set of millions is held once
        x, y = scaler.fit_transform(train.select(1, patch_mean, kept).numpy()), train.labels[kept].numpy()
        held_x = scaler.transform(train.select(1, patch_mean, chosen).numpy())
        held_y = train.labels[chosen].numpy()
        for strength in REGULARISATIONS:
            model = LogisticRegression(C=strength, max_iter=300)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the held-out accuracy says if it is good
                model.fit(x, y)
            name = f"{_describe(1, patch_mean)}, C {strength:g}"
            loss = float(log_loss(held_y, model.predict_proba(held_x), labels=model.classes_))
            trials.append(_Trial(name, float(model.score(held_x, held_y)), loss, (patch_mean, scaler, model)))
    best = _best(trials, len(chosen))
    patch_mean, scaler, model = best.classifier
    predicted = torch.from_numpy(model.predict(scaler.transform(val.select(1, patch_mean).numpy())))
    return Probe(best.name, predicted == val.labels, {trial.name: 100 * trial.accuracy for trial in trials})


Classifier = TypeVar("Classifier")


@dataclass(frozen=True)
class _Trial(Generic[Classifier]):
    """A classifier of the grid, and its accuracy (in [0, 1]) and loss on the held-out pictures."""

    name: str
    accuracy: float
    loss: float
    classifier: Classifier


def _best(trials: list[_Trial[Classifier]], pictures: int) -> _Trial[Classifier]:
    """The smallest loss among those whose accuracy is within a standard error of the best one's.

    With few held-out pictures one of them more or less would choose else; with many the best accuracy does. Those
    that diverged do not count.

    Raises:
        DataError: all of them did.
    """
    trials = [trial for trial in trials if math.isfinite(trial.loss)]
    if not trials:
        raise DataError("no classifier of the grid has a finite loss: the features are too large, or the rates")
    top = max(trial.accuracy for trial in trials)
    error = (top * (1 - top) / pictures) ** 0.5
    return min((trial for trial in trials if trial.accuracy >= top - error), key=lambda trial: trial.loss)


def _all_logits(x: Tensor, heads: Sequence[nn.Linear]) -> Tensor:
    """One product for all heads: (batch, width) -> (heads, batch, classes)."""
    weight = torch.cat([head.weight for head in heads])
    bias = torch.cat([head.bias for head in heads])
    logits: Tensor = F.linear(x, weight, bias).unflatten(1, (len(heads), -1)).transpose(0, 1)
    return logits


@torch.inference_mode()
def _score(
    features: Features, rows: Tensor, entry: tuple[int, bool], heads: Sequence[nn.Linear]
) -> tuple[Tensor, Tensor]:
    """Whether each head classifies each picture right, and its loss there: bool and float32, (heads, rows)."""
    correct, losses = [], []
    for part in rows.split(CHUNK):
        logits = _all_logits(features.select(*entry, part), heads)  # (heads, part, classes)
        targets = features.labels[part].expand(len(heads), -1)
        correct.append(logits.argmax(2) == targets)
        losses.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    return torch.cat(correct, 1), torch.cat(losses, 1)


def _describe(blocks: int, patch_mean: bool) -> str:
    return f"last {blocks} block{'s' * (blocks > 1)}, class token{' + mean patch token' * patch_mean}"


def _hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the pictures to train on, and of those held out: of each class alike where there are enough.

    Each class keeps a picture to train on, so that a class with a single one is never only held out.
    """
    from sklearn.model_selection import train_test_split

    counts = labels.bincount()
    present = int((counts > 0).sum())
    count = min(math.ceil(share * len(labels)), len(labels) - present)
    if present < 2 or count < 1:
        raise DataError(
            f"`train` has too few pictures to hold some out: {len(labels)} of {present} classes, and it needs two "
            "classes and more pictures than classes"
        )
    if int(counts[counts > 0].min()) >= 2 and share * len(labels) >= len(counts):
        indices = torch.arange(len(labels)).numpy()
        kept, chosen = train_test_split(indices, test_size=share, random_state=seed, stratify=labels.numpy())
        return torch.from_numpy(kept), torch.from_numpy(chosen)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    places = np.arange(len(labels))
    _, first = np.unique(labels[order].numpy(), return_index=True)  # of each class
    held = np.setdiff1d(places, first)[:count]
    return order[np.setdiff1d(places, held)], order[held]
