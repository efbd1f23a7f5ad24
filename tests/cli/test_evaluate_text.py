"""The command line on a language model: compress, evaluate, merge, and what a user can get wrong."""

import json
from pathlib import Path

import pytest
import transformers

import oats_vision as ov
from command import run
from harness_task import TASK


@pytest.fixture
def quick(language_directory) -> list[object]:
    options = ["--data", "demo", "--samples", 8, "--sequence-length", 64, "--iterations", 5]
    return ["compress", "--model", language_directory, *options]


def test_compress_evaluate_merge_and_generate(quick, tmp_path):
    out = tmp_path / "out"
    done = run(*quick, "--eval-data", "demo", "--eval-samples", 3, "--out", out, "--merge")
    assert done.returncode == 0, done.stderr
    for words in ("perplexity", "same next token", "8 sequences", "bytes on disk"):
        assert words in done.stdout
    report = json.loads((out / "report.json").read_text())["perplexity"]
    assert report["dense"]["windows"] == 3
    change = report["difference"]["perplexity"]
    assert change["low"] <= report["compressed"]["perplexity"] / report["dense"]["perplexity"] <= change["high"]

    again = run("eval", "perplexity", out, "--data", "demo", "--sequence-length", 64, "--samples", 3, "--json")
    result = json.loads(again.stdout)
    for which in ("dense", "compressed"):
        assert result[which]["perplexity"] == pytest.approx(report[which]["perplexity"], rel=1e-4)
    assert run("inspect", out, "--html", tmp_path / "report.html").returncode == 0
    assert "perplexity, when compressed" in (tmp_path / "report.html").read_text()

    model, tokenizer = ov.load(out), ov.load_tokenizer(str(out))
    prompt = tokenizer("the cat", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(prompt, **options)
    assert tokenizer.decode(generated[0]).startswith("the cat")
    plain = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    assert transformers.AutoTokenizer.from_pretrained(out / "merged").vocab_size == tokenizer.vocab_size
    assert plain.generate(prompt, **options).shape == generated.shape


def test_the_dense_model_of_a_relative_path_is_found_from_elsewhere(quick, language_directory, tmp_path):
    quick[quick.index("--model") + 1] = language_directory.name
    done = run(*quick, "--out", tmp_path / "out", cwd=language_directory.parent)
    assert done.returncode == 0, done.stderr
    again = run("eval", "perplexity", tmp_path / "out", "--data", "demo", "--sequence-length", 64, "--samples", 2)
    assert again.returncode == 0, again.stderr


def test_evaluation_table(quick, tmp_path):
    out = tmp_path / "the out"
    done = run(*quick, "--out", out, "--no-eval")
    assert done.returncode == 0, done.stderr
    assert f"What it cost was not measured: oats-vision eval perplexity '{out}' --data" in " ".join(done.stdout.split())
    shown = run("eval", "perplexity", out, "--data", "demo", "--sequence-length", 64, "--stride", 32, "--samples", 3)
    for words in ("dense", "compressed", "95% interval", " x [", "3 of 64 tokens"):
        assert words in shown.stdout


def test_a_protocol_for_models_of_another_kind_names_those_that_fit(
    quick, model_directory, language_directory, tmp_path
):
    done = run(*quick, "--out", tmp_path / "out", "--no-eval")
    assert done.returncode == 0, done.stderr
    for model in (tmp_path / "out", language_directory):
        done = run("eval", "top1", model, "--data", "demo")
        fit = f"top1 is for models that read pictures, and {model} reads text: take perplexity or lm"
        assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"error: {fit}")
    done = run("eval", "perplexity", model_directory, "--data", "demo")
    fit = (
        f"perplexity is for models that read text, and {model_directory} reads pictures: take top1, linear-probe or knn"
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"error: {fit}")


BAD = {
    "text too short": (["--sequence-length", 128, "--data", "short.txt"], "fewer than one sequence of 128"),
    "missing text": (["--data", "none.txt"], "none.txt does not exist"),
    "sequence too long": (
        ["--sequence-length", 4096],
        "--sequence-length must be at most the model's 128 positions, got 4096",
    ),
    "tokenizer without a model": (["--model", "tokenizer_only"], "has no config.json"),
    "encoder and decoder": (["--model", "t5"], "no model family fits"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line(quick, tmp_path, arguments, message):
    (tmp_path / "short.txt").write_text("the cat")
    ov.load_tokenizer(str(quick[2])).save_pretrained(tmp_path / "tokenizer_only")
    sizes = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    done = run(*quick, "--out", "out", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_is_not_compressed_again(quick, tmp_path):
    assert run(*quick, "--out", tmp_path / "out").returncode == 0
    done = run(*quick, "--model", tmp_path / "out", "--out", tmp_path / "again")
    assert done.returncode == 1
    assert "is compressed already" in done.stderr


@pytest.fixture
def task(tmp_path) -> Path:
    """A multiple-choice task in the harness's own format, with its documents in a file."""
    documents = [{"q": f"the cat sat {i}", "a": "on the mat", "b": "zzz qqq"} for i in range(12)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "cats.yaml").write_text(TASK.format(name="cats", file=tmp_path / "docs.jsonl"))
    return tmp_path


@pytest.mark.slow
def test_harness_tasks_run_on_both_models(quick, task, tmp_path):
    out = tmp_path / "out"
    assert run(*quick, "--out", out).returncode == 0
    command = ["eval", "lm", out, "--tasks", "cats", "--task-folder", task]
    done = run(*command, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for which in ("dense", "compressed"):
        assert result[which]["top1"]["cats"] == result[which]["mean"]
        assert result[which]["top1"]["cats"] * 12 / 100 == pytest.approx(
            round(result[which]["top1"]["cats"] * 12 / 100)
        )
    assert result["difference"]["cats"]["low"] <= result["difference"]["cats"]["points"]
    unknown = run("eval", "lm", out, "--tasks", "no_such_task", "--no-dense")
    assert unknown.returncode == 1
    assert "the harness has no task no_such_task" in unknown.stderr
