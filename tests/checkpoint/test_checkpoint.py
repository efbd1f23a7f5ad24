import copy
import errno
import hashlib
import json
import math
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import oats_vision as ov
from oats_vision.checkpoint import locked, measure
from oats_vision.checkpoint import place as checkpoint_place
from oats_vision.checkpoint.config import config_digest
from oats_vision.checkpoint.weights import check_bitmask
from oats_vision.errors import CheckpointError, ConfigError, ModelError
from oats_vision.models.loading.load import record_source, source_of
from oats_vision.models.source import ModelSource
from oats_vision.nn.sparse_low_rank import LayerSpec, PartSpec

NAME, ARGS = "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


@pytest.fixture
def compressed(tiny_vit, pictures):
    record_source(tiny_vit, ModelSource("timm", NAME, {**ARGS, "num_classes": 10}))
    ov.compress(tiny_vit, pictures, rate=0.5, rank_ratio=0.2, iterations=3, storage_dtype="float16")
    return tiny_vit


@pytest.fixture
def saved(compressed, tmp_path) -> Path:
    ov.save(compressed, tmp_path / "out")
    return tmp_path / "out"


def _edit(saved: Path, **fields) -> None:
    """Change fields and keep the digest right, as a malicious writer would."""
    config = json.loads((saved / "config.json").read_text()) | fields
    (saved / "config.json").write_text(json.dumps(config | {"config_sha256": config_digest(config)}))


def _rewrite(saved: Path, change) -> None:
    """Change the tensors and keep the digest right, as a malicious or buggy writer would."""
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    _edit(saved, weights_sha256=hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest())


