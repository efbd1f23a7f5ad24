"""`oats-vision bench` and `--rank-ratio auto` as a user runs them, on tiny models."""

import copy
import json

import pytest
import torch
import transformers as hf
from torch import nn

import oats_vision as ov
from command import run
from oats_vision.evaluation.speed import dense_twin, weight_bytes
from oats_vision.timing import side_by_side
from tiny import HF


def _compress(model, data, out, *options) -> dict:
    done = run("compress", "--model", model, "--data", data, "--out", out, "--iterations", 3, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_bench_of_pictures_prints_both_models_and_what_they_weigh(model_directory, tmp_path):
    out = tmp_path / "vit_50"
    _compress(model_directory, "demo", out, "--samples", 8)
    done = run("bench", out, "--batch-size", 1, "--batch-size", 3, "--repeats", 2, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [timing["units"] for timing in result["timings"]] == [1, 3]
    assert json.loads((out / "report.json").read_text())["speed"] == result["timings"]
    for timing in result["timings"]:
        assert timing["speedup"] == pytest.approx(timing["dense"] / timing["compressed"])
    model = ov.load(out)
    assert result["weight_bytes"] == {"dense": weight_bytes(dense_twin(model)), "compressed": weight_bytes(model)}
    assert result["weight_bytes"]["compressed"] < result["weight_bytes"]["dense"]
    assert result["machine"]["threads"] == 1
    done = run("bench", out, "--batch-size", 2, "--repeats", 1, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    for words in ("forward, batch 2", "pictures/s", "weights in memory", "bfloat16", "threads"):
        assert words in done.stdout


def test_bench_of_text_generates_token_by_token(language_directory, tmp_path):
    out = tmp_path / "lm_50"
    _compress(language_directory, "demo", out, "--samples", 4, "--sequence-length", 32)
    done = run("bench", out, "--prompt", 20, "--new-tokens", 3, "--repeats", 1, "--json")
    assert done.returncode == 0, done.stderr
    timings = json.loads(done.stdout)["timings"]
    assert [(timing["what"], timing["units"]) for timing in timings] == [
        ("prompt of 20 tokens", 20),
        ("generating 3 tokens", 3),
    ]


def test_a_model_of_pictures_without_preprocessing_is_a_clear_error(pictures, tmp_path):
    model = hf.ViTModel(hf.ViTConfig(**HF))
    ov.compress(model, pictures, rate=0.4, iterations=3)
    ov.save(model, tmp_path / "vit_40")
    done = run("bench", tmp_path / "vit_40")
    assert done.returncode == 1
    assert "preprocessing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sliced_model_is_timed_beside_one_of_the_shapes_that_it_had(model_directory, tmp_path):
    out = tmp_path / "sliced"
    _compress(model_directory, "demo", out, "--samples", 8, "--method", "slicegpt")
    done = run("bench", out, "--json", "--repeats", 1)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    dense, _ = ov.load_model(model_directory)
    assert result["weight_bytes"]["dense"] == weight_bytes(dense)
    assert all(timing["dense"] > 0 for timing in result["timings"])


def test_a_directory_without_a_model_is_a_clear_error(tmp_path):
    done = run("bench", tmp_path)
    assert done.returncode == 1
    assert "not a compressed model" in done.stderr


def test_rank_ratio_auto_stays_within_the_tolerance_and_the_budget(tiny_vit, pictures):
    def errors(model: nn.Module, **options) -> dict[str, float]:
        report = ov.compress(model, pictures, rate=0.5, iterations=5, **options).report
        return {layer.name: layer.error for layer in report.layers if layer.name.startswith("blocks.0.attn.qkv")}

    fixed = [errors(copy.deepcopy(tiny_vit), rank_ratio=ratio) for ratio in (0.0, 0.1, 0.2, 0.3, 0.4)]
    model = copy.deepcopy(tiny_vit)
    chosen = errors(model, rank_ratio="auto", error_tolerance=0.1)
    for name, error in chosen.items():
        assert error <= 1.1 * min(run[name] for run in fixed) + 1e-6
    report = ov.record(model).report
    assert report.parameters <= 0.5 * report.dense_parameters
    assert report.settings.rank_ratio == "auto"


def test_rank_ratio_auto_from_the_command_line(model_directory, tmp_path):
    result = _compress(
        model_directory, "demo", tmp_path / "auto", "--samples", 8, "--rank-ratio", "auto", "--latency-tokens", 4
    )
    assert result["settings"]["rank_ratio"] == "auto"
    done = run("inspect", tmp_path / "auto")
    assert done.returncode == 0, done.stderr
    assert "auto" in done.stdout
    for wrong, words in (
        (["--rank-ratio", "auto", "--method", "wanda"], "--rank-ratio"),
        (["--rank-ratio", "auto", "--pattern", "2:4"], "--rank-ratio auto"),
        (["--rank-ratio", "fast"], "--rank-ratio"),
        (["--rank-ratio", "auto", "--error-tolerance", "-1"], "--error-tolerance"),
    ):
        done = run("compress", *wrong, "--out", tmp_path / "wrong")
        assert done.returncode == 1, wrong
        assert words in done.stderr
        assert not (tmp_path / "wrong").exists()


def test_side_by_side_takes_turns_and_the_twin_is_dense(tiny_vit, pictures):
    order = []
    taken = side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert set(taken) == {"a", "b"}
    assert all(seconds > 0 for seconds in taken.values())
    before = weight_bytes(tiny_vit)
    x = pictures[0][0] if isinstance(pictures[0], (tuple, list)) else pictures[0]
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=2)
    twin = dense_twin(tiny_vit)
    assert weight_bytes(twin) == before
    torch.testing.assert_close(twin(x), tiny_vit(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "x", "--repeats", "nan"], "--repeats must be a whole number, at least 1, got 'nan'"),
        (["bench", "x", "--prompt", "0"], "--prompt must be in [1, 1048576], got 0"),
        (["bench", "x", "--batch-size", "1", "--batch-size", "0"], "--batch-size must be in [1, 65536], got 0"),
        (["bench", "x", "--threads", "2000"], "--threads must be in [1, 1024], got 2000"),
        (["sweep", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["sweep", "--seeds", "x"], "--seeds must be a whole number, at least 1, got 'x'"),
    ],
)
def test_numbers_out_of_range_are_said_as_compress_says_them(arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")
