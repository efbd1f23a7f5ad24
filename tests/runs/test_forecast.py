import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch import nn

import oats_vision as ov
from oats_vision import checkpoint
from oats_vision.compression.settings import resolve
from oats_vision.errors import ConfigError
from oats_vision.models.record import structure_of
from oats_vision.runs.forecast import Forecast, Memory, forecast

PICTURE = torch.zeros(1, 3, 32, 32)
SETTINGS = [
    {"rate": 0.5},
    {"rate": 0.3, "pattern": "layer"},
    {"pattern": "2:4"},
    {"rate": 0.6, "rank_ratio": 0.0},
    {"rate": 0.5, "fused_qkv": "joint", "storage_dtype": "float16"},
    {"rate": 0.5, "skip": ("blocks.0", "*.mlp.fc1")},
    {"method": "magnitude"},
    {"method": "wanda", "pattern": "2:4"},
    {"method": "sparsegpt"},
    {"method": "dsnot"},
    {"method": "svd"},
    {"method": "slicegpt", "rate": 0.3},
    {"method": "gptq"},
    {"method": "rtn", "values": "int3", "symmetric": False},
    {"rate": 0.5, "values": "int6", "quality": "fast"},
    {"density": 1.0, "rank_ratio": 0.1, "values": "int2"},
]


def of(model: nn.Module, example: torch.Tensor = PICTURE, **settings) -> Forecast:
    return forecast(model, structure_of(model), resolve(**settings), example, samples=8, batch_size=4)


def measured(model: nn.Module, report: ov.CompressionReport) -> checkpoint.Sizes:
    storage = getattr(torch, report.settings.storage_dtype or "float32")
    return checkpoint.measure(model.state_dict().values(), report, storage)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_the_bytes_and_parameters_forecast_are_those_that_come(tiny_vit, pictures, settings):
    settings = settings | {"budget": "uniform"}
    told = of(tiny_vit, **settings)
    dense = sum(parameter.numel() for parameter in tiny_vit.parameters())
    fast = {"iterations": 2} if "method" not in settings else {}
    report = ov.compress(tiny_vit, pictures, **settings, **fast).report
    assert told.exact
    assert told.sizes == measured(tiny_vit, report)
    assert told.parameters == (dense, dense - report.dense_parameters + report.parameters)
    assert (told.blocks, told.tokens, told.width) == (3, 17, 48)
    if report.layers:
        assert told.linears == len(report.layers)
    assert len(told.skipped) == 12 - told.linears
    assert told.outside == ("head",)


def test_with_bits_the_bytes_are_known_about(tiny_vit, pictures):
    told = of(tiny_vit, bits=3.9)
    report = ov.compress(tiny_vit, pictures, bits=3.9, quality="fast").report
    assert not told.exact
    assert measured(tiny_vit, report).total == pytest.approx(told.sizes.total, rel=0.05)
    assert told.sizes.bits == 3.9


def test_of_the_fastest_splits_the_bytes_are_known_about(tiny_vit, pictures):
    told = of(tiny_vit, rank_ratio="auto")
    report = ov.compress(tiny_vit, pictures, rank_ratio="auto", iterations=2).report
    assert not told.exact
    assert told.sizes.total == pytest.approx(measured(tiny_vit, report).total, rel=0.05)
    assert "about" in told.lines()["bytes"]


TEXT = {"vocab_size": 100, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
SMALL = TEXT | {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LANGUAGE = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=48, n_layer=2, n_head=3, n_positions=32, **TEXT)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=3, **SMALL)),
}


@pytest.mark.parametrize("kind", LANGUAGE)
def test_language_models_are_forecast_as_they_are_prepared_and_stay_as_they_are(kind):
    torch.manual_seed(0)
    model = LANGUAGE[kind]().eval()
    names = [(name, id(module)) for name, module in model.named_modules()]
    told = of(model, torch.zeros(1, 16, dtype=torch.int64), rate=0.4, budget="uniform")
    assert [(name, id(module)) for name, module in model.named_modules()] == names
    assert not hasattr(model, "oats_vision")
    report = ov.compress(model, [torch.randint(100, (4, 16))], rate=0.4, iterations=2, budget="uniform").report
    assert told.sizes == measured(model, report)
    assert (told.unit, told.tokens, told.width) == ("sequences", 16, 48)


