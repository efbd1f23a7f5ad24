"""`oats-vision compress`: compress a model, measure what it cost, write the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oats_vision import logs
from oats_vision.aliases import check_model
from oats_vision.cli.common import notes, results
from oats_vision.cli.help import WHAT
from oats_vision.cli.options import Json, LogFile, Verbose, option, with_settings
from oats_vision.config import load_run_config
from oats_vision.display import Display

if TYPE_CHECKING:
    from oats_vision.run import Outcome

EXAMPLES = """\
a backbone, on a folder of pictures without labels
  oats-vision compress --model dinov2_vitl14 --rate 0.5 \\
    --data pictures/ --out dinov2_l_50
a classifier, with its top-1 on labelled pictures before and after
  oats-vision compress --model vit_base_patch16_224 --rate 0.4 \\
    --data imagenet/train --eval-data imagenet/val
a language model, with its perplexity before and after
  oats-vision compress --model hf:HuggingFaceTB/SmolLM2-135M \\
    --data c4 --streaming --eval-data wikitext"""


@with_settings
def compress(
    config: Annotated[
        Path | None, option(WHAT, metavar="FILE", help="YAML file of these settings (underscores for dashes)")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    **settings: Any,
) -> None:
    """Compress a model, measure what it cost, and write the checkpoint.

    Without arguments it runs on the demo: a small ViT and Fashion-MNIST pictures that ship with the package.
    """
    logs.set_up(verbose, log_file)
    chosen = load_run_config(config, settings)
    check_model(chosen.model)
    chosen.check_data()
    from oats_vision.run import run  # seconds: not before all that was given is seen to be right

    outcome = run(chosen, Display(notes))
    if as_json:
        typer.echo(json.dumps(outcome.to_dict()))
    else:
        _show(outcome)


def _show(outcome: Outcome) -> None:
    """The table, and in a few lines what was done and where it is."""
    from oats_vision import report
    from oats_vision.checkpoint_place import MERGED
    from oats_vision.run import how_to_evaluate

    config, done = outcome.run, outcome.report
    console = results()
    title = f"{config.model}: {outcome.settings.summary}, stored in {outcome.settings.storage_dtype}"
    console.print(report.run_table(title, outcome.parameters, outcome.sizes, outcome.scores))
    errors = [layer.error for layer in done.layers]
    quality = (
        f"{done.error_name.capitalize()}: mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}."
        if errors
        else f"Signal kept in a cut: smallest {min(done.slicing.kept):.4f}."
        if done.slicing
        else ""
    )
    what = f"{len(errors)} layers" if errors else "all blocks"
    written = ", ".join(f"{name} {report.megabytes(size)}" for name, size in sorted(outcome.files.items()))
    console.print(
        f"{what} compressed with {done.samples} {done.unit}"
        f"{f' ({outcome.skipped} unreadable ones skipped)' * (outcome.skipped > 0)} in "
        f"{done.seconds['total']:.1f} s: {done.seconds['calibration']:.1f} s calibration, "
        f"{done.seconds['solver']:.1f} s solver; {outcome.seconds:.1f} s with the evaluation. "
        f"Peak memory {outcome.peak_memory / 1e9:.2f} GB.\n"
        f"{quality}\n"
        f"Written to {config.out} ({written})"
        f"{', and the dense merge to ' + str(config.out / MERGED) if config.merge else ''}.",
        soft_wrap=True,
        markup=False,
    )
    if not outcome.scores:
        how = how_to_evaluate(done.unit).format(config.out, "LABELLED_PICTURES" if done.unit == "pictures" else "TEXT")
        console.print(f"What it cost was not measured: oats-vision eval {how}", markup=False)
