"""The page in a real browser: it loads without errors or network, sorts, and draws the spectrum that is chosen."""

import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from torch import Tensor, nn

import oats_vision as ov
from oats_vision.checkpoint import add_evaluation, layer_specs, read_config, read_weights
from oats_vision.errors import CheckpointError
from oats_vision.html_report import spectrum, write_html

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1100,1600"""


@pytest.fixture
def saved(tiny_vit, pictures, tmp_path):
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=5, storage_dtype="float16")
    ov.save(tiny_vit, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def browser(tmp_path):
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    assert binary, "the test needs Chromium: apt-get install chromium chromium-driver"
    assert driver, "the test needs Chromium's driver: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'browser'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def _evaluation(protocol: str, **about) -> dict:
    return {
        "protocol": protocol,
        **about,
        "dense": {"top1": 91.0},
        "compressed": {"top1": 90.25},
        "difference": {"top-1": {"points": -0.75, "low": -1.2, "high": -0.3, "p_value": 0.01}},
    }


def test_page_in_a_browser(saved, browser, tmp_path):
    add_evaluation(saved, _evaluation("top1", data="imagenet/val <script>alert(1)</script>"))
    page = tmp_path / "report.html"
    write_html(saved, page)
    text = page.read_text()
    assert not re.search(r"(src|href)=", re.sub(r'href="#[^"]*"', "", text))  # nothing to fetch
    assert len(text) < 200_000
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert "-0.75 points [-1.20, -0.30]" in browser.find_element(By.ID, "accuracy").text
    assert "<script>" in browser.find_element(By.ID, "accuracy").text  # shown, not run

    table = browser.find_element(By.ID, "layers")
    buttons = {button.text: button for button in table.find_elements(By.CSS_SELECTOR, "th button")}

    def column(index: int) -> list[str]:
        return [
            row.find_elements(By.TAG_NAME, "td")[index].text for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")
        ]

    untouched = column(6)
    assert len(untouched) == 3 * 6
    buttons["error"].click()
    assert column(6) == sorted(untouched, key=float)
    buttons["error"].click()
    assert column(6) == sorted(untouched, key=float, reverse=True)
    buttons["layer"].click()
    assert column(6) == untouched  # the order of the model again
    buttons["non-zeros"].click()
    counts = [int(text.replace(",", "")) for text in column(4)]
    assert counts == sorted(counts)

    def curve() -> str:
        return browser.find_element(By.CSS_SELECTOR, "#spectrum polyline[data-term=whole]").get_attribute("points")

    first = curve()
    Select(browser.find_element(By.ID, "layer")).select_by_visible_text("blocks.2.mlp.fc2")
    assert curve() != first
    picture = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L"))
    assert picture.shape[1] >= 1000
    assert 0.01 < (picture < 128).mean() < 0.3  # neither blank nor broken


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
    write_html(directory, page)
    write_html(saved, tmp_path / "plain.html")
    found, plain = _Page(page.read_text()), _Page((tmp_path / "plain.html").read_text())
    assert set(found.open) <= set(plain.open)  # no element came from a name
    assert found.open.count("script") == 1
    for name in _OddlyNamed.NAMES:
        assert {f"blocks.0.mlp.{name}"} <= set(found.texts["td"]) & set(found.texts["option"])
        assert f"mlp.{name}" in found.texts["text"]  # of the plot
    assert any(directory.name in text for text in found.texts["p"])
    assert {"<u>top1", '"/><script>alert(2)</script>'} <= set(found.texts["td"])


def test_spectrum_is_numpys(saved, tiny_vit):
    config = read_config(saved)
    specs, tensors = layer_specs(config), read_weights(saved, config)
    layer = tiny_vit.get_submodule("blocks.0.mlp.fc1")  # the model that was saved
    found = spectrum("blocks.0.mlp.fc1", specs["blocks.0.mlp.fc1"], tensors)
    for term, matrix in {"whole": layer.dense_weight(), "sparse": layer.sparse.dense()}.items():
        expected = np.linalg.svd(matrix.numpy(), compute_uv=False)[np.array(found["rank"]) - 1]
        np.testing.assert_allclose(found["values"][term], expected, rtol=1e-3, atol=1e-5 * expected[0])
    assert sum(value > 0 for value in found["values"]["low_rank"]) <= layer.low_rank.U.shape[1]


def test_page_without_an_evaluation_says_how_to_get_one_and_sliced_models_have_one_too(saved, tiny_vit, tmp_path):
    write_html(saved, tmp_path / "report.html")
    assert "oats-vision eval top1 out" in (tmp_path / "report.html").read_text()


def test_sliced_model_has_a_page(tiny_vit, pictures, tmp_path):
    ov.compress(tiny_vit, pictures, rate=0.3, method="slicegpt")
    ov.save(tiny_vit, tmp_path / "out")
    write_html(tmp_path / "out", tmp_path / "report.html")
    assert "Signal kept" in (tmp_path / "report.html").read_text()


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
