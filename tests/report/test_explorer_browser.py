"""The explorer page in headless Chromium, with real pointer moves and keys."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lamzoo.adapters import add_lam, capture_masks
from lamzoo.lam import LamConfig
from lamzoo.models.vit import micro_vit
from lamzoo.reduction import merge_tokens
from lamzoo.report import TokenRun, explore, explore_image
from lamzoo.report.mask_pictures import run_all_queries
from lamzoo.report.model_view import view
from tests.report.explorer_data import PageLayer, read_page

pytestmark = pytest.mark.browser

GRID, PREFIX, HEADS = 8, 1, 2
SECONDS, EARLIER, WORDS = 12, ("he", "<b>says</b>", "so"), ("a", "dog", "runs", "café", "off")
NUMBERS = ("mask", "masked", "plain", "difference")


class Explorer:
    """The page in a browser, and what ``capture_masks`` says of the same model and image."""

    def __init__(self, driver: Any, file: Path, records: dict[str, Any]) -> None:
        self.driver, self.file, self.records = driver, file, list(records.values())

    def open(self, *, width: int = 1400, height: int = 1100, scheme: str = "light") -> None:
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(self.file.as_uri())
        assert self.script("document.documentElement.dataset.ready") == "yes"

    def script(self, code: str, *args: object) -> Any:
        return self.driver.execute_script(f"return {code}", *args)

    def text(self, name: str) -> str:
        return self.driver.find_element("id", name).text

    def choose(self, select: str, index: int) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.driver.find_element("id", select)).select_by_index(index)

    def point(self, place: str, token: int, *, click: bool = False) -> None:
        """Moves the pointer to a token in a view, as a hand does."""
        from selenium.webdriver import ActionChains

        box = self.driver.find_element("id", place)
        actions = ActionChains(self.driver, duration=0)
        if token < PREFIX:
            actions.move_to_element(box.find_elements("css selector", ".words span")[token])
        else:
            canvas = box.find_element("css selector", "canvas.grid")
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
            cell = canvas.size["width"] / GRID
            row, column = divmod(token - PREFIX, GRID)
            across, down = ((at + 0.5) * cell - canvas.size["width"] / 2 for at in (column, row))
            actions.move_to_element_with_offset(canvas, round(across), round(down))
        (actions.click() if click else actions).perform()

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def expected(self, layer: int, head: int | None, query: int, key: int) -> list[float]:
        """The numbers of a place, of tokens of the model's input; all nan where the key or the query is not there."""
        record = self.records[layer]
        i, j = (
            token if places is None else int(places[0, token])
            for token, places in ((query, record.query_places), (key, record.key_places))
        )
        mask, masked, plain = (
            float((each.mean(dim=0) if head is None else each[head if len(each) > 1 else 0])[i, j])
            for each in (record.mask.dense()[0], record.attention[0], record.scores.attention()[0])
        )
        return [mask, masked, plain, masked - plain]

    def check(self, layer: int, head: int | None, query: int, key: int) -> None:
        shown = [float(self.text(f"n-{name}")) for name in NUMBERS]
        np.testing.assert_allclose(shown, self.expected(layer, head, query, key), rtol=2e-3, atol=2e-5)


def label(token: int) -> str:
    row, column = divmod(token - PREFIX, GRID)
    return "token class" if token < PREFIX else f"patch, row {row}, column {column}"


@pytest.fixture(scope="module", params=["plain", "merged"])
def explorer(request: pytest.FixtureRequest, driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    torch.manual_seed(0)
    config = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": HEADS, "num_classes": 10}
    model = micro_vit(config, lam=LamConfig(op="mul", heads="per-head", init="paper")).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 20
    if request.param == "merged":
        merge_tokens(model, keep=0.4)
    photo = Image.fromarray(torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8).numpy())
    file = tmp_path_factory.mktemp("explorer") / "page.html"
    explore_image(model, photo, file)
    with torch.no_grad(), capture_masks(model) as records:
        run_all_queries(model, view(model, photo).images)
    return Explorer(driver, file, dict(records))


def test_page_opens_without_a_complaint_and_without_a_network_request(explorer: Explorer) -> None:
    explorer.open()
    assert explorer.driver.get_log("browser") == []
    messages = (json.loads(entry["message"])["message"] for entry in explorer.driver.get_log("performance"))
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith(("file:", "data:"))} == set()


def test_twenty_random_places_show_what_capture_masks_has(explorer: Explorer) -> None:
    explorer.open()
    draw = random.Random(0)
    for _ in range(20):
        layer, head = draw.randrange(len(explorer.records)), draw.choice([None, *range(HEADS)])
        query, key = (draw.randrange(PREFIX + GRID**2) for _ in range(2))
        explorer.choose("layer", layer)
        explorer.choose("head", 0 if head is None else head + 1)
        explorer.press("\ue00c")  # Escape
        explorer.point("picker", query)
        assert explorer.text("i").startswith(label(query))
        explorer.point("picker", query, click=True)
        explorer.point(draw.choice(NUMBERS), key)
        assert explorer.text("j").startswith(label(key))
        explorer.check(layer, head, query, key)


