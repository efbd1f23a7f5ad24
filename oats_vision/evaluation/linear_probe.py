"""Linear probing of frozen features: DINOv2's protocol, and a quick one by logistic regression."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision.errors import DataError
from oats_vision.evaluation.features import Features, check_pair

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
    inputs = {entry: train.select(*entry).to(device) for entry in grid}
    labels = train.labels.to(device)
    batch_size = min(batch_size, len(kept))
    groups, heads = [], {}
    for entry in grid:
        width = inputs[entry].shape[1]
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
            logits = _all_logits(inputs[entry][batch], linears)  # (rates, batch, classes)
            targets = labels[batch].expand(len(linears), -1)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(i + 1)
    trials: list[_Trial[tuple[tuple[int, bool], int]]] = []
    with torch.inference_mode():
        for entry, linears in heads.items():
            targets = labels[chosen.to(device)]
            for j, logits in enumerate(_all_logits(inputs[entry][chosen.to(device)], linears)):
                name = f"{_describe(*entry)}, learning rate {learning_rates[j]:g}"
                accuracy = float((logits.argmax(1) == targets).float().mean())
                trials.append(_Trial(name, accuracy, float(F.cross_entropy(logits, targets)), (entry, j)))
        best = _best(trials, len(chosen))
        entry, j = best.classifier
        correct = heads[entry][j](val.select(*entry).to(device)).argmax(1).cpu() == val.labels
    return Probe(best.name, correct, {trial.name: 100 * trial.accuracy for trial in trials})


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
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_pair(train, val)
    kept, chosen = _hold_out(train.labels, held_out, seed)
    trials: list[_Trial[tuple[bool, Any]]] = []
    for patch_mean in (False, True):
        x, y = train.select(1, patch_mean).numpy(), train.labels.numpy()
        for strength in REGULARISATIONS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the held-out accuracy says if it is good
                model.fit(x[kept], y[kept])
            name = f"{_describe(1, patch_mean)}, C {strength:g}"
            loss = float(log_loss(y[chosen], model.predict_proba(x[chosen]), labels=model.classes_))
            trials.append(_Trial(name, float(model.score(x[chosen], y[chosen])), loss, (patch_mean, model)))
    best = _best(trials, len(chosen))
    patch_mean, model = best.classifier
    predicted = torch.from_numpy(model.predict(val.select(1, patch_mean).numpy()))
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

    With few held-out pictures one of them more or less would choose else; with many the best accuracy does.
    """
    top = max(trial.accuracy for trial in trials)
    error = (top * (1 - top) / pictures) ** 0.5
    return min((trial for trial in trials if trial.accuracy >= top - error), key=lambda trial: trial.loss)


def _all_logits(x: Tensor, heads: Sequence[nn.Linear]) -> Tensor:
    """One product for all heads: (batch, width) -> (heads, batch, classes)."""
    weight = torch.cat([head.weight for head in heads])
    bias = torch.cat([head.bias for head in heads])
    return F.linear(x, weight, bias).unflatten(1, (len(heads), -1)).transpose(0, 1)


def _describe(blocks: int, patch_mean: bool) -> str:
    return f"last {blocks} block{'s' * (blocks > 1)}, class token{' + mean patch token' * patch_mean}"


def _hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the pictures to train on, and of those held out: of each class alike where there are enough."""
    from sklearn.model_selection import train_test_split

    counts = labels.bincount()
    stratify = labels.numpy() if int(counts[counts > 0].min()) >= 2 and share * len(labels) >= len(counts) else None
    try:
        kept, chosen = train_test_split(
            torch.arange(len(labels)).numpy(), test_size=share, random_state=seed, stratify=stratify
        )
    except ValueError as problem:
        raise DataError(f"--train has too few pictures ({len(labels)}) to hold some out: {problem}") from None
    if len(labels[kept].unique()) < 2:
        raise DataError(f"--train has too few pictures ({len(labels)}): those left to train on are of one class")
    return torch.from_numpy(kept), torch.from_numpy(chosen)
