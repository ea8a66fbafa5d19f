"""The report's page in a browser: charts drawn, tables sorted and searched, print."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import average_precision_score

from fastat.config.paper import TABLE_4
from fastat.study.report.page import write_report
from tests.report_samples import (
    EVIL,
    NAMES,
    scores,
    write_ablation,
    write_profile,
    write_quality,
    write_run,
)

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHARTS = ("loss", "map", "figure-2", "noise-chart")
ROWS = "#class-table tbody tr"
MARKUP = "no <b>mixup"
"""A run's name that plotly would take for markup."""
EVIL_ID = f"/m/{NAMES.index(EVIL)}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The system's Chromium; playwright's own is not downloaded."""
    found = [path for name in CHROMIUM if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is installed: the page is not opened")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # its sandbox needs privileges that a container may not have
        chromium = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "runs" / "first")
    write_run(folder / "runs" / "second", model="crnn", maps=(0.2, 0.7), seed=1)
    write_run(folder / "runs" / MARKUP, mixup=0.0, seed=2)
    write_ablation(folder / "runs" / "t4", dict.fromkeys(TABLE_4, 5.0))
    inputs = [folder / "runs", write_profile(folder / "p.json")]
    out = folder / "report.html"
    write_report(inputs, out, write_quality(folder / "qa.csv"))
    return out


class Window:
    """The page in a window of its own, and what it said and asked for."""

    def __init__(self, browser: Any, report: Path, width: int) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())

    def check(self, report: Path) -> None:
        """Nothing was complained of, and nothing but the page asked for."""
        assert self.said == []
        asked = [url for url in self.asked if not url.startswith(("data:", "blob:"))]
        assert asked == [report.as_uri()]


@pytest.fixture(scope="module")
def window(browser: Any, report: Path) -> Iterator[Window]:
    """Opening the page takes seconds of a processor: most tests share it."""
    opened = Window(browser, report, 1200)
    yield opened
    opened.page.close()


@pytest.fixture
def page(window: Window, report: Path) -> Iterator[Any]:
    """The page with its controls as it is opened."""
    window.page.locator("#run-a").select_option(label="first")
    window.page.locator("#run-b").select_option(label="no other")
    for field in window.page.locator("input[type=search]").all():
        field.fill("")
    yield window.page
    window.check(report)


def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def average_precisions(seed: int) -> list[float]:
    logit, target = scores(seed)
    return [average_precision_score(target[:, k], logit[:, k]) for k in range(4)]


def lines(page: Any, chart: str) -> list[str]:
    """The paths of a chart's lines."""
    found: list[str] = page.eval_on_selector_all(
        f"#{chart} .scatterlayer path.js-line", "paths => paths.map(p => p.getAttribute('d'))"
    )
    return found


def test_charts_are_drawn(page: Any) -> None:
    for name in CHARTS:
        paths = page.locator(f"#chart-{name} .scatterlayer path")
        assert paths.count() > 0, name
    assert len(lines(page, "chart-loss")) == 6 and len(lines(page, "chart-map")) == 3
    assert len(lines(page, "precision-recall")) == 2
    labels = page.locator("#chart-loss .xtitle, #chart-loss .ytitle").all_text_contents()
    assert sorted(labels) == ["epoch", "loss"]


def test_classes_are_sorted_by_click_and_by_key(page: Any) -> None:
    order = sorted(range(4), key=lambda k: -average_precisions(0)[k])
    assert texts(page, f"{ROWS} th") == [NAMES[k] for k in order] + [NAMES[4]]
    head = page.locator("#class-table thead th").nth(2)
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    # the class without a positive has no AP, and stays last
    assert texts(page, f"{ROWS} th") == [NAMES[k] for k in order[::-1]] + [NAMES[4]]
    page.locator("#class-table thead button").first.focus()
    page.keyboard.press("Enter")
    by_name = [EVIL, "Never heard", "Plucked string", "Rain", "Speech, babble"]
    assert texts(page, f"{ROWS} th") == by_name
    assert head.get_attribute("aria-sort") is None
    positives = scores(0)[1].sum(0)
    page.locator("#class-table thead button").nth(1).click()
    shown = [int(text) for text in texts(page, f"{ROWS} td:nth-child(2)")]
    assert shown == sorted(positives, reverse=True)


def test_a_table_made_with_the_page_is_sorted_too(page: Any) -> None:
    page.locator("#all-runs thead button", has_text="best mAP").click()
    assert texts(page, "#all-runs tbody th") == ["second", "first", MARKUP]
    page.locator("#all-runs thead button", has_text="run").click()
    assert texts(page, "#all-runs tbody th") == ["first", MARKUP, "second"]


def test_classes_are_found(page: Any) -> None:
    field = page.locator("#find")
    field.fill("speech")
    assert texts(page, f"{ROWS}:visible th") == ["Speech, babble"]
    assert page.locator("#found").inner_text() == "1 of 5 classes"
    field.fill("/m/3")
    assert texts(page, f"{ROWS}:visible th") == ["Rain"]
    field.fill("")
    assert page.locator(f"{ROWS}:visible").count() == 5


