"""`oats-vision bench`: how fast a compressed model is on this machine, against the dense one."""

from __future__ import annotations

import json
from typing import Any

import typer

from oats_vision import logs
from oats_vision.cli.common import messages, need_directory, results
from oats_vision.cli.fields import given_fields, with_fields
from oats_vision.cli.flags import flag
from oats_vision.cli.help import MACHINE, MEASURE
from oats_vision.cli.options import Device, Directory, Dtype, Json, LogFile, Trust, Verbose
from oats_vision.display import Display
from oats_vision.evaluation.load import Load
from oats_vision.fields import validated

EXAMPLES = """\
  oats-vision bench dinov2_l_50
  oats-vision bench dinov2_l_50 --batch-size 1 --batch-size 64 --threads 8
  oats-vision bench smollm2_50 --prompt 512 --new-tokens 64"""


@with_fields(Load, {MEASURE: "batch_size prompt new_tokens repeats", MACHINE: "threads"})
def bench(
    directory: Directory,
    device: Device = "auto",
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
    **given: Any,
) -> None:
    """Time a compressed model against its dense twin: latency, throughput and memory of the weights.

    Both run the same inputs in turns, in the same precision. The twin has dense layers of the same shapes; compressed
    layers keep their stored precision.
    """
    logs.set_up(verbose, log_file)
    load = validated(Load, given_fields(given), flag)
    need_directory(directory)
    from oats_vision.analysis.tables import bench_table
    from oats_vision.machine import machine_line
    from oats_vision.runs.bench import bench as run

    display = Display(messages)
    done = run(directory, load, display, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps(done.to_dict()))
    else:
        console, title = results(), f"{directory}, {dtype}, medians of {load.repeats}"
        console.print(bench_table(title, done.timings, done.weight_bytes))
        console.print(machine_line(done.machine))
    done.keep(display)  # last: a damaged report must not lose what was measured
