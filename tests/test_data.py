from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from oats_vision.data import load_pictures
from oats_vision.errors import DataError

TRANSFORM = v2.Compose([v2.Resize((8, 8)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def _write(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 12, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve pictures in three classes; the grey value tells them apart."""
    for i in range(12):
        _write(tmp_path / "pictures" / f"class{i % 3}" / f"{i}.png", 10 * i)
    return tmp_path / "pictures"


def _values(batches) -> list[int]:
    return [round(255 * float(picture.mean())) for pictures, _ in batches for picture in pictures]


def test_samples_are_seeded_and_do_not_depend_on_the_batch_size(folder):
    options = {"samples": 5, "seed": 3}
    first = _values(load_pictures(str(folder), TRANSFORM, batch_size=2, **options))
    assert len(set(first)) == 5
    assert first == _values(load_pictures(str(folder), TRANSFORM, batch_size=5, **options))
    assert first == _values(load_pictures(str(folder), TRANSFORM, batch_size=2, workers=2, **options))
    assert first != _values(load_pictures(str(folder), TRANSFORM, batch_size=2, samples=5, seed=4))


def test_labels_follow_the_sorted_class_folders(folder):
    batches = load_pictures(str(folder), TRANSFORM, batch_size=4, labelled=True)
    assert batches.classes == ["class0", "class1", "class2"]
    for pictures, labels in batches:
        assert [round(255 * float(picture.mean())) // 10 % 3 for picture in pictures] == labels.tolist()


def test_flat_folders_and_grey_or_transparent_pictures_are_read(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.zeros((4, 4, 4), np.uint8), "RGBA").save(tmp_path / "alpha.PNG")
    ((pictures, _),) = load_pictures(str(tmp_path), TRANSFORM, batch_size=4, samples=2)
    assert pictures.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_replaced_and_counted(folder, caplog, workers):
    for name in ("class0/0.png", "class1/4.png"):
        (folder / name).write_bytes(b"no picture")
    (folder / "class2" / "2.png").write_bytes((folder / "class2" / "5.png").read_bytes()[:45])  # truncated
    batches = load_pictures(str(folder), TRANSFORM, batch_size=4, samples=9, workers=workers)
    values = _values(batches)
    assert len(values) + batches.skipped >= 9
    assert not {0, 40, 20} & set(values)
    everything = load_pictures(str(folder), TRANSFORM, batch_size=4)
    assert len(_values(everything)) == 9
    assert everything.skipped == 3
    assert "3 unreadable pictures were skipped" in caplog.text


def test_a_spare_picture_takes_the_place_of_an_unreadable_one(folder):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(42)).tolist()
    files = sorted(str(file) for file in folder.rglob("*.png"))
    Path(files[order[0]]).write_bytes(b"no picture")
    batches = load_pictures(str(folder), TRANSFORM, batch_size=4, samples=6)
    assert len(_values(batches)) == 6
    assert batches.skipped == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
def test_saved_huggingface_datasets(tmp_path, streaming, as_dict):
    pictures = [Image.fromarray(np.full((6, 6, 3), 20 * i, np.uint8)) for i in range(6)]
    features = datasets.Features({"img": datasets.Image(), "y": datasets.ClassLabel(names=["a", "b"])})
    dataset = datasets.Dataset.from_dict({"img": pictures, "y": [0, 1] * 3}, features=features)
    (datasets.DatasetDict({"val": dataset}) if as_dict else dataset).save_to_disk(tmp_path / "set")
    options = {"batch_size": 4, "labelled": True, "split": "val", "streaming": streaming}
    batches = load_pictures(str(tmp_path / "set"), TRANSFORM, **options)
    assert batches.classes == ["a", "b"]
    assert _values(batches) == [0, 20, 40, 60, 80, 100]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1] * 3
    assert len(set(_values(load_pictures(str(tmp_path / "set"), TRANSFORM, samples=3, **options)))) == 3


def test_local_parquet_by_name(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [Image.fromarray(np.full((6, 6, 3), 20 * i, np.uint8)) for i in range(4)]
    datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1]}, features=features).to_parquet(
        tmp_path / "set" / "train.parquet"
    )
    batches = load_pictures(f"hf:{tmp_path / 'set'}", TRANSFORM, batch_size=2, samples=4, split="train")
    assert sorted(_values(batches)) == [0, 20, 40, 60]


def test_demo_sets_are_different_and_balanced():
    calibration = load_pictures("demo", TRANSFORM, batch_size=100, samples=2048)
    test = load_pictures("demo", TRANSFORM, batch_size=500, labelled=True, split="test")
    assert calibration.total == 1000
    assert test.total == 4000
    labels = torch.cat([labels for _, labels in test])
    assert labels.bincount().tolist() == [400] * 10
    a, b = (next(iter(batches))[0] for batches in (calibration, test))
    assert not any(torch.equal(x, y) for x in a for y in b)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: path / "missing", {}, "does not exist"),
        (lambda path: path, {}, "has no picture"),
        (lambda path: path, {"labelled": True}, "has no labels: it must hold one folder"),
        (lambda path: _file(path), {}, "is a file"),
        (lambda path: _flat(path), {"labelled": True}, "has no labels"),
        (lambda path: f"hf:{path}/nothing", {}, "cannot be loaded"),
        (lambda path: _no_pictures(path), {}, "no column of pictures, only text"),
        (lambda path: _splits(path), {}, "no split 'train', only other"),
    ],
)
def test_bad_sources_are_clear_errors(tmp_path, make, options, message):
    with pytest.raises(DataError, match=message) as error:
        load_pictures(str(make(tmp_path)), TRANSFORM, batch_size=4, **options)
    assert "\n" not in str(error.value)


def _file(path: Path) -> Path:
    _write(path / "a.png", 1)
    return path / "a.png"


def _flat(path: Path) -> Path:
    _write(path / "a.png", 1)
    return path


def _no_pictures(path: Path) -> Path:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(path / "set")
    return path / "set"


def _splits(path: Path) -> Path:
    datasets.DatasetDict({"other": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(path / "set")
    return path / "set"
