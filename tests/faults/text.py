"""Untrusted text: names of files, classes, models, splits and queries that would steer a terminal or a document."""

from __future__ import annotations

import csv
import html.parser
import json
import shutil
import xml.etree.ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.driver import Row, edit, put

WORD = "yak"  # in each trick; short, since long values are abbreviated in the middle
ESC = f"\x1b[31m{WORD}\x1b]52;c;YWJj\x07"
TRICKS = {
    "a colour and the clipboard": ESC,
    "a C1 control": f"{WORD}\x9b31m",
    "a reversed name": f"{WORD}\u202egnp.exe",
    "a line end": f"{WORD}\nlamzoo: all is well",
    "a carriage return": f"{WORD}\rok",
    "a backspace": f"{WORD}\b\b\bok",
    "a lone byte": f"{WORD}\udcff",
}
MARKUP = "<img src=x onerror=alert(1)>|[a](javascript:x)`"


def quoted(text: str) -> str:
    return "'" + text + "'"


def classes(*names: str) -> Callable[[], None]:
    return partial(edit, "model/config.json", {"label_names": list(names)})


def named(name: str) -> Callable[[], None]:
    return lambda: shutil.move("photo.png", f"{name}.png")


MISSING = [
    Row(f"text: {what}: {name}", call.format(quoted(trick)), WORD, needs)
    for name, trick in TRICKS.items()
    for call, what, needs in (
        ("predict local-dir:model {}", "an image", "model"),
        ("predict {} photo.png", "a model", "photo"),
        ("eval local-dir:model --data {}", "a data set", "model"),
        ("info {}", "a model to describe", ""),
    )
] + [
    Row(f"text: {call.split()[0]}: {what}", call.format(quoted(ESC)), WORD, needs)
    for call, what, needs in (
        ("list {}", "a pattern", ""),
        ("download {}", "a name", ""),
        ("explain local-dir:model {} --out x.png", "an image", "model"),
        ("eval local-dir:model --data photos --split {}", "a split", "model photos"),
        ("eval local-dir:model --data photos --class-map {}", "a class map", "model photos"),
        ("eval local-dir:model --data photos --device {}", "a device", "model photos"),
        ("eval local-dir:model --data photos --task {}", "a task", "model photos"),
                ("predict local-dir:model photo.png --{}", "an option", "model photo"),
        ("{}", "a command", ""),
        ("train {}", "a recipe", ""),
        ("train --model local-dir:model --data photos run.{}=1", "a change", "model photos"),
        ("search red --videos {} --model local-dir:retriever", "videos", "retriever"),
        ("find red {} --model local-dir:film_finder --features local-dir:retriever", "a video",
         "film_finder retriever"),
        ("describe {} --model local-dir:film_describer --features local-dir:retriever", "a video",
         "film_describer retriever"),
        ("compare {}", "a table", ""),
        ("bench {} --out x.csv", "a pattern", ""),
        ("export local-dir:model --out x.onnx --images {}", "images", "model"),
        ("demo --cifar10 {}", "a folder", ""),
        ("extract-features {} --out x --model local-dir:retriever", "videos", "retriever"),
    )
]  # fmt: skip

