"""The command line as a user runs it: a process of its own, its output, its exit status and its files."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import oats_vision as ov
from command import run
from oats_vision.data.pictures import load_pictures
from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ModelError, OatsVisionError
from oats_vision.evaluation.models import Models
from oats_vision.evaluation.top1 import evaluate_top1
from oats_vision.models.loading.load import record_source, source_of
from oats_vision.runs.config import RunConfig
from oats_vision.runs.run import run as run_here


@pytest.fixture
def quick(model_directory) -> list[object]:
    options = ["--data", "demo", "--samples", 20, "--eval-data", "demo", "--eval-samples", 40, "--iterations", 5]
    return ["compress", "--model", model_directory, *options]


@pytest.mark.slow
def test_demo_at_rate_half_is_within_a_point_of_dense_and_small(tmp_path):
    """The README's main job, whole: bare `compress` on the demo."""
    done = run("compress", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["settings"]["rate"] == 0.5
    assert result["settings"]["rank_ratio"] == 0.2
    dense, ours = result["top1"]["dense"], result["top1"]["compressed"]
    assert dense["top1"] > 90
    assert ours["top1"] > dense["top1"] - 1.0
    assert dense["pictures"] == ours["pictures"] == 4000
    assert result["bytes"]["layer_ratio"] <= 0.60
    assert result["bytes"]["files"]["model.safetensors"] < 1.01 * result["bytes"]["total"]
    out = tmp_path / "oats_compressed"
    files = ["config.json", "layers.jsonl", "model.safetensors", "report.html", "report.json", "run.log"]
    assert sorted(file.name for file in out.iterdir()) == files
    assert json.loads((out / "report.json").read_text())["top1"] == result["top1"]

    again = run("eval", "top1", out, "--data", "demo", "--json", "--no-dense")
    assert json.loads(again.stdout)["compressed"]["top1"] == pytest.approx(ours["top1"])


def test_table_inspect_eval_and_merge(quick, tmp_path):
    out = tmp_path / "out"
    done = run(*quick, "--out", out, "--merge")
    assert done.returncode == 0, done.stderr
    for words in ("top-1", "parameters", "bytes on disk", "compressed layers", "decomposing", "Written:"):
        assert words in done.stdout
    config = json.loads((out / "config.json").read_text())
    assert config["storage_dtype"] == "float16"  # the checkpoint's own
    shown = run("inspect", out)
    assert "blocks.1.mlp.fc2" in shown.stdout
    assert "rank_ratio" in shown.stdout
    assert json.loads(run("inspect", out, "--json").stdout)["bytes"]["layer_ratio"] < 0.6
    scores = [
        json.loads(run("eval", "top1", model, "--data", "demo", "--samples", 300, "--json").stdout)[which]["top1"]
        for model, which in ((out, "compressed"), (out / "merged", "dense"))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1.0)  # the merge is rounded to fp16 once more


def test_config_file_and_flags_that_override_it(quick, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"rate": 0.3, "seed": 7, "out": str(tmp_path / "out")}))
    done = run(*quick, "--config", tmp_path / "run.yaml", "--rate", 0.4, "--json")
    result = json.loads(done.stdout)
    assert result["run"]["rate"] == 0.4
    assert result["run"]["seed"] == 7
    assert (tmp_path / "out").is_dir()


@pytest.mark.slow
def test_seed_decides_the_result(quick, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*quick, "--seed", seed, "--out", tmp_path / name).returncode == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_models_lists_families_and_aliases():
    listed = json.loads(run("models", "--json").stdout)
    assert {"timm_vit", "timm_eva", "hf_clip", "dinov2_hub"} <= set(listed["families"])
    assert listed["aliases"]["dinov2_vitl14"] == "vit_large_patch14_dinov2.lvd142m"
    assert "vit_base_patch14_dinov2.lvd142m" in run("models", "--search", "dinov2").stdout


