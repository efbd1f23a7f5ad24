"""Checkpoints whose values have few bits: format version 2."""

import hashlib
import json
from pathlib import Path

import jsonschema
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oats_vision as ov
from oats_vision.checkpoint import measure, read_config, weights
from oats_vision.checkpoint.config import config_digest, schema
from oats_vision.errors import CheckpointError, ConfigError
from oats_vision.models.loading.load import record_source
from oats_vision.models.source import ModelSource

NAME, ARGS = "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
WAYS = {
    "rtn": {"method": "rtn", "values": "int3", "group_size": 16},
    "gptq": {"method": "gptq", "symmetric": False, "act_order": True},
    "sparsegpt": {"method": "sparsegpt", "values": "int4", "rate": 0.5},
    "sparsegpt, all kept": {"method": "sparsegpt", "values": "int4", "density": 1.0},
    "oats": {"values": "int6", "rate": 0.5},
    "all kept": {"values": "int2", "density": 1.0, "rank_ratio": 0.1},
    "nf": {"values": "nf3", "rate": 0.5},
    "floating U and V": {"values": "int5", "rate": 0.5, "factors": "floating"},
}


@pytest.fixture(params=WAYS)
def result(request, tiny_vit, pictures):
    record_source(tiny_vit, ModelSource("timm", NAME, {**ARGS, "num_classes": 10}))
    return ov.compress(tiny_vit, pictures, iterations=3, **WAYS[request.param])


