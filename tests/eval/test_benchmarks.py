"""The benchmarks in `eval/` run as their help says, on the smallest shapes."""

import csv
import json
import os
import re
from pathlib import Path

import pytest

from command import run, run_script

BENCHMARKS = Path(__file__).parents[2] / "eval" / "benchmarks"


def _script(name: str, *arguments: object) -> str:
    done = run_script(BENCHMARKS / name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(model_directory, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("benchmarks") / "vit_50"
    done = run(
        "compress", "--model", model_directory, "--data", "demo", "--samples", 4, "--iterations", 2, "--out", out
    )
    assert done.returncode == 0, done.stderr
    return out


def test_layers_against_dense(tmp_path):
    file = tmp_path / "layers.csv"
    options = ["--shapes", "96x64", "--tokens", 1, 20, "--rates", 0.5, "--layers", 3, "--repeats", 2, "--csv", file]
    assert "medians of 2" in _script("layer_speed.py", *options)
    with file.open() as rows:
        found = list(csv.DictReader(rows))
    assert len(found) == 2 * 2 * 2  # tokens, rank ratios, storage
    for row in found:
        assert float(row["speedup"]) == pytest.approx(float(row["dense_us"]) / float(row["compressed_us"]))


def test_layers_of_few_bits_against_dense(tmp_path):
    file = tmp_path / "few_bits.csv"
    options = ["--shapes", "96x128", "--tokens", 1, 20, "--bits", 8, 3, "--layers", 2, "--repeats", 2, "--csv", file]
    assert "medians of 2" in _script("few_bits.py", *options, "--rank", 4, "--zeros", "--threads", 1)
    with file.open() as rows:
        found = {(row["layer"], row["tokens"]): row for row in csv.DictReader(rows)}
    ours = ["int8", "int8, density 0.5", "int3", "int3, density 0.5"]
    assert {layer for layer, _ in found} >= {"dense float32", "dense bfloat16", *ours}
    # codes, a scale and a zero for 64 columns, and the factors in 8 bits with a scale for each row
    expected = 3 + 24 / 64 + (8 * 4 * (96 + 128) + 16 * (96 + 4)) / (96 * 128)
    assert float(found["int3", "1"]["bits_a_weight"]) == pytest.approx(expected)
    for row in found.values():
        dense = found["dense float32", row["tokens"]]
        assert float(row["times_float32"]) == pytest.approx(float(dense["us"]) / float(row["us"]))


def test_whole_models_with_what_torch_alone_offers(checkpoint, tmp_path):
    file = tmp_path / "models.csv"
    options = ["--batch-sizes", 2, "--others", "bfloat16", "rank ratio 0", "--repeats", 1, "--csv", file]
    _script("model_speed.py", checkpoint, *options)
    with file.open() as rows:
        what = [row["what"] for row in csv.DictReader(rows)]
    assert what == ["dense", "compressed", "rank ratio 0", "dense, bfloat16", "compressed, bfloat16"]


def test_a_language_model_of_given_shapes_can_be_timed(tmp_path):
    shapes = ["--hidden", 32, "--intermediate", 48, "--layers", 2, "--heads", 4, 2, "--vocabulary", 99]
    _script("llama_shapes.py", tmp_path / "llama", *shapes)
    timed = run("bench", tmp_path / "llama", "--prompt", 20, "--new-tokens", 2, "--repeats", 1, "--json")
    assert timed.returncode == 0, timed.stderr
    assert [one["units"] for one in json.loads(timed.stdout)["timings"]] == [20, 2]


def test_how_long_compressing_takes_by_quality():
    sizes = ["--blocks", 1, "--image-size", 32, "--samples", 4, "--batch-size", 2]
    output = _script("compress_time.py", "--model", "vit_tiny_patch16_224", *sizes)
    fast, best = (re.search(rf"│ {quality} (.*)│", output)[1].split("│") for quality in ("fast", "best"))
    assert fast[-1].strip() == "1.00"
    assert float(best[-1]) == pytest.approx(float(best[-2]) / float(fast[-2]), rel=0.1)


@pytest.mark.slow
def test_the_parts_of_a_round_and_the_memory_of_loading(checkpoint):
    output = _script("iteration_profile.py", "--shapes", "96x64", "--repeats", 1)
    for words in ("sparse step", "orthonormal basis", "GFLOP/s"):
        assert words in output
    assert "MB" in _script("loading.py", checkpoint)


@pytest.mark.slow
def test_bytes_on_disk_are_those_that_are_counted():
    output = _script("file_sizes.py", "--models", "demo", "--bits", 2.75)
    line = next(line for line in output.splitlines() if "│ demo" in line)
    bits, counted, on_disk, to_count = (float(cell) for cell in line.split("│")[2:6])
    assert bits == pytest.approx(2.75, rel=0.01)
    assert on_disk == pytest.approx(counted, rel=0.01)
    assert to_count == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_a_model_three_times_as_large_as_its_memory_is_compressed_within_it():
    groups = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    files = ["memory.limit_in_bytes", "cgroup.subtree_control"]
    limited = any(os.access(group / file, os.W_OK) for group, file in zip(groups, files, strict=True))
    options = ["--depth", 50, "--quality", "plain", "--iterations", 1, "--samples", 16]
    output = _script("low_memory.py", *options, *([] if limited else ["--no-limit"]))
    assert "weights are equal to the byte" in output
    weights, allowed = (int(number) for number in re.findall(r"(\d+) MB", output.splitlines()[0]))
    above = dict(re.findall(r"^(.*?) +[\d.]+ s, .* (\d+) MB above", output, re.MULTILINE))
    assert int(above["ordinary"]) > weights
    assert int(above["block by block"]) < allowed
    if limited:
        assert re.search("^ordinary, limited +killed", output, re.MULTILINE)


def test_durable_blocks_shows_what_they_cost(tmp_path):
    shape = ["--model", "vit_tiny_patch16_224", "--image-size", 32, "--blocks", 1, "--samples", 4, "--repeats", 1]
    shown = _script("durable_blocks.py", *shape, "--folder", tmp_path)
    assert "keeping blocks, s" in shown
    assert not list(tmp_path.iterdir())
