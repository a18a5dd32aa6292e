"""Python and shell snippets of the README and the docs do what the text says."""

from __future__ import annotations

import contextlib
import re
import shlex
import tomllib
import unittest
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from lamzoo.cli.app import app, main
from lamzoo.training import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {  # torch.export takes seconds, and so do two models of transformers
    "docs/how-to/export.md": pytest.mark.slow,
    "docs/tutorials/vision-language.md": pytest.mark.slow,
}
PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
SHELL = [page for page in PAGES if "```bash" in page.read_text(encoding="utf-8")]

# Python snippets that no test runs, by page, and why.
NOT_RUN = {
    "docs/how-to/cluster.md": ["needs the network"],
    "docs/how-to/timm-scripts.md": ["needs the network"],
    "docs/how-to/mask-adapters.md": ["needs the file", "needs the network"],
    "docs/how-to/explore.md": ["needs the network"],
    "docs/start/offline.md": ["needs the network"],
    "docs/start/timm-open-clip.md": ["needs the network", "needs the network"],
    "docs/tutorials/describe.md": ["needs the network"],
    "docs/tutorials/photos.md": ["needs a finished training run"],
    "docs/tutorials/text.md": ["needs the network", "needs a data set"],
    "docs/tutorials/vision-language.md": ["needs the network"],
    "docs/tutorials/plugin.md": ["a file of tests/plugin_example", "needs the plug-in"],
    "docs/tutorials/videos.md": ["needs the network", "needs files of weights"],
}

# Commands of the docs that are cheap and need no data, run as they are.
RUN = {
    "lamzoo --version",
    'lamzoo list "lam_vit*"',
    "lamzoo info lam_vit_micro",
    "lamzoo predict lam_vit_micro photo.jpg",
    "lamzoo predict lam_vit_micro photo.jpg photos/",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that snippets read, without a way to the hub."""
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    for path in ("photo.jpg", "photos/one.jpg", "photos/two.jpg"):
        Image.fromarray(pixels).save(tmp_path / path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("page", [pytest.param(p, marks=SLOW.get(name(p), ()), id=name(p)) for p in PYTHON])
def test_python_snippets_run_from_top_to_bottom(page: Path, workplace: Path) -> None:
    document = Sybil([PythonCodeBlockParser(), SkipParser()]).parse(page)
    for example in document.examples():
        with contextlib.suppress(unittest.SkipTest):  # sybil's, for those in NOT_RUN
            example.evaluate()


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_skipped_snippets_are_listed(page: Path) -> None:
    assert re.findall(r'<!-- skip: next "(.*)" -->', page.read_text(encoding="utf-8")) == NOT_RUN.get(name(page), [])


def test_recipes_are_valid() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    tables = [tomllib.loads(block) for block in re.findall(r"^```toml\n(.*?)^```", pages, re.DOTALL | re.MULTILINE)]
    recipes = [table for table in tables if "run" in table]
    assert {parse_recipe(recipe).task for recipe in recipes} == {"classification", "retrieval"}


@pytest.mark.parametrize("file", ["pyproject.toml", "src/lamzoo_example/models.py"])
def test_the_plugin_page_shows_the_tested_plugin(file: str) -> None:
    shown = (ROOT / "docs" / "tutorials" / "plugin.md").read_text(encoding="utf-8")
    assert f"\n{(ROOT / 'tests' / 'plugin_example' / file).read_text(encoding='utf-8')}```" in shown


def commands(page: Path) -> Iterator[list[str]]:
    """The lamzoo commands in a page's shell snippets, without what launches them."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "lamzoo" in words:
            yield words[words.index("lamzoo") + 1 :]


@pytest.mark.parametrize("page", SHELL, ids=name)
def test_commands_exist_with_their_options(page: Path) -> None:
    group = typer.main.get_command(app)
    context = group.make_context("lamzoo", [], resilient_parsing=True)
    for words in commands(page):
        if words == ["--version"]:
            continue
        command_name, command, rest = group.resolve_command(context, words)
        command.make_context(command_name, rest, parent=context)  # raises for what the command does not have


def test_cheap_commands_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {f"lamzoo {shlex.join(words)}".replace("'", '"') for page in SHELL for words in commands(page)}
    assert found >= RUN
    for command in sorted(RUN):
        with pytest.raises(SystemExit) as end:
            main(shlex.split(command)[1:])
        assert end.value.code == 0, command
        assert capsys.readouterr().out, command
