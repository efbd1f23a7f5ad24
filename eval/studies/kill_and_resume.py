"""Kill a compression at random moments, and see that the same command ends with the files of one that nobody stopped.

    python eval/studies/kill_and_resume.py --kills 50
    python eval/studies/kill_and_resume.py --kills 50 --while saving

`compressing`: a run on the demo is killed (SIGKILL) at a moment drawn from the time that a whole one takes, and started
again, until it ends; then the next one begins. Every other run has an older checkpoint in its place to replace. After
each kill the folder holds no checkpoint, or a whole one, and at the end model.safetensors is equal byte for byte to
that of a run without a kill, and config.json but for its seconds. `saving`: two models are saved over each other
without a break; after each kill one of them is there whole. Any difference ends the study with an error.

Runs are forked from one process, so that PyTorch is imported once; each computes with one thread.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import oats_vision as ov
from oats_vision import checkpoint
from oats_vision.display import Display
from oats_vision.runs.config import RunConfig
from oats_vision.runs.partial import journal_of
from oats_vision.runs.run import run

Row = dict[str, Any]


class Different(Exception):
    """What must be equal is not."""


def forked(work: Callable[[], object]) -> int:
    """The number of a process that does this and ends, with status 0 if it went well."""
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException as problem:
        os.write(2, f"{type(problem).__name__}: {problem}\n".encode())
        os._exit(1)


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Start the work in a process of its own and kill it after a time; whether it had not ended by then."""
    process, end = forked(work), time.perf_counter() + seconds
    while time.perf_counter() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if status:
                raise Different("a run that was started again failed")
            return False
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def finished(work: Callable[[], object]) -> float:
    """Do the work in a process of its own: how many seconds it took."""
    start = time.perf_counter()
    if os.waitpid(forked(work), 0)[1]:
        raise Different("a run that nobody stopped failed")
    return time.perf_counter() - start


def files(out: Path) -> tuple[bytes, Any]:
    """A checkpoint's weights, and what its config.json says but for seconds, and the digest of those."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(entry) for name, entry in value.items() if name not in ("seconds", "sha256")}
        return [timeless(entry) for entry in value] if isinstance(value, list) else value

    config = timeless(json.loads((out / "config.json").read_text()))
    return (out / "model.safetensors").read_bytes(), {
        k: v for k, v in config.items() if not k.endswith("config_sha256")
    }


def compressing(folder: Path, kills: int, draw: random.Random, options: dict[str, Any]) -> Row:
    """Kill runs until so many were killed, and let each end at last."""

    def work(out: Path, **others: Any) -> Callable[[], object]:
        return lambda: run(RunConfig(out=out, eval=False, report=False, **options | others), Display())

    whole, older, out = folder / "whole", folder / "older", folder / "runs" / "out"
    finished(work(whole))  # whose time has the first use of everything in it
    shutil.move(whole, older)
    seconds = finished(work(whole))
    finished(work(older, overwrite=True, seed=7))
    known = [whole, older]
    if options["recover"]:
        finished(work(folder / "one_shot", recover=0))
        known.append(folder / "one_shot")
    digests = {checkpoint.read_config(one).weights_sha256 for one in known}
    wanted, runs, done, kept, most = files(whole), 0, 0, 0, 0
    while done < kills:
        out.parent.mkdir()
        replaces = runs % 2 == 1
        if replaces:
            shutil.copytree(older, out)
        times = 0
        while killed_after(draw.uniform(0, seconds), work(out, overwrite=replaces)):
            done, times = done + 1, times + 1
            journal = journal_of(out)
            kept += bool(journal.done)
            if replaces or out.exists():
                ov.load(out)  # which reads all of it, and checks its digest
                if checkpoint.read_config(out).weights_sha256 not in digests:
                    raise Different(f"after kill {done} another checkpoint is there")
                if not (replaces or journal.noted("written")):
                    break  # the run was over, and only its process had not ended: nothing is left to go on with
        runs, most = runs + 1, max(most, times)
        if files(out) != wanted:
            raise Different(f"after kill {done} the files are not those of a whole run")
        if left := [entry.name for entry in out.parent.iterdir() if entry.name != "out"]:
            raise Different(f"a run has left {', '.join(left)} beside its output")
        shutil.rmtree(out.parent)
    return {
        "kills": done,
        "with finished blocks": kept,
        "runs": runs,
        "most kills of one": most,
        "bit-equal": f"{runs} of {runs}",
        "seconds of a whole run": f"{seconds:.1f}",
    }


def saving(folder: Path, kills: int, draw: random.Random, options: dict[str, Any]) -> Row:
    """Kill a process that saves two models over each other."""
    out, models = folder / "runs" / "out", []
    for rate in (0.4, 0.5):
        model, transform = ov.load_model(options["model"])
        pictures = ov.load_pictures("demo", transform, batch_size=32, samples=32)
        ov.compress(model, pictures, method="magnitude", rate=rate)
        models.append(model)

    def work() -> None:
        while True:
            for model in models:
                ov.save(model, out, overwrite=True)

    out.parent.mkdir()
    start = time.perf_counter()
    for model in models:
        ov.save(model, out, overwrite=True)
    seconds = time.perf_counter() - start
    contents = [{name: tensor.half() for name, tensor in model.state_dict().items()} for model in models]
    found, halfway = [0, 0], 0
    for number in range(kills):
        if not killed_after(draw.uniform(0, 2 * seconds), work):
            raise Different("saving has ended by itself")
        halfway += any(out.parent.glob(".out.writing-*"))
        ov.load(out)
        stored = load_file(out / "model.safetensors")
        same = [all(torch.equal(stored[n].half(), t) for n, t in content.items()) for content in contents]
        if sum(same) != 1:
            raise Different(f"after kill {number + 1} neither model is there")
        found[same.index(True)] += 1
    ov.save(models[0], out, overwrite=True)
    if left := [entry.name for entry in out.parent.iterdir() if entry.name != "out"]:
        raise Different(f"{', '.join(left)} is left beside the checkpoint")
    return {
        "kills": kills,
        "while files were written": halfway,
        "one whole checkpoint there": f"{sum(found)} of {kills}",
        "of each": " + ".join(map(str, found)),
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=50)
    flags.add_argument("--while", dest="what", choices=["compressing", "saving"], default="compressing")
    flags.add_argument("--model", default="demo")
    flags.add_argument("--data", default="demo")
    flags.add_argument("--samples", type=int, default=64)
    flags.add_argument("--quality", choices=["best", "fast", "plain"], default="fast")
    flags.add_argument("--iterations", type=int, default=80)
    flags.add_argument("--recover", type=int, default=0, help="steps of a recovery, which is killed too")
    flags.add_argument("--seed", type=int, default=0, help="of the moments")
    args = flags.parse_args()
    torch.set_num_threads(1)  # a process that has started threads must not be forked
    options = {name: getattr(args, name) for name in ("model", "data", "samples", "quality", "iterations", "recover")}
    study = compressing if args.what == "compressing" else saving
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = study(Path(folder), args.kills, random.Random(args.seed), options)
        except Different as problem:
            sys.exit(f"error: {problem}")
    table = Table(title=f"killed while {args.what}: {args.model}, {args.samples} samples, quality {args.quality}")
    for name in row:
        table.add_column(name, justify="right")
    table.add_row(*map(str, row.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