def test_every_token_is_reached_by_the_pointer_and_by_keys(explorer: Explorer) -> None:
    explorer.open()
    for token in range(PREFIX + GRID**2):
        explorer.point("picker", token)
        assert explorer.text("i").startswith(label(token))
    explorer.script("document.getElementById('mask').focus()")
    explorer.press("\ue011")  # Home
    for token in range(PREFIX + GRID**2):
        assert explorer.text("j").startswith(label(token))
        explorer.press("\ue014")  # right
    explorer.press("\ue013")  # up
    assert explorer.text("j").startswith(label(GRID**2 - GRID))


def test_keys_reach_every_layer_and_head_and_the_numbers_follow(explorer: Explorer) -> None:
    from selenium.webdriver.common.keys import Keys

    explorer.open()
    explorer.script("document.getElementById('picker').focus()")
    explorer.press(Keys.HOME, Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.TAB)
    query = min(1 + GRID, GRID**2) if explorer.text("i").startswith(label(1 + GRID)) else 2
    assert explorer.text("i").startswith(label(query))
    explorer.press(Keys.END, Keys.ARROW_UP)
    key = GRID**2 - GRID
    assert explorer.text("j").startswith(label(key))
    for layer in range(len(explorer.records)):
        for head in (None, *range(HEADS)):
            explorer.check(layer, head, query, key)
            explorer.press(".")
        explorer.press("]", *"," * HEADS)


def test_a_click_on_a_layer_chooses_it_and_below_is_the_importance_of_the_key(explorer: Explorer) -> None:
    explorer.open()
    explorer.point("plain", 30)
    for index, record in enumerate(explorer.records):
        button = explorer.driver.find_elements("css selector", "#layers button")[index]
        at = 30 if record.key_places is None else int(record.key_places[0, 30])
        shown = float(button.find_element("css selector", "small").text.split(",")[0])
        assert shown == pytest.approx(float(record.importance[0].mean(dim=0)[at]), rel=2e-3, abs=1e-5)
        button.find_element("css selector", "span").click()
        assert explorer.script("document.getElementById('layer').selectedIndex") == index
        assert button.get_attribute("aria-pressed") == "true"


def test_merged_tokens_are_named_layer_by_layer(explorer: Explorer) -> None:
    explorer.open()
    for index, record in enumerate(explorer.records):
        explorer.choose("layer", index)
        for token in (10, 40):
            explorer.point("difference", token)
            places = record.key_places
            others = 0 if places is None else int((places[0] == places[0, token]).sum()) - 1
            assert (f"(one with {others} other" in explorer.text("j")) == (others > 0)
            assert ("one with" in explorer.text("j")) == (others > 0)