@torch.no_grad()
def test_round_trip_is_bit_equal_and_of_the_size_that_is_counted(result, pictures, tmp_path):
    ov.save(result.model, tmp_path / "out")
    loaded = ov.load(tmp_path / "out")
    for low_memory in (False, True):
        assert torch.equal(ov.load(tmp_path / "out", low_memory=low_memory)(pictures[0]), loaded(pictures[0]))
    tensors, reloaded = result.model.state_dict(), loaded.state_dict()
    for name, tensor in tensors.items():
        if ".sparse." in name:
            assert torch.equal(reloaded[name], tensor)  # what has few bits is held as it is stored
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["format_version"] == 2
    assert config["storage_dtype"] == "float16"
    sizes = measure(tensors.values(), result.report, torch.float16)
    on_disk = load_file(tmp_path / "out/model.safetensors")
    assert sum(tensor.nbytes for tensor in on_disk.values()) == sizes.total
    factors = sum(layer.spec.factor_bytes(2) for layer in result.report.layers)
    assert factors == sum(tensor.nbytes for name, tensor in on_disk.items() if ".low_rank." in name)
    counted = sum(8 * tensor.nbytes for name, tensor in on_disk.items() if ".sparse." in name or ".low_rank." in name)
    assert sizes.bits == pytest.approx(counted / result.report.dense_parameters)
    assert f"{sizes.bits:.2f}" in str(result)
    ov.save(loaded, tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


class _Made(TorchDispatchMode):
    """What tensors are made in memory: bytes, by the place of their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = max(self.sizes.get(storage.data_ptr(), 0), storage.nbytes())
        return made


def test_a_model_of_a_number_of_bits_takes_them_on_disk_and_in_memory(pictures, tmp_path, monkeypatch):
    args = ARGS | {"embed_dim": 96, "depth": 2}
    torch.manual_seed(0)
    model = timm.create_model(NAME, **args, num_classes=10).eval()
    record_source(model, ModelSource("timm", NAME, {**args, "num_classes": 10}))
    result = ov.compress(model, pictures, bits=3.5, quality="fast")
    counted = result.sizes.layers
    assert 8 * counted / result.report.dense_parameters == pytest.approx(3.5, rel=0.02)
    ov.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    packed = {name: tensor for name, tensor in stored.items() if ".sparse." in name or ".low_rank." in name}
    assert sum(tensor.nbytes for tensor in packed.values()) == pytest.approx(counted, rel=0.01)

    tensors = ov.load(tmp_path / "out").state_dict()
    assert all((tensors[name].dtype, tensors[name].shape) == (one.dtype, one.shape) for name, one in packed.items())
    linears = tuple(f"{layer.name}." for layer in result.report.layers)
    assert {name for name in tensors if name.startswith(linears) and not name.endswith(".bias")} == packed.keys()

    monkeypatch.setattr(weights, "_PIECE", 256)
    config = read_config(tmp_path / "out")
    with weights.WeightsFile(tmp_path / "out") as file, _Made() as made:
        read = file.read(config.weights_sha256, lambda name: None if name in packed else torch.float32)
        for name, spec in config.specs.items():
            weights.check_layer(read, name, spec, "")
    own = {tensor.untyped_storage().data_ptr() for tensor in read.values()}
    assert own <= made.sizes.keys()
    beside = max(size for place, size in made.sizes.items() if place not in own)
    assert beside <= 8 * 256 < min(read[name].nbytes for name in ("pos_embed", "blocks.0.mlp.fc1.sparse.codes"))


def test_values_that_need_no_check_stay_in_the_file(saved, monkeypatch):
    read, kept = weights.WeightsFile.read, {}
    monkeypatch.setattr(weights.WeightsFile, "read", lambda *args, **how: kept.update(read(*args, **how)) or kept)
    ov.load(saved, low_memory=True)
    held = {name.split(".", 3)[3] for name, tensor in kept.items() if ".attn.proj." in name and not tensor.is_meta}
    checked = {"sparse.scales", "sparse.zeros", "sparse.bitmask", "low_rank.U_scale", "low_rank.V_scale"}
    assert {name.removeprefix("proj.") for name in held} == checked


@torch.no_grad()
def test_a_merged_model_computes_the_same(result, pictures):
    expected = result.model(pictures[0])
    merged = ov.merge(result.model)
    torch.testing.assert_close(merged(pictures[0]), expected, rtol=1e-3, atol=1e-3)


def test_all_kept_takes_no_positions_and_a_rank_comes_on_top(tiny_vit, pictures):
    report = ov.compress(tiny_vit, pictures, iterations=2, values="int4", density=1.0, rank_ratio=0.1).report
    assert all(not layer.spec.has_bitmask and layer.spec.parts[0].rank for layer in report.layers)
    assert report.rate == pytest.approx(1 - 1 / 0.9, abs=0.02)


@pytest.fixture
def saved(tiny_vit, pictures, tmp_path) -> Path:
    record_source(tiny_vit, ModelSource("timm", NAME, {**ARGS, "num_classes": 10}))
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=2, quality="fast", values="int3", symmetric=False)
    ov.save(tiny_vit, tmp_path / "out")
    return tmp_path / "out"


def _edit(saved: Path, change) -> None:
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (saved / "config.json").write_text(json.dumps(config | {"config_sha256": config_digest(config)}))


def _tensor(name: str, change):
    name = f"blocks.0.attn.proj.{name}"

    def damage(saved: Path) -> None:
        tensors = load_file(saved / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, saved / "model.safetensors")
        digest = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
        _edit(saved, lambda config: config.update(weights_sha256=digest))

    return damage


def _set(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def _grid(**fields):
    def change(config):
        for layer in config["layers"]:
            layer["spec"]["grid"].update(fields)

    return lambda saved: _edit(saved, change)


def _spec(**fields):
    def change(config):
        for layer in config["layers"]:
            layer["spec"].update(fields)

    return lambda saved: _edit(saved, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_tensor("sparse.scales", _set(0x7F80)), "a scale is not finite"),  # infinity in bfloat16
        (_tensor("sparse.scales", _set(0x7FC0)), "a scale is not finite"),  # NaN
        (_tensor("sparse.scales", lambda t: t[:, :0].clone()), r"scales is int16 \[48, 0\], expected int16 \[48, 1\]"),
        (_tensor("sparse.scales", lambda t: t.to(torch.int32)), "scales is int32"),
        (_tensor("sparse.zeros", _set(8)), "a zero is beyond the 8 levels"),
        (_tensor("sparse.codes", lambda t: t[:-1].clone()), "codes is uint8"),
        (_tensor("sparse.bitmask", _set(255)), "the bitmask has"),
        (_grid(bits=7), "config.json is damaged: layers.0.spec.grid.bits"),
        (_tensor("low_rank.U_scale", _set(0x7F80)), "a scale is not finite"),
        (_tensor("low_rank.V_scale", _set(0x7FC0)), "a scale is not finite"),
        (_tensor("low_rank.V_scale", lambda t: t[:-1].clone()), "V_scale is int16"),
        (_tensor("low_rank.U", lambda t: t.half()), "U is float16"),
        (_spec(int8_factors=False), "U is int8"),
        (_spec(grid=None), "config.json is damaged: U and V of 8 bits are for values of few bits and a rank"),
        (_grid(bits=4), "codes is uint8"),
        (_grid(bits=5, symmetric=True, normal=True), "config.json is damaged: normal levels have 2, 3, 4 bits"),
        (_grid(normal=True), "config.json is damaged: normal levels have 2, 3, 4 bits, and no zeros of groups"),
        (_grid(group_size=24), "group_size"),
        (_grid(group_size=-16), "group_size"),
        (_grid(symmetric=True), "zeros is not of this architecture"),
        (lambda saved: _edit(saved, lambda config: config.update(format_version=3)), "reads 1 to 2: update"),
    ],
)
def test_damaged_checkpoints_are_clear_errors(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as error:
        ov.load(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"values": "int4", "method": "wanda"}, "values must be left out with method wanda"),
        ({"values": "int7"}, "values must be int8, int6, int5, int4, int3, int2, nf4, nf3 or nf2, got 'int7'"),
        ({"values": "int4", "quality": "plain"}, "values rounds by the inputs' second moments"),
        ({"values": "int4", "scaling": "none"}, "second moments: use scaling second_moment"),
        ({"values": "int4", "group_size": 20}, "group_size must be 0 or a multiple of 16, got 20"),
        ({"values": "int4", "recover": 5}, "recover trains floating values, which `values` rounds"),
        ({"method": "gptq", "rate": 0.5}, "rate must be left out with method gptq"),
        ({"method": "rtn", "density": 0.5}, "density must be left out with method rtn"),
        ({"method": "rtn", "rank_ratio": 0.1}, "rank_ratio must be 0"),
        ({"method": "gptq", "budget": "measured"}, "budget must be uniform with method gptq"),
        ({"method": "rtn", "act_order": True}, "act_order must be left out with method rtn"),
        ({"factors": "int8"}, "factors is for method oats with `values` of few bits"),
        ({"factors": "int8", "method": "gptq"}, "factors is for method oats with `values` of few bits"),
        ({"factors": "int4", "values": "int4"}, "factors must be int8 or floating, got 'int4'"),
        ({"values": "nf4", "symmetric": False}, "`symmetric=False` must be left out with values nf4"),
        ({"density": 1.0}, "density 1 is for `values` of few bits"),
        ({"density": 0.5, "method": "slicegpt"}, "density must be left out with method slicegpt"),
        ({"group_size": 32}, "group_size is for `values`"),
        ({"symmetric": False, "method": "wanda"}, "`symmetric=False` is for `values`"),
        ({"method": "rtn", "recover": 5}, "which method rtn rounds"),
        ({"density": 0.5, "rate": 0.5}, "say the same thing: leave one of them out"),
        ({"density": 0.0}, "density must be"),
        ({"density": 0.5, "pattern": "2:4"}, "density must be left out with pattern 2:4"),
        ({"density": 0.5, "budget": "measured"}, "budget must be uniform with a density"),
        ({"values": "int4", "rank_ratio": "auto"}, "rank_ratio auto is for floating values"),
    ],
)
def test_what_does_not_fit_together_is_said(tiny_vit, pictures, given, message):
    with pytest.raises(ConfigError, match=message):
        ov.compress(tiny_vit, pictures, **given)
    assert not any(type(module).__name__ == "SparseLowRankLinear" for module in tiny_vit.modules())


def test_the_schema_in_the_documentation_is_that_of_what_is_written(saved):
    file = Path(__file__).parents[2] / "docs/config.schema.json"
    made = json.dumps(schema(), indent=2) + "\n"
    assert file.read_text() == made, "write `json.dumps(schema(), indent=2)` to docs/config.schema.json"
    jsonschema.validate(json.loads((saved / "config.json").read_text()), schema())
    config = json.loads((saved / "config.json").read_text())
    config["layers"][0]["spec"]["grid"]["bits"] = 7
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, schema())
