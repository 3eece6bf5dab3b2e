"""The page as a browser shows it: at three widths, light and dark, by mouse and by keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.browser import Browser
from tests.report.conftest import HOSTILE
from vitds.report.page import SECTIONS, SECTIONS_OF_SEVERAL

WIDTHS = (360, 768, 1920)
KINDS = ("pre", "fine-seed0", "hostile", "resnet", "alone", "several")
# Elements that stick out of the screen, apart from what lies in a box that scrolls by itself.
TOO_WIDE = """[...document.querySelectorAll("main, main *")].filter(
    (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.parentElement.closest(".box"))
    .map((e) => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_at_three_widths_without_a_complaint_or_a_request(
    pages: dict[str, Path], browser: Browser, kind: str
) -> None:
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            browser.open(pages[kind], width=width, scheme=scheme)
            assert browser.complaints == [], (width, scheme)
            asked = [url for url in browser.requests if not url.startswith("data:")]
            assert asked == [pages[kind].absolute().as_uri()], (width, scheme)
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value(TOO_WIDE) == [], (width, scheme)


@pytest.mark.parametrize("kind", KINDS)
def test_every_section_is_there_and_leads_somewhere(
    pages: dict[str, Path], browser: Browser, kind: str
) -> None:
    browser.open(pages[kind], width=1920)
    sections = dict(SECTIONS_OF_SEVERAL if kind == "several" else SECTIONS)
    if kind != "pre":  # nothing was measured of the others
        sections.pop("theory", None)
    assert browser.each("h2", "e.textContent") == list(sections.values())
    # Each has more below it than its heading, and the links above lead to them.
    assert "H2" not in browser.each("h2", "e.nextElementSibling.tagName")
    assert browser.each("nav a", "document.querySelector(e.hash).textContent") == list(sections.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_screen_reader_finds_headings_in_order_names_of_pictures_and_real_tables(
    pages: dict[str, Path], browser: Browser, kind: str
) -> None:
    browser.open(pages[kind], width=768)
    levels = browser.each("h1, h2, h3, h4", "+e.tagName[1]")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(browser.each("img", "e.alt.trim()"))
    assert all(len(label) > 20 for label in browser.each("svg[role=img]", "e.ariaLabel"))
    assert all(browser.each("table", "e.querySelectorAll('th[scope]').length"))
    assert all(browser.each(".box", "e.ariaLabel && e.tabIndex === 0"))
    assert browser.value("document.documentElement.lang") == "en"


def test_a_page_is_small_enough_to_be_mailed(pages: dict[str, Path]) -> None:
    assert max(page.stat().st_size for page in pages.values()) < 10e6


def test_the_text_has_contrast_enough_light_and_dark(pages: dict[str, Path], browser: Browser) -> None:
    luminance = """(name) => { const probe = document.createElement("i"); document.body.append(probe);
        probe.style.color = `var(--${name})`;
        const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map((v) => v / 255)
            .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        probe.remove(); return .2126 * r + .7152 * g + .0722 * b; }"""
    for scheme in ("light", "dark"):
        browser.open(pages["pre"], width=768, scheme=scheme)
        paper, *others = (
            browser.value(f"({luminance})('{name}')")
            for name in ("paper", "ink", "soft", "link", "good", "bad")
        )
        for other in others:
            contrast = (max(paper, other) + 0.05) / (min(paper, other) + 0.05)
            assert contrast >= 4.5  # WCAG 2.1, AA


def test_a_heading_sorts_its_table_and_says_so(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["fine-seed0"], width=768)
    table = ".box[aria-label='Each class']"
    for order, is_falling in (("descending", True), ("ascending", False)):
        browser.value(f'document.querySelectorAll("{table} button")[3].click()')
        values = list(map(float, browser.each(f"{table} tbody td:nth-child(4)", "e.dataset.value")))
        assert values == sorted(values, reverse=is_falling) and len(set(values)) > 1
        assert browser.each(f"{table} thead th", "e.ariaSort") == [None] * 3 + [order] + [None] * 2


def test_the_map_shows_an_image_by_mouse_and_by_keyboard(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["fine-seed0"], width=1920)
    said = "document.getElementById('said').textContent"
    assert browser.value(said) == ""
    browser.value("document.getElementById('scatter').scrollIntoView()")
    ((left, top),) = browser.each("#scatter", "(({x, y}) => [x, y])(e.getBoundingClientRect())")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + 20, y=top + 20)
    browser.wait(f"{said} !== ''")
    first = browser.value(said)
    assert ".png" in first and "class: digit" in first and ("✓ right" in first or "✗ wrong" in first)
    assert browser.value("document.getElementById('thumb').style.backgroundPosition") != ""
    browser.value("document.getElementById('scatter').focus()")
    seen = set()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft"):
        browser.press(key)
        seen.add(browser.value(said))
    assert len(seen) > 1


def test_the_thumbnail_is_that_of_the_image_that_is_said(pages: dict[str, Path], browser: Browser) -> None:
    """The place on the sheet, and no other one, for the first and the last image."""
    browser.open(pages["fine-seed0"], width=1920)
    browser.value("document.getElementById('scatter').focus()")
    browser.press("Home")
    place = """(() => { const points = JSON.parse(document.getElementById("points").textContent);
        const words = document.getElementById("said").textContent;
        const thumb = document.getElementById("thumb"), cell = thumb.clientWidth;
        const [x, y] = thumb.style.backgroundPosition.split(" ").map(parseFloat);
        return [points.name.findIndex((name) => words.startsWith(name)),
            Math.round(-y / cell) * points.columns + Math.round(-x / cell)]; })()"""
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft"):
        browser.press(key)
        said, shown = browser.value(place)
        assert said == shown and said >= 0


def test_names_that_are_markup_stay_names(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["hostile"], width=768)
    assert browser.complaints == []
    assert browser.value("document.querySelectorAll('img[src=x], b b, td b, h3 b').length") == 0
    text = browser.value("document.body.textContent")
    assert HOSTILE in text and "<b>0.png" in text and "{{ 7*7 }}" in text
    points = "JSON.parse(document.getElementById('points').textContent)"
    assert browser.value(f"{points}.classes").count(HOSTILE) == 1


def test_several_runs_have_their_settings_beside_each_other_and_a_mean_over_seeds(
    pages: dict[str, Path], browser: Browser, runs: dict[str, Path]
) -> None:
    browser.open(pages["several"], width=1920)
    settings, groups = browser.each("#runs ~ .box table", "e.innerText")
    assert "seed" in settings and "method" in settings
    assert all(str(runs[name]) in settings for name in ("fine-seed0", "fine-seed1", "pre"))
    rows = [line.split("\t") for line in groups.splitlines() if line[:1].isdigit()]
    assert [row[2] for row in rows] == ["2", "1"] and rows[0][4] != "-" and rows[1][4] == "-"
    # Three lines, told apart by dash and marker, in a chart that all runs have.
    dashes = browser.each("figure.chart:first-child svg .line", "getComputedStyle(e).strokeDasharray")
    assert len(set(dashes[:3])) == 3
    assert browser.each(".legend", "e.children.length")[0] == 3
