import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from oats_vision.data.pictures import load_pictures
from oats_vision.errors import DataError
from oats_vision.models.transforms import as_seen, build_transform

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
        (lambda path: path, {"labelled": True}, "has no picture"),
        (lambda path: _file(path), {}, "is a file"),
        (lambda path: _flat(path), {"labelled": True}, "has no labels"),
        (lambda path: f"hf:{path}/nothing", {}, "cannot be loaded"),
        (lambda path: "hf:", {}, "names no dataset"),
        (lambda path: _script(path), {}, "cannot be loaded"),
        (lambda path: _damaged(path), {}, "cannot be loaded"),
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


def _script(path: Path) -> str:
    """A dataset made of code, which must not run."""
    (path / "set").mkdir()
    (path / "set" / "set.py").write_text("raise SystemExit('code of a dataset ran')")
    return f"hf:{path / 'set'}"


def _damaged(path: Path) -> Path:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(path / "set")
    next((path / "set").glob("*.arrow")).write_bytes(b"no table")
    return path / "set"


def _no_pictures(path: Path) -> Path:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(path / "set")
    return path / "set"


def _splits(path: Path) -> Path:
    datasets.DatasetDict({"other": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(path / "set")
    return path / "set"


def test_labels_are_not_looked_at_unless_they_are_needed(folder):
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "linked").symlink_to(folder / "class0")  # read once, under its own name
    _write(folder / "beside.png", 250)
    labelled = load_pictures(folder, TRANSFORM, batch_size=4, labelled=True)
    assert labelled.classes == ["class0", "class1", "class2"]
    everything = load_pictures(folder, TRANSFORM, batch_size=4)
    assert set(_values(everything)) == {*_values(labelled), 250}
    assert everything.classes is None


def test_what_is_left_out_is_said(folder, caplog):
    (folder / "empty").mkdir()
    _write(folder / "beside.png", 250)
    load_pictures(folder, TRANSFORM, batch_size=4, labelled=True)
    assert "1 pictures" in caplog.text
    assert "without a picture are left out: empty" in caplog.text


def test_the_reason_of_an_unreadable_picture_is_said(folder, caplog):
    (folder / "class1" / "4.png").write_bytes(b"no picture")
    list(load_pictures(folder, TRANSFORM, batch_size=4))
    assert "4.png is skipped: cannot identify image file" in caplog.text


@pytest.mark.parametrize("source", ["folder", "table", "stream"])
def test_no_readable_picture_is_an_error(tmp_path, source):
    (tmp_path / "a.png").write_bytes(b"no picture")
    if source != "folder":
        _dataset(tmp_path / "set", image=[{"bytes": b"no picture", "path": None}])
    where = tmp_path if source == "folder" else tmp_path / "set"
    with pytest.raises(DataError, match=r"no picture could be read \(1 skipped\)"):
        list(load_pictures(where, TRANSFORM, batch_size=4, streaming=source == "stream"))


SIX = [Image.fromarray(np.full((6, 6, 3), 20 * i, np.uint8)) for i in range(6)]
KINDS = {"coarse": datasets.ClassLabel(names=["low", "high"]), "fine": datasets.ClassLabel(names=list("abcdef"))}
NUMBER, TEXT = datasets.Value("int64"), datasets.Value("string")


def _bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _dataset(path: Path, types: dict | None = None, **columns) -> Path:
    """A saved dataset, its pictures of the library's type unless `types` says otherwise."""
    types = {"image": datasets.Image(), **(types or {})}
    features = {name: types[name] for name in columns}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("types", "columns"),
    [
        ({"label": TEXT}, {"image": SIX, "label": list("catdog")}),
        ({"label": NUMBER}, {"image": SIX, "label": [None] * 6}),
        ({"mask": datasets.Image()}, {"mask": SIX[::-1], "image": SIX}),
        ({"jpg": datasets.Value("binary")}, {"jpg": [_bytes(picture) for picture in SIX]}),
        (
            {"img": {"bytes": datasets.Value("binary"), "path": TEXT}},
            {"img": [{"bytes": _bytes(picture), "path": None} for picture in SIX]},
        ),
    ],
)
def test_calibration_takes_pictures_in_any_form_and_no_labels(tmp_path, types, columns, streaming):
    source = _dataset(tmp_path / "set", types, **columns)
    batches = load_pictures(source, TRANSFORM, batch_size=4, streaming=streaming)
    assert _values(batches) == [0, 20, 40, 60, 80, 100]
    assert {label for _, labels in batches for label in labels.tolist()} == {-1}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_format_that_a_directory_asks_for_is_not_followed(tmp_path, streaming):
    features = datasets.Features({"image": datasets.Image(), "label": NUMBER})
    dataset = datasets.Dataset.from_dict({"image": SIX, "label": range(6)}, features=features).with_format("torch")
    dataset.save_to_disk(tmp_path / "set")
    batches = load_pictures(tmp_path / "set", TRANSFORM, batch_size=6, labelled=True, streaming=streaming)
    ((_, labels),) = batches
    assert labels.tolist() == list(range(6))


