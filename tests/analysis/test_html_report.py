"""The page in a real browser: it answers first, loads without errors or network, sorts, and draws what is chosen."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from torch import Tensor, nn

import oats_vision as ov
from oats_vision.analysis.html_report import write_html
from oats_vision.analysis.spectra import spectra_of, spectrum
from oats_vision.checkpoint import add_evaluation, read_config, read_weights
from oats_vision.compression.record import CompressionReport, LayerReport
from oats_vision.compression.settings import resolve
from oats_vision.errors import CheckpointError
from oats_vision.evaluation.results import EXAMPLES, Answer, Cost, Example, Metric
from oats_vision.evaluation.speed import Timing
from oats_vision.nn.sparse_low_rank import LayerSpec, PartSpec
from pages import DESKTOP, PHONE, check_accessible, check_dark, check_quiet, check_width, show

ADVICE = "blocks.2.mlp.fc2 has an error far above the others': leave it dense with `skip`"


@pytest.fixture
def saved(tiny_vit, pictures, tmp_path):
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=5, storage_dtype="float16")
    ov.save(tiny_vit, tmp_path / "out")
    return tmp_path / "out"


def _thumbnail(seed: int, side: int = 112) -> str:
    """Noise, which no JPEG makes smaller."""
    stream = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(values).save(stream, "jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _examples(count: int = 3, label: str = "a cat") -> list[dict]:
    classes = [
        Example(
            name=f"pictures/{i}.png",
            thumbnail=_thumbnail(i),
            dense=Answer(label=label, share=0.9),
            compressed=Answer(label="a dog", share=0.6),
        )
        for i in range(count - 1)
    ]
    maps = Example(
        name=f"maps of {label}", thumbnail=_thumbnail(90), cosine=0.91, maps=[_thumbnail(91), _thumbnail(92)]
    )
    return [one.model_dump() for one in (*classes, maps)]


def _measure(directory, **more) -> None:
    """Write a report.json as `compress` does."""
    cost = Cost(
        unit="pictures",
        samples=64,
        metrics=[
            Metric(name="same class", kind="percent", value=98.44, low=91.6, high=99.96),
            Metric(name="relative error of features", kind="number", value=0.0712, low=0.064, high=0.079),
        ],
    )
    speed = [
        Timing("forward, batch 1", 1, "pictures", 0.0123, 0.0104, 1.1, 1.25),
        Timing("forward, batch 64", 64, "pictures", 0.4, 0.38),
    ]
    content = {
        "run": {"model": "tiny", "data": "some/pictures", "seed": 42},
        "cost": cost.model_dump(),
        "speed": [timing.to_dict() for timing in speed],
        "advice": [ADVICE],
        "examples": _examples(),
        "seconds": {"command": 12.5},
        "peak_memory": 1_084_428_288,
        "machine": {"device": "cpu", "threads": 2, "torch": "2.14.1"},
    }
    (directory / "report.json").write_text(json.dumps(content | more))


def _evaluation(protocol: str, **about) -> dict:
    return {
        "protocol": protocol,
        **about,
        "dense": {"top1": 91.0},
        "compressed": {"top1": 90.25, "pictures": 400},
        "difference": {"top-1": {"points": -0.75, "low": -1.2, "high": -0.3, "p_value": 0.01}},
    }


def _headlines(browser) -> list[str]:
    return [" ".join(section.text.split()) for section in browser.find_elements(By.CSS_SELECTOR, ".figures section")]


def test_page_in_a_browser(saved, browser, tmp_path):
    _measure(saved)
    page = tmp_path / "report.html"
    write_html(saved, page)
    for size in (DESKTOP, PHONE):
        show(browser, page, size)
        check_quiet(browser, page)
        check_width(browser)
        figures = browser.find_elements(By.CSS_SELECTOR, "header + .figures .value")
        assert [figure.text for figure in figures][1:] == ["1.18 x as fast", "98.4%"]
        for figure in figures:
            assert figure.rect["y"] >= 0
            assert figure.rect["y"] + figure.rect["height"] <= size[1]  # without scrolling
            assert figure.rect["x"] + figure.rect["width"] <= size[0]
    check_accessible(browser)
    check_dark(browser, page)
    show(browser, page)
    size, speed, cost = _headlines(browser)
    assert "x the bytes" in size
    assert speed == "Speed 1.18 x as fast 12.3 → 10.4 ms at batch 1 1.05 x at batch 64"
    assert cost == (
        "What it cost 98.4% same class beside the dense model 95% interval [91.6, 100.0], on 64 held-out pictures "
        "relative error of features 0.0712 [0.0640, 0.0790]"
    )
    assert browser.find_element(By.CSS_SELECTOR, ".figures + .advice").text == ADVICE.replace("`", "")
    assert "1.18 x [1.10, 1.25]" in browser.find_element(By.ID, "speed").text
    examples = [" ".join(one.text.split()) for one in browser.find_elements(By.CSS_SELECTOR, ".example")]
    assert examples[0] == "dense a cat 90% compressed a dog 60% pictures/0.png"
    assert examples[2] == "dense compressed maps of a cat, cosine 0.9100"
    loaded = "return [...document.images].map(one => one.complete && one.naturalWidth)"
    assert browser.execute_script(loaded.replace("return", "document.images[0].loading = 'eager'; return"))[0] == 112

    table = browser.find_element(By.ID, "layers")
    buttons = {button.text: button for button in table.find_elements(By.CSS_SELECTOR, "th button")}

    def column(index: int) -> list[str]:
        script = "return [...arguments[0].tBodies[0].rows].map(row => row.cells[arguments[1]].innerText)"
        return browser.execute_script(script, table, index)

    def press(name: str) -> None:
        browser.execute_script("arguments[0].click()", buttons[name])

    untouched = column(6)
    assert len(untouched) == 3 * 6
    press("error")
    assert column(6) == sorted(untouched, key=float)
    press("error")
    assert column(6) == sorted(untouched, key=float, reverse=True)
    press("layer")
    assert column(6) == untouched  # the order of the model again
    press("non-zeros")
    counts = [int(text.replace(",", "")) for text in column(4)]
    assert counts == sorted(counts)

    def curve() -> str:
        return browser.find_element(By.CSS_SELECTOR, "#spectrum polyline[data-term=whole]").get_attribute("points")

    first = curve()
    Select(browser.find_element(By.ID, "layer")).select_by_visible_text("blocks.2.mlp.fc2")
    assert curve() != first
    picture = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L"))
    assert 0.003 < (picture < 128).mean() < 0.3  # neither blank nor broken

    add_evaluation(saved, _evaluation("top1", data="imagenet/val <script>alert(1)</script>"))
    write_html(saved, page)
    show(browser, page, PHONE)
    check_quiet(browser, page)
    check_width(browser)
    assert _headlines(browser)[2].startswith(
        "What it cost -0.75 points top-1: 91.00% → 90.25% 95% interval [-1.20, -0.30]"
    )
    assert "same class 98.4%" in _headlines(browser)[2]  # beneath
    accuracy = browser.find_element(By.ID, "accuracy").get_attribute("innerText")
    assert "-0.75 points [-1.20, -0.30]" in accuracy
    assert "<script>" in accuracy  # shown, not run


class _OddlyNamed(nn.Module):
    """An MLP whose linears have names that are markup, formulas or hidden elsewhere."""

    NAMES = ("$x^{", "_private", "<script>alert('1')</script>", '"><b>[/red]', "__proto__")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(48, 48))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.children():
            x = linear(x)
        return x


class _Page(HTMLParser):
    """The elements of a page, and its texts by the element that they are in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data.strip())


