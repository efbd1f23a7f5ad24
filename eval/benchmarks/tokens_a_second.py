r"""Tokens a second of a compressed Llama, one after another as in generation, against llama.cpp on its own formats.

    oats-vision compress --model model.gguf --data text.txt --bits 4.25 --out model_4.25/
    python eval/benchmarks/tokens_a_second.py model_4.25/ --gguf model.gguf --threads 1

Needs llama-cpp-python. From the GGUF file of the same model it makes one in each of its formats (if that file has few
bits itself, their values are those of a second rounding: only how fast they are counts here). A whole token is timed,
with its embedding, attention and head; of our model also its compressed linears alone. Bytes are those of the blocks'
linears.
"""

import argparse
import ctypes
import tempfile
from functools import partial
from pathlib import Path

import llama_cpp
import torch
from few_bits import processor
from llama_cpp import Llama
from rich.console import Console
from rich.table import Table
from torch import nn

import oats_vision as ov
from oats_vision.evaluation.speed import dense_twin
from oats_vision.nn.sparse_low_rank import compressed_layers
from oats_vision.timing import in_turns

FORMATS = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
BITS = {"Q8_0": 8.5, "Q4_0": 4.5}  # a weight: blocks of 32 with a float16 scale


def converted(gguf: Path, name: str, folder: Path) -> Path:
    """The file in another of llama.cpp's formats."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize, parameters.pure = FORMATS[name], True, True
    out = folder / f"{name}.gguf"
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(out).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp cannot make {name} of {gguf}")
    return out


class Ours:
    """A model that takes one token after another."""

    def __init__(self, model: nn.Module, prompt: list[int]) -> None:
        self._model = model
        with torch.inference_mode():
            self._past = model(torch.tensor([prompt]), use_cache=True).past_key_values

    def token(self) -> None:
        self._past = self._model(torch.tensor([[1]]), past_key_values=self._past, use_cache=True).past_key_values


def linears(model: nn.Module) -> list[partial]:
    """Each compressed linear with a token of its own."""
    return [partial(layer, torch.randn(1, layer.in_features)) for layer in compressed_layers(model).values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="compressed models of one architecture")
    parser.add_argument("--gguf", type=Path, required=True, help="the same model for llama.cpp")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the first that is timed")
    parser.add_argument("--repeats", type=int, default=65, help="tokens that are timed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompt = list(range(2, 2 + args.prompt))
    calls, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in FORMATS:
            file = converted(args.gguf, name, Path(folder))
            size = args.prompt + args.repeats + 8
            model = Llama(str(file), n_ctx=size, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
            for token in prompt:  # one after another: its products for many tokens crash on some CPUs
                model.eval([token])
            calls[f"llama.cpp {name}"] = partial(model.eval, [1])
        for checkpoint in args.checkpoints:
            model = ov.load(checkpoint)
            layers = compressed_layers(model).values()
            weights = sum(layer.spec.dense_parameters for layer in layers)
            stored = sum(layer.spec.stored_bytes(layer.dtype.itemsize) for layer in layers)
            name = f"{checkpoint.name}, {8 * stored / weights:.2f} bits"
            calls[name] = Ours(model, prompt).token
            calls[f"{name}: its linears"] = partial(run_all, linears(model))
            sizes |= {name: stored, f"{name}: its linears": stored}
        sizes |= {f"llama.cpp {name}": weights * bits / 8 for name, bits in BITS.items()}
        for dtype in (torch.float32, torch.bfloat16):
            dense = dense_twin(model).to(dtype)
            calls[f"dense {dtype}".replace("torch.", "")] = Ours(dense, prompt).token
            sizes[f"dense {dtype}".replace("torch.", "")] = weights * dtype.itemsize
        seconds = {name: sorted(taken) for name, taken in in_turns(calls, args.repeats).items()}
    table = Table(title=f"{processor()}, {args.threads} threads, torch {torch.__version__}; medians of {args.repeats}")
    for heading in ("model", "MB of linears", "ms a token", "tokens a second"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, taken in seconds.items():
        median = taken[len(taken) // 2]
        table.add_row(name, f"{sizes[name] / 1e6:.1f}", f"{1e3 * median:.2f}", f"{1 / median:.1f}")
    Console(width=120).print(table)


def run_all(some: list[partial]) -> None:
    for call in some:
        call()


if __name__ == "__main__":
    main()
