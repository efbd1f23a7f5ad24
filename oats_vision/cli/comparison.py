"""What the commands of `oats-vision eval` share: both models, one after the other, and what is shown of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oats_vision.cli.common import dtype_of, need_transform, results, warn_if_slow
from oats_vision.cli.help import MODELS
from oats_vision.cli.options import option, suggest
from oats_vision.errors import ConfigError, ModelError
from oats_vision.models.loading import provider_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from oats_vision.evaluation import Difference, Perplexity, Ratio
    from oats_vision.models.source import ModelSource
    from oats_vision.models.transforms import Transform

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a compressed model, or any that `compress` takes",
        rich_help_panel=MODELS,
        autocompletion=suggest("model"),
    ),
]
Dense = Annotated[
    str | None,
    option(
        MODELS,
        metavar="MODEL",
        help="the dense model to compare with",
        show_default="the one that was compressed",
        autocompletion=suggest("model"),
    ),
]
NoDense = Annotated[bool, option(MODELS, "--no-dense", help="evaluate the compressed model alone")]
# what to report; for each metric which pictures are right, or the perplexity
Score = tuple[dict[str, Any], "dict[str, Tensor | Perplexity]"]


class Models:
    """The compressed model and the dense one that it came from; one of them is in memory at a time."""

    def __init__(self, model: str, dense: str | None, no_dense: bool, device: str, dtype: str, trust: bool) -> None:
        if dense and no_dense:
            raise ConfigError("give either --dense or --no-dense")
        for given in filter(None, (model, dense)):
            provider_of(given)
        from oats_vision import checkpoint
        from oats_vision.machine import choose_device
        from oats_vision.models.loading.load import load_model

        self.device = choose_device(device)
        self.options: dict[str, Any] = {
            "dtype": dtype_of(dtype),
            "device": self.device,
            "trust_remote_code": trust,
        }
        warn_if_slow("--dtype", self.options["dtype"], self.device)
        self.directory = Path(model) if checkpoint.is_checkpoint(Path(model)) else None
        self.loaders: dict[str, Callable[[], nn.Module]] = {}
        if self.directory is None:
            if dense:
                raise ConfigError(f"--dense is for a compressed checkpoint, and {model} is none")
            module, transform = load_model(model, **self.options)
            self.loaders["dense"] = lambda: module
        else:
            source = checkpoint.read_config(self.directory).source
            transform = checkpoint.load_transform(self.directory)
            if not no_dense:
                self.loaders["dense"] = lambda: self._dense(source, dense)
            self.loaders["compressed"] = lambda: checkpoint.load(Path(model), **self.options)
        self.name, self._transform = model, transform

    @property
    def transform(self) -> Transform:
        """The models' preprocessing of pictures. Raises ModelError if it is not known."""
        return need_transform(self._transform, self.name)

    def _dense(self, source: ModelSource, name: str | None) -> nn.Module:
        from oats_vision.models.loading.load import load_model, source_of

        given, origin = name is not None, source.origin or {}
        if name is None:
            name = _origin(source, self.directory)
            how = (
                f"the dense model that {self.directory} was made from: {name} (--dense gives another, --no-dense none)"
            )
            typer.echo(how, err=True)
        try:
            module, _ = load_model(name, image_size=origin.get("image_size"), **self.options)
        except ModelError as problem:
            raise ModelError(f"the dense model: {problem} (give --dense, or --no-dense)") from None
        found = source_of(module)
        if not found.is_architecture_of(source):
            raise ConfigError(f"--dense {name} is no {source.name} as in {self.directory}")
        if source.dense_sha256 and found.dense_sha256 != source.dense_sha256:
            changed = f"the weights of {name} differ from those that {self.directory} was compressed from"
            if not given:
                raise ModelError(f"{changed}: they have changed since. Give --dense the original, or --no-dense")
            typer.echo(f"warning: {changed}", err=True)
        return module

    def run(self, protocol: Callable[[nn.Module, str], Score]) -> dict[str, Score]:
        """The protocol on each model."""
        return {what: protocol(load(), what) for what, load in self.loaders.items()}


def show(
    models: Models,
    title: str,
    about: dict[str, Any],
    scores: dict[str, Score],
    rows: dict[str, list[str]],
    as_json: bool,
) -> None:
    """Print the scores and their differences, and add them to the checkpoint's report."""
    from oats_vision import checkpoint
    from oats_vision.analysis import tables as report
    from oats_vision.machine import machine

    differences: dict[str, Difference | Ratio] = {}
    values: dict[str, list[str]] = {}
    for metric in next(iter(scores.values()))[1]:
        measured = [score[metric] for _, score in scores.values() if metric in score]
        values[metric] = [_text(score) for score in measured]
        if len(measured) == 2:
            differences[metric] = _difference(*measured)
    result = {
        **about,
        "model": str(models.directory or ""),
        **{what: details for what, (details, _) in scores.items()},
        "difference": {metric: difference.to_dict() for metric, difference in differences.items()},
        "machine": machine(models.device),
    }
    if as_json:
        typer.echo(json.dumps(result))
    else:
        shown = {metric: str(difference) for metric, difference in differences.items()}
        results().print(report.comparison_table(title, list(scores), values | rows, shown))
    if models.directory:  # last: a damaged report must not lose what was measured
        checkpoint.add_evaluation(models.directory, result)


def _origin(source: ModelSource, directory: Path | None) -> str:
    """Where a checkpoint says that its dense model is: a name, or a directory in a plain format.

    Raises:
        ConfigError: it does not say, or says a place whose code would run.
    """
    name = (source.origin or {}).get("name")
    if name is None:
        raise ConfigError(f"{directory} does not say where its dense model is: give --dense or --no-dense")
    if name.startswith("hub:") and Path(name[4:].rpartition(":")[0]).exists():
        raise ConfigError(f"{directory} names code in a folder as its dense model, {name}: give --dense or --no-dense")
    return name


def _text(score: Tensor | Perplexity) -> str:
    from oats_vision.evaluation import Perplexity

    return f"{score.value:.3f}" if isinstance(score, Perplexity) else f"{100 * float(score.float().mean()):.2f}%"


def _difference(dense: Tensor | Perplexity, compressed: Tensor | Perplexity) -> Difference | Ratio:
    from torch import Tensor

    from oats_vision.evaluation import Perplexity, paired_difference, paired_ratio

    if isinstance(dense, Perplexity) and isinstance(compressed, Perplexity):
        return paired_ratio(dense, compressed)
    assert isinstance(dense, Tensor)
    assert isinstance(compressed, Tensor)
    return paired_difference(dense, compressed)