def test_odd_names_are_shown_as_they_are(saved, pictures, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    for block in model.blocks:
        block.mlp = _OddlyNamed()
    ov.compress(model, pictures, rate=0.5, iterations=2)
    directory, page = tmp_path / "out <i>$a$ [b]", tmp_path / "report [draft].html"
    ov.save(model, directory)
    add_evaluation(directory, _evaluation("<u>top1", data='"/><script>alert(2)</script>'))
    markup = "</script><img src=x onerror=alert(3)>"
    content = json.loads((directory / "report.json").read_text())
    _measure(directory, **content, advice=[markup], examples=_examples(2, markup), machine={markup: markup})
    write_html(directory, page)
    _measure(saved, examples=_examples(2))
    add_evaluation(saved, _evaluation("top1", data="x"))
    write_html(saved, tmp_path / "plain.html")
    found, plain = _Page(page.read_text()), _Page((tmp_path / "plain.html").read_text())
    assert set(found.open) <= set(plain.open)  # no element came from a name
    assert found.open.count("script") == plain.open.count("script") == 2
    assert found.open.count("img") == plain.open.count("img")
    for name in _OddlyNamed.NAMES:
        assert {f"blocks.0.mlp.{name}"} <= set(found.texts["th"]) & set(found.texts["option"])
        assert f"mlp.{name}" in found.texts["text"]  # of the plot
    assert {directory.name, "<u>top1", '"/><script>alert(2)</script>', markup} <= set(found.texts["td"])
    assert markup in set(found.texts["li"]) & set(found.texts["span"])


def test_a_folder_whose_name_is_in_no_encoding_has_a_page(saved, tmp_path):
    directory = tmp_path / os.fsdecode(b"o\xfc")
    saved.rename(directory)
    write_html(directory, directory / "report.html")
    assert "o\\udcfc" in (directory / "report.html").read_text()


def test_page_of_few_bits(tiny_vit, pictures, browser, tmp_path):
    report = ov.compress(tiny_vit, pictures, bits=4.0, quality="fast").report
    ov.save(tiny_vit, tmp_path / "out")
    write_html(tmp_path / "out", tmp_path / "page.html")
    show(browser, tmp_path / "page.html")
    check_quiet(browser, tmp_path / "page.html")
    check_width(browser)
    (bits,) = re.findall(r"in the compressed layers: ([\d.]+) bits a weight", _headlines(browser)[0])
    headings = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#layers thead th")]
    rows = [row.text.split() for row in browser.find_elements(By.CSS_SELECTOR, "#layers tbody tr")]
    weights = [part.out_features * layer.spec.in_features for layer in report.layers for part in layer.spec.parts]
    assert headings[-2:] == ["values", "bits"]
    assert [row[-2] for row in rows] == [layer.spec.grid.short for layer in report.layers for _ in layer.spec.parts]
    mean = sum(float(row[-1]) * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(float(bits), abs=0.01)
    captions = [one.text for one in browser.find_elements(By.CSS_SELECTOR, ".plots figcaption")]
    assert captions[:2] == ["Error of each linear, by block", "Bits of each linear, by block"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#spectrum polyline")) == 1  # S is the whole weight
    said = browser.find_element(By.TAG_NAME, "body").text
    assert "S, scales" in said
    assert not any(words in said for words in ("U and V", "bitmask", "group size", "rank ratio"))


def test_spectrum_is_numpys(saved, tiny_vit):
    config = read_config(saved)
    specs, tensors = config.specs, read_weights(saved, config)
    layer = tiny_vit.get_submodule("blocks.0.mlp.fc1")  # the model that was saved
    found = spectrum("blocks.0.mlp.fc1", specs["blocks.0.mlp.fc1"], tensors)
    for term, matrix in {"whole": layer.dense_weight(), "sparse": layer.sparse.dense()}.items():
        expected = np.linalg.svd(matrix.numpy(), compute_uv=False)[np.array(found["rank"]) - 1]
        np.testing.assert_allclose(found["values"][term], expected, rtol=1e-3, atol=1e-5 * expected[0])
    assert sum(value > 0 for value in found["values"]["low_rank"]) <= layer.low_rank.U.shape[1]


def test_what_was_not_measured_is_said_with_the_command_that_does(saved, tmp_path):
    write_html(saved, tmp_path / "report.html")
    found = _Page((tmp_path / "report.html").read_text())
    assert list(filter(None, found.texts["code"]))[:2] == [
        "oats-vision bench out",
        "oats-vision eval top1 out --data LABELLED_PICTURES",
    ]
    assert "Not measured. To measure it:" in found.texts["p"]
    assert not {"img", "ul"} & set(found.open)


@pytest.mark.slow
def test_page_of_a_large_model_stays_small(pictures, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=24, num_heads=3)
    ov.compress(model, pictures, rate=0.5, iterations=1, refit=False, storage_dtype="float16")
    ov.save(model, tmp_path / "out")
    _measure(tmp_path / "out", examples=_examples(EXAMPLES + 5))
    write_html(tmp_path / "out", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count('class="example"') == EXAMPLES
    assert len(text.encode()) < 1_000_000


def test_spectra_of_large_models_are_of_some_blocks():
    def chosen(width: int, blocks: int) -> list[str]:
        names = [f"blocks.{i}.{kind}" for i in range(blocks) for kind in ("fc1", "fc2")]
        spec = LayerSpec(width, 4 * width, False, (PartSpec("fc", 4 * width, 1, 1),))
        layers = [LayerReport(name, spec, {"fc": 0.1}, {}, {"fc": 1}, 0.0, 1) for name in names]
        return [names[i] for i in spectra_of(CompressionReport("x", resolve(), layers=layers))]

    assert chosen(384, 12) == [f"blocks.{i}.{kind}" for i in range(12) for kind in ("fc1", "fc2")]
    some = chosen(1280, 32)
    assert {"blocks.0.fc1", "blocks.0.fc2", "blocks.31.fc1", "blocks.31.fc2"} <= set(some)
    assert len(some) < 20
    assert chosen(8192, 80) == []


def test_sliced_model_has_a_page(tiny_vit, pictures, tmp_path):
    ov.compress(tiny_vit, pictures, rate=0.3, method="slicegpt")
    ov.save(tiny_vit, tmp_path / "out")
    write_html(tmp_path / "out", tmp_path / "report.html")
    assert "Signal kept" in (tmp_path / "report.html").read_text()


def test_a_page_in_its_checkpoint_does_not_keep_it_from_being_replaced(saved, tiny_vit):
    write_html(saved, saved / "report.html")
    ov.save(tiny_vit, saved, overwrite=True)
    assert not (saved / "report.html").exists()


def test_damaged_report_and_unwritable_target_are_errors_and_leave_nothing(saved, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_html(saved, tmp_path / "missing" / "report.html")
    (saved / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"report.json is damaged"):
        write_html(saved, tmp_path / "report.html")
    with pytest.raises(CheckpointError, match=r"report.json is damaged"):
        add_evaluation(saved, _evaluation("top1", data="x"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_evaluation_takes_the_place_of_an_older_one_of_the_same_data(saved):
    for data, top1 in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        add_evaluation(saved, _evaluation("top1", data=data) | {"compressed": {"top1": top1}})
    kept = json.loads((saved / "report.json").read_text())["evaluations"]
    assert [(result["data"], result["compressed"]["top1"]) for result in kept] == [("b", 2.0), ("a", 3.0)]