def test_another_class_has_another_curve(page: Any) -> None:
    before = lines(page, "precision-recall")
    page.locator(f"{ROWS} button", has_text="Rain").click()
    after = lines(page, "precision-recall")
    assert after[0] != before[0]
    want = f"first: AP {average_precisions(0)[3]:.3f}"
    assert page.locator("#class-note").inner_text().startswith(want)
    assert page.locator("#class").input_value() == "/m/3"
    page.locator("#class").select_option(EVIL_ID)
    assert page.locator(f"{ROWS}[aria-current] th").inner_text() == EVIL
    page.locator("#class").select_option("/m/4")
    assert "no positive in 60 clips" in page.locator("#class-note").inner_text()
    assert lines(page, "precision-recall") == []


def test_two_runs_beside_one_another(page: Any) -> None:
    page.locator("#run-b").select_option(label="second")
    heads = [text.strip() for text in texts(page, "#class-table thead th")]
    assert heads == ["class", "positives", "AP", "AP beside", "difference"]
    page.locator("#class").select_option("/m/0")
    first, second = (average_precisions(seed)[0] for seed in (0, 1))
    cells = texts(page, f"{ROWS}[aria-current] td")
    assert cells[1:3] == [f"{first:.3f}", f"{second:.3f}"]
    assert float(cells[3].replace("−", "-")) == pytest.approx(first - second, abs=1e-3)
    assert len(lines(page, "precision-recall")) == 3  # two runs and chance
    page.locator("#run-a").select_option(label="second")
    page.locator("#run-b").select_option(label="no other")
    assert texts(page, f"{ROWS}[aria-current] td")[1] == f"{second:.3f}"


def test_a_run_is_taken_from_a_chart(page: Any) -> None:
    entry = page.locator("#chart-loss .traces", has_text="second").locator(".legendtoggle")
    entry.click()
    page.wait_for_timeout(600)  # plotly waits for a second click
    assert len(lines(page, "chart-loss")) == 4  # its training and its evaluation loss are gone
    entry.click()
    page.wait_for_timeout(600)
    assert len(lines(page, "chart-loss")) == 6


def test_print(browser: Any, report: Path) -> None:
    """On paper nothing is cut off, and the page is as before when it is on the screen again."""
    window = Window(browser, report, 1200)
    page = window.page
    width = "document.querySelector('#chart-map .main-svg').clientWidth"
    before = page.evaluate(width)
    page.emulate_media(media="print")
    page.wait_for_function("document.querySelector('#chart-map .main-svg').clientWidth <= 660")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    for hidden in ("nav", ".controls"):
        assert page.locator(f"{hidden}:visible").count() == 0
    cut: int = page.evaluate(
        """() => [...document.querySelectorAll(".scroll")].filter(
            (e) => getComputedStyle(e).overflowX !== "visible" || e.clientHeight < e.scrollHeight,
        ).length"""
    )
    assert cut == 0
    assert page.locator(f"{ROWS}:visible").count() == 5
    page.emulate_media(media="screen")
    page.wait_for_function("document.querySelector('nav').checkVisibility()")
    page.wait_for_function(f"{width} === {before}")
    window.check(report)
    page.close()


def test_the_page_is_never_wider_than_the_window(browser: Any, report: Path) -> None:
    window = Window(browser, report, 400)
    for width in (400, 800, 1200):
        window.page.set_viewport_size({"width": width, "height": 900})
        # plotly follows the window in a while
        window.page.wait_for_function(
            """() => [...document.querySelectorAll(".plot")].every((plot) => {
                const drawn = plot.querySelector(".main-svg").getBoundingClientRect();
                return Math.abs(drawn.width - plot.clientWidth) < 2 && drawn.right <= innerWidth;
            })"""
        )
        assert window.page.evaluate("document.documentElement.scrollWidth") <= width
    window.check(report)
    window.page.close()


def test_nothing_moves_once_the_page_is_there(page: Any) -> None:
    """What the script draws has its room before."""
    shifts = page.evaluate(
        """() => new Promise((resolve) => {
            let sum = 0;
            new PerformanceObserver((list) => {
                for (const entry of list.getEntries()) sum += entry.value;
            }).observe({ type: "layout-shift", buffered: true });
            setTimeout(() => resolve(sum), 200);
        })"""
    )
    assert shifts < 0.05


def test_names_run_nothing(page: Any) -> None:
    """A class called ``</script><b>...``, and a run that plotly is given the name of."""
    page.locator("#class").select_option(EVIL_ID)
    page.locator("#run-b").select_option(label=MARKUP)
    names = page.locator("#precision-recall .legendtext").all_text_contents()
    assert names == ["first", "chance", MARKUP]
    assert page.locator("b, img").count() == 0
    assert page.evaluate("typeof hacked") == "undefined"
    assert EVIL in texts(page, f"{ROWS} th")
    data = page.locator("#data-classes-0").inner_text()
    assert "<" not in data and json.loads(data)["names"] == NAMES


def test_tables_have_headings(page: Any) -> None:
    """A screen reader is told of every cell which row and column it is in."""
    wrong: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("table")].filter((table) => {
            const rows = [...table.tBodies[0].rows];
            const heads = [...table.tHead.rows].at(-1).cells;
            return !table.caption.textContent.trim()
                || [...heads].some((h) => h.tagName !== "TH" || h.scope !== "col")
                || rows.some((r) => r.cells[0].scope !== "row" || r.cells.length !== heads.length);
        }).map((table) => table.id)"""
    )
    assert wrong == [] and page.locator("table").count() >= 8
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("select, input")]
            .filter((e) => !e.labels.length).length"""
    )
    assert unnamed == 0
