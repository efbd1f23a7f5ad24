"""Files from a stranger: nothing that they name is run, nothing that they ask for is allocated."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import hostile
import oats_vision as ov
from oats_vision.analysis.compared import ComparedModel
from oats_vision.errors import CheckpointError, ModelError, OatsVisionError
from tiny import HF


@pytest.mark.slow
def test_random_changes_give_clear_errors_or_finite_outputs():
    """In a process of its own, whose memory is measured; more by hand: python tests/helpers/hostile.py --help."""
    done = subprocess.run(
        [sys.executable, hostile.__file__, "--mutations", os.environ.get("OATS_VISION_MUTATIONS", "500")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(hostile.__file__).parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "WRONG" not in done.stdout


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    for name in ("rotary", "Hugging Face", "language model"):
        hostile.make(name, folder / name)
    return {name: folder / name for name in ("rotary", "Hugging Face", "language model")}


@pytest.fixture
def changed(originals, tmp_path):
    """Copy an original, let a function change its config, and give it digests that fit."""

    def change(name, edit) -> Path:
        for file in originals[name].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        edit(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        hostile.repair(tmp_path)
        return tmp_path

    return change


CANARY = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Model: pass\n"


@pytest.mark.parametrize(
    "transform",
    [
        {"image_processor_type": "pipeline", "task": "x", "trust_remote_code": True},
        {"image_processor_type": "AutoImageProcessor"},
        {"image_processor_type": "ViTModel"},
        {"image_processor_type": "OneFormerImageProcessor", "repo_path": ".", "class_info_file": "config.json"},
        {"image_processor_type": "ViTImageProcessor", "auto_map": {"AutoImageProcessor": "code.Model"}},
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 10**6, "width": 10**6}},
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 1e6, "width": 1e6}},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 300}, "crop_pct": 1e-3},
        {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 4096, "max_num_patches": 4096},
        {"image_processor_type": ["ViTImageProcessor"]},
        {},
    ],
)
def test_a_transform_is_made_of_image_processors_only(changed, transform):
    path = changed(
        "Hugging Face", lambda config: config["source"].update(transform={"kind": "huggingface"} | transform)
    )
    (path / "code.py").write_text(CANARY)
    with pytest.raises(ModelError, match="transform: ") as error:
        ov.load_transform(path)
    assert "\n" not in str(error.value)
    assert not (path / "ran").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"interpolation": "os.system"},
        {"input_size": [3, 10**6, 10**6]},
        {"mean": [float(10**400 > 0), "x", 1]},
        {"auto_augment": "rand"},
        {"crop_pct": 1e-4},
    ],
)
def test_a_transform_of_timm_has_fields_of_its_own(changed, fields):
    path = changed("rotary", lambda config: config["source"]["transform"].update(fields))
    with pytest.raises(ModelError, match="transform: "):
        ov.load_transform(path)


@pytest.mark.parametrize("name", ["pipeline", "Trainer", "AutoModel", "PreTrainedModel", "TimmWrapperModel", "_x", ""])
def test_only_model_classes_of_a_known_family_are_built(changed, name):
    path = changed("Hugging Face", lambda config: config["source"].update(name=name))
    with pytest.raises(OatsVisionError, match=r"cannot be rebuilt|is damaged"):
        ov.load(path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map in a configuration leads to code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config in a configuration"),
        ({"attn_implementation": "org/kernel"}, "attn_implementation in a configuration"),
        ({"num_attention_heads": -3}, "num_attention_heads in a configuration must be like"),
        ({"layer_norm_eps": -0.5}, "layer_norm_eps in a configuration must be like"),
        ({"num_hidden_layers": 10**7}, "asks for 10000000 blocks"),
    ],
)
def test_a_hugging_face_configuration_leads_nowhere(changed, args, message):
    path = changed("Hugging Face", lambda config: config["source"]["args"].update(args))
    (path / "code.py").write_text(CANARY)
    with pytest.raises(OatsVisionError, match=message):
        ov.load(path)
    assert not (path / "ran").exists()


def test_the_form_of_outputs_is_not_chosen_by_a_file(changed):
    path = changed("language model", lambda config: config["source"]["args"].update(return_dict=False))
    assert ov.load(path)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_private_fields_of_a_configuration_are_left_out(changed):
    """Attention of a hub's kernel, by the attribute that transformers keeps it in."""
    hidden = {"_attn_implementation": "org/kernel", "_attn_implementation_internal": "org/kernel", "num_labels": 10**8}
    model = ov.load(changed("Hugging Face", lambda config: config["source"]["args"].update(hidden)))
    assert "/" not in str(model.config._attn_implementation)


