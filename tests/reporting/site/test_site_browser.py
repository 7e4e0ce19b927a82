"""The site in a real browser, from disk. Screenshots are left in the temporary folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.reporting.site.write import write_site
from tests.reporting.cells import write_cell, write_matrix

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or CHROMEDRIVER is None, reason="needs chromium and chromedriver: apt install chromium-driver"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    write_matrix(root / "results")
    write_cell(root / "results", dataset="other <b>faces</b>", fingerprint="e" * 64, method="a_method_of_a_rather_long_name_indeed")
    write_site(root / "results", root / "site", data=root / "data")
    return root / "site"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # In a container there is neither a user namespace for the sandbox nor a large /dev/shm; the pages are our own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def board(browser, site):
    """The page of the leaderboard, wide, as it is when one comes to it; gives its first table."""
    resize(browser, 1280)
    browser.get((site / "index.html").as_uri())
    return browser.find_element(By.CSS_SELECTOR, "table.board")


def resize(browser, width: int, height: int = 900) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def column(board, number: int) -> list[str]:
    rows = board.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [row.find_elements(By.XPATH, "./*")[number].get_attribute("data-sort" if number > 1 else "textContent") for row in rows]


def heading(board, number: int):
    return board.find_elements(By.CSS_SELECTOR, "thead th")[number]


def methods_shown(board) -> list[str]:
    return [row.get_attribute("data-method") for row in board.find_elements(By.CSS_SELECTOR, "tbody tr") if row.is_displayed()]


def test_a_click_sorts_by_figures_the_largest_first_then_the_other_way_round(board):
    figures = column(board, 2)
    heading(board, 2).find_element(By.TAG_NAME, "button").click()
    assert column(board, 2) == sorted(figures, key=float, reverse=True) != figures
    assert heading(board, 2).get_attribute("aria-sort") == "descending"
    heading(board, 2).find_element(By.TAG_NAME, "button").click()
    assert column(board, 2) == sorted(figures, key=float)
    assert heading(board, 2).get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE])
def test_the_keyboard_sorts_by_words_once(board, key):
    heading(board, 0).find_element(By.TAG_NAME, "button").send_keys(key)
    assert heading(board, 0).get_attribute("aria-sort") == "ascending"
    assert column(board, 0) == ["ACoL", "CAM", "TS-CAM"]
    heading(board, 1).find_element(By.TAG_NAME, "button").send_keys(key)
    assert [heading(board, number).get_attribute("aria-sort") for number in (0, 1)] == [None, "ascending"]
    assert column(board, 1) == ["mini", "mini", "mini-vit"]


def test_filters_hide_rows_and_say_how_many_are_left(browser, board):
    form = browser.find_element(By.CSS_SELECTOR, "form.filters")
    text, output = form.find_element(By.CSS_SELECTOR, "input[type=search]"), form.find_element(By.TAG_NAME, "output")
    assert methods_shown(board) == ["CAM", "ACoL", "TS-CAM"]
    text.send_keys("cam MINI")
    assert (methods_shown(board), output.text) == (["CAM", "TS-CAM"], "2 of 3 rows")
    form.find_element(By.CSS_SELECTOR, "[data-filter=backbone] option[value=''] + option").click()
    assert (methods_shown(board), output.text) == (["CAM"], "1 of 3 rows")
    text.send_keys(Keys.ENTER)
    assert browser.current_url.endswith("index.html")


def test_intervals_can_be_shown_without_a_mouse(browser, board):
    certainty = board.find_element(By.CSS_SELECTOR, ".certainty")
    assert certainty.size["width"] <= 1
    browser.find_element(By.CSS_SELECTOR, "[data-intervals]").send_keys(Keys.SPACE)
    assert certainty.size["width"] > 100


def test_the_tab_key_reaches_the_skip_link_first_and_shows_it(browser, board):
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    focused = browser.switch_to.active_element
    assert focused.get_attribute("class") == "skip"
    assert focused.rect["x"] >= 0
    assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", focused) == "solid"


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_no_page_scrolls_sideways_and_none_has_errors(browser, site, tmp_path, width):
    browser.get_log("browser")
    cell = sorted(site.glob("cells/*.html"))[0]
    for page in (site / "index.html", cell, *site.glob("maps/*.html")):
        resize(browser, width)
        browser.get(page.as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        browser.execute_script("document.querySelectorAll('[data-intervals]').forEach((tick) => tick.click())")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page
        pictures = browser.execute_script("return [...document.images].map((image) => image.naturalWidth)")
        assert all(pictures), page
        resize(browser, width, browser.execute_script("return document.documentElement.scrollHeight"))
        browser.save_screenshot(str(tmp_path / f"{page.stem}-{width}.png"))
    assert browser.get_log("browser") == []
