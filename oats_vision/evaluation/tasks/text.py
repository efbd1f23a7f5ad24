"""Models that read text: causal language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from oats_vision.errors import ConfigError
from oats_vision.evaluation.tasks.base import Progress, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from oats_vision.data.batches import Inputs
    from oats_vision.data.text import Sequences
    from oats_vision.evaluation.load import Load
    from oats_vision.evaluation.protocols.settings import Settings
    from oats_vision.evaluation.reference import TextReference
    from oats_vision.evaluation.speed import Timing
    from oats_vision.evaluation.tasks.options import DataOptions
    from oats_vision.models.transforms import Transform

PROMPT, NEW_TOKENS = 128, 32  # that a run times


class Text(Task):
    """Read through a tokenizer."""

    unit = "sequences"
    samples = 128
    batch_size = 4
    eval_split = "test"
    measured_by = "perplexity"
    placeholder = "TEXT"

    def reader(self, name: str, transform: Transform | None) -> Any:
        from oats_vision.models.loading.load import load_tokenizer

        return load_tokenizer(name)

    def tokenizer(self, reader: Any) -> Any:
        return reader

    def check(self, model: nn.Module, config: DataOptions) -> None:
        positions = _positions(model)
        if positions is not None and config.sequence_length > positions:
            raise ConfigError(
                f"`sequence_length` must be at most the model's {positions} positions, got {config.sequence_length}"
            )

    def calibration(self, config: DataOptions, reader: Any, held_out: int | None = None) -> Sequences:
        from oats_vision.data.text import load_sequences

        return load_sequences(
            str(config.data),
            reader,
            samples=config.samples or self.samples,
            sequence_length=config.sequence_length,
            batch_size=config.batch_size or self.batch_size,
            seed=config.seed,
            split=config.split,
            streaming=config.streaming,
            held_out=self.held_out(config) if held_out is None else held_out,
        )

    def evaluation(self, config: DataOptions) -> Settings | None:
        from oats_vision.evaluation.protocols.perplexity import PerplexitySettings

        if config.eval_data is None:
            return None
        asked = {
            "data": config.eval_data,
            "split": config.eval_split or self.eval_split,
            "samples": config.eval_samples,
            "batch_size": config.batch_size or self.batch_size,
            "sequence_length": config.sequence_length,
            "streaming": config.streaming,
        }
        return PerplexitySettings.model_validate(asked)

    def example(self, model: nn.Module, config: DataOptions, reader: Any) -> Tensor:
        import torch

        from oats_vision.models.structure import floating

        return torch.zeros(1, config.sequence_length, dtype=torch.long, device=floating(model).device)

    def reference(
        self,
        model: nn.Module,
        held_out: Any,
        transform: Transform | None = None,
        progress: Progress = lambda done: None,
    ) -> TextReference:
        from oats_vision.evaluation.reference import TextReference

        return TextReference(model, held_out, transform, progress)

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
        from oats_vision.evaluation.speed import BEGINNING, time_inputs, time_text

        if not (hasattr(compressed, "generate") and hasattr(compressed, "config")):  # not of transformers
            return time_inputs(dense, compressed, first, dtype, batch_sizes, rounds, progress, limit)
        tokens = first.tensor.shape[1]
        prompts, new_tokens = [min(tokens, PROMPT)], max(1, min(NEW_TOKENS, tokens - BEGINNING))
        return time_text(dense, compressed, _words(compressed), prompts, new_tokens, rounds, progress, limit)

    def bench(
        self,
        dense: nn.Module,
        compressed: nn.Module,
        transform: Transform | None,
        load: Load,
        dtype: torch.dtype,
        progress: Progress,
    ) -> list[Timing]:
        from oats_vision.evaluation.speed import BEGINNING, time_text

        positions = _positions(compressed)
        for name, tokens in (("prompt", max(load.prompt)), ("new_tokens", BEGINNING + load.new_tokens)):
            if positions is not None and tokens > positions:
                raise ConfigError(f"`{name}`: the model has {positions} positions, and {tokens} tokens need as many")
        words = _words(compressed)
        return time_text(dense, compressed, words, load.prompt, load.new_tokens, load.repeats, progress)

    def measurements(self, load: Load) -> int:
        return len(load.prompt) + 1


def _positions(model: nn.Module) -> int | None:
    """How many tokens the model can read, if it says so."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _words(model: Any) -> int:
    """Size of a transformers model's vocabulary."""
    return int(model.config.get_text_config().vocab_size)
