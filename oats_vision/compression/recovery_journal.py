"""A recovery that goes on where it was stopped: what it is of, and what is kept of each trained block."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from oats_vision.compression.block_training import Trained
from oats_vision.compression.journal import Journal
from oats_vision.machine import machine
from oats_vision.models.structure import floating
from oats_vision.models.weights import tensor_bytes


def recovery_journal(
    folder: Path | None,
    model: nn.Module,
    dense: nn.Module,
    settings: Mapping[str, Any],
    data: Sequence[str],
    blocks: int,
) -> Journal | None:
    """What is kept of a recovery in a folder, which is made if it is not there; without a folder nothing is.

    Args:
        model: compressed, as it was before. data: the digests of their batches. blocks: how many there are; what is
            kept of all together comes after them.

    Raises:
        ConfigError: what is there is of other settings, models or data; the message says which.
        CheckpointError: it is damaged, or cannot be written.
    """
    if folder is None:
        return None
    journal = Journal(folder)
    facts = {
        **settings,
        "SHA-256 of the compressed weights": _digest(model),
        "SHA-256 of the dense weights": _digest(dense),
        "SHA-256 of the calibration data": hashlib.sha256(" ".join(data).encode()).hexdigest(),
    }
    journal.begin(facts, blocks, machine(floating(model).device))
    return journal


def trained(journal: Journal | None, index: int) -> Trained | None:
    """A block that is done. Raises CheckpointError if its file is damaged."""
    kept = journal.block(index) if journal else None
    if kept is None:
        return None
    curve = [(int(step), float(error)) for step, error in kept.figures["curve"]]
    return Trained(weights=kept.tensors, **kept.figures | {"curve": curve})


def keep(journal: Journal | None, index: int, done: Trained | None) -> None:
    """Keep a block that is done; None if there is nothing to train in it. Raises CheckpointError if it cannot be."""
    if journal is None:
        return
    figures = {one.name: getattr(done, one.name) for one in fields(Trained) if one.name != "weights"} if done else {}
    journal.add(index, done.weights if done else {}, figures)


def _digest(model: nn.Module) -> str:
    """SHA-256 of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
