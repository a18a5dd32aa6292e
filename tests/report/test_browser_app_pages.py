"""The app in headless Chromium, against a running server on the loopback address; needs the extra ``app``."""

import json
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.videos import write_clip

pytest.importorskip("gradio")
pytest.importorskip("av")
from lamzoo.errors import ConfigError
from lamzoo.report.browser_app import build, launch

pytestmark = pytest.mark.browser

MODELS = ("lam_vit_micro.cifar10", "lam_clip4clip_micro.grid")
_SECONDS = 120


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for number, colour in enumerate(("red", "blue", "green")):
        write_clip(folder / f"{number}.mp4", [Image.new("RGB", (64, 48), colour)] * 10, fps=10, size=(64, 48))
    return folder


@pytest.fixture(scope="module")
def app(films: Path) -> Iterator[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = launch(MODELS, videos=films, port=port, device="cpu", block=False)
    yield app
    app.close()


@pytest.fixture
def page(driver: Any, app: Any) -> Any:
    driver.switch_to.default_content()
    driver.get("about:blank")
    driver.get_log("performance")
    driver.get(app.local_url)
    until(driver, lambda: driver.find_elements("id", "explain-image"))
    return driver


def until(driver: Any, holds: Callable[[], Any]) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, _SECONDS).until(lambda _: holds())


def tab(driver: Any, name: str) -> None:
    (button,) = [each for each in driver.find_elements("css selector", "button[role=tab]") if each.text == name]
    button.click()


def visible(driver: Any, selector: str) -> list[Any]:
    return [each for each in driver.find_elements("css selector", selector) if each.is_displayed()]


def upload(driver: Any, file: Path, panel: int) -> None:
    inputs = driver.find_elements("css selector", "div[role=tabpanel]")[panel]
    until(driver, lambda: inputs.find_elements("css selector", "input[type=file]"))
    inputs.find_element("css selector", "input[type=file]").send_keys(str(file))


def test_an_uploaded_image_has_predictions_and_a_page_that_works(page: Any, app: Any, tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), "blue").save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png", 0)
    until(page, lambda: page.find_elements("css selector", "div[role=tabpanel] img"))
    page.find_element("id", "explain-image").click()
    until(page, lambda: visible(page, "iframe"))
    assert "%" in page.find_element("css selector", "div[role=tabpanel]").text
    page.switch_to.frame(visible(page, "iframe")[0])
    until(page, lambda: page.execute_script("return document.documentElement.dataset.ready") == "yes")
    assert page.find_element("id", "i").text.startswith("patch, row 4, column 4")
    page.switch_to.default_content()
    messages = (json.loads(entry["message"])["message"] for entry in page.get_log("performance"))
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith((app.local_url, "data:", "blob:", "about:"))} == set()


def test_a_video_is_compared_with_texts_and_the_folder_is_searched(page: Any, films: Path) -> None:
    tab(page, "Video")
    upload(page, films / "0.mp4", 1)
    until(page, lambda: visible(page, "video"))
    visible(page, "textarea")[0].send_keys("bin red now\nlay blue soon")
    page.find_element("id", "explain-video").click()
    until(page, lambda: visible(page, "iframe"))
    page.switch_to.frame(visible(page, "iframe")[0])
    until(page, lambda: page.execute_script("return document.documentElement.dataset.ready") == "yes")
    assert "this text: bin red now" in page.find_element("id", "answers").text
    page.switch_to.default_content()
    tab(page, "Search")
    visible(page, "#query textarea, #query input")[0].send_keys("bin red now")
    page.find_element("id", "search").click()
    until(page, lambda: len(visible(page, "#found img")) >= 3)
    assert "1. " in page.find_element("id", "found").text


@pytest.mark.parametrize(("name", "status"), [("localhost", 200), ("evil.example", 400)])
def test_a_site_under_another_name_cannot_read_the_app(app: Any, name: str, status: int) -> None:
    connection = HTTPConnection("127.0.0.1", app.server_port, timeout=_SECONDS)
    connection.request("GET", "/config", headers={"Host": f"{name}:{app.server_port}"})
    assert connection.getresponse().status == status
    connection.close()


def test_a_mistake_is_said_in_the_page(page: Any) -> None:
    page.find_element("id", "explain-image").click()
    until(page, lambda: "there is no image; upload one" in page.find_element("tag name", "body").text)


def test_a_file_that_is_no_image_is_said_in_the_page(page: Any, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    upload(page, tmp_path / "photo.png", 0)
    until(page, lambda: page.find_elements("css selector", "div[role=tabpanel] img"))
    page.find_element("id", "explain-image").click()
    until(
        page, lambda: "cannot read the image photo.png: it is PostScript" in page.find_element("tag name", "body").text
    )


def test_an_address_that_is_taken_and_a_folder_without_a_model_are_named(app: Any, films: Path) -> None:
    with pytest.raises(ConfigError, match="choose another --port"):
        launch(MODELS[:1], port=app.server_port, block=False)
    with pytest.raises(ConfigError, match="needs a retrieval model"):
        build(MODELS[:1], videos=films)