class _Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_small_patch16_dinov3", {"checkpoint_path": "x.pth"}, "'checkpoint_path' is not an argument"),
        ("vit_small_patch16_dinov3", {"pretrained_cfg": {"file": "x.pth"}}, "'pretrained_cfg' is not an argument"),
        ("vit_small_patch16_dinov3", {"features_only": True}, "'features_only' is not an argument"),
        ("vit_small_patch16_dinov3", {"norm_layer": "os.system"}, "norm_layer of a timm architecture must be"),
        ("vit_small_patch16_dinov3", {"attn_type": "os.system('x')"}, "must be a number or a word"),
        ("local-dir:x", {}, "is not an architecture of timm"),
        ("hf-hub:org/name", {}, "is not an architecture of timm"),
    ],
)
def test_a_timm_architecture_is_a_name_and_numbers(changed, monkeypatch, name, args, message):
    def edit(config):
        config["source"]["name"] = name
        config["source"]["args"].update(args)

    path = changed("rotary", edit)
    monkeypatch.chdir(path)
    Path("x.pth").write_bytes(pickle.dumps(_Payload()))
    with pytest.raises(ModelError, match=message):
        ov.load(path)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("rotary", {"depth": 10**5}),
        ("rotary", {"depth": 10**7}),
        ("rotary", {"num_reg_tokens": 10**9}),
        ("rotary", {"embed_dim": 3 * 10**6}),
        ("Hugging Face", {"image_size": 10**6}),
        ("Hugging Face", {"intermediate_size": 10**9}),
        ("language model", {"num_hidden_layers": 10**6}),
        ("language model", {"vocab_size": 10**10}),
        ("language model", {"head_dim": 10**10}),
    ],
)
def test_what_is_too_large_is_refused_at_once(changed, name, args):
    path = changed(name, lambda config: config["source"]["args"].update(args))
    start = time.perf_counter()
    with pytest.raises(OatsVisionError):
        ov.load(path)
    assert time.perf_counter() - start < 3  # a tenth of it on a free machine


@pytest.mark.parametrize("dense", ["timm", "wrapped"])
def test_a_dense_directory_leads_to_no_other_file(tmp_path, monkeypatch, model_directory, dense):
    """Its configuration names a pickled file; only the weights beside it are read."""
    monkeypatch.chdir(tmp_path)
    config = json.loads((model_directory / "config.json").read_text())
    (tmp_path / "x.pth").write_bytes(pickle.dumps(_Payload()))
    leading = {"file": str(tmp_path / "x.pth"), "url": "https://x/y.pth", "hf_hub_id": "org/x", "custom_load": True}
    config["pretrained_cfg"] |= leading | {"source": "file"}
    if dense == "wrapped":
        config["model_type"] = "timm_wrapper"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has none of model\.safetensors"):
        ov.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((model_directory / "model.safetensors").read_bytes())
    model, _ = ov.load_model(tmp_path)
    assert torch.equal(model.head.weight, load_file(tmp_path / "model.safetensors")["head.weight"].float())
    assert not Path("ran").exists()


