import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import oats_vision as ov
from oats_vision.errors import ConfigError, ModelError
from oats_vision.models.loading.load import load_model
from oats_vision.models.record import record_of

BATCHES = {
    "pictures": list(torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(1)).split(4)),
    "text": list(torch.randint(0, 300, (8, 12), generator=torch.Generator().manual_seed(1)).split(4)),
}


@pytest.fixture
def sharded_directory(language_directory, tmp_path):
    """The language model in several files."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(language_directory, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


@pytest.fixture(params=["pictures", "text"])
def directory(request, model_directory):
    return model_directory if request.param == "pictures" else request.getfixturevalue("sharded_directory")


def _batches(model):
    return BATCHES["text" if hasattr(model, "lm_head") else "pictures"]


def _logits(output):
    return getattr(output, "logits", output)


@torch.no_grad()
def test_blocks_are_read_when_they_are_called_and_one_is_in_memory(directory):
    whole, _ = load_model(directory)
    model, _ = load_model(directory, low_memory=True)
    blocks = record_of(model).on_disk.blocks
    outside = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert outside
    assert not any(name.startswith(tuple(blocks)) for name in outside)
    x = _batches(model)[0]
    assert torch.equal(_logits(model(x)), _logits(whole(x)))
    there = [name for name, block in blocks.items() if not any(p.is_meta for p in block.parameters())]
    assert there == [list(blocks)[-1]]
    assert record_of(model).source == record_of(whole).source  # with the digest of the weights


@torch.no_grad()
def test_several_threads_may_call_one_model(model_directory):
    whole, _ = load_model(model_directory)
    model, _ = load_model(model_directory, low_memory=True)
    batches = BATCHES["pictures"] * 8
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(torch.no_grad()(model), batches))
    assert all(torch.equal(logits, whole(x)) for logits, x in zip(found, batches, strict=True))


@torch.no_grad()
def test_a_model_in_files_is_pickled(model_directory):
    model, _ = load_model(model_directory, low_memory=True)
    again = pickle.loads(pickle.dumps(model))
    x = BATCHES["pictures"][0]
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"quality": "best"},
        {"quality": "fast", "storage_dtype": "bfloat16", "budget": "owl"},
        {"quality": "plain", "budget": "alphapruning", "skip": "*.0"},
        {"quality": "fast", "values": "int4"},
    ],
    ids=["best", "fast, owl, rounded", "plain, alphapruning", "int4"],
)
def test_the_compressed_files_are_those_of_the_whole_model(directory, settings, tmp_path):
    for name, low_memory in (("whole", False), ("read", True)):
        model, _ = load_model(directory, low_memory=low_memory)
        result = ov.compress(model, _batches(model), iterations=3, held_out=_batches(model), **settings)
        result.save(tmp_path / name)
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if "blocks.0" in name)
    whole, read = (tmp_path / name / "model.safetensors" for name in ("whole", "read"))
    assert whole.read_bytes() == read.read_bytes()
    assert result.cost is not None
    assert "block by block" in result.untimed


@torch.no_grad()
def test_a_checkpoint_is_read_block_by_block_too(directory, tmp_path):
    model, _ = load_model(directory)
    x = _batches(model)[0]
    ov.compress(model, _batches(model), quality="plain", iterations=2).save(tmp_path / "out")
    loaded = ov.load(tmp_path / "out", low_memory=True)
    assert record_of(loaded).on_disk.at_hand == ""
    assert torch.equal(_logits(loaded(x)), _logits(ov.load(tmp_path / "out")(x)))
    ov.save(loaded, tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_renamed_tensors_stay_in_their_file(model_directory, tmp_path):
    tensors = load_file(model_directory / "model.safetensors")
    save_file({f"timm_model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model_directory / "config.json").read_text())
    model, _ = load_model(tmp_path, low_memory=True)
    places = record_of(model).on_disk.places
    assert places["blocks.0.attn.qkv.weight"].name == "timm_model.blocks.0.attn.qkv.weight"
    assert places.keys() == {name for name, parameter in model.named_parameters() if parameter.is_meta}


def test_values_that_are_not_finite_are_found(model_directory, tmp_path):
    tensors = load_file(model_directory / "model.safetensors")
    tensors["blocks.1.mlp.fc1.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model_directory / "config.json").read_text())
    model, _ = load_model(tmp_path, low_memory=True)
    with pytest.raises(ModelError, match=r"blocks\.1\.mlp\.fc1\.weight holds values that are NaN"):
        ov.compress(model, BATCHES["pictures"], quality="plain")


def test_a_copy_does_not_read_into_the_original(model_directory):
    model, _ = load_model(model_directory, low_memory=True)
    on_disk = record_of(model).on_disk
    block = on_disk.copy_of("blocks.1")
    assert "forward" not in vars(block)
    on_disk.bring("blocks.0")
    assert not any(parameter.is_meta for parameter in block.parameters())
    assert record_of(copy.deepcopy(model)).on_disk is on_disk


def test_a_file_that_is_gone_is_said(model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "model")
    model, _ = load_model(tmp_path / "model", low_memory=True)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"blocks\.0\..* cannot be read from .*model\.safetensors, which must stay"):
        ov.compress(model, BATCHES["pictures"], quality="plain")


def test_what_cannot_be_read_block_by_block_is_said(model_directory, tmp_path):
    with pytest.raises(ModelError, match="cannot be read block by block"):
        load_model(model_directory, pretrained=False, low_memory=True)
    model, _ = load_model(model_directory, low_memory=True)
    with pytest.raises(ConfigError, match="slicegpt changes all blocks at once"):
        ov.compress(model, BATCHES["pictures"], method="slicegpt")


def test_without_a_word_it_is_a_matter_of_room(model_directory, monkeypatch):
    from oats_vision.models.loading import load

    for free, read in ((1e12, False), (1e5, True)):
        monkeypatch.setattr(load, "available_memory", lambda device, free=free: free)
        model, _ = load_model(model_directory, low_memory=None)
        assert (record_of(model).on_disk is not None) == read
