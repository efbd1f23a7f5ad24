r"""Memory and time of loading a compressed model: the peak of the process against the bytes of its weights.

    python eval/benchmarks/loading.py dinov2_l_50/ vit_b_50/

Each checkpoint is loaded in a process of its own, for the second time, so that the libraries and the code that it
needs are there already, and all its weights are read once. `packed` are the weights of its compressed linears, `dense`
is all else as it is in memory: biases, norms, embeddings, heads.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

PROGRAM = """
import gc, json, sys, time
import timm, torch, transformers
import oats_vision as ov
from oats_vision.evaluation.speed import weight_bytes
from oats_vision.machine import give_memory_back
from oats_vision.nn.sparse_low_rank import layer_tensors

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

ov.load(sys.argv[1])  # for the code that it needs
gc.collect()
give_memory_back()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts from here
before = status("VmRSS")
start = time.perf_counter()
model = ov.load(sys.argv[1])
seconds = time.perf_counter() - start
for tensor in (*model.parameters(), *model.buffers()):
    tensor.count_nonzero()
peak = status("VmHWM") - before
packed = sum(tensor.nbytes for name, tensor in layer_tensors(model).items() if not name.endswith(".bias"))
print(json.dumps({"packed": packed, "dense": weight_bytes(model) - packed, "peak": peak, "seconds": seconds}))
"""


@dataclass(frozen=True)
class Loaded:
    """Bytes of a model in memory, the peak of the process while it was loaded, beyond its libraries, and seconds."""

    packed: int
    dense: int
    peak: int
    seconds: float

    @property
    def times(self) -> float:
        """The peak to the bytes of the weights."""
        return self.peak / (self.packed + self.dense)

    @property
    def times_packed(self) -> float:
        """What of the peak is not the dense part's, to the bytes of the packed one."""
        return (self.peak - self.dense) / self.packed


def load_alone(directory: Path | str) -> Loaded:
    """Load a checkpoint in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(directory)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return Loaded(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="compressed checkpoints")
    args = parser.parse_args()
    table = Table(title="peak memory while loading, without the libraries; MB")
    for heading in ("checkpoint", "packed", "dense", "peak", "to weights", "seconds"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right")
    for directory in args.directories:
        found = load_alone(directory)
        sizes = (f"{size / 1e6:.1f}" for size in (found.packed, found.dense, found.peak))
        table.add_row(directory, *sizes, f"{found.times:.2f}", f"{found.seconds:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
