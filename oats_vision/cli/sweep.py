"""`oats-vision sweep`: a grid of compressions of one model, each measured, in one table, one CSV file and one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oats_vision import logs
from oats_vision.cli.common import messages, results
from oats_vision.cli.fields import given_fields
from oats_vision.cli.flags import flag
from oats_vision.cli.help import GRID, OUTPUT, WHAT, Facts
from oats_vision.cli.options import SWEEP, Json, LogFile, Verbose, option, with_settings
from oats_vision.display import Display
from oats_vision.fields import allowed, validated
from oats_vision.models.loading import provider_of
from oats_vision.runs.grid import OUT, Extent, load_sweep_config

if TYPE_CHECKING:
    from oats_vision.runs.sweep import Sweep

EXAMPLES = """\
three rates by two rank ratios, on the demo
  oats-vision sweep --rate 0.3 --rate 0.5 --rate 0.7 \\
    --rank-ratio 0.1 --rank-ratio 0.2
rates and bits a weight, side by side
  oats-vision sweep --rate 0.3 --rate 0.5 --bits 4 --bits 3
OATS and two baselines, with three draws of the calibration pictures
  oats-vision sweep --model vit_base_patch16_224 --rate 0.4 --rate 0.5 \\
    --method oats --method wanda --method sparsegpt --seeds 3 \\
    --data imagenet/train --eval-data imagenet/val
a grid that is in a file, in which `rate` and the like may be lists
  oats-vision sweep --config sweep.yaml --out dinov2_l_sweep"""

SEEDS = Facts(lambda: f"{allowed(Extent, 'seeds')}; default: {Extent.model_fields['seeds'].default}")


@with_settings(SWEEP)
def sweep(
    config: Annotated[
        Path | None, option(WHAT, metavar="FILE", help="YAML file of these settings (underscores for dashes)")
    ] = None,
    seeds: Annotated[
        str | None, option(GRID, metavar="N", help=Extent.model_fields["seeds"].description, show_default=SEEDS)
    ] = None,
    out: Annotated[
        Path | None,
        option(OUTPUT, metavar="FOLDER", help="folder to write, or that of a sweep to resume", show_default=str(OUT)),
    ] = None,
    keep: Annotated[
        bool | None, option(OUTPUT, "--keep", metavar="--keep", help=Extent.model_fields["keep"].description)
    ] = None,
    report: Annotated[
        bool | None,
        option(OUTPUT, "--report/--no-report", metavar="--no-report", help="do not write sweep.html"),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    **settings: Any,
) -> None:
    """Compress a model in several ways, and show what each costs against its size and its speed.

    The options of the grid may be repeated: every possible combination is run, with rates and bits side by side.
    A sweep that was stopped resumes when it is started again; with more values, it runs those too.
    """
    logs.set_up(verbose, log_file)
    validated(Extent, given_fields({"seeds": seeds, "keep": keep}), flag)
    own = {"seeds": seeds, "out": out, "keep": keep, "report": report}
    chosen = load_sweep_config(config, settings | own)
    provider_of(chosen.base.model)
    chosen.base.check_data()
    from oats_vision.runs.sweep import sweep as run  # seconds: not before all that was given is seen to be right

    done = run(chosen, Display(messages))
    if as_json:
        typer.echo(json.dumps(done.to_dict()))
    else:
        _show(done)
    if done.failures:
        raise typer.Exit(1)


def _show(done: Sweep) -> None:
    """The table, what is missing and why, and where the files are."""
    from oats_vision.analysis.compare import doubts
    from oats_vision.runs.sweep_folder import CSV, PAGE
    from oats_vision.runs.sweep_table import mean_runs, sweep_table

    console, config = results(), done.config
    if done.rows:
        console.print(sweep_table(done))
    lines = [*doubts(mean_runs(done.rows)), *done.notes, *(f"to do: {name}" for name in done.missing)]
    if done.rows and not config.base.dry_run:
        page = f"; the page with plots is {config.out / PAGE}" if config.base.report else ""
        lines.append(f"Written to {config.out / CSV}{page}.")
    for line in lines:
        console.print(line, soft_wrap=True)