def test_class_folders_of_a_relative_place(folder, monkeypatch):
    for place, start in ((".", folder), ("..", folder / "class0"), ("pictures/", folder.parent)):
        monkeypatch.chdir(start)
        assert load_pictures(place, TRANSFORM, batch_size=4, labelled=True).classes == ["class0", "class1", "class2"]


def test_columns_of_paths(folder, tmp_path):
    files = sorted(str(file) for file in folder.rglob("*.png"))
    source = _dataset(tmp_path / "set", {"image_path": TEXT}, image_path=files)
    assert _values(load_pictures(source, TRANSFORM, batch_size=4)) == _values(
        load_pictures(folder, TRANSFORM, batch_size=4)
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"coarse": [0, 1] * 3, "label": [5, 4, 3, 2, 1, 0]}, ([5, 4, 3, 2, 1, 0], None)),
        ({"coarse": [0, 1] * 3, "fine_label": range(6)}, ([0, 1, 2, 3, 4, 5], None)),
        ({"coarse": [0, 1] * 3, "other": [7] * 6}, ([0, 1] * 3, ["low", "high"])),
        ({"fine": range(6), "coarse": [0, 1] * 3}, ([0, 1, 2, 3, 4, 5], list("abcdef"))),
    ],
)
def test_the_column_of_labels_goes_by_its_name_and_then_by_its_type(tmp_path, columns, expected, streaming, caplog):
    types = {name: KINDS.get(name, NUMBER) for name in columns}
    source = _dataset(tmp_path / "set", types, image=SIX, **{name: list(values) for name, values in columns.items()})
    batches = load_pictures(source, TRANSFORM, batch_size=4, labelled=True, streaming=streaming)
    assert (torch.cat([labels for _, labels in batches]).tolist(), batches.classes) == expected
    assert ("several columns of labels (fine, coarse)" in caplog.text) == ("fine" in columns)


