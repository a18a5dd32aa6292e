import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lamzoo.report.compare import compare, write_comparison
from lamzoo.report.compare.panels import creation
from tests.report.compare_rows import FAILED, LAM, PLAIN, UNSCORED, WORSE, table, timm_results

pytestmark = pytest.mark.browser

MERGED = replace(UNSCORED, merge=0.5)

_SECONDS = 60


class Page:
    """The comparison page in a browser, with what was asked of the network and written to the console meanwhile."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def script(self, code: str, *args: object) -> Any:
        return self.driver.execute_script(f"return {code}", *args)

    def column(self, heading: str) -> list[str]:
        """Returns the cells of a column, top to bottom, as they stand there now."""
        return self.script(
            """(() => { const table = $("#models").DataTable();
            const index = table.columns().titles().toArray().indexOf(arguments[0]);
            return Array.from(table.column(index, { search: "applied", order: "applied" }).nodes(), (n) => n.innerText);
            })()""",
            heading,
        )

    def until(self, holds: Callable[[], object]) -> None:
        """Waits until something holds: the page answers a click when it comes to it."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, _SECONDS).until(lambda _: holds())

    def heading(self, text: str) -> Any:
        from selenium.webdriver.common.by import By

        titles = self.driver.find_elements(By.CSS_SELECTOR, ".dt-scroll-head thead tr:first-child th")
        return next(title for title in titles if title.text.strip() == text)

    def requests(self) -> set[str]:
        """Returns the addresses asked for since the page was opened, but for those that need no network."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        return {url for url in urls if not url.startswith(("file:", "blob:", "data:"))}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    other = [replace(row, data="imagefolder:others") for row in (PLAIN, LAM)]
    rows = table(folder, PLAIN, LAM, WORSE, FAILED, UNSCORED, MERGED, *other)
    write_comparison(compare([rows], timm=timm_results(folder / "timm"), timm_data=PLAIN.data), folder)
    return folder / "compare.html"


@pytest.fixture
def page(driver: Any, file: Path) -> Page:
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(file.as_uri())
    page = Page(driver)
    page.until(lambda: page.script("document.documentElement.dataset.ready") == "yes")
    return page


def test_page_opens_without_a_complaint_and_without_a_network_request(page: Page) -> None:
    assert page.driver.get_log("browser") == []
    assert page.requests() == set()


def test_table_holds_every_row_with_its_cost(page: Page) -> None:
    assert sorted(page.column("model")) == sorted(
        ["vit_micro.toy", "lam_vit_micro.toy"] * 2 + ["vit_worse.toy", "vit_small", MERGED.label, "lam_vit_huge"]
    )
    by_model = dict(zip(page.column("model"), page.column("of masks (GMACs)"), strict=True))
    assert by_model["lam_vit_micro.toy"] == "0.0200"


def test_click_on_a_heading_sorts_by_number_and_again_the_other_way_round(page: Page) -> None:
    for order, backwards in (("ascending", False), ("descending", True)):
        page.heading("latency (ms)").click()
        page.until(lambda order=order: page.heading("latency (ms)").get_attribute("aria-sort") == order)
        latencies = [float(cell) for cell in page.column("latency (ms)") if cell]
        assert latencies == sorted(latencies, reverse=backwards)
        assert len(set(latencies)) > 1


def test_search_box_filters_the_rows(page: Page) -> None:
    from selenium.webdriver.common.by import By

    page.driver.find_element(By.CSS_SELECTOR, ".dt-search input").send_keys("lam_vit_micro")
    page.until(lambda: page.column("model") == ["lam_vit_micro.toy"] * 2)


def test_filter_of_a_column_keeps_what_is_ticked(page: Page) -> None:
    from selenium.webdriver.common.by import By

    row = ".dt-scroll-head thead tr:nth-child(2) th:nth-child(2)"
    page.driver.find_element(By.CSS_SELECTOR, f"{row} button").click()
    choices = ".dtcc-dropdown .dtcc-list-buttons button"
    page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, choices))
    found = page.driver.find_elements(By.CSS_SELECTOR, choices)
    next(choice for choice in found if choice.text.strip() == "LAM").click()
    page.until(lambda: set(page.column("kind")) == {"LAM"})
    assert set(page.column("model")) == {"lam_vit_micro.toy"}


def test_plots_have_their_points_lines_and_timms_results(page: Page) -> None:
    code = """Array.from(document.querySelectorAll(".js-plotly-plot"), (plot) => [plot.id, Object.fromEntries(
        plot.data.map((trace, index) => [trace.name,
            plot.querySelectorAll(".scatterlayer .trace")[index].querySelectorAll("path.point").length]))])"""
    plots = dict(page.script(code))
    assert set(plots) == {"gmacs-0", "gmacs-1", "latency-0", "latency-1"}
    toys = plots["gmacs-1"]
    assert (toys["plain backbone"], toys["with LAM"], toys["on the front"]) == (2, 1, 2)
    assert toys["timm's published results"] == 2
    assert {"LAM and its backbone", "Pareto front", "their Pareto front"} <= set(toys)
    assert "timm's published results" not in plots["gmacs-0"]


def test_no_button_would_upload_a_plot(page: Page) -> None:
    titles = page.script('Array.from(document.querySelectorAll(".modebar-btn"), (b) => b.dataset.title.toLowerCase())')
    assert titles
    assert not [title for title in titles if "share" in title or "cloud" in title or "upload" in title]


@pytest.mark.parametrize("where", ["table", "plot"])
def test_click_on_a_model_copies_the_python_that_creates_it(page: Page, where: str) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    if where == "table":
        cells = page.driver.find_elements(By.CSS_SELECTOR, "td.name")
        next(cell for cell in cells if cell.text == "lam_vit_micro.toy").click()
    else:
        point = page.script(
            """(() => { const plot = document.getElementById("gmacs-0");
            const at = plot.data.findIndex((trace) => trace.name === "with LAM");
            return plot.querySelectorAll(".scatterlayer .trace")[at].querySelector("path.point"); })()"""
        )
        page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
        ActionChains(page.driver).move_to_element(point).pause(0.5).click().perform()
    python = 'model = lamzoo.create_model("lam_vit_micro.toy", pretrained=True, img_size=32)'
    page.until(lambda: page.driver.find_element(By.ID, "copied").text == f"copied:\n{python}")
    assert page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == python


def test_click_on_a_merged_model_copies_each_line(page: Page) -> None:
    cells = page.driver.find_elements("css selector", "td.name")
    next(cell for cell in cells if cell.text == MERGED.label).click()
    lines = creation(MERGED).splitlines()
    page.until(lambda: page.driver.find_element("id", "copied").text.splitlines()[1:] == lines)
    assert len(lines) == 2
