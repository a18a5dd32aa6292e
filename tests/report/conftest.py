import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lamzoo.lam import LamConfig
from lamzoo.models.vit import micro_vit

_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_PAPER = LamConfig(op="mul", heads="shared", init="paper")


@pytest.fixture
def build():
    """Builds a two-layer classifier of CIFAR-10's classes with random weights, masks included."""

    def build(lam=_PAPER, **kwargs):
        config = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
        model = micro_vit({**config, **kwargs}, lam=lam)
        model.pretrained_cfg = {"architecture": "micro", "tag": "random", "label_names": _CLASSES, "num_classes": 10}
        return model

    return build


@pytest.fixture
def photo():
    pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def drawn(monkeypatch):
    """Stands between `explain` and the drawing, and keeps what was to be drawn."""
    from lamzoo.report import mask_pictures

    seen = SimpleNamespace()
    real = mask_pictures.draw

    def draw(layers, *args, **kwargs):
        seen.layers, seen.title, seen.neutral = layers, kwargs["title"], kwargs["neutral"]
        return real(layers, *args, **kwargs)

    monkeypatch.setattr(mask_pictures, "draw", draw)
    return seen


_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,2400",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that logs its console and its requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    control = shutil.which("chromedriver")
    if browser is None or control is None:
        pytest.skip("there is no Chromium with its driver here; Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    from selenium.webdriver.chrome.service import Service

    driver = webdriver.Chrome(options=options, service=Service(control))
    yield driver
    driver.quit()