def test_a_held_query_stays_until_it_is_let_go(explorer: Explorer) -> None:
    explorer.open()
    explorer.point("picker", 20, click=True)
    explorer.point("picker", 33)
    assert explorer.text("i").startswith(label(20))
    explorer.press("\ue00c")
    explorer.point("picker", 34)
    assert explorer.text("i").startswith(label(34))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_has_the_colours_of_the_scheme(explorer: Explorer, scheme: str) -> None:
    explorer.open(width=390, height=844, scheme=scheme)
    assert explorer.script("document.documentElement.scrollWidth") == 390
    background = explorer.script("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
    explorer.point("picker", 12, click=True)
    assert explorer.text("i").startswith(label(12))
    cell = explorer.script("document.querySelector('#picker canvas.grid').clientWidth") / GRID
    assert cell >= 24


@pytest.fixture(scope="module")
def crossing(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    """The page of an encoder over seconds and a decoder over words, which attends to both."""
    torch.manual_seed(0)
    model = nn.Transformer(16, HEADS, 1, 1, 32, dropout=0.0, batch_first=True)
    add_lam(model, LamConfig(op="add", heads="per-head", init="paper"))
    seconds = [
        TokenRun("second", tuple(f"{start} s" for start in range(SECONDS)), time=True),
        TokenRun("word", EARLIER),
    ]
    words = [TokenRun("word", WORDS)]
    inputs = (torch.randn(1, SECONDS + len(EARLIER), 16) * 3, torch.randn(1, len(WORDS), 16) * 3)
    file = tmp_path_factory.mktemp("crossing") / "page.html"
    explore(model, inputs, file, tokens=[seconds, words])
    with torch.no_grad(), capture_masks(model.eval()) as records:
        model(*inputs)
    return Explorer(driver, file, dict(records))


def test_seconds_and_words_of_two_sequences_show_what_capture_masks_has(crossing: Explorer) -> None:
    from selenium.webdriver import ActionChains

    crossing.open()
    names = crossing.script("Array.from(document.getElementById('layer').options, (option) => option.text)")
    assert names == ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    early = [*(f"second {start} s" for start in range(SECONDS)), *(f"word {word}" for word in EARLIER)]
    late = [f"word {word}" for word in WORDS]
    labels = [(early, early), (late, late), (late, early)]

    def point(place: str, sequence: list[str], token: int) -> None:
        box = crossing.driver.find_element("id", place)
        actions = ActionChains(crossing.driver, duration=0)
        if sequence is early and token < SECONDS:
            strip = box.find_element("css selector", "canvas.strip")
            across = (token + 0.5) / SECONDS * strip.size["width"] - strip.size["width"] / 2
            actions.move_to_element_with_offset(strip, round(across), 0)
        else:
            spans = box.find_elements("css selector", ".words span")
            actions.move_to_element(spans[token - SECONDS if sequence is early else token])
        actions.perform()

    draw = random.Random(1)
    for layer in (0, 1, 2, 2, 1, 0, 2):
        queries, keys = labels[layer]
        query, key, head = draw.randrange(len(queries)), draw.randrange(len(keys)), draw.choice([None, *range(HEADS)])
        crossing.choose("layer", layer)
        crossing.choose("head", 0 if head is None else head + 1)
        point("picker", queries, query)
        assert crossing.text("i") == queries[query]
        point(draw.choice(NUMBERS), keys, key)
        assert crossing.text("j") == keys[key]
        crossing.check(layer, head, query, key)
    assert crossing.driver.get_log("browser") == []


def test_frames_of_a_video_are_a_sheet_in_the_order_of_time(driver: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains

    from tests.report.test_explorer_clips import clip, explore_video, retriever

    model, frames = retriever("seq"), 5
    explore_video(model, clip(frames), ["a dog", "a cat"], tmp_path / "page.html")
    page = Explorer(driver, tmp_path / "page.html", {})
    page.open()
    sheet = driver.find_element("css selector", "#picker canvas.grid")
    columns = page.script("page.runs[page.sequences[page.layers[0].queries][0]].grid[1]")
    width, height = (sheet.size[side] for side in ("width", "height"))
    rows = -(-frames // columns)

    def point(cell: int) -> None:
        across, down = (cell % columns + 0.5) / columns - 0.5, (cell // columns + 0.5) / rows - 0.5
        ActionChains(driver, duration=0).move_to_element_with_offset(
            sheet, round(across * width), round(down * height)
        ).perform()

    for frame in (3, 0, 4):
        point(frame)
        assert page.text("i") == f"frame {0.5 * frame:.2f} s"
    assert driver.find_element("id", "i-frame").is_displayed()
    assert rows * columns > frames
    point(frames)  # behind the last frame nothing is left to point at
    assert page.text("i") == "frame 2.00 s"
    page.choose("layer", 1)
    assert page.script("document.getElementById('layer').selectedOptions[0].text").endswith("frame at 0.00 s")
    assert page.script("document.querySelectorAll('#picker canvas.grid').length") == 1
    assert not driver.find_element("id", "i-frame").is_displayed()
    assert driver.get_log("browser") == []


def test_a_word_of_a_sentence_shows_what_it_was_generated_from(driver: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains

    from tests.report.test_explorer_clips import CaptionDataset, Film, describer, explore_description

    words = ["red", "blue", "now"]
    model = describer(features={"image": 8}, vocabulary=words, rates={}, seconds=0.16)
    explore_description(model, CaptionDataset(Film(), "film:x"), "1", tmp_path / "page.html")
    page = Explorer(driver, tmp_path / "page.html", {})
    data = read_page((tmp_path / "page.html").read_text())
    page.open()
    for index, layer in enumerate(data["layers"]):
        page.choose("layer", index)
        is_masked = layer["op"] is not None
        assert (driver.find_element("id", "mask").is_displayed(), page.text("n-mask") != "–") == (is_masked, is_masked)
        if is_masked:
            continue
        generated = driver.find_elements("css selector", "#picker .words span")
        ActionChains(driver, duration=0).move_to_element(generated[1]).perform()
        assert page.text("i") == f"generated word {generated[1].text}"
        ActionChains(driver, duration=0).move_to_element(
            driver.find_element("css selector", "#difference .words span")
        ).perform()
        shown = [float(page.text(f"n-{name}")) for name in NUMBERS[1:]]
        own = PageLayer(data, index)
        masked, plain = (float(each.mean(axis=0)[1, 0]) for each in (own.masked, own.plain))
        np.testing.assert_allclose(shown, [masked, plain, masked - plain], rtol=2e-3, atol=2e-5)
        mean = driver.find_elements("css selector", "#layers small")[index].text
        assert mean.endswith(", mean attention")
        assert float(mean.split(",")[0]) == pytest.approx(float(own.masked.mean(axis=(0, 1))[0]), rel=2e-3)
    assert driver.get_log("browser") == []