def test_a_buffer_that_no_file_can_hold_is_named_and_nothing_is_written(tiny_vit, pictures, tmp_path):
    tiny_vit.register_buffer("rotations", torch.ones(4, dtype=torch.complex64))
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=1)
    with pytest.raises(CheckpointError, match="rotations is complex64, which checkpoints do not hold: convert it"):
        ov.save(tiny_vit, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_round_trip_is_bit_equal_and_small(compressed, saved, pictures):
    loaded = ov.load(saved)
    assert torch.equal(loaded(pictures[0]), compressed(pictures[0]))
    assert all(not parameter.is_meta for parameter in loaded.parameters())
    sizes = measure(compressed.state_dict().values(), ov.record(compressed).report, torch.float16)
    # non-zeros 0.4, U and V 0.1, and one bit a position: 1/16 in fp16; a little less for rounding down
    assert sizes.layer_ratio <= 0.5 + 1 / 16
    on_disk = load_file(saved / "model.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in on_disk.values()) == sizes.total
    assert {tensor.dtype for tensor in on_disk.values()} == {torch.float16, torch.uint8}


@torch.no_grad()
def test_a_loaded_model_can_be_saved_again(saved, tmp_path, pictures):
    ov.save(ov.load(saved), tmp_path / "again")
    assert torch.equal(ov.load(saved)(pictures[0]), ov.load(tmp_path / "again")(pictures[0]))


@torch.no_grad()
def test_a_loaded_model_does_not_depend_on_its_file(compressed, saved, pictures):
    loaded = ov.load(saved)
    with (saved / "model.safetensors").open("rb+") as file:
        file.write(b"\xff" * 5000)
        file.truncate(6000)
    assert torch.equal(loaded(pictures[0]), compressed(pictures[0]))


def test_a_loaded_model_asks_for_no_gradients(saved, pictures):
    loaded = ov.load(saved)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded(pictures[0]).requires_grad


@torch.no_grad()
def test_a_float64_model_stays_one(tiny_vit, pictures, tmp_path):
    tiny_vit.double()
    record_source(tiny_vit, ModelSource("timm", NAME, {**ARGS, "num_classes": 10}))
    ov.compress(tiny_vit, [batch.double() for batch in pictures], rate=0.5, iterations=2)
    ov.save(tiny_vit, tmp_path / "out")
    loaded = ov.load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert torch.equal(loaded(pictures[0].double()), tiny_vit(pictures[0].double()))


@torch.no_grad()
@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_the_model_in_a_wrapper_is_saved(compressed, tmp_path, pictures, wrap):
    wrapped = wrap(compressed)
    ov.save(wrapped, tmp_path / "out")
    assert torch.equal(ov.load(tmp_path / "out")(pictures[0]), compressed(pictures[0]))


def _interrupted(model):
    model.set_submodule("blocks.2.mlp.fc2", model.blocks[2].mlp.fc2.merge())


def _offloaded(model):
    model.blocks[1].norm1.to("meta")


def _not_finite(model):
    model.head.bias.data[2] = float("nan")


def _overflow(model):
    model.norm.weight.data[2] = 1e6  # stored in float16


def _endless_configuration(model):
    source = source_of(model)
    record_source(model, replace(source, args=source.args | {"limit": (0.0, math.inf)}))


def _other_pooling(model):
    model.global_pool = "avg"


def _other_head(model):
    model.head = torch.nn.Linear(48, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_interrupted, r"not those of its report \(such as blocks\.2\.mlp\.fc2\)"),
        (ov.merge, "was merged and is dense again: save it before the merge"),
        (_offloaded, r"blocks\.1\.norm1\.weight is on the meta device"),
        (_not_finite, r"head\.bias holds values that are NaN or infinite"),
        (_overflow, r"cannot be stored in float16: norm\.weight"),
        (_endless_configuration, "configuration holds infinity or NaN"),
        (_other_pooling, r"fc_norm\.weight is missing"),
        (_other_head, r"head\.weight is \[3, 48\], expected \[10, 48\].*say so in model\.num_classes"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(compressed, tmp_path, change, message):
    change(compressed)
    with pytest.raises(CheckpointError, match=message):
        ov.save(compressed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_the_model_tells_of_is_saved(tiny_vit, pictures, tmp_path):
    source = ModelSource("timm", NAME, {**ARGS, "num_classes": 10}, label_names=list("abcdefghij"))
    record_source(tiny_vit, source)
    tiny_vit.reset_classifier(3)
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=1)
    ov.save(tiny_vit, tmp_path / "out")
    loaded = ov.load(tmp_path / "out")
    assert loaded(pictures[0]).shape == (4, 3)
    assert source_of(loaded).label_names is None  # they were those of the old head


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
@torch.no_grad()
def test_a_mask_may_hold_the_lowest_numbers(tiny_vit, pictures, tmp_path, lowest):
    class Masked(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.register_buffer("mask", torch.full((3, 3), lowest).triu(1))

        def forward(self, x):
            return self.inner(x) + self.mask.exp().sum() - 6

    model, fresh = Masked(tiny_vit), Masked(copy.deepcopy(tiny_vit))
    ov.compress(model, pictures, rate=0.5, iterations=1, storage_dtype="float16")
    ov.save(model, tmp_path / "out")
    loaded = ov.load(tmp_path / "out", model=fresh)
    torch.testing.assert_close(loaded(pictures[0]), model(pictures[0]), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_loading_does_not_depend_on_the_default_device(compressed, saved, pictures):
    with torch.device("meta"):
        loaded = ov.load(saved, device="cpu")
    torch.testing.assert_close(loaded(pictures[0]), compressed(pictures[0]))


def test_threads_may_load_at_once(saved, pictures):
    before = torch.nn.Module.register_parameter, torch.nn.Module.register_buffer
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(ov.load, [saved] * 8))
    assert (torch.nn.Module.register_parameter, torch.nn.Module.register_buffer) == before
    assert all(torch.equal(model(pictures[0]), loaded[0](pictures[0])) for model in loaded)


@torch.no_grad()
def test_merged_model_is_dense_and_computes_the_same(compressed, pictures):
    expected = compressed(pictures[0])
    merged = ov.merge(compressed)
    assert not any(isinstance(module, ov.SparseLowRankLinear) for module in merged.modules())
    torch.testing.assert_close(merged(pictures[0]), expected, rtol=1e-4, atol=1e-4)


def test_other_precision_on_load(saved, pictures):
    assert ov.load(saved, dtype=torch.bfloat16)(pictures[0].bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_what_another_precision_cannot_hold_is_said(tiny_vit, pictures, tmp_path):
    record_source(tiny_vit, ModelSource("timm", NAME, {**ARGS, "num_classes": 10}))
    tiny_vit.norm.weight[2] = 1e5
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=1)
    ov.save(tiny_vit, tmp_path / "out")
    assert ov.load(tmp_path / "out", dtype=torch.bfloat16).norm.weight.isfinite().all()
    with pytest.raises(ConfigError, match=r"norm\.weight holds 1e\+05, which float16 cannot: use dtype float32"):
        ov.load(tmp_path / "out", dtype=torch.float16)


@torch.no_grad()
def test_a_matrix_and_its_transpose_are_not_taken_for_one(tiny_vit, pictures, tmp_path):
    class Both(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.one = torch.nn.Parameter(torch.randn(10, 10))
            self.other = torch.nn.Parameter(self.one.t())

        def forward(self, x):
            return self.inner(x) @ self.one @ self.other

    model = Both(tiny_vit)
    fresh = copy.deepcopy(model)
    ov.compress(model, pictures, rate=0.5, iterations=1)
    ov.save(model, tmp_path / "out")
    torch.testing.assert_close(ov.load(tmp_path / "out", model=fresh)(pictures[0]), model(pictures[0]))


def test_nothing_but_the_two_files_is_left(saved):
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert [file.name for file in saved.parent.iterdir()] == ["out"]


def test_uncompressed_model_is_an_error(tiny_vit, tmp_path):
    with pytest.raises(CheckpointError, match="not compressed"):
        ov.save(tiny_vit, tmp_path / "out")


def test_existing_directory_needs_overwrite_and_foreign_ones_are_never_replaced(compressed, saved, tmp_path):
    with pytest.raises(CheckpointError, match="exists: give another `path`, or `overwrite=True`"):
        ov.save(compressed, saved)
    ov.save(compressed, saved, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="not a checkpoint of ours"):
        ov.save(compressed, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "me.jpg").read_bytes() == b"precious"
    with pytest.raises(CheckpointError, match="does not exist"):
        ov.save(compressed, tmp_path / "no" / "parent")


@pytest.mark.parametrize("file", ["notes.txt", "tokenizer/me.jpg", "merged/data/x.json", "model.bin"])
def test_files_of_others_in_a_checkpoint_are_never_lost(compressed, saved, file):
    (saved / file).parent.mkdir(parents=True, exist_ok=True)
    (saved / file).write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=f"holds {file.rpartition('/')[0] or file}.*not ours and would be lost"):
        ov.save(compressed, saved, overwrite=True)
    assert (saved / file).read_bytes() == b"precious"


@pytest.mark.parametrize("file", ["tokenizer/additional_chat_templates/tools.jinja", "tokenizer/a.tiktoken"])
def test_files_of_a_tokenizer_are_ours(compressed, saved, file):
    (saved / file).parent.mkdir(parents=True)
    (saved / file).write_text("{{ messages }}")
    ov.save(compressed, saved, overwrite=True)
    assert not (saved / file).exists()


def test_a_file_system_without_locks_is_said(compressed, tmp_path, monkeypatch, caplog):
    def none(*args: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(checkpoint_place.fcntl, "flock", none)
    ov.save(compressed, tmp_path / "out")
    assert "has no locks" in caplog.text
    ov.load(tmp_path / "out")


@pytest.mark.parametrize("can_swap", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(compressed, tmp_path, monkeypatch, can_swap, there):
    """Also where the system cannot swap two directories in one step."""
    if not can_swap:
        monkeypatch.setattr(checkpoint_place, "_swap", lambda one, other: False)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "run")
    if there:
        (tmp_path / "disk" / "run").mkdir()
    for _ in range(2):
        ov.save(compressed, tmp_path / "out", overwrite=True)
        ov.load(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["run"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "out"]


def test_one_writer_at_a_time_who_cleans_up_after_killed_ones(compressed, tmp_path):
    (tmp_path / ".out.writing-killed").mkdir()
    (tmp_path / ".out.lock").touch()  # of a killed run: the lock itself died with it
    with locked(tmp_path / "out"):
        assert [entry.name for entry in tmp_path.iterdir()] == [".out.lock"]
        with pytest.raises(CheckpointError, match="is being written by another run"):
            ov.save(compressed, tmp_path / "out")
    ov.save(compressed, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_the_name_of_one_moved_aside_is_left_alone(tmp_path):
    aside = tmp_path / ".out.old"
    aside.mkdir()
    (aside / "mine.txt").write_text("precious")
    with locked(tmp_path / "out"):
        assert not (tmp_path / "out").exists()
    assert (aside / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("put_in_place", [False, True])
def test_a_checkpoint_that_was_moved_aside_by_a_killed_run_is_put_back(saved, put_in_place):
    """Where the system cannot swap two directories in one step."""
    aside = saved.with_name(".out.old")
    before = (saved / "model.safetensors").read_bytes()
    if put_in_place:
        shutil.copytree(saved, aside)
    else:
        saved.rename(aside)
    with locked(saved):
        assert (saved / "model.safetensors").read_bytes() == before
        assert not aside.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_write_error_in_the_middle_leaves_what_was_there(compressed, saved, tmp_path, overwrite):
    """The kernel refuses to let a file grow past the limit, as it does on a full disk."""
    target = saved if overwrite else tmp_path / "new"
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            ov.save(compressed, target, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def _truncate(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _flip_a_bit(saved):
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def _one_more_position(saved):
    def change(tensors):
        tensors["blocks.0.attn.proj.sparse.bitmask"][0] = 255

    _rewrite(saved, change)


def _shorter_values(saved):
    def change(tensors):
        tensors["blocks.1.mlp.fc1.sparse.values"] = tensors["blocks.1.mlp.fc1.sparse.values"][:-1].clone()

    _rewrite(saved, change)


def _missing_factor(saved):
    _rewrite(saved, lambda tensors: tensors.pop("blocks.0.attn.qkv.low_rank.U"))


def _missing_head(saved):
    _rewrite(saved, lambda tensors: tensors.pop("head.weight"))


def _other_dtype(saved):
    def change(tensors):
        tensors["blocks.0.attn.qkv.low_rank.U"] = tensors["blocks.0.attn.qkv.low_rank.U"].float()

    _rewrite(saved, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "damaged: it is cut"),
        (_flip_a_bit, "damaged: its SHA-256"),
        (_one_more_position, "damaged: the bitmask has"),
        (_shorter_values, "damaged: .*sparse.values is float16"),
        (_missing_factor, "low_rank.U is missing"),
        (_missing_head, "does not fit .*head.weight"),
        (_other_dtype, "is float32 .* expected float16"),
        (lambda saved: (saved / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda saved: (saved / "config.json").unlink(), "there is no config.json"),
        (lambda saved: (saved / "config.json").write_text('{"format": "oats_'), "config.json is damaged"),
        (lambda saved: (saved / "config.json").write_text("[]"), "not a config of oats_vision"),
        (lambda saved: _edit(saved, format_version=3), "format version 3 and this release reads 1 to 2: update"),
        (lambda saved: _edit(saved, layers=[{"name": "x"}]), "config.json is damaged"),
        (lambda saved: _edit(saved, dtype="float99"), "config.json is damaged"),
        (lambda saved: _edit(saved, adapter="alien"), "needs the model family 'alien'"),
    ],
)
def test_damaged_checkpoints_are_clear_errors(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as error:
        ov.load(saved)
    assert "\n" not in str(error.value)


def test_an_architecture_that_is_not_there_is_an_error(saved):
    source = {"kind": "timm", "name": "vit_of_the_future", "args": {}, "transform": None, "dtype": "float32"}
    _edit(saved, source=source)
    with pytest.raises(ModelError, match="'vit_of_the_future' cannot be rebuilt"):
        ov.load(saved)


def test_bitmask_beyond_the_last_column_is_an_error():
    spec = LayerSpec(5, 2, False, (PartSpec("w", 2, 0, 2),))
    check_bitmask(torch.tensor([[1], [16]], dtype=torch.uint8), spec, "x")
    with pytest.raises(CheckpointError, match="beyond the last column"):
        check_bitmask(torch.tensor([[1], [32]], dtype=torch.uint8), spec, "x")


def test_files_are_as_readable_as_any_other_new_file(compressed, tmp_path):
    ov.save(compressed, tmp_path / "out")
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {expected}
