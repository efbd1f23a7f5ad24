"""`oats-vision bench`: how fast a compressed model is on this machine, against the dense one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from oats_vision import logs
from oats_vision.cli.common import dtype_of, need_directory, need_transform, notes, results, warn_if_slow
from oats_vision.cli.help import MACHINE, MEASURE
from oats_vision.cli.options import Device, Directory, Dtype, Json, LogFile, Trust, Verbose, option
from oats_vision.display import Display
from oats_vision.errors import ConfigError

if TYPE_CHECKING:
    import torch

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
    repeats: Annotated[int, option(MEASURE, min=1, metavar="N", help="of each measurement; medians are shown")] = 7,
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Annotated[
        int | None, option(MACHINE, min=1, max=1024, metavar="N", help="of the CPU", show_default="PyTorch's own")
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
    import torch

    from oats_vision import checkpoint
    from oats_vision.analysis import tables as report
    from oats_vision.evaluation.speed import dense_twin, plain_picture, time_pictures, time_text, weight_bytes
    from oats_vision.evaluation.stored import read_report
    from oats_vision.machine import choose_device, machine, machine_line
    from oats_vision.nn.semi_structured import to_semi_structured
    from oats_vision.runs.compress import note_speed

    if threads:
        torch.set_num_threads(threads)
    target = choose_device(device)
    warn_if_slow("--dtype", dtype_of(dtype), target)
    compressed = checkpoint.load(directory, device=target, dtype=dtype_of(dtype), trust_remote_code=trust_remote_code)
    dense = dense_twin(compressed)
    if target.type == "cuda" and dtype != "float32":
        to_semi_structured(compressed)  # the layers that are 2:4
    vocabulary: int = getattr(getattr(compressed, "config", None), "vocab_size", 0)  # 0: a model of pictures
    _see_positions(compressed, prompt, new_tokens)
    lengths = len(prompt) + 1 if vocabulary else len(batch_size)
    transform = checkpoint.load_transform(directory)
    picture = None if vocabulary else plain_picture(need_transform(transform, str(directory)))
    with Display(notes).counting("timing", "rounds", lengths * repeats) as progress:
        if picture is None:
            timings = time_text(dense, compressed, vocabulary, prompt, new_tokens, repeats, progress)
        else:
            picture = picture.to(target, dtype_of(dtype))
            timings = time_pictures(dense, compressed, picture, batch_size, repeats, progress)
    memory = (weight_bytes(dense), weight_bytes(compressed))
    if as_json:
        result = {
            "directory": str(directory),
            "dtype": dtype,
            "repeats": repeats,
            "timings": [timing.to_dict() for timing in timings],
            "weight_bytes": {"dense": memory[0], "compressed": memory[1]},
            "machine": machine(target),
        }
        typer.echo(json.dumps(result))
    else:
        console = results()
        console.print(report.bench_table(f"{directory}, {dtype}, medians of {repeats}", timings, memory))
        console.print(machine_line(target))
    if dtype == read_report(directory).dtype:  # last: a damaged report must not lose what was measured
        note_speed(directory, timings, machine(target))


def _see_positions(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> None:
    """Raises ConfigError if a language model has no positions for so much text."""
    from oats_vision.evaluation.speed import BEGINNING

    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int):
        for flag, tokens in (("--prompt", max(prompt)), ("--new-tokens", BEGINNING + new_tokens)):
            if tokens > positions:
                raise ConfigError(f"{flag}: the model has {positions} positions, and {tokens} tokens need as many")
