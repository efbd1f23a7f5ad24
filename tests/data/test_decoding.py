"""How one picture is decoded, and which files of a folder are pictures."""

import io
import os
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from oats_vision.data.decoding import UNREADABLE, open_picture, picture_files

RAMP = np.linspace(0, 255, 12 * 20).reshape(12, 20).astype(np.uint8)


def _encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _palette() -> Image.Image:
    picture = Image.fromarray(RAMP).convert("P")
    picture.info["transparency"] = bytes(range(256))
    return picture


@pytest.mark.parametrize(
    "data",
    [
        _encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"),
        _encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
        _encoded(Image.fromarray(RAMP.astype(">u2") * 257), "TIFF"),
        _encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        _encoded(Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF"),
        _encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        _encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
        b"P5 20 12 65535\n" + (RAMP.astype(">u2") * 257).tobytes(),
        _encoded(Image.fromarray(RAMP).convert("LA"), "PNG"),
        _encoded(_palette(), "PNG"),
        _encoded(Image.merge("RGBA", [Image.fromarray(RAMP)] * 3 + [Image.new("L", (20, 12))]), "PNG"),
        _encoded(Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "TIFF"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_depth_and_mode_gives_the_same_greys(data):
    picture = open_picture(data)
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture).astype(int) - RAMP[..., None]).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = open_picture(_encoded(Image.fromarray(RAMP.astype(np.uint16)), "PNG"))  # 255 of 65535 at most
    assert not np.asarray(dark).any()


def test_one_bit_is_black_and_white():
    values = np.asarray(open_picture(_encoded(Image.fromarray(RAMP > 99), "PNG")))
    assert set(values.ravel().tolist()) == {0, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(RAMP)
    picture = open_picture(_encoded(stored, "PNG", exif=exif))
    turned = {1: RAMP, 2: RAMP[:, ::-1], 3: RAMP[::-1, ::-1], 4: RAMP[::-1], 5: RAMP.T, 6: RAMP[::-1].T}
    turned |= {7: RAMP[::-1, ::-1].T, 8: RAMP[:, ::-1].T}
    assert np.array_equal(np.asarray(picture)[..., 0], turned[orientation])


def test_broken_exif_does_not_lose_the_picture():
    picture = open_picture(_encoded(Image.fromarray(RAMP), "JPEG", quality=98, exif=b"Exif\0\0nothing of the kind"))
    assert picture.size == (20, 12)


@pytest.mark.parametrize("form", [str, Path, lambda path: path.read_bytes(), lambda path: {"path": str(path)}])
def test_whatever_holds_a_picture_is_opened(tmp_path, form):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_picture(form(tmp_path / "a.png")))[..., 0], RAMP)


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"no picture",
        _encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)), "PNG")[:900],
        _encoded(Image.fromarray(RAMP.astype(np.float32) * np.nan), "TIFF"),
        _encoded(Image.fromarray(RAMP.astype(np.int32) - 9), "TIFF"),
        _encoded(Image.fromarray(RAMP.astype(np.int32) * 10**6), "TIFF"),
        {"bytes": None, "path": None},
        "no/such/file.png",
        None,
        3,
    ],
)
def test_what_is_no_picture_is_one_kind_of_error(source):
    with pytest.raises(UNREADABLE):
        open_picture(source)


@pytest.mark.filterwarnings("ignore")
def test_no_damage_to_a_file_raises_another_kind_of_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF"):
        whole = _encoded(Image.fromarray(RAMP), kind)
        for _ in range(60):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 8):
                data[place] = generator.integers(256)
            with suppress(UNREADABLE):
                assert open_picture(bytes(data)).mode == "RGB"


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two class folders, a third by a link, and all that is to be left out."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere" / "deep"
    names = ["a/1.png", "a/inner/2.JPG", "b/1.jpeg", "a/notes.txt", "a/.3.png", ".cache/4.png", "b/._1.jpeg"]
    for file in [root / name for name in names] + [elsewhere / "5.webp"]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    (root / "c").symlink_to(elsewhere.parent)
    return root


def test_links_are_followed_and_hidden_files_are_not_seen(tree):
    names = [str(file.relative_to(tree)) for file in picture_files(tree)]
    assert names == ["a/1.png", "a/inner/2.JPG", "b/1.jpeg", "c/deep/5.webp"]


@pytest.mark.filterwarnings("ignore")
def test_a_picture_of_a_stream_that_cannot_be_decoded_is_skipped_like_one_of_a_file(monkeypatch):
    def bomb(self, value):
        raise Image.DecompressionBombError(value["path"])

    monkeypatch.setattr(datasets.Image, "decode_example", bomb)
    with pytest.raises(UNREADABLE, match=r"cannot be decoded: hf://here/1\.png"):
        open_picture("hf://here/1.png")


def test_an_entry_that_leads_nowhere_leaves_the_others(tree, caplog):
    (tree / "a" / "loop").symlink_to("loop")
    assert len(picture_files(tree)) == 4
    assert "a/loop cannot be read and is left out" in caplog.text


@pytest.mark.parametrize(
    ("link", "target"),
    [("a/up", ".."), ("a/self", "."), ("a/0", "../b"), ("0", "b"), ("b/out", "../../root"), ("a/gone", "nowhere")],
)
def test_links_neither_loop_nor_take_the_place_of_a_folder(tree, link, target):
    before = picture_files(tree)
    (tree / link).symlink_to(target)
    assert picture_files(tree) == before


def test_links_from_one_to_another_end(tree):
    for i in range(12):  # paths through these would be 12!
        (tree / f"many{i}").mkdir()
        for j in range(12):
            (tree / f"many{i}" / f"to{j}").symlink_to(tree / f"many{j}")
    assert len(picture_files(tree)) == 4


def test_a_folder_that_cannot_be_read_is_said(tree, caplog, monkeypatch):
    scandir = os.scandir

    def scan(folder: str):
        if folder.endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    assert len(picture_files(tree)) == 3
    assert "b cannot be read and is left out: Permission denied" in caplog.text
