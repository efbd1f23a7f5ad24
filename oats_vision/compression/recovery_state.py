"""What is done of a recovery, block by block, on disk: a run that was stopped goes on from there."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from oats_vision.compression.block_training import Trained
from oats_vision.errors import CheckpointError, ConfigError
from oats_vision.files import replacing

STATE = "state.json"


@dataclass
class RecoveryState:
    """A folder with the trained weights of each block that is done; without a folder nothing is kept."""

    folder: Path | None
    blocks: dict[int, Path] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: Path | None, model: nn.Module, dense: nn.Module, settings: Mapping[str, Any], data: Sequence[str]
    ) -> "RecoveryState":
        """The state in a folder, which is made if it is not there.

        Raises:
            ConfigError: it is of other settings, models or data; the message says which.
            CheckpointError: it is damaged, or cannot be written.
        """
        if folder is None:
            return cls(None)
        now = {
            **settings,
            "model": _digest(model),
            "dense": _digest(dense),
            "data": hashlib.sha256(" ".join(data).encode()).hexdigest(),
        }
        file, begun = folder / STATE, now
        try:
            if file.is_file():
                begun = json.loads(file.read_text())
            else:
                folder.mkdir(exist_ok=True)
                with replacing(file) as temporary:
                    temporary.write_text(json.dumps(now, indent=2) + "\n")
        except ValueError as damaged:
            raise CheckpointError(f"{file} is damaged ({damaged}): delete {folder} to begin again") from None
        except OSError as problem:
            raise CheckpointError(f"{folder} cannot be used: {problem.strerror or problem}") from None
        if not isinstance(begun, dict):
            raise CheckpointError(f"{file} is damaged (it holds no object): delete {folder} to begin again")
        _check_same(folder, begun, now)
        return cls(folder, {int(path.stem): path for path in folder.glob("[0-9]*.safetensors")})

    def block(self, index: int) -> Trained | None:
        """A block that is done.

        Raises:
            CheckpointError: its file is damaged.
        """
        file = self.blocks.get(index)
        if file is None:
            return None
        try:
            with safe_open(file, "pt") as stored:
                figures = json.loads(stored.metadata()["trained"])
                weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                curve = [(int(step), float(error)) for step, error in figures["curve"]]
                return Trained(weights, figures["before"], figures["after"], figures["step"], curve)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as damaged:
            raise CheckpointError(f"{file} is damaged ({damaged}): delete it to train its block again") from None

    def add(self, index: int, trained: Trained) -> None:
        """Write a block down.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.folder is None:
            return
        figures = {name: getattr(trained, name) for name in ("before", "after", "step", "curve")}
        weights = {name: value.detach().cpu().contiguous() for name, value in trained.weights.items()}
        try:
            with replacing(self.folder / f"{index:04}.safetensors") as temporary:
                save_file(weights, temporary, metadata={"trained": json.dumps(figures)})
        except OSError as problem:
            raise CheckpointError(f"{self.folder} cannot be written: {problem.strerror or problem}") from None


def _check_same(folder: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if begun.get(name) != value:
            figures = f" ({begun.get(name)} there, {value} now)" * isinstance(value, int)
            raise ConfigError(
                f"{folder} holds another recovery, which differs in {name}{figures}: give the same again, or delete "
                "the folder to begin anew"
            )


def _digest(model: nn.Module) -> str:
    """SHA-256 of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(digest_of(tensor).encode())
    return digest.hexdigest()


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
