r"""Memory and time of loading a compressed model: the peak of the process against the bytes of its weights.

    python eval/benchmarks/loading.py dinov2_l_50/ vit_b_50/

Each checkpoint is loaded in a process of its own, after the libraries, and all its weights are read once.
"""

import argparse
import json
import subprocess
import sys

from rich.console import Console
from rich.table import Table

PROGRAM = """
import json, sys, time
import timm, torch, transformers
import oats_vision as ov
from oats_vision.evaluation.speed import weight_bytes

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts from here
before = status("VmRSS")
start = time.perf_counter()
model = ov.load(sys.argv[1])
seconds = time.perf_counter() - start
for tensor in (*model.parameters(), *model.buffers()):
    tensor.sum()
print(json.dumps({"seconds": seconds, "weights": weight_bytes(model), "peak": status("VmHWM") - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="compressed checkpoints")
    args = parser.parse_args()
    table = Table(title="peak memory while loading, without the libraries")
    for heading in ("checkpoint", "weights", "peak", "to weights", "seconds"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right")
    for directory in args.directories:
        done = subprocess.run([sys.executable, "-c", PROGRAM, directory], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        sizes = (f"{found[name] / 1e6:.1f} MB" for name in ("weights", "peak"))
        table.add_row(directory, *sizes, f"{found['peak'] / found['weights']:.2f}", f"{found['seconds']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
