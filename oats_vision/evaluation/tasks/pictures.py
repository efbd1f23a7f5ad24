"""Models that read pictures: classifiers and backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from oats_vision.errors import ModelError
from oats_vision.evaluation.tasks.base import Progress, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from oats_vision.data.batches import Inputs
    from oats_vision.data.pictures import Batches
    from oats_vision.evaluation.load import Load
    from oats_vision.evaluation.protocols.settings import Settings
    from oats_vision.evaluation.reference import PictureReference
    from oats_vision.evaluation.speed import Timing
    from oats_vision.evaluation.tasks.options import DataOptions
    from oats_vision.models.transforms import Transform


class Pictures(Task):
    """Read through a transform."""

    unit = "pictures"
    samples = 2048
    batch_size = 64
    eval_split = "validation"
    measured_by = "top1"
    placeholder = "LABELLED_PICTURES"

    def reader(self, name: str, transform: Transform | None) -> Transform:
        if transform is None:
            raise ModelError(
                f"{name} says nothing about its preprocessing: use the Python API with batches of your own"
            )
        return transform

    def transform(self, reader: Any) -> Transform | None:
        transform: Transform | None = reader
        return transform

    def calibration(self, config: DataOptions, reader: Any, held_out: int | None = None) -> Batches:
        from oats_vision.data.pictures import load_pictures

        return load_pictures(
            config.data or "demo",
            reader,
            samples=config.samples,
            split=config.split,
            held_out=self.held_out(config) if held_out is None else held_out,
            batch_size=config.batch_size or self.batch_size,
            seed=config.seed,
            streaming=config.streaming,
            workers=config.workers,
        )

    def evaluation(self, config: DataOptions) -> Settings | None:
        from oats_vision.evaluation.protocols import LabelledPictures

        source = config.eval_data or ("demo" if config.model == "demo" and config.eval else None)
        if source is None:
            return None
        asked = {
            "data": source,
            "split": config.eval_split or self.eval_split,
            "samples": config.eval_samples,
            "batch_size": config.batch_size or self.batch_size,
            "seed": config.seed,
            "streaming": config.streaming,
            "workers": config.workers,
        }
        return LabelledPictures.model_validate(asked)

    def example(self, model: nn.Module, config: DataOptions, reader: Any) -> Tensor:
        from oats_vision.evaluation.speed import plain_picture
        from oats_vision.models.structure import floating

        first = floating(model)
        return plain_picture(reader)[None].to(first.device, first.dtype)

    def reference(
        self,
        model: nn.Module,
        held_out: Any,
        transform: Transform | None = None,
        progress: Progress = lambda done: None,
    ) -> PictureReference:
        from oats_vision.evaluation.reference import PictureReference

        return PictureReference(model, held_out, transform, progress)

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
        from oats_vision.evaluation.speed import time_inputs

        return time_inputs(dense, compressed, first, dtype, batch_sizes, rounds, progress, limit)

    def bench(
        self,
        dense: nn.Module,
        compressed: nn.Module,
        transform: Transform | None,
        load: Load,
        dtype: torch.dtype,
        progress: Progress,
    ) -> list[Timing]:
        from oats_vision.evaluation.speed import plain_picture, time_pictures
        from oats_vision.models.structure import floating

        reader = self.reader("the checkpoint", transform)
        picture = plain_picture(reader).to(floating(compressed).device, dtype)
        return time_pictures(dense, compressed, picture, load.batch_size, load.repeats, progress)

    def measurements(self, load: Load) -> int:
        return len(load.batch_size)
