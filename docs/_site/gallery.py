"""The pictures of docs/how-to/gallery.md, made by the commands of that page; run ``python docs/_site/gallery.py``.

The commands run in a temporary folder with ``cat.png``, a photograph of scikit-image. Pages are photographed in
headless Chromium (apt: chromium, chromium-driver), and pictures are made small.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from lamzoo.cli import main
from lamzoo.report.demo import find_photographs

DOCS = Path(__file__).resolve().parents[1]
PAGE = DOCS / "how-to" / "gallery.md"
IMAGES = DOCS / "images"
_WINDOW = (1280, 1120)
_WIDTH, _QUALITY = 1000, 78  # of a picture


def commands(page: str) -> list[tuple[list[str], str]]:
    """Returns each command of the page, and the name of the picture that follows it."""
    found = re.findall(r"```bash\n(.*?)```\s+!\[.*?\]\(\.\./images/(.*?)\)", page, re.DOTALL)
    return [(shlex.split(command)[1:], picture) for command, picture in found]


def make() -> None:
    """Runs the commands and writes the pictures."""
    (cat,) = (photograph.path for photograph in find_photographs() if photograph.name == "cat")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copy(cat, "cat.png")
        for arguments, picture in commands(PAGE.read_text(encoding="utf-8")):
            try:
                main(arguments)
            except SystemExit as end:
                if end.code:
                    raise
            made = Path(arguments[-1])
            if made.suffix == ".html":
                made = photograph(made)
            shrink(made, IMAGES / picture)


def photograph(page: Path) -> Path:
    """Returns a picture of a page in the browser, at the layer in the middle."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    width, height = _WINDOW
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.get(page.resolve().as_uri())
    driver.execute_script("choose({ layer: page.layers.length >> 1 })")
    driver.save_screenshot(str(page.with_suffix(".png")))
    driver.quit()
    return page.with_suffix(".png")


def shrink(source: Path, target: Path) -> None:
    """Writes a picture at most 1000 pixels wide as WebP."""
    with Image.open(source) as image:
        height = round(image.height * min(1.0, _WIDTH / image.width))
        small = image.convert("RGB").resize((min(_WIDTH, image.width), height), Image.Resampling.LANCZOS)
    small.save(target, quality=_QUALITY, method=6)


if __name__ == "__main__":
    make()