BAD = {
    "rate 0": (["--rate", 0], "--rate must be in (0, 1), got 0"),
    "rate 1": (["--rate", 1], "--rate must be in (0, 1), got 1"),
    "rate 1.5": (["--rate", 1.5], "--rate must be in (0, 1), got 1.5"),
    "rate NaN": (["--rate", "nan"], "--rate must be a finite number, in (0, 1), got"),
    "rank ratio below 0": (["--rank-ratio=-0.5"], "--rank-ratio must be in [0, 1] or auto, got -0.5"),
    "rank ratio above 1": (["--rank-ratio", 1.5], "--rank-ratio must be in [0, 1] or auto, got 1.5"),
    "rank 0": (["--rank-ratio", 0.0001], "leaves rank 0"),
    "no non-zeros": (["--rank-ratio", 0.9999], "leaves no non-zeros"),
    "pattern": (["--pattern", "4:2"], "pattern must be"),
    "method": (["--method", "magic"], "--method must be oats, dsnot, gptq, magnitude"),
    "rank ratio of a baseline": (["--method", "wanda", "--rank-ratio", 0.3], "--rank-ratio must be 0 (or left out)"),
    "pattern of slicegpt": (["--method", "slicegpt", "--pattern", "2:4"], "pattern must be left out"),
    "merge of slicegpt": (["--method", "slicegpt", "--merge"], "--merge is for methods that keep"),
    "refit of a baseline": (["--method", "wanda", "--refit"], "refit is for method oats"),
    "unknown model": (["--model", "vit_none"], "unknown model 'vit_none'"),
    "unsupported model": (["--model", "resnet18", "--no-pretrained"], "no model family fits"),
    "missing data": (["--data", "no/such/folder"], "does not exist"),
    "device": (["--device", "warp:9"], "--device 'warp:9' is not available"),
    "samples": (["--samples", 0], "--samples must be at least 1, got 0"),
    "dtype": (["--dtype", "int3"], "--dtype must be float32, float16 or bfloat16, got 'int3'"),
    "missing config": (["--config", "none.yaml"], "--config none.yaml"),
    "missing parent": (["--out", "no/such/parent"], "does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(quick, tmp_path, arguments, message):
    done = run(*quick, "--out", "out", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_folders_bad_config_and_existing_output(quick, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "run.yaml").write_text("rate: half\nspeed: 3\n")
    (tmp_path / "taken").mkdir()
    for arguments, messages in (
        (["--data", tmp_path / "empty", "--out", "out"], ["empty has no picture"]),
        (["--data", tmp_path / "broken", "--out", "out"], ["no picture could be read (1 skipped)"]),
        (
            ["--config", "run.yaml", "--out", "out"],
            ["run.yaml", "rate must be in (0, 1), got 'half'", "speed is not a setting"],
        ),
        (["--out", "taken"], ["taken exists", "--overwrite"]),
    ):
        done = run(*quick, *arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert all(message in done.stderr for message in messages), done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken", "empty", "run.yaml", "taken"]


def test_labels_that_do_not_fit_the_head(model_directory, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "set" / name / "x.png")
    done = run("eval", "top1", model_directory, "--data", tmp_path / "set")
    assert done.returncode == 1
    assert "the data has 2 classes and the model's head has 10" in done.stderr


def test_a_backbone_has_no_top1(tmp_path, pictures):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a" / "x.png")
    model, transform = ov.load_model("vit_tiny_patch16_224", pretrained=False, image_size=32)
    model.reset_classifier(0)
    batches = load_pictures(str(tmp_path), transform, batch_size=1, labelled=True)
    with pytest.raises(ModelError, match="no classification head"):
        evaluate_top1(model, batches)


def test_damaged_checkpoint_is_one_line(quick, tmp_path):
    assert run(*quick, "--out", tmp_path / "out").returncode == 0
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    for command in (["inspect", tmp_path / "out"], ["eval", "top1", tmp_path / "out", "--data", "demo"]):
        done = run(*command)
        assert done.returncode == 1
        assert "is damaged" in done.stderr
        assert "Traceback" not in done.stderr


def test_files_of_others_are_seen_before_the_work(quick, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps({"format": "oats_vision"}))
    (tmp_path / "out" / "thesis[1].md").write_text("precious")
    done = run(*quick, "--out", tmp_path / "out", "--overwrite")
    assert done.returncode == 1
    assert "holds thesis[1].md, which is not ours" in done.stderr
    assert "%" not in done.stderr


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_stopped_one_leaves_only_what_it_goes_on_from(quick, tmp_path):
    (tmp_path / "tmp").mkdir()
    slow = [*quick, "--quality", "fast", "--iterations", 10**6, "--tolerance", 0, "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "oats_vision", *map(str, slow)]
    first = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    )
    while not (tmp_path / ".out.lock").exists():
        assert first.poll() is None
        time.sleep(0.1)
    second = run(*quick, "--out", tmp_path / "out")
    assert second.returncode == 1
    assert "is being written by another run" in second.stderr
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "Traceback" not in errors
    assert errors.count("stopped by SIGINT") == 1
    assert {entry.name for entry in tmp_path.iterdir()} - {"out.partial"} == {"tmp"}  # it may not have begun
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_as_errors_do(number):
    """Context managers that hold temporary files see an exception."""
    code = (
        "import os, oats_vision.cli as cli, oats_vision.cli.commands as commands\n"
        "def app(**options):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)}); __import__('time').sleep(9)\n"
        "    finally:\n"
        "        print('cleaned')\n"
        "commands.app = app\n"
        "cli.main()\n"
    )
    where = Path(__file__).parent
    hangs_up = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731  # if the tests run under nohup
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=where, preexec_fn=hangs_up
    )
    assert (done.returncode, done.stdout) == (128 + number, "cleaned\n")
    assert done.stderr == f"stopped by {number.name}\n"


@pytest.mark.parametrize("part", ["PreparedRun.score", "save_plain", "checkpoint.write_json"])
def test_a_failure_after_the_checkpoint_is_no_lost_run(model_directory, tmp_path, monkeypatch, part):
    def full(model, *args, **kwargs):
        if part != "PreparedRun.score" or args[1] != "dense":
            raise OSError("No space left on device")

    monkeypatch.setattr(f"oats_vision.runs.run.{part}", full)
    out = tmp_path / "out"
    options = {"data": "demo", "samples": 8, "eval_samples": 8, "iterations": 1, "merge": True}
    with pytest.raises(
        CheckpointError, match=r"is complete; what comes after it failed: .*(No space left|the disk is full)"
    ) as error:
        run_here(RunConfig(model=str(model_directory), out=out, **options), Display())
    assert f"oats-vision eval top1 {out}" in str(error.value)
    ov.load(out)
    assert not [entry for entry in out.iterdir() if entry.name.startswith(".")]
    assert not (out / "merged").exists()


def test_a_comparison_is_with_the_weights_that_were_compressed(model_directory, pictures, tmp_path, caplog):
    dense = tmp_path / "dense"
    shutil.copytree(model_directory, dense)
    model, _ = ov.load_model(dense)
    ov.compress(model, [torch.randn(4, 3, 28, 28)], rate=0.5, iterations=1)
    ov.save(model, tmp_path / "out")

    said: list[str] = []

    def load(name=None):
        return Models(str(tmp_path / "out"), name, device="cpu", say=said.append).loaders["dense"]()

    load()
    assert said == [
        f"the dense model that {tmp_path / 'out'} was made from: {dense} (`dense` gives another, `no_dense` none)"
    ]
    tensors = load_file(dense / "model.safetensors")
    tensors["head.bias"][0] += 1
    save_file(tensors, dense / "model.safetensors")
    with pytest.raises(ModelError, match="they have changed since"):
        load()
    load(str(dense))
    assert "the weights of" in caplog.text


@pytest.mark.parametrize("where", ["folder", "checkpoint"])
def test_a_checkpoint_does_not_name_code_as_its_dense_model(model_directory, tmp_path, where):
    model, _ = ov.load_model(model_directory)
    source = source_of(model)
    ov.compress(model, [torch.randn(4, 3, 28, 28)], rate=0.5, iterations=1)
    name = f"hub:{tmp_path}:entry" if where == "folder" else str(tmp_path / "out")
    record_source(model, dataclasses.replace(source, origin={"name": name}))
    ov.save(model, tmp_path / "out")
    models = Models(str(tmp_path / "out"), device="cpu", trust_remote_code=True)
    with pytest.raises(OatsVisionError, match="names code in a folder" if where == "folder" else "compressed already"):
        models.loaders["dense"]()
