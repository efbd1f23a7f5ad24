"""What a page must be in a real browser, whatever it is about."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

DESKTOP, PHONE = (1280, 800), (390, 844)  # width and height


def show(browser: Any, page: Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
    """Open a page on a screen of that size, after the last one's logs are read."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(page.as_uri())


def check_quiet(browser: Any, page: Path) -> None:
    """Nothing is asked for but the page and what it holds, and nothing is complained of."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert page.as_uri() in asked
    assert all(url == page.as_uri() or url.startswith("data:image/") for url in asked)
    assert browser.get_log("browser") == []


def check_width(browser: Any) -> None:
    """The page does not scroll sideways."""
    needed, there = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert needed <= there


def check_accessible(browser: Any) -> None:
    """Headings in order, texts for pictures, scopes for headings of tables, and a name for each control."""
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for lacking in (
        "img:not([alt])",
        "img[alt='']",
        "th:not([scope])",
        "svg:not([role=img][aria-label])",
        "select:not(label select)",
    ):
        assert browser.execute_script(f'return document.querySelectorAll("{lacking}").length') == 0, lacking


def colours(browser: Any) -> dict[str, tuple[float, float, float]]:
    """Of the page, its text, its notes and the text of a figure."""
    found = browser.execute_script(
        """const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
        return {paper: of("body", "backgroundColor"), text: of("body", "color"), note: of(".note", "color"),
                figure: of("svg.figure text", "fill")};"""
    )
    return {name: tuple(float(part) for part in text.strip("rgba()").split(",")[:3]) for name, text in found.items()}


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """As WCAG 2 defines it, from 1 to 21."""

    def luminance(colour: tuple[float, float, float]) -> float:
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def check_dark(browser: Any, page: Path) -> None:
    """Colours follow the system's, and are read well both ways."""
    show(browser, page)
    light = colours(browser)
    show(browser, page, dark=True)
    dark = colours(browser)
    assert min(light["paper"]) > 240
    assert max(dark["paper"]) < 40
    for scheme in (light, dark):
        for name in ("text", "note", "figure"):
            assert contrast(scheme[name], scheme["paper"]) > 4.5, name
