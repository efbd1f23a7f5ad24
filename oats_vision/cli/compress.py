"""`oats-vision compress`: compress a model, measure what it cost, write the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from oats_vision import logs, ranks
from oats_vision.cli.common import messages
from oats_vision.cli.help import WHAT
from oats_vision.cli.options import Json, LogFile, Verbose, option, with_settings
from oats_vision.display import Display
from oats_vision.models.loading import provider_of
from oats_vision.runs.config import RunConfig, load_run_config

EXAMPLES = """\
a backbone, on a folder of pictures without labels
  oats-vision compress --model dinov2_vitl14 --rate 0.5 \\
    --data pictures/ --out dinov2_l_50
a classifier, with its top-1 on labelled pictures before and after
  oats-vision compress --model vit_base_patch16_224 --rate 0.4 \\
    --data imagenet/train --eval-data imagenet/val
the smallest file that loses less than half a point of top-1
  oats-vision compress --model vit_base_patch16_224 --bits auto \\
    --max-drop 0.5 --data imagenet/train --eval-data imagenet/val
a language model, with its perplexity before and after
  oats-vision compress --model hf:HuggingFaceTB/SmolLM2-135M \\
    --data c4 --streaming --eval-data wikitext"""


@with_settings()
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

    Without arguments it runs on the demo: a small ViT and Fashion-MNIST pictures that ship with the package. A run that
    was stopped goes on when the same command is started again.
    """
    logs.set_up(verbose, log_file)
    chosen = load_run_config(config, settings)
    provider_of(chosen.model)
    chosen.check_data()
    with ranks.joined(chosen.device):
        messages.quiet = not ranks.is_main()
        _compress(chosen, as_json)


def _compress(chosen: RunConfig, as_json: bool) -> None:
    """Do what is asked for, and print what came of it."""
    from oats_vision.cli.compress_output import print_finished, print_plan, print_time
    from oats_vision.runs.run import dry_run, run  # seconds: not before all that was given is seen to be right
    from oats_vision.runs.search import dry_search, search

    if chosen.searched_for:
        ranks.refuse(f"`{chosen.searched_for}`")
    if chosen.dry_run and chosen.searched_for:
        planned, estimate, trials = dry_search(
            chosen, Display(messages), (lambda planned: None) if as_json else print_plan
        )
        if as_json:
            typer.echo(json.dumps(planned.to_dict() | {"trials": trials.most, "seconds": trials.seconds}))
        else:
            print_time(planned, estimate, trials)
    elif chosen.searched_for:
        print_finished(search(chosen, Display(messages)), as_json)
    elif chosen.dry_run:
        planned, estimate = dry_run(chosen, Display(messages), (lambda planned: None) if as_json else print_plan)
        if as_json:
            typer.echo(json.dumps(planned.to_dict() | {"seconds": estimate.total}))
        else:
            print_time(planned, estimate)
    else:
        finished = run(chosen, Display(messages))
        if ranks.is_main():
            print_finished(finished, as_json)