def test_a_pickled_dense_model_runs_nothing(tmp_path, monkeypatch, model_directory):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text((model_directory / "config.json").read_text())
    torch.save({"head.weight": _Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        ov.load_model(tmp_path)
    assert not Path("ran").exists()
    torch.save(load_file(model_directory / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert ov.load_model(tmp_path)[0].head.weight.shape == (10, 48)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["pipeline"]}, "no model family fits|cannot be loaded"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "is quantised already"),
    ],
)
def test_a_hugging_face_directory_names_no_other_class(tmp_path, fields, message):
    hf.BertModel(
        hf.BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=1, intermediate_size=12, vocab_size=9)
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ModelError, match=message):
        ov.load_model(str(tmp_path))


def test_a_wrapper_of_timm_that_names_no_architecture_is_not_built(tmp_path, monkeypatch):
    """Its arguments would reach timm whole, and lead it to a pickled file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(pickle.dumps(_Payload()))
    opened = []
    monkeypatch.setattr("timm.models._factory.load_checkpoint", lambda *args, **kwargs: opened.append(args))
    fields = {"model_type": "timm_wrapper", "architectures": ["X"], "label_names": ["a", "b"], "num_classes": 2}
    fields["model_args"] = {"checkpoint_path": str(tmp_path / "x.pth")}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"timm_wrapper|cannot be loaded"):
        ov.load_model(tmp_path)
    assert not opened
    assert not Path("ran").exists()


def test_an_unknown_family_is_not_built(tmp_path, monkeypatch):
    config = hf.BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=1, intermediate_size=12)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(hf.AutoModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was built"))
    with pytest.raises(ModelError, match="no model family fits bert"):
        ov.load_model(tmp_path)


def test_a_configuration_without_its_class_is_that_of_its_kind(tmp_path):
    hf.ViTModel(hf.ViTConfig(**HF)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(ov.load_model(tmp_path)[0]) is hf.ViTModel


def test_unmerged_adapters_are_not_followed_to_their_base(tmp_path):
    hf.ViTForImageClassification(hf.ViTConfig(**HF)).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))
    with pytest.raises(ModelError, match="merge them first"):
        ov.load_model(tmp_path)


def test_a_value_that_overflows_or_is_nan_names_its_tensor(originals, tmp_path):
    from safetensors.torch import save_file

    for value in (float("nan"), float("inf"), 1e30):
        for file in originals["rotary"].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["norm.weight"][3] = value
        save_file(tensors, tmp_path / "model.safetensors")
        hostile.repair(tmp_path)
        with pytest.raises(CheckpointError, match=r"norm\.weight holds"):
            ov.load(tmp_path)


def test_the_digest_of_config_json_is_checked_where_it_is(originals, tmp_path):
    for file in originals["rotary"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"samples": 7}, indent=7))
    with pytest.raises(CheckpointError, match="config_sha256 is not that of its other fields"):
        ov.load(tmp_path)
    del config["config_sha256"]  # as in checkpoints that were written before it
    (tmp_path / "config.json").write_text(json.dumps(config))
    ov.load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([0, 2**70], "no sizes"),
        ([0, 2**48, 2**48], "a tensor of shape"),
        ([0] + [2**48] * 100_000, "a tensor of shape"),
    ],
    ids=["one size", "two sizes", "many sizes"],
)
def test_an_empty_tensor_of_an_endless_shape_is_refused(originals, tmp_path, shape, message):
    """Its bytes are right: there are none."""
    for file in originals["rotary"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:size])
    end = max(fields["data_offsets"][1] for name, fields in header.items() if name != "__metadata__")
    header["more"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
    changed = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(changed).to_bytes(8, "little") + changed + weights[size:])
    hostile.repair(tmp_path)
    for read in (ov.load, ComparedModel.read):
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match=message) as error:
            read(tmp_path)
        assert len(str(error.value)) < 1000
        assert time.perf_counter() - start < 2  # a product of many sizes takes quadratic time