def test_labels_that_are_text_are_classes_in_alphabetical_order(tmp_path):
    source = _dataset(tmp_path / "set", {"label": TEXT}, image=SIX, label=["dog", "cat", "dog", "ant", "cat", "dog"])
    batches = load_pictures(source, TRANSFORM, batch_size=4, labelled=True)
    assert batches.classes == ["ant", "cat", "dog"]
    assert torch.cat([labels for _, labels in batches]).tolist() == [2, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (NUMBER, [0, 1, None, 0, 1, 0], "no label in column 'label'"),
        (KINDS["coarse"], [-1] * 6, "no label in column 'label'"),
        (datasets.Value("float32"), [0.5] * 6, "column 'label' holds float"),
        (TEXT, ["cat", None] * 3, "column 'label'"),
    ],
)
def test_labels_that_are_needed_and_not_there_are_an_error(tmp_path, kind, labels, message, streaming):
    source = _dataset(tmp_path / "set", {"label": kind}, image=SIX, label=labels)
    with pytest.raises(DataError, match=message):
        list(load_pictures(source, TRANSFORM, batch_size=4, labelled=True, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_picture_of_a_dataset_fails_alone(tmp_path, streaming):
    rows = [{"bytes": _bytes(picture), "path": None} for picture in SIX]
    rows[1]["bytes"] = rows[1]["bytes"][:50]
    rows[4] = None
    source = _dataset(tmp_path / "set", {"label": NUMBER}, image=rows, label=list(range(6)))
    batches = load_pictures(source, TRANSFORM, batch_size=2, labelled=True, streaming=streaming)
    read = [(pictures, labels) for pictures, labels in batches]
    assert torch.cat([labels for _, labels in read]).tolist() == [0, 2, 3, 5]
    assert [round(255 * float(picture.mean())) for pictures, _ in read for picture in pictures] == [0, 40, 60, 100]
    assert batches.skipped == 2


def test_a_stream_that_breaks_is_an_error_and_not_its_end(tmp_path, monkeypatch):
    def rows(self):
        yield {"image": SIX[0]}
        raise ConnectionError("the line is dead")

    source = _dataset(tmp_path / "set", image=SIX)
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", rows)
    with pytest.raises(DataError, match="could not be read to the end: the line is dead"):
        list(load_pictures(source, TRANSFORM, batch_size=1, streaming=True))


def test_folders_and_datasets_give_the_same_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    left_half = np.zeros((8, 8, 3), np.uint8)
    left_half[:, :4] = 200
    (tmp_path / "p").mkdir()
    Image.fromarray(left_half).save(tmp_path / "p" / "turned.png", exif=exif)
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "p" / "wide.png")
    files = sorted((tmp_path / "p").iterdir())
    source = _dataset(tmp_path / "set", image=[str(file) for file in files])
    sources = [(tmp_path / "p", False), (source, False), (source, True)]
    first, *others = (
        torch.cat([x for x, _ in load_pictures(place, TRANSFORM, batch_size=2, streaming=streaming)])
        for place, streaming in sources
    )
    assert first[0, 0, :4].mean() > 0.7  # the left half is on top now
    for other in others:
        assert torch.equal(first, other)


def test_the_fingerprint_knows_the_labels(tmp_path):
    source = _dataset(
        tmp_path / "set", {"coarse": KINDS["coarse"], "label": NUMBER}, image=SIX, coarse=[0, 1] * 3, label=range(6)
    )
    needed, unneeded = (
        load_pictures(source, TRANSFORM, batch_size=2, labelled=labelled).fingerprint() for labelled in (True, False)
    )
    assert needed != unneeded


@pytest.mark.parametrize(
    "transform",
    [
        lambda picture: TRANSFORM(picture).numpy(),
        lambda picture: {"pixel_values": TRANSFORM(picture)[None]},
        lambda picture: {"pixel_values": [TRANSFORM(picture).numpy()]},
        lambda picture: TRANSFORM(picture)[:1],
    ],
)
def test_arrays_dictionaries_and_one_channel_are_taken(folder, transform):
    batches = load_pictures(folder, transform, batch_size=4)
    assert _values(batches) == _values(load_pictures(folder, TRANSFORM, batch_size=4))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda picture: picture, "the transform gives Image: let it give a tensor of floats"),
        (lambda picture: torch.tensor(np.asarray(picture)), "the transform gives torch.uint8: let it give a tensor"),
        (lambda picture: TRANSFORM(picture).permute(1, 2, 0), r"shape \(8, 8, 3\): it must be \(channels"),
        (lambda picture: TRANSFORM(picture)[0], r"shape \(8, 8\)"),
        (lambda picture: TRANSFORM(picture) / 0, "3.png has values that are not finite"),
        (
            v2.Compose([v2.Resize(8), v2.PILToTensor(), v2.ToDtype(torch.float32)]),
            "different sizes after preprocessing",
        ),
    ],
)
def test_what_is_no_batch_is_one_line_from_any_process(tmp_path, transform, message, workers):
    _write(tmp_path / "3.png", 50)
    Image.new("RGB", (30, 10)).save(tmp_path / "wide.png")
    with pytest.raises(DataError, match=message) as error:
        list(load_pictures(tmp_path, transform, batch_size=4, workers=workers))
    assert "\n" not in str(error.value)


ONE_CHANNEL = [
    {"kind": "timm", "input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "crop_pct": 1.0},
    {
        "kind": "huggingface",
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 8},
        "image_mean": [0.5],
        "image_std": [0.5],
    },
]


@pytest.mark.parametrize("config", ONE_CHANNEL, ids=["timm", "huggingface"])
def test_models_of_one_channel_are_given_grey_pictures(folder, config):
    transform = build_transform(config)
    ((pictures, _),) = load_pictures(folder, transform, batch_size=12)
    assert pictures.shape == (12, 1, 8, 8)
    assert as_seen(Image.new("RGB", (9, 9), (90, 90, 90)), transform).getpixel((4, 4)) == (90, 90, 90)