def test_what_the_plan_says(tiny_vit):
    settings = resolve(rate=0.5, skip=("blocks.0",), quality="fast")
    told = forecast(
        tiny_vit,
        structure_of(tiny_vit),
        settings,
        PICTURE,
        name="tiny",
        data="imagenet/train",
        samples=2048,
        held_out=64,
        batch_size=64,
        activation_memory=1e-3,
    )
    lines = told.lines()
    assert list(lines) == ["model", "linears", "bytes", "calibration", "memory", "time"]
    assert lines["model"].startswith("tiny, timm VisionTransformer: 3 blocks, 0.1 M parameters")
    assert "8 compressed by oats fast, rate 0.5" in lines["linears"]
    assert "left dense: 4 that match skip and 1 in no block (head)" in lines["linears"]
    assert lines["calibration"] == (
        "2,048 pictures from imagenet/train in batches of 64, 17 tokens each; 64 others are held out to measure what "
        "it costs"
    )
    activations = 2048 * 17 * 48 * 4
    assert (told.memory.activations, told.memory.disk) == (1_000_000, activations - 1_000_000)
    assert "of activations on disk" in lines["memory"]
    assert json.loads(json.dumps(told.to_dict()))["peak_memory"] == told.memory.peak


def test_settings_that_a_run_would_refuse_are_refused(tiny_vit):
    with pytest.raises(ConfigError, match="leaves rank 0"):
        of(tiny_vit, rank_ratio=0.001)
    with pytest.raises(ConfigError, match="is the name of no linear"):
        of(tiny_vit, skip=("nothing",))


def test_a_large_model_is_forecast_in_no_time():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch14_dinov2")
    model.to_empty(device="cpu")  # memory that is never touched
    start = time.perf_counter()
    told = of(model, torch.zeros(1, 3, 518, 518), rate=0.5)
    assert time.perf_counter() - start < 5  # well under a second where nothing else runs
    assert (told.blocks, told.linears, told.tokens, told.width) == (24, 96, 1370, 1024)


MEASURE = """
import json, sys, torch, timm, oats_vision as ov
from oats_vision.models.record import structure_of
from oats_vision.compression.settings import resolve
from oats_vision.runs.forecast import forecast
from oats_vision.machine import peak_memory

depth, batch, samples, settings = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
model = timm.create_model("vit_small_patch16_224", depth=depth, num_classes=0).eval()
picture = torch.zeros(1, 3, 224, 224)
told = forecast(model, structure_of(model), resolve(**settings), picture, samples=samples, batch_size=batch)
ov.compress(model, (torch.randn(batch, 3, 224, 224) for _ in range(samples // batch)), **settings)
print(told.memory.peak, peak_memory(torch.device("cpu")))
"""


@pytest.mark.parametrize(
    ("depth", "batch", "samples", "settings"),
    [(1, 16, 16, {"iterations": 2}), (1, 64, 128, {"method": "wanda"})],
)
@pytest.mark.slow
def test_the_memory_forecast_is_close_to_what_a_run_takes(depth, batch, samples, settings):
    arguments = [sys.executable, "-c", MEASURE, str(depth), str(batch), str(samples), json.dumps(settings)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    told, peak = map(int, done.stdout.split())
    assert 0.8 * peak < told < 1.25 * peak


def test_the_peak_is_never_below_what_was_needed_before():
    assert Memory(1, 2, 3, 100, 4, 5, so_far=5).peak == 15
    assert Memory(1, 2, 3, 100, 4, 5, so_far=50).peak == 50


def test_a_recovery_says_what_it_holds(tiny_vit):
    told = forecast(tiny_vit, structure_of(tiny_vit), resolve(rate=0.5), PICTURE, samples=64, batch_size=4, recover=30)
    weights = 3 * 12 * 48 * 48
    assert told.recovery.streams == 3 * 64 * 17 * 48 * 4
    assert told.recovery.twin == told.memory.model
    assert told.recovery.gradients > 4 * 7 * weights
    assert told.lines()["recovery"].startswith("then 30 steps a block towards the dense outputs")
    assert "recovery" not in of(tiny_vit, rate=0.5).lines()
