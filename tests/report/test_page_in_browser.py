"""The page in a real browser: no errors, the table works, in the dark and on a phone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcompiler.report.page import report_html
from tests.support.reports import HOSTILE, full_report

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _missing(what: str) -> None:
    """Skip; in CI, which installs a browser, that would hide that nothing was tested."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("needs playwright: pip install playwright")
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        _missing("needs a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, who tests run as in containers.
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page, and what its console said."""

    def __init__(self, browser: Any, path: Path, **settings: Any) -> None:
        self.page = browser.new_page(**settings)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def shown(self) -> list[str]:
        """Return the names of the rows that are to be seen, in order."""
        rows = self.page.locator("#node-table tbody tr:visible td.name")
        return [str(text) for text in rows.all_inner_texts()]

    def background(self) -> str:
        """Return the colour behind everything."""
        return str(self.page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    """The page of a report with everything in it."""
    path = tmp_path / "report.html"
    path.write_text(report_html(full_report("first", "second", "third")))
    return path


def test_charts_are_drawn_without_a_word_on_the_console(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file)
    assert opened.page.locator(".chart").count() == 4
    assert opened.page.locator(".chart canvas").count() == 4
    assert opened.page.locator(".heat td").count() == 12
    assert opened.said == []
    assert opened.asked == [page_file.as_uri()]


def test_the_table_is_filtered_and_sorted(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file)
    page = opened.page
    assert opened.shown() == ["first", "second", "third"]
    page.fill("#filter", "reason of SECOND")
    assert opened.shown() == ["second"]
    assert page.inner_text("#shown") == "1 of 3"
    page.fill("#filter", "")
    page.select_option("#scheme", "float")
    assert opened.shown() == ["third"]
    page.select_option("#scheme", "")
    heads = page.locator("#node-table th button")
    heads.get_by_text("result dB").click()
    assert opened.shown() == ["second", "first", "third"], "what was not measured goes last"
    heads.get_by_text("result dB").click()
    assert opened.shown() == ["first", "second", "third"]
    heads.get_by_text("node").click()
    heads.get_by_text("node").click()
    assert opened.shown() == ["third", "second", "first"]
    assert opened.said == []


def test_dark_is_dark(browser: Any, page_file: Path) -> None:
    light = Opened(browser, page_file, color_scheme="light")
    dark = Opened(browser, page_file, color_scheme="dark")
    assert light.background() == "rgb(246, 247, 249)"
    assert dark.background() == "rgb(13, 17, 23)"
    light.page.emulate_media(color_scheme="dark")
    assert light.background() == dark.background()
    assert light.page.locator(".chart canvas").count() == 4
    assert light.said == dark.said == []


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_is_wider_than_the_screen(browser: Any, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(report_html(full_report("a" * 200, "/model/layers.0/" * 9, "third")))
    opened = Opened(browser, path, viewport={"width": width, "height": 800})
    inner = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = opened.page.evaluate(inner)
    assert scroll <= client == width
    assert opened.said == []


def test_hostile_names_stay_text(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report_html(full_report(HOSTILE, "'\"><svg onload=alert(1)>", "third")))
    opened = Opened(browser, path)
    opened.page.fill("#filter", "owned")
    opened.page.locator(".chart").first.hover()
    assert opened.shown() == [HOSTILE]
    assert opened.page.title().startswith("</script>")
    assert opened.page.locator("img, svg").count() == 0
    assert opened.page.locator("script").count() == 3
    assert opened.said == []
