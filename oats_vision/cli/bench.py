"""`oats-vision bench`: how fast a compressed model is on this machine, against the dense one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from oats_vision import logs
from oats_vision.cli.common import messages, need_directory, results
from oats_vision.cli.help import MACHINE, MEASURE
from oats_vision.cli.options import Device, Directory, Dtype, Json, LogFile, Trust, Verbose, option
from oats_vision.display import Display

Sizes = Annotated[
    list[int], option(MEASURE, min=1, max=2**16, metavar="N", help="pictures in a batch; may be repeated")
]
Prompts = Annotated[
    list[int], option(MEASURE, min=1, max=2**20, metavar="N", help="tokens of a prompt (text); may be repeated")
]
EXAMPLES = """\
  oats-vision bench dinov2_l_50
  oats-vision bench dinov2_l_50 --batch-size 1 --batch-size 64 --threads 8
  oats-vision bench smollm2_50 --prompt 512 --new-tokens 64"""


def bench(
    directory: Directory,
    batch_size: Sizes = [1, 16],  # noqa: B006
    prompt: Prompts = [128],  # noqa: B006
    new_tokens: Annotated[int, option(MEASURE, min=1, metavar="N", help="tokens to generate (text)")] = 32,
    repeats: Annotated[
        int, option(MEASURE, min=1, metavar="N", help="repeats of each measurement; medians are shown")
    ] = 7,
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Annotated[
        int | None, option(MACHINE, min=1, max=1024, metavar="N", help="CPU threads", show_default="PyTorch's own")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
) -> None:
    """Time a compressed model against its dense twin: latency, throughput and memory of the weights.

    Both run the same inputs in turns, in the same precision. The twin has dense layers of the same shapes; compressed
    layers keep their stored precision.
    """
    logs.set_up(verbose, log_file)
    need_directory(directory)
    from oats_vision.analysis.tables import bench_table
    from oats_vision.evaluation.speed import Load
    from oats_vision.machine import machine_line
    from oats_vision.runs.bench import bench as run

    display, load = Display(messages), Load(batch_size, prompt, new_tokens, repeats)
    done = run(
        directory, load, display, device=device, dtype=dtype, threads=threads, trust_remote_code=trust_remote_code
    )
    if as_json:
        typer.echo(json.dumps(done.to_dict()))
    else:
        console, title = results(), f"{directory}, {dtype}, medians of {repeats}"
        console.print(bench_table(title, done.timings, done.weight_bytes))
        console.print(machine_line(done.machine))
    done.keep(display)  # last: a damaged report must not lose what was measured
