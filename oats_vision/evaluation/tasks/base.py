"""What a task must say."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from oats_vision.progress import Unit

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from oats_vision.data.batches import Inputs
    from oats_vision.evaluation.load import Load
    from oats_vision.evaluation.protocols.base import Protocol
    from oats_vision.evaluation.protocols.settings import Settings
    from oats_vision.evaluation.reference import Reference
    from oats_vision.evaluation.speed import Timing
    from oats_vision.evaluation.tasks.options import DataOptions
    from oats_vision.models.transforms import Transform

Progress = Callable[[int], None]
Options = TypeVar("Options", bound="DataOptions")


class Task(ABC):
    """Pictures or text.

    unit: what calibration data are counted in. samples, batch_size, eval_split: of a run, where none are given.
    measured_by: the protocol that a run measures with, where it has labelled data. placeholder: for such data.
    """

    unit: ClassVar[Unit]
    samples: ClassVar[int]
    batch_size: ClassVar[int]
    eval_split: ClassVar[str]
    measured_by: ClassVar[str]
    placeholder: ClassVar[str]

    @property
    def protocol(self) -> Protocol[Any]:
        """The protocol that a run measures with."""
        from oats_vision.evaluation.protocols import find_protocol

        return find_protocol(self.measured_by)

    def eval_command(self, directory: str, data: str = "") -> str:
        """The command, for a shell, that measures a checkpoint on data, or on what there is a placeholder for."""
        given = shlex.quote(data) if data else self.placeholder
        return f"oats-vision eval {self.measured_by} {shlex.quote(directory)} --data {given}"

    def completed(self, config: Options) -> Options:
        """The run with the defaults that depend on what the model reads."""
        changes = {
            "samples": config.samples or self.samples,
            "batch_size": config.batch_size or self.batch_size,
            "eval_split": config.eval_split or self.eval_split,
        }
        return config.model_copy(update=changes)

    def held_out(self, config: DataOptions) -> int:
        """How many inputs to keep apart to measure the cost on."""
        from oats_vision.data.pictures import ENOUGH

        return max(ENOUGH, (config.samples or self.samples) // 8) if config.eval else 0

    @abstractmethod
    def reader(self, name: str, transform: Transform | None) -> Any:
        """What turns data into the model's inputs: its transform of pictures, or its tokenizer.

        Args:
            name: of the model, as `load_model` takes it, or of a compressed one's directory.
            transform: that came with the model.

        Raises:
            ModelError: there is none.
        """

    def transform(self, reader: Any) -> Transform | None:
        """The reader, if it is a transform of pictures: pictures are shown in the colours that it undoes."""
        return None

    def tokenizer(self, reader: Any) -> Any:
        """The reader, if it is a tokenizer, which is stored beside the model."""
        return None

    def check(self, model: nn.Module, config: DataOptions) -> None:  # noqa: B027  # most runs fit
        """Raises ConfigError if the model cannot read what the run gives it."""

    @abstractmethod
    def calibration(self, config: DataOptions, reader: Any, held_out: int | None = None) -> Any:
        """The calibration data of a completed run, with some held out; by default as many as `held_out` says."""

    @abstractmethod
    def evaluation(self, config: DataOptions) -> Settings | None:
        """What the task's protocol is asked for in a completed run; None without labelled data."""

    @abstractmethod
    def example(self, model: nn.Module, config: DataOptions, reader: Any) -> Tensor:
        """One input as the model takes it; what it holds does not matter."""

    @abstractmethod
    def reference(
        self,
        model: nn.Module,
        held_out: Any,
        transform: Transform | None = None,
        progress: Progress = lambda done: None,
    ) -> Reference:
        """What the dense model says of inputs without labels; its `compare` then tells how close another one comes.

        Args:
            model: dense, of a known family.
            held_out: batches as for `compress`, that can be iterated again; of one pass, they are kept in memory.
            transform: that made the pictures, to show them in their colours.
            progress: called with the number of inputs done.

        Raises:
            DataError: there is no input, or one that the model cannot take.
            ModelError: the model's outputs are not finite.
        """

    @abstractmethod
    def time(
        self,
        dense: nn.Module,
        compressed: nn.Module,
        first: Inputs,
        dtype: torch.dtype,
        batch_sizes: Sequence[int],
        rounds: int,
        progress: Progress,
        limit: float,
    ) -> list[Timing]:
        """Both models in turns on inputs such as they are used on.

        Args:
            first: batch of held-out inputs.
            dtype: of floating inputs.
            rounds, limit: number and seconds of each measurement.
        """

    @abstractmethod
    def bench(
        self,
        dense: nn.Module,
        compressed: nn.Module,
        transform: Transform | None,
        load: Load,
        dtype: torch.dtype,
        progress: Progress,
    ) -> list[Timing]:
        """Both models in turns on inputs that are made up.

        Args:
            transform: of the compressed model.
            dtype: of floating inputs.

        Raises:
            ConfigError: the model has no positions for so much text.
            ModelError: the outputs are not finite, or the transform is missing that a picture needs.
        """

    @abstractmethod
    def measurements(self, load: Load) -> int:
        """How many measurements `bench` makes."""
