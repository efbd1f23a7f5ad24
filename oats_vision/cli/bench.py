"""`oats-vision bench`: how fast a compressed model is on this machine, against the dense one."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from oats_vision import checkpoint, report
from oats_vision.benchmark import BEGINNING, dense_twin, plain_picture, time_pictures, time_text, weight_bytes
from oats_vision.cli.common import (
    Json,
    dtype_of,
    need_directory,
    need_transform,
    notes,
    results,
    warn_if_slow,
)
from oats_vision.display import Display
from oats_vision.errors import ConfigError
from oats_vision.kernels.semi_structured import to_semi_structured
from oats_vision.machine import choose_device, machine, machine_line

Sizes = Annotated[list[int], typer.Option(min=1, max=2**16, help="pictures in a batch; may be repeated")]
Prompts = Annotated[list[int], typer.Option(min=1, max=2**20, help="tokens of a prompt (text); may be repeated")]


def bench(
    directory: Annotated[Path, typer.Argument(help="a compressed checkpoint")],
    batch_size: Sizes = [1, 16],  # noqa: B006
    prompt: Prompts = [128],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate (text)")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="of each measurement; medians are shown")] = 7,
    dtype: Annotated[str, typer.Option(help="precision to compute in: float32, bfloat16 or float16")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="of the CPU", show_default="PyTorch's own")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (CUDA if it is there), cpu, cuda, ...")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run model code from a hub")] = False,
    as_json: Json = False,
) -> None:
    """Time a compressed model against its dense twin: latency, throughput and memory of the weights.

    Both run the same inputs in turns, in the same precision. The twin has dense layers of the same shapes; compressed
    layers keep their stored precision.
    """
    need_directory(directory)
    if threads:
        torch.set_num_threads(threads)
    target = choose_device(device)
    warn_if_slow("--dtype", dtype_of("--dtype", dtype), target)
    compressed = checkpoint.load(
        directory, device=target, dtype=dtype_of("--dtype", dtype), trust_remote_code=trust_remote_code
    )
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
            picture = picture.to(target, dtype_of("--dtype", dtype))
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
        return
    console = results()
    console.print(report.bench_table(f"{directory}, {dtype}, medians of {repeats}", timings, memory))
    console.print(machine_line(target))


def _see_positions(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> None:
    """Raises ConfigError if a language model has no positions for so much text."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int):
        for flag, tokens in (("--prompt", max(prompt)), ("--new-tokens", BEGINNING + new_tokens)):
            if tokens > positions:
                raise ConfigError(f"{flag}: the model has {positions} positions, and {tokens} tokens need as many")