SHOWN = [
    *(
        Row(f"text: predict shows a file: {name}", "predict local-dir:model .", (WORD, ".png"), "model photo",
            named(trick), code=0, out=True)
        for name, trick in TRICKS.items()
    ),
    *(
        Row(f"text: predict shows a class: {name}", "predict local-dir:model photo.png", (WORD, "%"), "model photo",
            classes(trick, "b"), code=0, out=True)
        for name, trick in TRICKS.items() if name != "a lone byte"
    ),
    Row("text: info shows classes", "info local-dir:model", "classes", "model", classes(ESC, "b"), code=0, out=True),
    Row("text: an unreadable image", "eval local-dir:model --data photos --device cpu", ".png", "model photos",
        lambda: put(f"photos/red/{ESC}.png", "no image")),
    Row("text: an unreadable image, left out",
        "eval local-dir:model --data photos --device cpu --on-bad-input skip", ("16", ".png"), "model photos",
        lambda: put(f"photos/red/{ESC}.png", "no image"), code=0, out=True),
    Row("text: search shows a video", "search red --videos clips --model local-dir:retriever --no-sheet --device cpu",
        "3 of 3", "retriever clips", lambda: shutil.move("clips/coffee.mp4", f"clips/{ESC}.mp4"), code=0, out=True,
        writes=("cache*",)),
    Row("text: search shows a query",
        f"search '{ESC}' --videos clips --model local-dir:retriever --no-sheet --device cpu", "3 of 3",
        "retriever clips", code=0, out=True, writes=("cache*",)),
    Row("text: compare shows a model", "compare bench.csv", WORD, "table",
        lambda: put("bench.csv", Path("bench.csv").read_text().replace("local-dir:vit", f"local-dir:{ESC}")), code=0,
        out=True),
    Row("text: a value of a config", "predict local-dir:model photo.png", WORD, "model photo",
        partial(edit, "model/config.json", {"pretrained_cfg.interpolation": ESC})),
    Row("text: an architecture", "predict local-dir:model photo.png", WORD, "model photo",
        partial(edit, "model/config.json", {"architecture": ESC, "lamzoo.name": ESC})),
    Row("text: a key of a tensor", "predict local-dir:sharded photo.png", WORD, "sharded photo",
        lambda: index_with(ESC)),
    Row("text: a value of a recipe", "train recipe.toml", WORD, "recipe",
        lambda: put("recipe.toml", Path("recipe.toml").read_text().replace('"lam_vit_micro"', json.dumps(ESC)))),
    Row("text: a key of a recipe", "train recipe.toml", WORD, "recipe",
        lambda: put("recipe.toml", Path("recipe.toml").read_text() + f"[{json.dumps(ESC)}]\n")),
]  # fmt: skip


def index_with(name: str) -> None:
    path = Path("sharded/model.safetensors.index.json")
    content = json.loads(path.read_text())
    content["weight_map"][name] = "model-00001-of-00005.safetensors"
    path.write_text(json.dumps(content))
    edit("sharded/config.json", {"lamzoo.sha256": ...})


# Documents. A report needs a run, which is short.

TRAIN = "train --model local-dir:model --data photos --epochs 1 --device cpu --workers 0 --output run"
BOUNDARY = MARKUP.replace("/", "")


class _Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found |= {tag, *(name for name, value in attrs), *(str(value) for _, value in attrs)}


def check_report() -> None:
    import markdown

    text = Path("run/report/report.md").read_text("utf-8")
    elements = _Elements()
    elements.feed(markdown.markdown(text, extensions=["tables"]))
    assert "onerror" not in elements.found
    assert not [name for name in elements.found if name.startswith("javascript:")]
    assert "\x1b" not in text
    for path in Path("run/report").glob("*.svg"):
        xml.etree.ElementTree.parse(path)
    for path in Path("run").rglob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "@"))], path


def renamed(first: str, second: str) -> Callable[[], None]:
    def make() -> None:
        shutil.move("photos/red", f"photos/{first}")
        shutil.move("photos/blue", f"photos/{second}")

    return make


DOCUMENTS = [
    Row(f"text: a report with {name}", TRAIN, "report", "model photos", renamed(*pair), code=0, out=True,
        writes=("run*",), then=check_report)
    for name, pair in (
        ("markup and control characters in classes", (BOUNDARY, ESC)),
        ("a formula and a table in classes", ("=cmd|' C'!A0", "a|b|c")),
    )
] + [
    Row("text: a comparison with a model of markup", "compare bench.csv --out page", "page", "table",
        lambda: put("bench.csv", Path("bench.csv").read_text().replace(
            "local-dir:vit", "</script><img src=x onerror=alert(1)>")),
        code=0, out=True, writes=("page*", "cache*"), then=lambda: check_page()),
]  # fmt: skip


def check_page() -> None:
    for path in Path("page").iterdir():
        if path.suffix in (".html", ".md"):
            elements = _Elements()
            elements.feed(path.read_text("utf-8"))
            assert "onerror" not in elements.found, path
        if path.suffix == ".svg":
            xml.etree.ElementTree.parse(path)


ROWS = [*MISSING, *SHOWN, *DOCUMENTS]
